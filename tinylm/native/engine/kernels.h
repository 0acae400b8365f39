// The arithmetic of the engine: one table of functions per instruction set, all with the same results, bit for bit.
//
// tinylm/engine/twin.py is the specification: the same sums in plain NumPy. Buffers are aligned to 64 bytes and padded
// with zeros to a multiple of 16 values unless a comment says otherwise.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tinylm {

enum class Kind : int32_t {
    floats = 0, ints = 1, bytes = 2,
    panel_float = 8, panel_int8 = 9, panel_planes = 10, panel_int4 = 11, panel_ternary = 12, packed_ternary = 13,
};

constexpr int LANES = 16;   // rows of a panel, and floats that are worked on together
constexpr int CHUNK = 256;  // positions whose weighted values are summed exactly before they become a float
constexpr int MAX_HEAD_WIDTH = 1024;

// A matrix of `rows` outputs by `columns` inputs, in panels of 16 rows: see the format in engine/file.py.
struct Matrix {
    Kind kind;
    int rows, columns, group;   // group 0: a float scale per row; else float16 scales, per row and `group` columns
    int panels, padded;         // ceil(rows / 16); columns rounded up to a multiple of 16
    const uint8_t* codes;       // panel_planes: the high plane
    const uint8_t* low;         // panel_planes: the low plane
    const void* scales;
    const float* bias;          // per output, padded with zeros; null: none
    const int32_t* dither;      // panel_planes: per column
    float input;                // static activation scale; 0: dynamic
};

// Several activations, one per row: codes[r * stride ..], with their scale and the sum of their codes.
struct Activations {
    int rows;
    int stride;
    const int8_t* codes;
    const float* scales;
    const int32_t* sums;
    const float* floats;        // the same rows before rounding, `stride` apart: panel_float reads these
};

// One head's keys and values, in blocks of 16 positions. int8: the head's width is a multiple of 16.
struct FloatCache {
    float* keys;    // [block][head width][16 positions]
    float* values;  // [block][head width][16 positions]
};
struct Int8Cache {
    uint8_t* keys;        // [block][head width / 4][16 positions][4], code + 128
    int8_t* values;       // [position / 2][head width][2 positions]
    float* key_scales;    // per position
    float* value_scales;  // per position
};

// A query over positions low .. high - 1; `out` gets `width` floats.
struct Query {
    const float* x;
    float* out;
    int low, high;
};

struct Kernels {
    const char* name;

    // codes[0 .. padded) of x[0 .. n); returns the scale. `fixed` is a static scale, or 0.
    float (*quantize)(const float* x, int n, int padded, float fixed, int8_t* codes, int32_t* sum);
    void (*rmsnorm)(const float* x, const float* scale, int n, float eps, float* y);
    void (*layernorm)(const float* x, const float* scale, const float* bias, int n, float eps, float* y);

    // out[r * out_stride + i] for outputs i of panels first .. last - 1 of every activation row r, bias added. Whole
    // panels are written: `out` has room for 16 * panels values per row.
    void (*linear)(const Matrix& m, int first, int last, const Activations& x, float* out, size_t out_stride);
    // One row of the matrix as floats (an embedding), y[0 .. columns).
    void (*row)(const Matrix& m, int index, float* y);

    void (*activate)(int mlp, float* x, int n);                      // in place; ModelConfig.mlp's number, not gated
    void (*gate)(int mlp, const float* gate, const float* up, float* y, int n);
    void (*tanh_all)(float* x, int n);
    void (*softcap)(float* x, int n, float cap);
    void (*add)(float* x, const float* y, int n);                    // x += y
    void (*rotate)(float* x, const float* cosines, const float* sines, int half);  // pairs i, i + half

    // Write one position's key and value of one head into the cache; `width` is the head's.
    void (*store_float)(const FloatCache& c, int width, int position, const float* key, const float* value);
    void (*store_int8)(const Int8Cache& c, int width, int position, const float* key, const float* value);
    // Attention of several queries that share one key/value head, each with low < high; how they are grouped changes no
    // result. `scratch`: count * (ceil16(longest high) + 64) floats.
    // `factor` is attention_scale * log2(e).
    void (*attend_float)(const FloatCache& c, int width, const Query* q, int count, float factor, float* scratch);
    void (*attend_int8)(const Int8Cache& c, int width, const Query* q, int count, float factor, float* scratch);

    // The screened head: approximate logits of panels first .. last - 1 from the high plane alone, for one activation
    // row (`correction` = 7.5 sum(x) - 128 sum(x) - sum(x dither)), then exact logits of one panel from both planes: the
    // bits that linear gives.
    void (*approximate)(const Matrix& m, int first, int last, const Activations& x, float correction, float* out);
    void (*exact_panel)(const Matrix& m, int panel, const Activations& x, float* out16);

    int (*argmax)(const float* x, int n);                            // the first of the largest; n >= 1
    float (*largest)(const float* x, int n);
    // y[i] = x[i] * inverse + gumbel(key, first + i); see sampling.h
    void (*add_gumbel)(const float* x, float inverse, uint64_t key, int first, int n, float* y);
};

// The table of this name ("avx512", "avxvnni", "avx2", "neon", "scalar"), or null where the processor lacks it. A null
// or empty name asks for the best that it has.
const Kernels* kernels(const char* name);

}  // namespace tinylm
