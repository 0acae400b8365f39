#include "engine.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "../tinylm.h"

namespace tinylm {
namespace {

constexpr int ALONE = 2;            // rows up to which every thread rounds all activations for itself
constexpr int TOGETHER = 8;         // tokens of a span up to which one thread does all of a head's attention
constexpr int QUERIES = 16;         // that one call of an attention kernel gets
constexpr int PANELS_AT_ONCE = 64;  // of the head, for all rows while they are in the cache
constexpr int LEAST_TURNS = 64;     // positions that angles are made for
constexpr double BYTES_PER_THREAD = 2 << 20;
constexpr float LOG2_E = 1.44269504f;

int threads_for(const Model& model, int wanted) {
    if (wanted > 0) return wanted;
    const int cores = std::max(1u, std::thread::hardware_concurrency());
    return std::clamp(static_cast<int>(model.weight_bytes / BYTES_PER_THREAD), 1, cores);
}

// A long prompt is read in pieces whose widest activations stay in a core's cache.
int rows_at_once(const Constants& c) {
    const int widest = std::max({c.width, c.hidden, c.heads * c.head_width});
    return std::clamp((1 << 19) / widest / 16 * 16, 16, 256);
}

}  // namespace

// ---- one thread's part of a pass

// All threads run the same code. What belongs to a row is done by the row's thread, a matrix is shared out by its
// panels, attention by heads; a barrier stands wherever one thread reads what another wrote.
class Worker {
public:
    Worker(Session& session, int id)
        : s(session),
          c(session.model.constants),
          kernels(*session.model.kernels),
          id(id),
          count(session.threads.active()),
          rows(static_cast<int>(session.rows_.size())) {}

    void trunk() {
        embed();
        for (int i = 0; i < c.layers; i++) block(s.model.layers[i], i);
        if (s.model.norm.scale) norm_in_place(s.model.norm);
    }

    void head(const int* chosen, int n, float* out, int stride) {
        const float* x = gather(chosen, n);
        const Model& m = s.model;
        if (m.dense.codes) {
            project(x, s.width_, n, {{m.dense, s.other_out_.data(), s.width_}});
            barrier();
            x = dense_output(n);
        }
        if (m.head.codes)
            project(x, s.width_, n, {{m.head, out, stride}});
        else
            each_of(n, [&](int i) {
                std::memcpy(out + size_t(i) * stride, x + size_t(i) * s.width_, c.width * sizeof(float));
            });
        if (!c.softcap) return;
        barrier();
        each_of(n, [&](int i) { kernels.softcap(out + size_t(i) * stride, s.model.outputs, c.softcap); });
    }

    void screen(const int* chosen, int n) {
        const Matrix& m = s.model.head;
        const Activations x = round(gather(chosen, n), s.width_, n, m);
        const auto [first, last] = Threads::share(m.panels, id, count);
        std::vector<float> corrections;
        for (int i = 0; i < n; i++) corrections.push_back(correction(m, one(x, i)));
        for (int at = first; at < last; at += PANELS_AT_ONCE)
            for (int i = 0; i < n; i++)
                kernels.approximate(m, at, std::min(at + PANELS_AT_ONCE, last), one(x, i), corrections[i], s.output(i));
    }

private:
    struct Product {
        const Matrix& matrix;
        float* out;
        int out_stride;
        NormWeights norm{};  // of the input
    };

    void embed() {
        each_of(rows, [&](int r) {
            const Session::Row& row = s.rows_[r];
            float* x = x_row(r);
            kernels.row(s.model.embed, row.token, x);
            if (s.model.positions) kernels.add(x, s.model.positions + size_t(row.position) * c.width, c.width);
            if (s.model.types) kernels.add(x, s.model.types + size_t(row.type) * c.width, c.width);
            if (s.model.embed_norm.scale) norm(s.model.embed_norm, x, x);
        });
        barrier();
    }

    void block(const Layer& layer, int number) {
        float *x = s.x_.data(), *attended = s.block_out_.data(), *mixed = s.other_out_.data();
        switch (c.block) {
        case Block::pre:
            attention(layer, number, normed(layer.attn_norm), attended);
            add(attended);
            mlp(layer, normed(layer.mlp_norm), mixed);
            add(mixed);
            break;
        case Block::post:
            attention(layer, number, x, attended);
            add(attended);
            norm_in_place(layer.attn_norm);
            mlp(layer, x, mixed);
            add(mixed);
            norm_in_place(layer.mlp_norm);
            break;
        case Block::parallel:
            attention(layer, number, normed(layer.attn_norm), attended);
            barrier();
            mlp(layer, normed(layer.mlp_norm), mixed);
            add(attended);
            add(mixed);
            break;
        }
    }

    // out = o(attention(q(x), k(x), v(x))), this thread's columns of it.
    void attention(const Layer& layer, int number, const float* x, float* out) {
        project(x, s.width_, rows,
                {{layer.q, s.q_.data(), s.queries_, layer.q.norm},
                 {layer.k, s.k_.data(), s.keys_, layer.k.norm},
                 {layer.v, s.v_.data(), s.keys_, layer.v.norm}});
        barrier();
        attend(layer, number);
        barrier();
        project(s.attended_.data(), s.queries_, rows, {{layer.o, out, s.width_, layer.o.norm}});
    }

    // out = down(activation(gate(x)) * up(x)) or down(activation(up(x))), this thread's columns of it.
    void mlp(const Layer& layer, const float* x, float* out) {
        float *gate = s.gate_.data(), *up = s.up_.data();
        const int kind = static_cast<int>(c.mlp), stride = s.hidden_;
        if (s.model.gated)
            project(x, s.width_, rows,
                    {{layer.gate, gate, stride, layer.gate.norm}, {layer.up, up, stride, layer.up.norm}});
        else
            project(x, s.width_, rows, {{layer.up, up, stride, layer.up.norm}});
        const auto [first, last] = columns(stride);
        for (size_t at = first, r = 0; first < last && r < size_t(rows); r++, at += stride) {
            if (s.model.gated)
                kernels.gate(kind, gate + at, up + at, up + at, last - first);
            else
                kernels.activate(kind, up + at, last - first);
        }
        barrier();
        project(up, stride, rows, {{layer.down, out, s.width_, layer.down.norm}});
    }

    // x += y, and everyone may read it.
    void add(const float* y) {
        const auto [first, last] = columns(s.width_);
        for (int r = 0; r < rows; r++) kernels.add(x_row(r) + first, y + size_t(r) * s.width_ + first, last - first);
        barrier();
    }

    // ---- attention

    void attend(const Layer& layer, int number) {
        const int spans = static_cast<int>(s.spans_.size()), heads = c.kv_heads;
        const int at_once = std::max(1, QUERIES / group());
        const bool together =
            std::all_of(s.spans_.begin(), s.spans_.end(), [](const Span& span) { return span.count <= TOGETHER; });
        if (!together) {
            each_of(rows, [&](int row) {
                for (int head = 0; head < heads; head++) turn_and_store(layer, number, row, head);
            });
            barrier();
        }
        int task = 0, first = 0;  // first row of the span
        for (int i = 0; i < spans; first += s.spans_[i++].count)
            for (int head = 0; head < heads; head++) {
                const int last = first + s.spans_[i].count;
                if (together) {
                    if (task++ % count != id) continue;
                    for (int row = first; row < last; row++) turn_and_store(layer, number, row, head);
                    for (int row = first; row < last; row += at_once)
                        queries(layer, number, head, row, std::min(last, row + at_once));
                } else {
                    for (int row = first; row < last; row += at_once)
                        if (task++ % count == id) queries(layer, number, head, row, std::min(last, row + at_once));
                }
            }
    }

    // Norm and rotation of one key head's query and key, and its key and value into the cache.
    void turn_and_store(const Layer& layer, int number, int r, int head) {
        const Session::Row& row = s.rows_[r];
        const int width = c.head_width;
        float* key = s.k_.data() + size_t(r) * s.keys_ + head * width;
        for (int i = 0; i < group(); i++)
            turn(layer, row, s.q_.data() + size_t(r) * s.queries_ + (head * group() + i) * width, layer.q_norm);
        turn(layer, row, key, layer.k_norm);
        const float* value = s.v_.data() + size_t(r) * s.keys_ + head * width;
        const Cache& cache = s.caches_[s.spans_[row.span].sequence];
        if (s.model.int8_cache)
            kernels.store_int8(cache.int8(number, head), width, row.position, key, value);
        else
            kernels.store_float(cache.floats(number, head), width, row.position, key, value);
    }

    void turn(const Layer& layer, const Session::Row& row, float* x, const float* norm_scale) {
        if (norm_scale) kernels.rmsnorm(x, norm_scale, c.head_width, c.norm_eps, x);
        const size_t at = size_t(row.position) * s.turn_stride_;
        if (layer.rotates) kernels.rotate(x, s.cosines_.data() + at, s.sines_.data() + at, c.rotary / 2);
    }

    // Attention of the query heads that share key head `head`, of rows first .. last - 1 of one span.
    void queries(const Layer& layer, int number, int head, int first, int last) {
        Session::Scratch& scratch = s.scratch_[id];
        const Span& span = s.spans_[s.rows_[first].span];
        const int width = c.head_width, length = span.first + span.count;
        scratch.queries.clear();
        for (int r = first; r < last; r++) {
            const int position = s.rows_[r].position, reach = layer.window ? layer.window : length;
            const int low = std::max(0, position - reach + 1);
            const int high = s.model.decoder() ? position + 1 : std::min<int64_t>(length, int64_t{position} + reach);
            for (int i = 0; i < group(); i++) {
                const size_t at = size_t(r) * s.queries_ + (head * group() + i) * width;
                scratch.queries.push_back({s.q_.data() + at, s.attended_.data() + at, low, high});
            }
        }
        const Cache& cache = s.caches_[span.sequence];
        const float factor = c.attention_scale * LOG2_E;
        const Query* q = scratch.queries.data();
        const int n = static_cast<int>(scratch.queries.size());
        for (int i = 0; i < n; i += QUERIES) {
            const int some = std::min(QUERIES, n - i);
            if (s.model.int8_cache)
                kernels.attend_int8(cache.int8(number, head), width, q + i, some, factor, scratch.floats.data());
            else
                kernels.attend_float(cache.floats(number, head), width, q + i, some, factor, scratch.floats.data());
        }
    }

    int group() const { return c.heads / c.kv_heads; }

    // ---- norms and matrices

    void norm(const NormWeights& weights, const float* x, float* y) { norm(weights, c.width, x, y); }
    void norm(const NormWeights& weights, int width, const float* x, float* y) {
        if (weights.bias)
            kernels.layernorm(x, weights.scale, weights.bias, width, c.norm_eps, y);
        else
            kernels.rmsnorm(x, weights.scale, width, c.norm_eps, y);
    }

    void norm_in_place(const NormWeights& weights) {
        each_of(rows, [&](int r) { norm(weights, x_row(r), x_row(r)); });
        barrier();
    }

    // Norm of the residual stream, or the stream itself where there is none, on its way into `project`.
    const float* normed(const NormWeights& weights) {
        if (!weights.scale) return s.x_.data();
        float* y = s.stage(rows, id).floats.data();
        each_staged(rows, [&](int r) { norm(weights, x_row(r), y + size_t(r) * s.width_); });
        return y;
    }

    // out = matrix x for several matrices, this thread's panels of each. `x` is the same for all threads, or staged by
    // this one.
    void project(const float* x, int stride, int n, std::initializer_list<Product> products) {
        const Product* before = nullptr;
        Activations rounded{};
        for (const Product& product : products) {
            const Matrix& m = product.matrix;
            const bool again = !before || !rounds_alike(product, *before);
            if (before && again && !staged_alone(n)) barrier();
            if (again) rounded = round(x, stride, n, m, product.norm);
            before = &product;
            const auto [first, last] = Threads::share(m.panels, id, count);
            if (first < last) kernels.linear(m, first, last, rounded, product.out, product.out_stride);
        }
    }

    static bool rounds_alike(const Product& a, const Product& b) {
        return a.matrix.input == b.matrix.input && a.norm.scale == b.norm.scale && a.norm.bias == b.norm.bias &&
               (a.matrix.kind == Kind::panel_float) == (b.matrix.kind == Kind::panel_float);
    }

    // The rows as int8 codes for matrix m, after its own norm if it has one. A few rows are rounded by every thread for
    // itself: sooner than waiting.
    Activations round(const float* x, int stride, int n, const Matrix& m, const NormWeights& own = {}) {
        Session::Stage& stage = s.stage(n, id);
        const float* from = own.scale ? stage.normed.data() : x;
        each_staged(n, [&](int r) {
            const size_t at = size_t(r) * stride;
            if (own.scale) {
                float* y = stage.normed.data() + at;
                norm(own, m.columns, x + at, y);
                std::fill(y + m.columns, y + m.padded, 0.0f);
            }
            if (m.kind != Kind::panel_float)
                stage.scales[r] =
                    kernels.quantize(from + at, m.columns, m.padded, m.input, stage.codes.data() + at, &stage.sums[r]);
        });
        if (!staged_alone(n)) barrier();
        return {n, stride, stage.codes.data(), stage.scales.data(), stage.sums.data(), from};
    }

    // ---- head

    const float* gather(const int* chosen, int n) {
        float* y = s.stage(n, id).floats.data();
        each_staged(n, [&](int i) {
            std::memcpy(y + size_t(i) * s.width_, x_row(chosen ? chosen[i] : i), c.width * sizeof(float));
        });
        return y;
    }

    const float* dense_output(int n) {
        float* y = s.stage(n, id).floats.data();
        each_staged(n, [&](int i) {
            float* row = y + size_t(i) * s.width_;
            std::memcpy(row, s.other_out_.data() + size_t(i) * s.width_, c.width * sizeof(float));
            if (c.head == Head::classes) return kernels.tanh_all(row, c.width);
            kernels.activate(static_cast<int>(Mlp::gelu), row, c.width);
            norm(s.model.head_norm, row, row);
        });
        return y;
    }

    static Activations one(const Activations& x, int i) {
        return {1, x.stride, x.codes + size_t(i) * x.stride, x.scales + i, x.sums + i, x.floats + size_t(i) * x.stride};
    }

    // What the high plane alone has too much, and half of what the low plane adds: 7.5 sum(x) - 128 sum(x) - sum(dither
    // x).
    static float correction(const Matrix& m, const Activations& x) {
        int64_t dithered = 0;
        for (int k = 0; k < m.padded; k++) dithered += m.dither[k] * x.codes[k];
        return static_cast<float>(-120.5 * x.sums[0] - static_cast<double>(dithered));
    }

    // ---- shares

    static bool staged_alone(int n) { return n <= ALONE; }

    template <class Each>
    void each_of(int n, Each each) {
        const auto [first, last] = Threads::share(n, id, count);
        for (int i = first; i < last; i++) each(i);
    }
    template <class Each>
    void each_staged(int n, Each each) {
        if (!staged_alone(n)) return each_of(n, each);
        for (int i = 0; i < n; i++) each(i);
    }
    Threads::Share columns(int width) const {  // of a buffer: the outputs of this thread's panels
        const auto [first, last] = Threads::share(width / LANES, id, count);
        return {first * LANES, last * LANES};
    }
    float* x_row(int r) { return s.x_.data() + size_t(r) * s.width_; }
    void barrier() { s.threads.barrier(); }

    Session& s;
    const Constants& c;
    const Kernels& kernels;
    const int id, count, rows;
};

// ---- sessions

Session::Session(const Model& model, int sequences, int threads)
    : model(model),
      threads(threads_for(model, threads)),
      width_(static_cast<int>(round_up(model.constants.width, LANES))),
      queries_(static_cast<int>(round_up(model.constants.heads * model.constants.head_width, LANES))),
      keys_(static_cast<int>(round_up(model.constants.kv_heads * model.constants.head_width, LANES))),
      hidden_(static_cast<int>(round_up(model.constants.hidden, LANES))),
      widest_(std::max({width_, queries_, hidden_})),
      output_stride_(static_cast<int>(round_up(model.outputs, LANES))),
      best_rows_(rows_at_once(model.constants)),
      turn_stride_(static_cast<int>(round_up(model.constants.rotary / 2, LANES))) {
    make_sequences(sequences);
    for (int i = 0; i < this->threads.count(); i++) {
        own_.emplace_back(ALONE, width_, widest_, model.own_norms);
        scratch_.emplace_back();
    }
}

void Session::make_sequences(int count) {
    while (sequences() < count) caches_.emplace_back(model);
}

void Session::trunk(const Span* spans, int count) {
    spans_.assign(spans, spans + count);
    rows_.clear();
    int longest = 1;
    for (int i = 0; i < count; i++) {
        const Span& span = spans[i];
        for (int j = 0; j < span.count; j++)
            rows_.push_back({span.tokens[j], span.types ? span.types[j] : 0, span.first + j, i});
        caches_[span.sequence].grow(span.first + span.count);
        longest = std::max(longest, span.first + span.count);
    }
    make_room(static_cast<int>(rows_.size()));
    make_turns(longest);
    const size_t scratch = QUERIES * (round_up(longest, CHUNK) + 64);
    for (Scratch& own : scratch_)
        if (own.floats.size() < scratch) own.floats = Buffer<float>(scratch);
    const auto work = [this](int id) { Worker(*this, id).trunk(); };
    if (threads.count() == 1) return threads.run(work);
    Balance& balance = balances_[std::min<int>(std::bit_width(rows_.size()), BALANCES) - 1];
    threads.use_all(balance.together());
    const auto begun = std::chrono::steady_clock::now();
    threads.run(work);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begun;
    balance.took(taken.count() / static_cast<double>(rows_.size()));
}

void Session::head(const int* rows, int count) {
    make_output(count);
    head(rows, count, output_.data(), output_stride_);
}

void Session::head(const int* rows, int count, float* out, int stride) {
    threads.run([=, this](int id) { Worker(*this, id).head(rows, count, out, stride); });
}

void Session::screen(const int* rows, int count) {
    make_output(count);
    picked_ = count;
    threads.run([=, this](int id) { Worker(*this, id).screen(rows, count); });
}

Activations Session::picked(int i) const {
    const Stage& stage = const_cast<Session*>(this)->stage(picked_, 0);
    const size_t at = size_t(i) * width_;
    return {1, width_, stage.codes.data() + at, stage.scales.data() + i, stage.sums.data() + i, nullptr};
}

// The high plane leaves out x (low - 7.5) per column, and the dither makes the low nibble uniform and independent of
// the weight: a sum of independent +-4, +-2, +-1 and +-1/2, sub-Gaussian with variance 21.25. Over all rows together,
// the chance that any is further off than this is 1e-9 (union bound). The last factor covers float rounding.
float Session::margin(int i) const {
    const Activations x = picked(i);
    int64_t squares = 0;
    for (int k = 0; k < model.head.padded; k++) squares += x.codes[k] * x.codes[k];
    const double deviations = std::sqrt(2 * 21.25 * std::log(2.0 * model.head.rows / 1e-9));
    return static_cast<float>(x.scales[0] * std::sqrt(static_cast<double>(squares)) * deviations * 1.001);
}

void Session::exact_panel(int i, int panel, float* out16) const {
    model.kernels->exact_panel(model.head, panel, picked(i), out16);
}

Session::Stage& Session::stage(int rows, int thread) { return rows <= ALONE ? own_[thread] : shared_; }

void Session::make_room(int rows) {
    if (rows <= room_) return;
    const size_t n = rows;
    x_ = Buffer<float>(n * width_), block_out_ = Buffer<float>(n * width_), other_out_ = Buffer<float>(n * width_);
    q_ = Buffer<float>(n * queries_), attended_ = Buffer<float>(n * queries_);
    k_ = Buffer<float>(n * keys_), v_ = Buffer<float>(n * keys_);
    up_ = Buffer<float>(n * hidden_);
    if (model.gated) gate_ = Buffer<float>(n * hidden_);
    if (rows > ALONE) shared_ = Stage(n, width_, widest_, model.own_norms);
    room_ = rows;
}

void Session::make_output(int rows) {
    if (rows <= output_room_) return;
    output_ = Buffer<float>(size_t(rows) * output_stride_);
    output_room_ = rows;
}

// Angles in double: float ones are off by whole turns' worth of rounding far into a long text.
void Session::make_turns(int positions) {
    const Constants& c = model.constants;
    const bool any =
        std::any_of(model.layers.begin(), model.layers.end(), [](const Layer& layer) { return layer.rotates; });
    if (!any || positions <= turned_) return;
    const int most = std::min<int>(std::max<int>(std::bit_ceil(static_cast<unsigned>(positions)), LEAST_TURNS),
                                   std::max(c.context, positions));
    Buffer<float> cosines(size_t(most) * turn_stride_), sines(size_t(most) * turn_stride_);
    for (int i = 0; i < c.rotary / 2; i++) {
        const double frequency = std::pow(static_cast<double>(c.theta), -2.0 * i / c.rotary);
        for (int position = 0; position < most; position++) {
            const size_t at = size_t(position) * turn_stride_ + i;
            cosines[at] = static_cast<float>(std::cos(position * frequency));
            sines[at] = static_cast<float>(std::sin(position * frequency));
        }
    }
    cosines_ = std::move(cosines), sines_ = std::move(sines);
    turned_ = most;
}

size_t Session::bytes() const {
    size_t bytes = shared_.bytes() + output_.bytes() + cosines_.bytes() + sines_.bytes();
    for (const Buffer<float>* buffer : {&x_, &block_out_, &other_out_, &q_, &attended_, &k_, &v_, &up_, &gate_})
        bytes += buffer->bytes();
    for (const Cache& cache : caches_) bytes += cache.bytes();
    for (const Stage& stage : own_) bytes += stage.bytes();
    for (const Scratch& scratch : scratch_) bytes += scratch.floats.bytes();
    return bytes;
}

}  // namespace tinylm
