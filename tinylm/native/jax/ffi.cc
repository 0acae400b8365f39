// XLA's way in: one handler per operation, each called inside a compiled program with its buffers.
//
// Every operation takes any number of leading dimensions, the same for all its arrays: members of a population.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "../engine/kernels.h"
#include "../training/kernels.h"
#include "xla.h"

namespace tinylm::training {
namespace {

// XLA's own threads. The caller works too and waits only for what others have begun, so that it comes to an end even
// when every other thread is busy.
class Threads final : public Pool {
public:
    explicit Threads(const xla::Frame& frame) : frame_(frame), count_(frame.threads()) {}

    void run(long count, void (*body)(void*, long), void* context) override {
        if (count_ <= 1) {
            for (long i = 0; i < count; i++) body(context, i);
            return;
        }
        auto job = std::make_shared<Job>(count, body, context);
        const auto help = [](void* held) {
            const std::unique_ptr<std::shared_ptr<Job>> job(static_cast<std::shared_ptr<Job>*>(held));
            (*job)->work();
        };
        for (long i = 1; i < count && i < count_; i++) frame_.schedule(help, new std::shared_ptr<Job>(job));
        job->work();
        for (int spins = 0; job->done.load(std::memory_order_acquire) < count; spins++)
            if (spins > 1000) std::this_thread::yield();
    }

    long count() const { return count_; }

private:
    struct Job {
        Job(long count, void (*body)(void*, long), void* context) : count(count), body(body), context(context) {}

        void work() {
            for (long i; (i = next.fetch_add(1)) < count;) {
                body(context, i);
                done.fetch_add(1, std::memory_order_release);
            }
        }

        const long count;
        void (*const body)(void*, long);
        void* const context;
        std::atomic<long> next{0}, done{0};
    };

    const xla::Frame& frame_;
    const long count_;
};

const Kernels* table() {
    static const Kernels* here = kernels("");
    return here;
}

// An array as matrices of its last two dimensions, one per member.
struct Array {
    char* data;
    long rows, columns, size;  // of a value, in bytes
    long members;

    Array(const xla::Buffer* from) : data(static_cast<char*>(from->data)) {
        const xla::Buffer& buffer = *from;
        rows = buffer.dims[buffer.rank - 2];
        columns = buffer.dims[buffer.rank - 1];
        size = buffer.dtype == xla::BF16 ? 2 : 4;
        members = 1;
        for (long i = 0; i + 2 < buffer.rank; i++) members *= buffer.dims[i];
    }

    bool half() const { return size == 2; }
    char* at(long member) const { return data + member * rows * columns * size; }
    Matrix matrix(long member) const { return {at(member), columns, 1, half()}; }
    Matrix turned(long member) const { return {at(member), 1, columns, half()}; }
};

std::vector<Array> arrays(const xla::Buffers& buffers) {
    return {buffers.buffers, buffers.buffers + buffers.count};
}

// y[i] = x w[i]
void linear(const xla::Frame& frame) {
    const auto in = arrays(frame.args), y = arrays(frame.results);
    Threads threads(frame);
    Product p = {};
    p.rows = in[0].rows;
    p.parts = 1;
    p.outs = int(y.size());
    p.depth[0] = in[0].columns;
    p.pairs = in[0].half();
    for (long member = 0; member < in[0].members; member++) {
        p.a[0] = in[0].matrix(member);
        for (int o = 0; o < p.outs; o++)
            p.out[o] = {y[o].columns, {in[1 + o].matrix(member)}, y[o].at(member), y[o].columns, y[o].half()};
        table()->product(p, threads);
    }
}

// dx = sum of dy[i] w[i]^T; arguments dy[0], .., w[0], ..
void linear_dx(const xla::Frame& frame) {
    const auto in = arrays(frame.args), dx = arrays(frame.results);
    Threads threads(frame);
    Product p = {};
    p.rows = dx[0].rows;
    p.parts = int(in.size() / 2);
    p.outs = 1;
    p.pairs = in[0].half();
    for (long member = 0; member < dx[0].members; member++) {
        p.out[0] = {dx[0].columns, {}, dx[0].at(member), dx[0].columns, dx[0].half()};
        for (int i = 0; i < p.parts; i++) {
            p.a[i] = in[i].matrix(member);
            p.depth[i] = in[i].columns;
            p.out[0].b[i] = in[p.parts + i].turned(member);
        }
        table()->product(p, threads);
    }
}

// dw[i] = x^T dy[i]; arguments x, dy[0], ..
void linear_dw(const xla::Frame& frame) {
    const auto in = arrays(frame.args), dw = arrays(frame.results);
    Threads threads(frame);
    Product p = {};
    p.rows = in[0].columns;
    p.parts = 1;
    p.outs = int(dw.size());
    p.depth[0] = in[0].rows;
    p.pairs = in[0].half();
    for (long member = 0; member < in[0].members; member++) {
        p.a[0] = in[0].turned(member);
        for (int o = 0; o < p.outs; o++)
            p.out[o] = {dw[o].columns, {in[1 + o].matrix(member)}, dw[o].at(member), dw[o].columns, dw[o].half()};
        table()->product(p, threads);
    }
}

// Arguments x, table, targets, weights; results sums, and with a gradient dx and dtable. `tied`: the table is
// vocabulary x width, else width x vocabulary.
void loss(const xla::Frame& frame) {
    const bool tied = frame.setting<bool>("tied");
    const Array x(&frame.arg(0)), w(&frame.arg(1));
    const auto targets = static_cast<const int32_t*>(frame.arg(2).data);
    const auto weights = static_cast<const float*>(frame.arg(3).data);
    const auto result = [&](long i) { return static_cast<char*>(frame.result(i).data); };
    const bool gradient = frame.results.count > 1;
    Threads threads(frame);
    for (long member = 0; member < x.members; member++) {
        Loss one = {};
        one.rows = x.rows;
        one.width = x.columns;
        one.vocab = tied ? w.rows : w.columns;
        one.x = x.matrix(member);
        one.table = tied ? w.turned(member) : w.matrix(member);
        one.targets = targets + member * x.rows;
        one.weights = weights + member * x.rows;
        one.z_loss = frame.setting<float>("z_loss");
        one.sums = reinterpret_cast<float*>(result(0)) + 2 * member;
        one.dx = gradient ? result(1) + member * x.rows * x.columns * x.size : nullptr;
        one.dtable = gradient ? reinterpret_cast<float*>(result(2)) + member * w.rows * w.columns : nullptr;
        one.pairs = x.half();
        table()->loss(one, threads);
    }
}

// The fields that both directions share, from arguments q, k, v, segments.
Attention attention_of(const xla::Frame& frame) {
    const xla::Buffer &q = frame.arg(0), &k = frame.arg(1), &segments = frame.arg(3);
    const long rank = q.rank;
    Attention x = {};
    x.width = q.dims[rank - 1];
    x.heads = q.dims[rank - 2];
    x.length = q.dims[rank - 3];
    x.kv_heads = k.dims[rank - 2];
    x.sequences = 1;
    for (long i = 0; i + 3 < rank; i++) x.sequences *= q.dims[i];
    x.half = q.dtype == xla::BF16;
    x.causal = frame.setting<bool>("causal");
    x.window = frame.setting<int64_t>("window");
    x.scale = frame.setting<float>("scale");
    long ids = 1;
    for (long i = 0; i < segments.rank; i++) ids *= segments.dims[i];
    x.segments = ids ? static_cast<const int32_t*>(segments.data) : nullptr;
    x.q = q.data;
    x.k = k.data;
    x.v = frame.arg(2).data;
    return x;
}

// Results out and statistics.
void attention(const xla::Frame& frame) {
    Attention x = attention_of(frame);
    x.out = frame.result(0).data;
    x.statistics = static_cast<float*>(frame.result(1).data);
    Threads threads(frame);
    table()->attention(x, threads);
}

// Further arguments out, statistics, dout; results dq, dk, dv.
void attention_back(const xla::Frame& frame) {
    Attention x = attention_of(frame);
    x.out = frame.arg(4).data;
    x.statistics = static_cast<float*>(frame.arg(5).data);
    x.dout = frame.arg(6).data;
    x.dq = frame.result(0).data;
    x.dk = frame.result(1).data;
    x.dv = frame.result(2).data;
    Threads threads(frame);
    table()->attention_back(x, threads);
}

// Argument x, result of its shape: a matrix per member. Enough members take a thread each, fewer share all threads.
void orthogonalize(const xla::Frame& frame) {
    const Array x(&frame.arg(0)), out(&frame.result(0));
    Threads threads(frame);
    const auto one = [&](long member, Pool& pool) {
        Orthogonal o = {};
        o.rows = x.rows;
        o.columns = x.columns;
        o.x = reinterpret_cast<const float*>(x.at(member));
        o.out = reinterpret_cast<float*>(out.at(member));
        o.a = frame.setting<float>("a");
        o.b = frame.setting<float>("b");
        o.c = frame.setting<float>("c");
        o.steps = int(frame.setting<int64_t>("steps"));
        table()->orthogonalize(o, pool);
    };
    if (x.members < threads.count()) {
        for (long member = 0; member < x.members; member++) one(member, threads);
        return;
    }
    threads.each(x.members, [&](long member) {
        Alone alone;
        one(member, alone);
    });
}

long count(const xla::Buffer& buffer, long last = 0) {
    long n = 1;
    for (long i = 0; i + last < buffer.rank; i++) n *= buffer.dims[i];
    return n;
}

// Arguments x (.., sequences, length, heads, head), cosine and sine (.., 1 or sequences, length, width / 2).
void rotate(const xla::Frame& frame) {
    const xla::Buffer &x = frame.arg(0), &cosine = frame.arg(1);
    Threads threads(frame);
    Rotation r = {};
    r.head = x.dims[x.rank - 1];
    r.heads = x.dims[x.rank - 2];
    r.length = x.dims[x.rank - 3];
    r.sequences = x.dims[x.rank - 4];
    r.tables = cosine.dims[cosine.rank - 3];
    r.width = 2 * cosine.dims[cosine.rank - 1];
    r.half = x.dtype == xla::BF16;
    r.back = frame.setting<bool>("back");
    const long members = count(x, 4), size = count(x) / members * (r.half ? 2 : 4), angles = count(cosine) / members;
    for (long member = 0; member < members; member++) {
        r.x = static_cast<const char*>(x.data) + member * size;
        r.out = static_cast<char*>(frame.result(0).data) + member * size;
        r.cosine = static_cast<const float*>(cosine.data) + member * angles;
        r.sine = static_cast<const float*>(frame.arg(2).data) + member * angles;
        table()->rotate(r, threads);
    }
}

// Arguments gate, up; result y. With a third argument dy the results are dgate, dup.
void gate(const xla::Frame& frame) {
    const bool back = frame.args.count > 2;
    Threads threads(frame);
    Gate g = {};
    g.size = count(frame.arg(0));
    g.half = frame.arg(0).dtype == xla::BF16;
    g.gate = frame.arg(0).data;
    g.up = frame.arg(1).data;
    g.dy = back ? frame.arg(2).data : nullptr;
    (back ? g.dgate : g.y) = frame.result(0).data;
    g.dup = back ? frame.result(1).data : nullptr;
    table()->gate(g, threads);
}

// A panel of 16 outputs as the engine reads it: four inputs of each output are neighbours, and 128 stands for 0. `lanes`
// outputs there are, `row` codes from input to input.
void pack_panel(const int8_t* codes, long row, long depth, long lanes, uint8_t* panel) {
    constexpr long LANES = tinylm::LANES;
    for (long k = 0; k < (depth + LANES - 1) / LANES * LANES; k += 4, panel += 4 * LANES) {
        if (lanes == LANES && k + 4 <= depth) {
            const int8_t* const at = codes + k * row;
            for (long lane = 0; lane < LANES; lane++)
                for (long j = 0; j < 4; j++) panel[lane * 4 + j] = uint8_t(at[j * row + lane] ^ -128);
        } else {
            for (long lane = 0; lane < LANES; lane++)
                for (long j = 0; j < 4; j++)
                    panel[lane * 4 + j] =
                        lane < lanes && k + j < depth ? uint8_t(codes[(k + j) * row + lane] ^ -128) : 128;
        }
    }
}

// The engine's int8 product inside somebody's program. Arguments x (.., rows, depth), codes (.., depth, columns) of int8
// and scales (.., columns); result (.., rows, columns). Inputs are rounded row by row, sums are exact.
void int8_product(const xla::Frame& frame) {
    static const tinylm::Kernels& engine = *tinylm::kernels("");
    const Array x(&frame.arg(0)), codes(&frame.arg(1)), y(&frame.result(0));
    constexpr long LANES = tinylm::LANES, TOGETHER = 4 * LANES;  // outputs of a task: as many as the engine tiles
    const long rows = x.rows, depth = x.columns, columns = y.columns, padded = (depth + LANES - 1) / LANES * LANES;
    Threads threads(frame);
    Scratch rounded_memory(rows * padded), step_memory(rows * sizeof(float)), sum_memory(rows * sizeof(int32_t));
    auto* const rounded = rounded_memory.as<int8_t>();
    auto* const steps = step_memory.as<float>();
    auto* const sums = sum_memory.as<int32_t>();
    for (long member = 0; member < x.members; member++) {
        const auto* const from = reinterpret_cast<const float*>(x.at(member));
        const auto* const weights = reinterpret_cast<const int8_t*>(codes.data) + member * depth * columns;
        const auto* const scales = static_cast<const float*>(frame.arg(2).data) + member * columns;
        auto* const to = reinterpret_cast<float*>(y.at(member));
        const long some = 16, tasks = (rows + some - 1) / some;
        threads.each(tasks, [&](long task) {
            for (long r = task * some; r < std::min(rows, (task + 1) * some); r++)
                steps[r] =
                    engine.quantize(from + r * depth, int(depth), int(padded), 0.0f, rounded + r * padded, sums + r);
        });
        threads.each((columns + TOGETHER - 1) / TOGETHER, [&](long task) {
            const long first = task * TOGETHER, width = std::min(TOGETHER, columns - first);
            const long panels = (width + LANES - 1) / LANES;
            Scratch panel_memory(panels * LANES * padded);
            Scratch rest_memory(width % LANES ? rows * TOGETHER * sizeof(float) : 0);
            auto* const room = panel_memory.as<uint8_t>();
            alignas(64) float own[TOGETHER] = {};
            std::copy_n(scales + first, width, own);
            for (long panel = 0; panel < panels; panel++)
                pack_panel(weights + first + panel * LANES, columns, depth, std::min(LANES, width - panel * LANES),
                           room + panel * padded * LANES);
            tinylm::Matrix m = {};
            m.kind = tinylm::Kind::panel_int8;
            m.rows = int(panels * LANES);
            m.columns = int(depth);
            m.panels = int(panels);
            m.padded = int(padded);
            m.codes = m.low = room;
            m.scales = own;
            const tinylm::Activations in = {int(rows), int(padded), rounded, steps, sums, nullptr};
            if (width % LANES == 0) return engine.linear(m, 0, m.panels, in, to + first, columns);
            auto* const rest = rest_memory.as<float>();
            engine.linear(m, 0, m.panels, in, rest, TOGETHER);
            for (long r = 0; r < rows; r++) std::copy_n(rest + r * TOGETHER, width, to + r * columns + first);
        });
    }
}

// An error for XLA, or null.
xla::Error* guarded(void (*handler)(const xla::Frame&), const xla::Frame& frame) {
    try {
        handler(frame);
    } catch (const std::bad_alloc&) {
        return frame.out_of_memory();
    }
    return nullptr;
}

}  // namespace
}  // namespace tinylm::training

#define EXPORTED __attribute__((visibility("default")))

// The table in use: "avx512bf16", "avx512", "avx2", or "" where there is none for this processor.
extern "C" EXPORTED const char* tlm_training_kernels() {
    return tinylm::training::table() ? tinylm::training::table()->name : "";
}

#define HANDLER(name)                                                                              \
    extern "C" EXPORTED tinylm::xla::Error* tlm_##name(const tinylm::xla::Frame* frame) {          \
        return frame->asked() ? nullptr : tinylm::training::guarded(tinylm::training::name, *frame); \
    }
HANDLER(linear)
HANDLER(linear_dx)
HANDLER(linear_dw)
HANDLER(loss)
HANDLER(attention)
HANDLER(attention_back)
HANDLER(orthogonalize)
HANDLER(rotate)
HANDLER(gate)
HANDLER(int8_product)
