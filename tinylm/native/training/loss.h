// Head, softmax and cross-entropy in one: logits exist for a block of rows at a time, in a core's cache, and become the
// gradient in place. The gradient towards the table is a sum over rows, taken chunk after chunk in order.
#pragma once
#include <cmath>

#include "gemm.h"

namespace tinylm::training {
namespace {

constexpr long LOSS_BYTES = 32 << 20;       // of the logits' gradient held at a time
constexpr long LOSS_ROWS = 2 * TILE_ROWS;   // of a block
constexpr long LOSS_CHUNK = 512;            // rows, at most: by then adding to the table's gradient costs little
constexpr long LOSS_COLUMNS = 8 * TILE_ROWS;

struct Nats {
    double total, plain;  // with the z-loss, and without
};

inline float log_sum_exp(const float* logits, long vocab) {
    Vec most = fill(-INFINITY), sums = zero();
    each(vocab, [&](long i) { most = max(load(logits + i), most); },
         [&](long i, Mask m) { most = max(select(m, load(logits + i, m), fill(-INFINITY)), most); });
    const float top = largest(most);
    each(vocab, [&](long i) { sums = sums + exp(load(logits + i) - fill(top)); },
         [&](long i, Mask m) { sums = sums + select(m, exp(load(logits + i, m) - fill(top)), zero()); });
    return top + std::log(sum(sums));
}

// One row's loss; its logits' gradient goes to `slope` unless that is null.
template <class T>
Nats row_loss(const Loss& x, long row, const float* logits, T* slope) {
    const float lse = log_sum_exp(logits, x.vocab), weight = x.weights[row];
    const long target = x.targets[row] < 0 ? x.targets[row] + x.vocab : x.targets[row];  // as jnp indexes
    const bool known = target >= 0 && target < x.vocab;
    const double plain = known ? double(lse) - logits[target] : NAN;
    if (slope) {
        const float scale = weight * (1 + 2 * x.z_loss * lse);
        const Vec factor = fill(scale), least = fill(lse);
        const float at_target = known ? std::exp(logits[target] - lse) * scale - weight : NAN;
        each(x.vocab, [&](long i) { store(slope + i, exp(load(logits + i) - least) * factor); },
             [&](long i, Mask m) { store(slope + i, exp(load(logits + i, m) - least) * factor, m); });
        put(slope + (known ? target : 0), at_target);
    }
    return {(plain + x.z_loss * double(lse) * lse) * weight, plain * weight};
}

// Arithmetic of the products, and the type that holds the logits' gradient.
template <class Arithmetic, class T>
class LossPass {
public:
    LossPass(const Loss& x, Pool& pool)
        : x_(x), pool_(pool), stride_((x.vocab + 31) / 32 * 32 + 32),
          turned_{x.table.data, x.table.column, x.table.row, x.table.half},
          chunk_(clamp(LOSS_BYTES / long(sizeof(T)) / stride_ / LOSS_ROWS * LOSS_ROWS, LOSS_ROWS, LOSS_CHUNK)),
          head_(4 * packed_size<Arithmetic>(x.width, x.vocab)),
          back_(x.dx ? 4 * packed_size<Arithmetic>(x.vocab, x.width) : 0),
          slopes_(x.dx ? chunk_ * stride_ * sizeof(T) : 0), nats_(x.rows * sizeof(Nats)) {}

    void run() {
        pack_table();
        for (long from = 0; from < x_.rows; from += chunk_) {
            const long rows = min(chunk_, x_.rows - from);
            pool_.each((rows + LOSS_ROWS - 1) / LOSS_ROWS, [&](long block) {
                const long at = from + block * LOSS_ROWS;
                block_loss(at, min(LOSS_ROWS, from + rows - at), slopes_.as<T>() + block * LOSS_ROWS * stride_);
            });
            if (x_.dx) add_to_table(from, rows);
        }
        double total = 0, plain = 0;
        for (long row = 0; row < x_.rows; row++) {
            total += nats_.as<Nats>()[row].total;
            plain += nats_.as<Nats>()[row].plain;
        }
        x_.sums[0] = float(total);
        x_.sums[1] = float(plain);
    }

private:
    void pack_table() {
        const long together = max(1, BLOCK_FLOATS / (PANEL * x_.width));
        pool_.each((panels(x_.vocab) + together - 1) / together, [&](long task) {
            for (long p = task * together; p < min(panels(x_.vocab), (task + 1) * together); p++)
                pack_panel<Arithmetic>(x_.table, x_.width, x_.vocab, p, head_.as<float>());
        });
        if (x_.dx)
            pool_.each(panels(x_.width), [&](long p) {
                pack_panel<Arithmetic>(turned_, x_.vocab, x_.width, p, back_.as<float>());
            });
    }

    // Loss and gradient towards x of a few rows.
    void block_loss(long from, long rows, T* slopes) {
        Scratch room(4 * rows * stride_), packed(4 * Rows<Arithmetic>::packed_size(x_.x, rows, x_.width));
        const Rows<Arithmetic> x(x_.x, from, rows, x_.width, packed.as<float>());
        multiply(x, head_.as<float>(), x_.width, rows, x_.vocab, {room.as<float>(), stride_, false, false});
        for (long r = 0; r < rows; r++)
            nats_.as<Nats>()[from + r] =
                row_loss(x_, from + r, room.as<float>() + r * stride_, x_.dx ? slopes + r * stride_ : nullptr);
        if (!x_.dx) return;
        const Matrix slope = {slopes, stride_, 1, sizeof(T) == 2};
        Scratch again(4 * Rows<Arithmetic>::packed_size(slope, rows, x_.vocab));
        const Rows<Arithmetic> a(slope, 0, rows, x_.vocab, again.as<float>());
        const Place to = {x_.dx, x_.width, x_.x.half, false};
        multiply(a, back_.as<float>(), x_.vocab, rows, x_.width, moved(to, from, 0));
    }

    void add_to_table(long from, long rows) {
        const Place to = {x_.dtable, x_.table.row == 1 ? x_.width : x_.vocab, false, from > 0};
        const Matrix slopes = {slopes_.as<T>(), stride_, 1, sizeof(T) == 2};
        const auto* first_row = static_cast<const char*>(x_.x.data) + from * x_.x.row * (x_.x.half ? 2 : 4);
        const Matrix x = {first_row, x_.x.row, 1, x_.x.half};
        const bool tied = x_.table.row == 1;  // the table lies as vocabulary x width
        Scratch packed(tied ? 4 * packed_size<Arithmetic>(rows, x_.width) : 0);
        if (tied) pack_panels<Arithmetic>(x, rows, x_.width, packed.as<float>());
        pool_.each((x_.vocab + LOSS_COLUMNS - 1) / LOSS_COLUMNS, [&](long task) {
            const long first = task * LOSS_COLUMNS, count = min(LOSS_COLUMNS, x_.vocab - first);
            const Matrix& left = tied ? slopes : x;  // rows x (vocabulary or width), to be turned
            const long out = tied ? count : x_.width;
            const Matrix turned = {left.data, 1, left.row, left.half};
            Scratch room(4 * Rows<Arithmetic>::packed_size(turned, out, rows));
            const Rows<Arithmetic> a(turned, tied ? first : 0, out, rows, room.as<float>());
            if (tied) return multiply(a, packed.as<float>(), rows, count, x_.width, moved(to, first, 0));
            Scratch some(4 * packed_size<Arithmetic>(rows, count));
            const Matrix b = {slopes_.as<T>() + first, stride_, 1, sizeof(T) == 2};
            pack_panels<Arithmetic>(b, rows, count, some.as<float>());
            multiply(a, some.as<float>(), rows, x_.width, count, moved(to, 0, first));
        });
    }

    const Loss& x_;
    Pool& pool_;
    const long stride_;    // of a row of logits, not a power of two
    const Matrix turned_;  // the table as vocabulary x width
    const long chunk_;
    Scratch head_, back_;  // the packed table, for logits and for the gradient towards x
    Scratch slopes_;       // the logits' gradient, chunk x vocabulary
    Scratch nats_;
};

template <class Arithmetic, class T>
void loss(const Loss& x, Pool& pool) {
    LossPass<Arithmetic, T>(x, pool).run();
}

}  // namespace
}  // namespace tinylm::training
