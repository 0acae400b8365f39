// Rotary positions and the gate of SwiGLU: one pass over memory each way, computed in floats.
#pragma once
#include "simd.h"
#include "kernels.h"

namespace tinylm::training {
namespace {

constexpr long STRETCH = 1 << 14;  // values in a task: enough to be worth a thread's attention

template <class T>
void rotate(const Rotation& r, Pool& pool) {
    const long half = r.width / 2, rows = r.sequences * r.length, size = r.heads * r.head;
    const long together = max(1, STRETCH / max(1, size));
    const Vec sign = fill(r.back ? -1.0f : 1.0f);
    pool.each((rows + together - 1) / together, [&](long task) {
        for (long row = task * together; row < min(rows, (task + 1) * together); row++) {
            const long place = row / r.length % r.tables * r.length + row % r.length;
            const float *cosine = r.cosine + place * half, *sine = r.sine + place * half;
            for (long h = 0; h < r.heads; h++) {
                const T* x = static_cast<const T*>(r.x) + row * size + h * r.head;
                T* y = static_cast<T*>(r.out) + row * size + h * r.head;
                const auto turn = [&](long i, auto... mask) {
                    const Vec a = load(x + i, mask...), b = load(x + half + i, mask...);
                    const Vec c = load(cosine + i, mask...), s = load(sine + i, mask...) * sign;
                    store(y + i, a * c - b * s, mask...);
                    store(y + half + i, fma(a, s, b * c), mask...);
                };
                each(half, turn, turn);
                for (long i = 2 * half; i < r.head; i++) y[i] = x[i];
            }
        }
    });
}

// For n values: body(at, mask...) by vectors, by tasks.
template <class Body>
void everywhere(long n, Pool& pool, Body body) {
    pool.each((n + STRETCH - 1) / STRETCH, [&](long task) {
        const long from = task * STRETCH;
        const auto moved = [&](long i, auto... mask) { body(from + i, mask...); };
        each(min(STRETCH, n - from), moved, moved);
    });
}

// Where sigmoid is 0 in floats; a factor that stays small there keeps the product 0. NaN stays NaN.
inline Vec bounded(Vec x) { return max(fill(-88.0f), x); }
inline Vec sigmoid(Vec x) { return fill(1.0f) / (fill(1.0f) + exp(zero() - x)); }

template <class T>
void gate(const Gate& g, Pool& pool) {
    const T *gate = static_cast<const T*>(g.gate), *up = static_cast<const T*>(g.up);
    if (!g.dy) {
        everywhere(g.size, pool, [=](long i, auto... mask) {
            const Vec x = bounded(load(gate + i, mask...));
            store(static_cast<T*>(g.y) + i, x * sigmoid(x) * load(up + i, mask...), mask...);
        });
        return;
    }
    everywhere(g.size, pool, [=](long i, auto... mask) {
        const Vec x = bounded(load(gate + i, mask...)), s = sigmoid(x);
        const Vec dy = load(static_cast<const T*>(g.dy) + i, mask...);
        const Vec slope = s * fma(x, fill(1.0f) - s, fill(1.0f));
        store(static_cast<T*>(g.dgate) + i, dy * load(up + i, mask...) * slope, mask...);
        store(static_cast<T*>(g.dup) + i, dy * x * s, mask...);
    });
}

}  // namespace
}  // namespace tinylm::training
