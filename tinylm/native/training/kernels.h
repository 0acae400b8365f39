// The table of operations: one per instruction set, chosen at run time. All give the same results on any number of
// threads; between instruction sets results differ by rounding.
#pragma once
#include <cstdint>

#include "pool.h"

namespace tinylm::training {

constexpr int MOST_PARTS = 4;

// Element (i, j) is data[i * row + j * column]; one of the two distances is 1.
struct Matrix {
    const void* data;
    long row, column;
    bool half;  // bfloat16, else float
};

// For every output o: c[o] = sum over parts i of a[i] b[o][i]; a[i] is rows x depth[i], b[o][i] depth[i] x columns[o].
struct Product {
    long rows;
    int parts, outs;
    Matrix a[MOST_PARTS];
    long depth[MOST_PARTS];
    struct {
        long columns;
        Matrix b[MOST_PARTS];
        void* c;
        long row;  // values from row to row of c
        bool half;
    } out[MOST_PARTS];
    bool pairs;  // factors are rounded to bfloat16; sums are floats in any case
};

// Cross-entropy of the rows of x under a table of vocabulary x width, and its gradient, on a block of rows at a time.
struct Loss {
    long rows, width, vocab;
    Matrix x;              // rows x width
    Matrix table;          // width x vocab: the embedding turned, or a head's own matrix
    const int32_t* targets;
    const float* weights;  // of each row in the sums
    float z_loss;          // factor of logsumexp^2
    float* sums;           // two: with the z-loss, and without
    void* dx;              // rows x width, of x's type; null: no gradient is wanted
    float* dtable;         // as the table lies in memory
    bool pairs;
};

// Attention of sequences to themselves. Arrays are (sequences, length, heads, width), floats or bfloat16.
struct Attention {
    long sequences, length, heads, kv_heads, width;
    bool half, causal;
    long window;              // positions seen on each side, the own included; 0: all
    float scale;
    const int32_t* segments;  // (sequences, length): positions see their own segment only; null: all
    void *q, *k, *v, *out;
    float* statistics;        // (sequences, heads, length): log of the sum of exp(score)
    void *dout, *dq, *dk, *dv;
};

// Newton-Schulz iterations on a matrix that is at most as high as wide; factors of products are rounded to bfloat16.
struct Orthogonal {
    long rows, columns;
    const float* x;
    float* out;
    float a, b, c;  // X becomes a X + (b S + c S S) X with S = X X^T
    int steps;
};

// Rotary positions of (sequences, length, heads, head), feature i paired with i + width/2; the rest is copied.
struct Rotation {
    long sequences, length, heads, head, width;
    long tables;  // sequences have a table in turn, of (length, width / 2)
    const float *cosine, *sine;
    const void* x;
    void* out;
    bool half, back;  // back: by the opposite angle
};

// y = silu(gate) up; or, from dy, the gradients of both.
struct Gate {
    long size;
    bool half;
    const void *gate, *up, *dy;
    void *y, *dgate, *dup;
};

struct Kernels {
    const char* name;
    void (*product)(const Product&, Pool&);
    void (*loss)(const Loss&, Pool&);
    void (*attention)(const Attention&, Pool&);       // from q, k, v: out and statistics
    void (*attention_back)(const Attention&, Pool&);  // from all these and dout: dq, dk, dv
    void (*orthogonalize)(const Orthogonal&, Pool&);
    void (*rotate)(const Rotation&, Pool&);
    void (*gate)(const Gate&, Pool&);
};

// The best table this processor can run, or the one of that name (else ""); null: none.
const Kernels* kernels(const char* name);

}  // namespace tinylm::training
