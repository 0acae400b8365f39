// Matrix products: blocks of packed panels, and tiles of sums that stay in registers (Goto and van de Geijn 2008).
//
// Two arithmetics share all but one instruction. Both work on units of 4 bytes: `Single` on floats; `Pairs` on two
// bfloat16 that are neighbours along the summed dimension, multiplied and added to a float by one instruction.
// Panels of B hold 2 LANES columns, step after step of the summed dimension; panels of A hold TILE_ROWS rows.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace tinylm::training {
namespace {

constexpr int PANEL = 2 * LANES;

struct Single {
    static constexpr int DEPTH = 1;  // values of the summed dimension in a unit
    static Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

    // Units of one step and LANES columns, whose values lie in a row.
    template <class T, class... M>
    static Vec across(const T* p, const T*, M... mask) {
        return load(p, mask...);
    }
    // Units of LANES steps and one column, whose values lie in a row.
    template <class T>
    static Vec along(const T* p) {
        return load(p);
    }
    template <class T>
    static float unit(const T* p, const T*) {
        return widen(*p);
    }
};

#if defined(__AVX512BF16__)
struct Pairs {
    static constexpr int DEPTH = 2;
    static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

    static __m256i halves(const float* p) { return training::narrow(load(p)); }
    static __m256i halves(const float* p, Mask m) { return training::narrow(load(p, m)); }
    static __m256i halves(const bfloat16* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static __m256i halves(const bfloat16* p, Mask m) { return _mm256_maskz_loadu_epi16(m, p); }

    template <class T, class... M>
    static Vec across(const T* p, const T* next, M... mask) {
        __m512i low = _mm512_cvtepu16_epi32(halves(p, mask...));
        __m512i high = next ? _mm512_cvtepu16_epi32(halves(next, mask...)) : _mm512_setzero_si512();
        return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    static Vec along(const bfloat16* p) { return _mm512_loadu_ps(p); }
    static Vec along(const float* p) {
        __m512i low = _mm512_castsi256_si512(halves(p));
        return _mm512_castsi512_ps(_mm512_inserti64x4(low, halves(p + LANES), 1));
    }
    template <class T>
    static float unit(const T* p, const T* next) {
        uint32_t bits = half(*p) | (next ? uint32_t(half(*next)) << 16 : 0);
        float both;
        std::memcpy(&both, &bits, 4);
        return both;
    }

private:
    static uint16_t half(float x) { return training::narrow(x).bits; }
    static uint16_t half(bfloat16 x) { return x.bits; }
};
#else
using Pairs = Single;  // the product of two bfloat16 is exact in float: only packing differs
#endif

template <class Arithmetic>
constexpr long steps(long depth) {
    return (depth + Arithmetic::DEPTH - 1) / Arithmetic::DEPTH;
}

// --- packing ---------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline void transpose(Vec (&x)[LANES]) {
    Vec y[LANES];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
        x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    for (int half = 0; half < 16; half += 8)
        for (int i = half; i < half + 4; i++) {
            y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
            y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
    }
}
#else
inline void transpose(Vec (&x)[LANES]) {
    Vec y[LANES];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) y[i] = x[i], y[i + 4] = x[i + 4];
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
    }
}
#endif

// Columns whose values lie one after the other along the summed dimension: LANES x LANES units are turned at a time.
template <class Arithmetic, class T>
void pack_turned(const T* data, long column, long depth, long columns, long width, float* to) {
    constexpr long DEEP = LANES * Arithmetic::DEPTH;
    for (long j = 0; j < width; j += LANES) {
        const Mask kept = first(width - j);
        const int filled = int(clamp(columns - j, 0, LANES));
        long k = 0;
        for (; k + DEEP <= depth; k += DEEP) {
            Vec x[LANES];
            for (int c = 0; c < LANES; c++) x[c] = c < filled ? Arithmetic::along(data + (j + c) * column + k) : zero();
            transpose(x);
            float* row = to + k / Arithmetic::DEPTH * width + j;
            for (int c = 0; c < LANES; c++) store(row + c * width, x[c], kept);
        }
        for (; k < depth; k += Arithmetic::DEPTH)
            for (long c = 0; c < min(LANES, width - j); c++) {
                const T* p = data + (j + c) * column + k;
                float* unit = to + k / Arithmetic::DEPTH * width + j + c;
                *unit = c < filled ? Arithmetic::unit(p, k + 1 < depth ? p + 1 : nullptr) : 0.0f;
            }
    }
}

// Rows whose values lie one after the other across the columns.
template <class Arithmetic, class T>
void pack_straight(const T* data, long row, long depth, long columns, long width, float* to) {
    for (long k = 0; k < depth; k += Arithmetic::DEPTH) {
        const T* p = data + k * row;
        const T* next = k + 1 < depth ? p + row : nullptr;
        for (long j = 0; j < width; j += LANES) {
            const Mask filled = first(clamp(columns - j, 0, LANES));
            const T* after = next ? next + j : nullptr;
            const Vec units = j + LANES <= columns ? Arithmetic::across(p + j, after)
                                                   : Arithmetic::across(p + j, after, filled);
            store(to + j, units, first(width - j));
        }
        to += width;
    }
}

// Units of `columns` columns from `from` on, [step][width], missing columns zero.
template <class Arithmetic, class T>
void pack(const Matrix& m, long from, long depth, long columns, long width, float* to) {
    const T* data = static_cast<const T*>(m.data) + from * m.column;
    if (m.column == 1) return pack_straight<Arithmetic>(data, m.row, depth, columns, width, to);
    pack_turned<Arithmetic>(data, m.column, depth, columns, width, to);
}

template <class Arithmetic>
void pack(const Matrix& m, long from, long depth, long columns, long width, float* to) {
    if (m.half) return pack<Arithmetic, bfloat16>(m, from, depth, columns, width, to);
    pack<Arithmetic, float>(m, from, depth, columns, width, to);
}

// The floats that packing all columns takes.
template <class Arithmetic>
long packed_size(long depth, long columns) {
    return steps<Arithmetic>(depth) * ((columns + LANES - 1) / LANES * LANES);
}

inline long panels(long columns) { return (columns + PANEL - 1) / PANEL; }
inline long panel_columns(long columns, long panel) { return min(PANEL, columns - panel * PANEL); }
// The last panel is half as wide where that is enough.
inline long panel_width(long columns, long panel) {
    return panel_columns(columns, panel) > LANES ? PANEL : LANES;
}

template <class Arithmetic>
void pack_panel(const Matrix& b, long depth, long columns, long panel, float* packed) {
    pack<Arithmetic>(b, panel * PANEL, depth, panel_columns(columns, panel), panel_width(columns, panel),
                     packed + panel * PANEL * steps<Arithmetic>(depth));
}

template <class Arithmetic>
void pack_panels(const Matrix& b, long depth, long columns, float* packed) {
    for (long p = 0; p < panels(columns); p++) pack_panel<Arithmetic>(b, depth, columns, p, packed);
}

// --- one tile --------------------------------------------------------------------------------------------------------

// A stretch of the summed dimension: rows of A (distances in bytes) and a packed panel of B.
struct Span {
    const char* a;
    long row, step;
    const float* b;
    long steps;
};

// Where a tile goes.
struct Place {
    void* c;
    long row;      // values from row to row
    bool half;     // bfloat16
    bool add;      // to what is there (floats only)
};

template <class Arithmetic, int ROWS, int VECTORS>
void tile(const Span* spans, int count, const Place& to, long columns) {
    Vec sums[ROWS][VECTORS];
    for (auto& row : sums)
        for (auto& sum : row) sum = zero();
    for (int s = 0; s < count; s++) {
        const char* a = spans[s].a;
        const float* b = spans[s].b;
        const long row = spans[s].row, step = spans[s].step;
        for (long k = spans[s].steps; k > 0; k--) {
            Vec across[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) across[v] = load(b + v * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const Vec x = fill(*reinterpret_cast<const float*>(a + r * row));
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++)
                    sums[r][v] = Arithmetic::multiply_add(x, across[v], sums[r][v]);
            }
            a += step;
            b += VECTORS * LANES;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
            const long left = columns - v * LANES;
            if (left <= 0) continue;
            const Mask kept = first(left);
            if (to.half) {
                store(static_cast<bfloat16*>(to.c) + r * to.row + v * LANES, sums[r][v], kept);
            } else {
                float* c = static_cast<float*>(to.c) + r * to.row + v * LANES;
                store(c, to.add ? load(c, kept) + sums[r][v] : sums[r][v], kept);
            }
        }
}

using Tile = void (*)(const Span*, int, const Place&, long);

template <class Arithmetic, int ROWS>
void fill_tiles(Tile (*tiles)[2]) {
    if constexpr (ROWS > 0) {
        tiles[ROWS][0] = tile<Arithmetic, ROWS, 1>;
        tiles[ROWS][1] = tile<Arithmetic, ROWS, 2>;
        fill_tiles<Arithmetic, ROWS - 1>(tiles);
    }
}

template <class Arithmetic>
Tile tile_for(long rows, long width) {
    static const auto table = [] {
        struct { Tile tiles[TILE_ROWS + 1][2]; } t = {};
        fill_tiles<Arithmetic, TILE_ROWS>(t.tiles);
        return t;
    }();
    return table.tiles[rows][width / LANES - 1];
}

// --- blocks ----------------------------------------------------------------------------------------------------------

// Rows of A ready for tiles: as they lie in memory where their units do, else packed.
template <class Arithmetic>
class Rows {
public:
    // Whether rows can be read in place. Rows a multiple of 2 KB apart share few cache lines' places: those are copied.
    static bool in_place(const Matrix& a, long depth) {
        const bool units = Arithmetic::DEPTH == 2 ? a.half && depth % 2 == 0 : !a.half;
        return units && a.column == 1 && a.row * (a.half ? 2 : 4) % 2048 != 0;
    }
    static long packed_size(const Matrix& a, long rows, long depth) {
        return in_place(a, depth) ? 0 : (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * steps<Arithmetic>(depth);
    }

    Rows(const Matrix& a, long from, long rows, long depth, float* packed) : depth_(depth) {
        if (in_place(a, depth)) {
            const long size = a.half ? 2 : 4;
            data_ = static_cast<const char*>(a.data) + from * a.row * size;
            row_ = a.row * size;
            step_ = 4;
            panel_ = TILE_ROWS * row_;
            return;
        }
        const Matrix turned = {a.data, a.column, a.row, a.half};
        const long size = TILE_ROWS * steps<Arithmetic>(depth);
        for (long r = 0; r < rows; r += TILE_ROWS)
            pack<Arithmetic>(turned, from + r, depth, min(TILE_ROWS, rows - r), TILE_ROWS,
                             packed + r / TILE_ROWS * size);
        data_ = reinterpret_cast<const char*>(packed);
        row_ = 4;
        step_ = 4 * TILE_ROWS;
        panel_ = 4 * size;
    }

    // Tile row t against a packed panel of B.
    Span span(long t, const float* b) const {
        return {data_ + t * panel_, row_, step_, b, steps<Arithmetic>(depth_)};
    }

private:
    const char* data_;
    long row_, step_, panel_, depth_;
};

inline Place moved(const Place& to, long row, long column) {
    const long by = row * to.row + column;
    return {static_cast<char*>(to.c) + by * (to.half ? 2 : 4), to.row, to.half, to.add};
}

// rows x columns of C from rows of A and packed panels first .. last of B.
template <class Arithmetic>
void multiply(const Rows<Arithmetic>* a, const float* const* b, const long* depths, int parts, long rows, long columns,
              long first_panel, long last_panel, const Place& to) {
    Span spans[MOST_PARTS];
    for (long p = first_panel; p < last_panel; p++)
        for (long r = 0; r < rows; r += TILE_ROWS) {
            for (int i = 0; i < parts; i++)
                spans[i] = a[i].span(r / TILE_ROWS, b[i] + p * PANEL * steps<Arithmetic>(depths[i]));
            const long tile_rows = min(TILE_ROWS, rows - r);
            tile_for<Arithmetic>(tile_rows, panel_width(columns, p))(spans, parts, moved(to, r, p * PANEL),
                                                                     panel_columns(columns, p));
        }
}

// The same for one product whose B is packed whole.
template <class Arithmetic>
void multiply(const Rows<Arithmetic>& a, const float* b, long depth, long rows, long columns, const Place& to) {
    multiply<Arithmetic>(&a, &b, &depth, 1, rows, columns, 0, panels(columns), to);
}

// The same for one product and a stretch of its summed dimension, `steps` from `from_step` on; B is packed whole, `depth`
// steps of it, and C is added to.
template <class Arithmetic>
void multiply_stretch(const Rows<Arithmetic>& a, const float* b, long depth, long from_step, long rows, long columns,
                      long first_panel, long last_panel, const Place& to) {
    for (long p = first_panel; p < last_panel; p++) {
        const long width = panel_width(columns, p);
        for (long r = 0; r < rows; r += TILE_ROWS) {
            const Span span = a.span(r / TILE_ROWS, b + p * PANEL * depth + from_step * width);
            tile_for<Arithmetic>(min(TILE_ROWS, rows - r), width)(&span, 1, moved(to, r, p * PANEL),
                                                                  panel_columns(columns, p));
        }
    }
}

// --- the whole product -----------------------------------------------------------------------------------------------

constexpr long BLOCK_FLOATS = 1 << 16;  // of A: 256 KB, which with a panel of B fit a core's own cache
constexpr long MOST_ROWS = 8 * TILE_ROWS;
constexpr long FEWEST_TASKS = 16;
// Long sums (a gradient sums over all tokens) are taken in stretches, so that a panel of B stays in a core's cache from
// one tile of rows to the next.
constexpr long STRETCH_STEPS = 256, STRETCH_ROWS = 4 * TILE_ROWS;

template <class Arithmetic>
void product(const Product& x, Pool& pool) {
    long depth = 0, size = 0, offsets[MOST_PARTS][MOST_PARTS], first_panel[MOST_PARTS + 1] = {0};
    for (int i = 0; i < x.parts; i++) depth += steps<Arithmetic>(x.depth[i]);
    for (int o = 0; o < x.outs; o++) {
        first_panel[o + 1] = first_panel[o] + panels(x.out[o].columns);
        for (int i = 0; i < x.parts; i++) {
            offsets[o][i] = size;
            size += packed_size<Arithmetic>(x.depth[i], x.out[o].columns);
        }
    }
    const long all_panels = first_panel[x.outs];
    if (x.rows == 0 || all_panels == 0) return;
    Scratch memory(size * sizeof(float));
    float* packed = memory.as<float>();
    const auto out_of = [&](long panel) {
        int o = 0;
        while (panel >= first_panel[o + 1]) o++;
        return o;
    };

    const long pack_together = max(1, BLOCK_FLOATS / max(1, depth * PANEL));
    pool.each((all_panels + pack_together - 1) / pack_together, [&](long task) {
        for (long p = task * pack_together; p < min(all_panels, (task + 1) * pack_together); p++) {
            const int o = out_of(p);
            for (int i = 0; i < x.parts; i++)
                pack_panel<Arithmetic>(x.out[o].b[i], x.depth[i], x.out[o].columns, p - first_panel[o],
                                       packed + offsets[o][i]);
        }
    });

    bool stretched = x.parts == 1 && depth >= 2 * STRETCH_STEPS;
    for (int o = 0; o < x.outs; o++) stretched = stretched && !x.out[o].half;
    const long tiles = clamp(BLOCK_FLOATS / max(1, depth) / TILE_ROWS, 1, MOST_ROWS / TILE_ROWS);
    const long block = stretched ? STRETCH_ROWS : tiles * TILE_ROWS, blocks = (x.rows + block - 1) / block;
    const long cuts = clamp((FEWEST_TASKS + blocks - 1) / blocks, 1, all_panels);
    pool.each(blocks * cuts, [&](long task) {
        const long from = task / cuts * block, rows = min(block, x.rows - from), cut = task % cuts;
        const long begin = all_panels * cut / cuts, end = all_panels * (cut + 1) / cuts;
        if (stretched) {
            const long values = STRETCH_STEPS * Arithmetic::DEPTH, last = (x.depth[0] - 1) % values + 1;
            const auto room = [&](long depth) { return Rows<Arithmetic>::packed_size(x.a[0], rows, depth); };
            Scratch memory(max(room(values), room(last)) * sizeof(float));
            for (long step = 0, at = 0; step < depth; step += STRETCH_STEPS, at += values) {
                Matrix part = x.a[0];
                part.data = static_cast<const char*>(part.data) + at * part.column * (part.half ? 2 : 4);
                const Rows<Arithmetic> a(part, from, rows, min(values, x.depth[0] - at), memory.as<float>());
                for (int o = out_of(begin); o < x.outs && first_panel[o] < end; o++) {
                    const Place to = {x.out[o].c, x.out[o].row, false, step > 0};
                    multiply_stretch<Arithmetic>(a, packed + offsets[o][0], depth, step, rows, x.out[o].columns,
                                                 max(0, begin - first_panel[o]),
                                                 min(end, first_panel[o + 1]) - first_panel[o], moved(to, from, 0));
                }
            }
            return;
        }
        long needed = 0, start[MOST_PARTS];
        for (int i = 0; i < x.parts; i++) {
            start[i] = needed;
            needed += Rows<Arithmetic>::packed_size(x.a[i], rows, x.depth[i]);
        }
        Scratch memory(needed * sizeof(float));
        struct { alignas(Rows<Arithmetic>) char room[MOST_PARTS * sizeof(Rows<Arithmetic>)]; } held;
        auto* a = reinterpret_cast<Rows<Arithmetic>*>(held.room);
        for (int i = 0; i < x.parts; i++)
            a[i] = Rows<Arithmetic>(x.a[i], from, rows, x.depth[i], memory.as<float>() + start[i]);
        for (int o = out_of(begin); o < x.outs && first_panel[o] < end; o++) {
            const float* b[MOST_PARTS];
            for (int i = 0; i < x.parts; i++) b[i] = packed + offsets[o][i];
            const Place to = {x.out[o].c, x.out[o].row, x.out[o].half, false};
            multiply<Arithmetic>(a, b, x.depth, x.parts, rows, x.out[o].columns, max(0, begin - first_panel[o]),
                                 min(end, first_panel[o + 1]) - first_panel[o], moved(to, from, 0));
        }
    });
}

}  // namespace
}  // namespace tinylm::training
