// Muon's step: every singular value of a matrix pushed towards 1 by quintic Newton-Schulz steps (Jordan et al. 2024).
#pragma once
#include <cmath>

#include "gemm.h"

namespace tinylm::training {
namespace {

// X becomes a X + (b S + c S S) X with S = X X^T, `steps` times, from X over its Frobenius norm.
template <class Arithmetic>
void orthogonalize(const Orthogonal& o, Pool& pool) {
    const long rows = o.rows, columns = o.columns, square = rows * rows, size = rows * columns;
    Scratch gram_memory(square * sizeof(float)), next_memory(square * sizeof(float));
    Scratch moved_memory(size * sizeof(float));
    float *gram = gram_memory.as<float>(), *next = next_memory.as<float>(), *moved = moved_memory.as<float>();
    float* x = o.out;
    double sum = 0.0;
    for (long i = 0; i < size; i++) sum += double(o.x[i]) * o.x[i];
    const float scale = float(1.0 / (std::sqrt(sum) + 1e-8));
    for (long i = 0; i < size; i++) x[i] = o.x[i] * scale;

    const auto straight = [](float* data, long row) { return Matrix{data, row, 1, false}; };
    const auto times = [&](Matrix a, Matrix b, long depth, long width, float* c) {
        Product p = {};
        p.rows = rows;
        p.parts = p.outs = 1;
        p.a[0] = a;
        p.depth[0] = depth;
        p.out[0] = {width, {b}, c, width, false};
        product<Arithmetic>(p, pool);
    };
    for (int step = 0; step < o.steps; step++) {
        times(straight(x, columns), {x, 1, columns, false}, columns, rows, gram);
        times(straight(gram, rows), straight(gram, rows), rows, rows, next);
        for (long i = 0; i < square; i++) next[i] = o.b * gram[i] + o.c * next[i];
        times(straight(next, rows), straight(x, columns), rows, columns, moved);
        for (long i = 0; i < size; i++) x[i] = o.a * x[i] + moved[i];
    }
}

}  // namespace
}  // namespace tinylm::training
