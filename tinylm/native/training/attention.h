// Attention and its gradient, for a few queries of one head at a time, whose scores stay in a core's cache. Of the
// softmax only the log of each row's sum is kept; backwards the weights are computed again (Dao et al. 2022).
//
// One task serves one key/value head of one sequence, with all query heads that share it, in order. Arithmetic is in
// floats whatever the arrays hold.
#pragma once
#include <cmath>

#include "gemm.h"

namespace tinylm::training {
namespace {

struct Range {
    long low, high;
};

// Positions of an array (batch, positions, heads, width) that belong to one sequence and head.
template <class T>
struct Head {
    T* data;
    long stride;

    Head(void* array, long positions, long heads, long width, long sequence, long head)
        : data(static_cast<T*>(array) + (sequence * positions * heads + head) * width), stride(heads * width) {}

    T* at(long position) const { return data + position * stride; }
    Matrix matrix() const { return {data, stride, 1, sizeof(T) == 2}; }
    Matrix turned() const { return {data, 1, stride, sizeof(T) == 2}; }
};

template <class T>
class AttentionPass {
    static constexpr long BLOCK = 4 * TILE_ROWS;  // queries

public:
    AttentionPass(const Attention& x, long task)
        : x_(x), sequence_(task / x.kv_heads), kv_(task % x.kv_heads), width_(x.width), length_(x.length),
          stride_((x.length + PANEL - 1) / PANEL * PANEL + LANES), panel_((x.width + LANES - 1) / LANES * LANES) {}

    void forward() {
        const Head<T> k = kv_head(x_.k), v = kv_head(x_.v);
        Scratch keys(4 * packed_size<Single>(width_, length_)), values(4 * packed_size<Single>(length_, width_));
        Scratch queries(4 * BLOCK * panel_), scores(4 * BLOCK * stride_), sums(4 * BLOCK * panel_);
        pack_panels<Single>(k.turned(), width_, length_, keys.as<float>());
        pack_panels<Single>(v.matrix(), length_, width_, values.as<float>());
        each_block([&](long head, long from, long rows) {
            const Head<T> q = query_head(x_.q, head), out = query_head(x_.out, head);
            take(q, from, rows, x_.scale, queries.as<float>());
            score(queries.as<float>(), from, rows, keys.as<float>(), scores.as<float>());
            float inverse[BLOCK];
            for (long r = 0; r < rows; r++)
                inverse[r] = soften(from + r, scores.as<float>() + r * stride_, statistic(head, from + r));
            gather(scores.as<float>(), from, rows, values.as<float>(), sums.as<float>());
            for (long r = 0; r < rows; r++) give(sums.as<float>() + r * panel_, inverse[r], out.at(from + r));
        });
    }

    void backward() {
        const Head<T> k = kv_head(x_.k), v = kv_head(x_.v);
        const long turned = 4 * packed_size<Single>(width_, length_);
        const long straight = 4 * packed_size<Single>(length_, width_);
        Scratch keys(turned), values(turned), straight_keys(straight);
        Scratch queries(4 * BLOCK * panel_), slopes(4 * BLOCK * panel_), sums(4 * BLOCK * panel_);
        Scratch packed_queries(4 * BLOCK * panel_), packed_slopes(4 * BLOCK * panel_);
        Scratch weights(4 * BLOCK * stride_), changes(4 * BLOCK * stride_);
        Scratch of_keys(4 * length_ * panel_), of_values(4 * length_ * panel_);
        pack_panels<Single>(k.turned(), width_, length_, keys.as<float>());
        pack_panels<Single>(v.turned(), width_, length_, values.as<float>());
        pack_panels<Single>(k.matrix(), length_, width_, straight_keys.as<float>());
        std::memset(of_keys.as<float>(), 0, 4 * length_ * panel_);
        std::memset(of_values.as<float>(), 0, 4 * length_ * panel_);
        each_block([&](long head, long from, long rows) {
            take(query_head(x_.q, head), from, rows, x_.scale, queries.as<float>());
            take(query_head(x_.dout, head), from, rows, 1, slopes.as<float>());
            take(query_head(x_.out, head), from, rows, 1, sums.as<float>());
            score(queries.as<float>(), from, rows, keys.as<float>(), weights.as<float>());
            score(slopes.as<float>(), from, rows, values.as<float>(), changes.as<float>());
            for (long r = 0; r < rows; r++) {
                const float mean = dot(slopes.as<float>() + r * panel_, sums.as<float>() + r * panel_);
                slope(from + r, *statistic(head, from + r), mean, weights.as<float>() + r * stride_,
                      changes.as<float>() + r * stride_);
            }
            gather(changes.as<float>(), from, rows, straight_keys.as<float>(), sums.as<float>());
            const Head<T> dq = query_head(x_.dq, head);
            for (long r = 0; r < rows; r++) give(sums.as<float>() + r * panel_, x_.scale, dq.at(from + r));
            pack_panels<Single>({queries.as<float>(), panel_, 1, false}, rows, width_, packed_queries.as<float>());
            pack_panels<Single>({slopes.as<float>(), panel_, 1, false}, rows, width_, packed_slopes.as<float>());
            scatter(changes.as<float>(), from, rows, packed_queries.as<float>(), of_keys.as<float>());
            scatter(weights.as<float>(), from, rows, packed_slopes.as<float>(), of_values.as<float>());
        });
        const Head<T> dk = kv_head(x_.dk), dv = kv_head(x_.dv);
        for (long s = 0; s < length_; s++) {
            give(of_keys.as<float>() + s * panel_, 1, dk.at(s));
            give(of_values.as<float>() + s * panel_, 1, dv.at(s));
        }
    }

private:
    Head<T> query_head(void* array, long head) const { return {array, length_, x_.heads, width_, sequence_, head}; }
    Head<T> kv_head(void* array) const { return {array, length_, x_.kv_heads, width_, sequence_, kv_}; }
    float* statistic(long head, long position) const {
        return x_.statistics + (sequence_ * x_.heads + head) * length_ + position;
    }

    template <class Body>
    void each_block(Body body) const {
        const long group = x_.heads / x_.kv_heads;
        for (long head = kv_ * group; head < (kv_ + 1) * group; head++)
            for (long from = 0; from < length_; from += BLOCK) body(head, from, min(BLOCK, length_ - from));
    }

    // The keys that queries first .. last see; some of them more than others.
    Range seen(long first, long last) const {
        const long low = x_.window ? max(0, first - x_.window + 1) : 0;
        const long high = x_.causal ? last + 1 : x_.window ? min(length_, last + x_.window) : length_;
        return {low, high};
    }
    // The columns of scores that are computed for a tile of rows: whole panels; with a window, the same for all tiles
    // of a block, so that every key's tile is complete.
    Range covered(long from, long rows) const {
        if (x_.window) {
            from = from / BLOCK * BLOCK;
            rows = min(BLOCK, length_ - from);
        }
        const Range keys = seen(from, from + rows - 1);
        return {keys.low / PANEL * PANEL, min(length_, (keys.high + PANEL - 1) / PANEL * PANEL)};
    }

    // Rows as floats times `factor`, padded with zeros to whole vectors.
    void take(const Head<T>& x, long from, long rows, float factor, float* to) const {
        for (long r = 0; r < rows; r++, to += panel_) {
            const T* row = x.at(from + r);
            each(width_, [&](long i) { store(to + i, load(row + i) * fill(factor)); },
                 [&](long i, Mask m) { store(to + i, load(row + i, m) * fill(factor)); });
        }
    }
    void give(const float* x, float factor, T* to) const {
        each(width_, [&](long i) { store(to + i, load(x + i) * fill(factor)); },
             [&](long i, Mask m) { store(to + i, load(x + i) * fill(factor), m); });
    }
    float dot(const float* x, const float* y) const {
        Vec total = zero();
        for (long i = 0; i < panel_; i += LANES) total = fma(load(x + i), load(y + i), total);
        return sum(total);
    }

    template <class Body>
    static void each_tile(long rows, Body body) {
        for (long r = 0; r < rows; r += TILE_ROWS) body(r, min(TILE_ROWS, rows - r));
    }

    // to[r][s] = x[r] . packed[s] for the keys s that are covered
    void score(const float* x, long from, long rows, const float* packed, float* to) const {
        each_tile(rows, [&](long r, long count) {
            const Range keys = covered(from + r, count);
            for (long s = keys.low; s < keys.high; s += PANEL) {
                const Span span = {(const char*)(x + r * panel_), 4 * panel_, 4, packed + s * width_, width_};
                const Place place = {to + r * stride_ + s, stride_, false, false};
                const long panel = s / PANEL;
                tile_for<Single>(count, panel_width(length_, panel))(&span, 1, place, panel_columns(length_, panel));
            }
        });
    }
    // to[r] = sum over the keys s that are covered of weights[r][s] packed[s]
    void gather(const float* weights, long from, long rows, const float* packed, float* to) const {
        each_tile(rows, [&](long r, long count) {
            const Range keys = covered(from + r, count);
            for (long e = 0; e < width_; e += PANEL) {
                const long wide = panel_width(width_, e / PANEL);
                const Span span = {(const char*)(weights + r * stride_ + keys.low), 4 * stride_, 4,
                                   packed + e * length_ + keys.low * wide, keys.high - keys.low};
                tile_for<Single>(count, wide)(&span, 1, {to + r * panel_ + e, panel_, false, false}, wide);
            }
        });
    }
    // to[s] += sum over rows r of weights[r][s] packed[r]
    void scatter(const float* weights, long from, long rows, const float* packed, float* to) const {
        const Range keys = seen(from, from + rows - 1);
        for (long s = keys.low; s < keys.high; s += TILE_ROWS) {
            const long count = min(TILE_ROWS, keys.high - s);
            // Rows before see none of these keys.
            const long first = x_.causal ? max(0, (s - from) / TILE_ROWS * TILE_ROWS) : 0;
            for (long e = 0; e < width_; e += PANEL) {
                const long wide = panel_width(width_, e / PANEL);
                const Span span = {(const char*)(weights + first * stride_ + s), 4, 4 * stride_,
                                   packed + e * rows + first * wide, rows - first};
                tile_for<Single>(count, wide)(&span, 1, {to + s * panel_ + e, panel_, false, true}, wide);
            }
        }
    }

    // Scores of other segments become so low that they count for nothing.
    void part(long query, const Range& keys, float* scores) const {
        if (!x_.segments) return;
        const int32_t* segments = x_.segments + sequence_ * length_;
        for (long s = keys.low; s < keys.high; s++) scores[s] = segments[s] == segments[query] ? scores[s] : -1e30f;
    }
    // Zeros where weights are computed with, but not seen.
    void clear(long query, const Range& keys, float* row) const {
        const long from = query / TILE_ROWS * TILE_ROWS;  // blocks are whole tiles
        const Range wide = covered(from, min(TILE_ROWS, length_ - from));
        std::memset(row + wide.low, 0, 4 * (keys.low - wide.low));
        std::memset(row + keys.high, 0, 4 * (wide.high - keys.high));
    }

    // A row of scores becomes exp(score - largest); returns one over their sum, and notes the log of the sum of
    // exp(score).
    float soften(long query, float* row, float* statistic) const {
        const Range keys = seen(query, query);
        const long count = keys.high - keys.low;
        part(query, keys, row);
        float* x = row + keys.low;
        Vec most = fill(-INFINITY), total = zero();
        each(count, [&](long i) { most = max(load(x + i), most); },
             [&](long i, Mask m) { most = max(select(m, load(x + i, m), fill(-INFINITY)), most); });
        const float top = largest(most);
        const auto weight = [&](Vec score) { return exp(score - fill(top)); };
        each(count, [&](long i) {
            const Vec w = weight(load(x + i));
            total = total + w;
            store(x + i, w);
        }, [&](long i, Mask m) {
            const Vec w = select(m, weight(load(x + i, m)), zero());
            total = total + w;
            store(x + i, w, m);
        });
        clear(query, keys, row);
        const float all = sum(total);
        *statistic = top + std::log(all);
        return 1 / all;
    }

    // Scores become weights, and slopes of the weights those of the scores: weight * (slope - mean).
    void slope(long query, float statistic, float mean, float* scores, float* slopes) const {
        const Range keys = seen(query, query);
        part(query, keys, scores);
        float *x = scores + keys.low, *y = slopes + keys.low;
        each(keys.high - keys.low, [&](long i) {
            const Vec w = exp(load(x + i) - fill(statistic));
            store(x + i, w);
            store(y + i, w * (load(y + i) - fill(mean)));
        }, [&](long i, Mask m) {
            const Vec w = exp(load(x + i, m) - fill(statistic));
            store(x + i, w, m);
            store(y + i, w * (load(y + i, m) - fill(mean)), m);
        });
        clear(query, keys, scores);
        clear(query, keys, slopes);
    }

    const Attention& x_;
    const long sequence_, kv_, width_, length_;
    const long stride_;  // of a row of scores, not a power of two
    const long panel_;   // width in whole vectors
};

void attention(const Attention& x, Pool& pool) {
    pool.each(x.sequences * x.kv_heads, [&](long task) {
        x.half ? AttentionPass<bfloat16>(x, task).forward() : AttentionPass<float>(x, task).forward();
    });
}

void attention_back(const Attention& x, Pool& pool) {
    pool.each(x.sequences * x.kv_heads, [&](long task) {
        x.half ? AttentionPass<bfloat16>(x, task).backward() : AttentionPass<float>(x, task).backward();
    });
}

}  // namespace
}  // namespace tinylm::training
