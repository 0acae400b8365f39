// Attention over the blocked cache: lanes are positions while scores are made, then positions again (float values) or
// features of the head (int8 values). Queries that share keys are taken together, each with its own range.
#pragma once

namespace tinylm::ISA {

// The blocks of 16 positions that some queries see between them.
struct Blocks {
    int first, last;
};

template <int Q> INLINE Blocks blocks_of(const Query* q) {
    int low = q[0].low, high = q[0].high;
    for (int j = 1; j < Q; j++) {
        low = q[j].low < low ? q[j].low : low;
        high = q[j].high > high ? q[j].high : high;
    }
    return {low / 16, (high + 15) / 16};
}

// Work on blocks `block` to `last - 1`, N together while there are so many, then half as many: sums side by side hide
// the time that each takes.
template <int N, class Work> INLINE void together(int block, int last, Work work) {
    for (; last - block >= N; block += N) work(std::integral_constant<int, N>(), block);
    if constexpr (N > 1) together<N / 2>(block, last, work);
}

INLINE bool inside(const Query& q, int block) { return q.low <= block * 16 && block * 16 + 16 <= q.high; }

// The lanes of a block that a query sees.
INLINE Mask seen(const Query& q, int block) {
    const I position = lane_numbers() + all_int(block * 16);
    // low <= position < high, as one comparison of numbers without a sign; both ends are below 2^31
    const I bias = all_int(INT32_MIN);
    return ((position - all_int(q.low)) ^ bias) < all_int(static_cast<int32_t>((q.high - q.low) ^ INT32_MIN));
}

// What the query sees of a block; `other` in its other lanes.
INLINE F masked(const Query& q, int block, F x, float other) {
    return inside(q, block) ? x : select(seen(q, block), x, all(other));
}

// Scores of the query's own blocks become exp2(score - largest), 0 where it sees nothing, in all of `blocks`. Returns
// what they sum to. `done(block, p)` may change them on the way to memory.
template <class Done> INLINE float softmax(const Query& q, Blocks blocks, float* scores, Done done) {
    const int first = q.low / 16, last = (q.high + 15) / 16;
    F most = all(-INFINITY), total = all(0);
    for (int b = first; b < last; b++) most = max(masked(q, b, load(scores + b * 16), -INFINITY), most);
    const F largest_score = all(largest(most));
    for (int b = blocks.first; b < first; b++) store(scores + b * 16, all(0));
    for (int b = first; b < last; b++) {
        const F p = masked(q, b, exp2(load(scores + b * 16) - largest_score), 0);
        total = total + p;
        store(scores + b * 16, done(b, p));
    }
    for (int b = last; b < blocks.last; b++) store(scores + b * 16, all(0));
    return sum(total);
}

// --- float cache

template <int B, int Q>
INLINE void float_scores(const float* keys, int width, const float (&x)[Q][MAX_HEAD_WIDTH], int block, float* scores,
                         size_t stride) {
    F s[B][Q];
    UNROLL for (int b = 0; b < B; b++) {
        UNROLL for (int q = 0; q < Q; q++) s[b][q] = all(0);
    }
    const float* k = keys + static_cast<size_t>(block) * width * 16;
    for (int d = 0; d < width; d++, k += 16) {
        F key[B];
        UNROLL for (int b = 0; b < B; b++) key[b] = load(k + static_cast<ptrdiff_t>(b) * width * 16);
        UNROLL for (int q = 0; q < Q; q++) {
            const F value = all(x[q][d]);
            UNROLL for (int b = 0; b < B; b++) s[b][q] = fma(value, key[b], s[b][q]);
        }
    }
    UNROLL for (int b = 0; b < B; b++) {
        UNROLL for (int q = 0; q < Q; q++) store(scores + q * stride + (block + b) * 16, s[b][q]);
    }
}

// Features d .. d + D - 1 of the outputs. Lanes that a query does not see keep their sums, whatever the values there.
template <int D, int Q>
INLINE void float_values(const float* values, int width, const Query* q, Blocks blocks, int d, const float* p,
                         size_t stride, const float (&inverse)[Q]) {
    F o[Q][D];
    UNROLL for (int j = 0; j < Q; j++) {
        UNROLL for (int i = 0; i < D; i++) o[j][i] = all(0);
    }
    for (int b = blocks.first; b < blocks.last; b++) {
        const float* v = values + (static_cast<size_t>(b) * width + d) * 16;
        bool whole = true;
        UNROLL for (int j = 0; j < Q; j++) whole = whole && inside(q[j], b);
        if (whole) {
            F weight[Q];
            UNROLL for (int j = 0; j < Q; j++) weight[j] = load(p + j * stride + b * 16);
            UNROLL for (int i = 0; i < D; i++) {
                const F value = load(v + i * 16);
                UNROLL for (int j = 0; j < Q; j++) o[j][i] = fma(weight[j], value, o[j][i]);
            }
        } else {
            UNROLL for (int j = 0; j < Q; j++) {
                const Mask mask = seen(q[j], b);
                const F weight = load(p + j * stride + b * 16);
                UNROLL for (int i = 0; i < D; i++) {
                    o[j][i] = select(mask, fma(weight, load(v + i * 16), o[j][i]), o[j][i]);
                }
            }
        }
    }
    UNROLL for (int j = 0; j < Q; j++) {
        UNROLL for (int i = 0; i < D; i++) q[j].out[d + i] = sum(o[j][i]) * inverse[j];
    }
}

template <int Q>
void attend_float_to(const FloatCache& c, int width, const Query* q, float factor, float* scratch) {
    constexpr int B = Register::SUMS / Q > 8 ? 8 : Register::SUMS / Q;
    const Blocks blocks = blocks_of<Q>(q);
    const size_t stride = static_cast<size_t>(blocks.last) * 16;
    alignas(64) float x[Q][MAX_HEAD_WIDTH];
    for (int j = 0; j < Q; j++) {
        for (int d = 0; d < width; d += 16) store(x[j] + d, load(q[j].x + d, width - d) * all(factor));
    }
    together<B>(blocks.first, blocks.last, [&](auto n, int block) {
        float_scores<n, Q>(c.keys, width, x, block, scratch, stride);
    });
    float inverse[Q];
    for (int j = 0; j < Q; j++) {
        inverse[j] = 1.0f / softmax(q[j], blocks, scratch + j * stride, [](int, F p) { return p; });
    }
    int d = 0;
    for (; width - d >= B; d += B) float_values<B, Q>(c.values, width, q, blocks, d, scratch, stride, inverse);
    for (; d < width; d++) float_values<1, Q>(c.values, width, q, blocks, d, scratch, stride, inverse);
}

// --- int8 cache

template <int B, int Q>
INLINE void int8_scores(const Int8Cache& c, int width, const int8_t* x, const int32_t (&sums)[Q],
                        const float (&factor)[Q], int block, float* scores, size_t stride) {
    const size_t bytes = static_cast<size_t>(width) * 16;
    constexpr int U = Register::SUMS / (B * Q) >= 2 ? 2 : 1;
    I s[B][Q];
    const uint8_t* keys = c.keys + block * bytes;
    add_steps<Step<Kind::panel_int8>, B, Q, U>(keys, keys, bytes, x, MAX_HEAD_WIDTH, width / 4, s);
    UNROLL for (int b = 0; b < B; b++) {
        const F scale = load(c.key_scales + (block + b) * 16);
        UNROLL for (int q = 0; q < Q; q++) {
            const F score = to_float(s[b][q] - all_int(OFFSET * sums[q])) * (all(factor[q]) * scale);
            store(scores + q * stride + (block + b) * 16, score);
        }
    }
}

// Features d .. d + 16 D - 1 of the outputs, from 16-bit probabilities.
template <int D, int Q>
INLINE void int8_values(const int8_t* values, int width, const Query* q, Blocks blocks, int d, const int16_t* codes,
                        size_t stride, const float (&factor)[Q]) {
    constexpr int chains = Register::SUMS / (D * Q), U = chains >= 8 ? 8 : chains >= 4 ? 4 : chains >= 2 ? 2 : 1;
    F o[Q][D];
    UNROLL for (int j = 0; j < Q; j++) {
        UNROLL for (int i = 0; i < D; i++) o[j][i] = all(0);
    }
    const int end = blocks.last * 16;
    for (int t = blocks.first * 16, stop; t < end; t = stop) {
        stop = (t / CHUNK + 1) * CHUNK;
        stop = stop < end ? stop : end;
        I s[U][Q][D];
        UNROLL for (int u = 0; u < U; u++) {
            UNROLL for (int j = 0; j < Q; j++) {
                UNROLL for (int i = 0; i < D; i++) s[u][j][i] = all_int(0);
            }
        }
        const int8_t* v = values + static_cast<size_t>(t) * width + d * 2;
        for (int pair = t; pair < stop; pair += 2 * U) {
            UNROLL for (int u = 0; u < U; u++, v += 2 * width) {
                Pairs value[D];
                UNROLL for (int i = 0; i < D; i++) value[i] = load_pairs(v + i * 32);
                UNROLL for (int j = 0; j < Q; j++) {
                    const Two weight = two(codes + j * stride + pair + 2 * u);
                    UNROLL for (int i = 0; i < D; i++) s[u][j][i] = dot(s[u][j][i], value[i], weight);
                }
            }
        }
        UNROLL for (int j = 0; j < Q; j++) {
            UNROLL for (int i = 0; i < D; i++) {
                I total = s[0][j][i];
                UNROLL for (int u = 1; u < U; u++) total = total + s[u][j][i];
                o[j][i] = o[j][i] + to_float(total);
            }
        }
    }
    UNROLL for (int j = 0; j < Q; j++) {
        UNROLL for (int i = 0; i < D; i++) store(q[j].out + d + i * 16, o[j][i] * all(factor[j]));
    }
}

template <int Q>
void attend_int8_to(const Int8Cache& c, int width, const Query* q, float factor, float* scratch) {
    constexpr int B = Register::SUMS / Q > 4 ? 4 : Register::SUMS / Q, D = B;
    const Blocks blocks = blocks_of<Q>(q);
    const size_t stride = static_cast<size_t>(blocks.last) * 16;
    alignas(64) int8_t x[Q][MAX_HEAD_WIDTH];
    int32_t sums[Q];
    float factors[Q];
    for (int j = 0; j < Q; j++) factors[j] = quantize(q[j].x, width, width, 0, x[j], &sums[j]) * factor;
    together<B>(blocks.first, blocks.last, [&](auto n, int block) {
        int8_scores<n, Q>(c, width, x[0], sums, factors, block, scratch, stride);
    });
    // The codes take the place of the scores, at half their size: writing never overtakes reading.
    int16_t* codes = reinterpret_cast<int16_t*>(scratch);
    for (int j = 0; j < Q; j++) {
        float* scores = scratch + j * stride;
        I most = all_int(0);
        const float total = softmax(q[j], blocks, scores, [&](int b, F p) {
            const F weight = masked(q[j], b, p * load(c.value_scales + b * 16), 0);
            most = max(as_int(weight) & all_int(0x7FFFFFFF), most);
            return weight;
        });
        const int32_t most_bits = largest(most);
        float m;
        std::memcpy(&m, &most_bits, 4);
        const F scale = all(m >= 1e-30f ? 32767.0f / m : 0.0f);
        for (int b = blocks.first; b < blocks.last; b++) {
            const F weight = load(scores + b * 16);
            store_int16(codes + j * stride * 2 + b * 16, to_int(m >= 1e-30f ? weight * scale : all(0)));
        }
        factors[j] = (m / 32767.0f) * (1.0f / total);
    }
    int d = 0;
    for (; width - d >= 16 * D; d += 16 * D) {
        int8_values<D, Q>(c.values, width, q, blocks, d, codes, stride * 2, factors);
    }
    if constexpr (D > 2) {
        for (; width - d >= 32; d += 32) int8_values<2, Q>(c.values, width, q, blocks, d, codes, stride * 2, factors);
    }
    for (; d < width; d += 16) int8_values<1, Q>(c.values, width, q, blocks, d, codes, stride * 2, factors);
}

// --- the queries of a call, a few at a time

void attend_float(const FloatCache& c, int width, const Query* q, int count, float factor, float* scratch) {
    if constexpr (Register::QUERIES >= 4) {
        for (; count >= 4; count -= 4, q += 4) attend_float_to<4>(c, width, q, factor, scratch);
    }
    if constexpr (Register::QUERIES >= 2) {
        for (; count >= 2; count -= 2, q += 2) attend_float_to<2>(c, width, q, factor, scratch);
    }
    for (; count > 0; count--, q++) attend_float_to<1>(c, width, q, factor, scratch);
}

void attend_int8(const Int8Cache& c, int width, const Query* q, int count, float factor, float* scratch) {
    if constexpr (Register::QUERIES >= 4) {
        for (; count >= 4; count -= 4, q += 4) attend_int8_to<4>(c, width, q, factor, scratch);
    }
    if constexpr (Register::QUERIES >= 2) {
        for (; count >= 2; count -= 2, q += 2) attend_int8_to<2>(c, width, q, factor, scratch);
    }
    for (; count > 0; count--, q++) attend_int8_to<1>(c, width, q, factor, scratch);
}

void store_float(const FloatCache& c, int width, int position, const float* key, const float* value) {
    const size_t at = static_cast<size_t>(position / 16) * width * 16 + position % 16;
    for (int d = 0; d < width; d++) {
        c.keys[at + static_cast<size_t>(d) * 16] = key[d];
        c.values[at + static_cast<size_t>(d) * 16] = value[d];
    }
}

void store_int8(const Int8Cache& c, int width, int position, const float* key, const float* value) {
    alignas(64) int8_t codes[MAX_HEAD_WIDTH];
    int32_t unused;
    c.key_scales[position] = quantize(key, width, width, 0, codes, &unused);
    uint8_t* keys = c.keys + static_cast<size_t>(position / 16) * width * 16 + position % 16 * 4;
    for (int d = 0; d < width; d++) keys[d / 4 * 64 + d % 4] = static_cast<uint8_t>(codes[d] + 128);
    c.value_scales[position] = quantize(value, width, width, 0, codes, &unused);
    int8_t* values = c.values + static_cast<size_t>(position / 2) * width * 2 + position % 2;
    for (int d = 0; d < width; d++) values[d * 2] = codes[d];
}

}  // namespace tinylm::ISA
