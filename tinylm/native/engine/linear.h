// Matrix times activations, from panels of 16 rows: each lane is one output, each step reads 64 bytes of codes.
#pragma once

namespace tinylm::ISA {

// How one step of a kind of panel becomes operands of dot(): COLUMNS weights of each row, four to a part. What is
// summed is (weight + ZERO) * activation. Where codes are parts of a byte, BITS wide, masked() is load() times
// 2^(BITS * part).
template <Kind kind> struct Step;

template <> struct Step<Kind::panel_int8> {
    static constexpr int COLUMNS = 4, ZERO = OFFSET, BITS = 0;
    template <int part> static INLINE Wide load(const uint8_t* codes, const uint8_t*) {
        return wide(load_bytes(codes));
    }
};

template <> struct Step<Kind::panel_planes> {
    static constexpr int COLUMNS = 8, ZERO = OFFSET, BITS = 0;
    template <int part> static INLINE Wide load(const uint8_t* codes, const uint8_t* low) {
        return wide(join<part>(load_bytes(codes), load_bytes(low)));
    }
};

template <> struct Step<Kind::panel_int4> {
    static constexpr int COLUMNS = 8, ZERO = 8, BITS = 4;
    template <int part> static INLINE Bytes load(const uint8_t* codes, const uint8_t*) {
        return nibble<part>(load_bytes(codes));
    }
    template <int part> static INLINE Bytes masked(Bytes codes) { return mask(codes, 15 << 4 * part); }
};

template <> struct Step<Kind::panel_ternary> {
    static constexpr int COLUMNS = 16, ZERO = 1, BITS = 2;
    template <int part> static INLINE Bytes load(const uint8_t* codes, const uint8_t*) {
        return field<part>(load_bytes(codes));
    }
    template <int part> static INLINE Bytes masked(Bytes codes) { return mask(codes, 3 << 2 * part); }
};

// Codes that were unpacked to a byte each, see `Unpacked`.
template <Kind kind> struct ByteStep {
    static constexpr int COLUMNS = 4, BITS = 0;
    template <int part> static INLINE auto load(const uint8_t* codes, const uint8_t*) {
        if constexpr (kind == Kind::panel_planes) {
            return wide(load_bytes(codes));
        } else {
            return load_bytes(codes);
        }
    }
};

template <Kind kind, bool unpacked> struct StepOf { using Type = Step<kind>; };
template <Kind kind> struct StepOf<kind, true> { using Type = ByteStep<kind>; };

// One step of PANELS panels (`panel` bytes apart) times ROWS rows of activations.
template <class S, int PANELS, int ROWS>
INLINE void add_step(const uint8_t* codes, const uint8_t* low, size_t panel, const int8_t* x, int stride,
                     I (&sums)[PANELS][ROWS]) {
    repeat<S::COLUMNS / 4>([&](auto part) INLINED {
        decltype(S::template load<part>(codes, low)) weights[PANELS];
        UNROLL for (int p = 0; p < PANELS; p++) weights[p] = S::template load<part>(codes + p * panel, low + p * panel);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Four values = four(x + static_cast<ptrdiff_t>(r) * stride + part * 4);
            UNROLL for (int p = 0; p < PANELS; p++) sums[p][r] = dot(sums[p][r], weights[p], values);
        }
    });
}

template <int A, int B, int C> INLINE void clear(I (&sums)[A][B][C]) {
    UNROLL for (int a = 0; a < A; a++) {
        UNROLL for (int b = 0; b < B; b++) {
            UNROLL for (int c = 0; c < C; c++) sums[a][b][c] = all_int(0);
        }
    }
}

// Exact sums over `steps` steps, in U independent chains: for tiles too small to keep the processor busy.
template <class S, int PANELS, int ROWS, int U>
INLINE void add_steps(const uint8_t* codes, const uint8_t* low, size_t panel, const int8_t* x, int stride, int steps,
                      I (&sums)[PANELS][ROWS]) {
    I chains[U][PANELS][ROWS];
    clear(chains);
    for (; steps >= U; steps -= U, codes += U * 64, low += U * 64, x += U * S::COLUMNS) {
        UNROLL for (int u = 0; u < U; u++) {
            add_step<S>(codes + u * 64, low + u * 64, panel, x + u * S::COLUMNS, stride, chains[u]);
        }
    }
    if constexpr (U > 1) {
        for (; steps > 0; steps--, codes += 64, low += 64, x += S::COLUMNS) {
            add_step<S>(codes, low, panel, x, stride, chains[0]);
        }
    }
    UNROLL for (int p = 0; p < PANELS; p++) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            sums[p][r] = chains[0][p][r];
            UNROLL for (int u = 1; u < U; u++) sums[p][r] = sums[p][r] + chains[u][p][r];
        }
    }
}

// The same for one row of codes smaller than a byte: a chain per part, of codes that were not shifted down. The sums
// are shifted instead, once and exactly. A third fewer instructions, where reading the codes does not hide them.
template <class S, int PANELS>
INLINE void add_masked_steps(const uint8_t* codes, size_t panel, const int8_t* x, int steps, I (&sums)[PANELS][1]) {
    constexpr int PARTS = S::COLUMNS / 4;
    I chains[PARTS][PANELS];
    repeat<PARTS>([&](auto part) INLINED { repeat<PANELS>([&](auto p) INLINED { chains[part][p] = all_int(0); }); });
    for (; steps > 0; steps--, codes += 64, x += S::COLUMNS) {
        repeat<PANELS>([&](auto p) INLINED {
            const Bytes bytes = load_bytes(codes + p * panel);
            repeat<PARTS>([&](auto part) INLINED {
                chains[part][p] = dot(chains[part][p], S::template masked<part>(bytes), four(x + part * 4));
            });
        });
    }
    repeat<PANELS>([&](auto p) INLINED {
        sums[p][0] = chains[0][p];
        repeat<PARTS - 1>([&](auto i) INLINED {
            sums[p][0] = sums[p][0] + shift_arithmetic<S::BITS * (i + 1)>(chains[i + 1][p]);
        });
    });
}

template <class S, int PANELS, int ROWS>
INLINE void tile_sums(const uint8_t* codes, const uint8_t* low, size_t panel, const int8_t* x, int stride, int steps,
                      I (&sums)[PANELS][ROWS]) {
    constexpr int chains = Register::VECTOR_PANELS * Register::VECTOR_UNROLL / (PANELS * ROWS);
    if constexpr (ROWS == 1 && S::BITS > 0 && Register::UNSIGNED_CODES) {
        add_masked_steps<S>(codes, panel, x, steps, sums);
    } else {
        add_steps<S, PANELS, ROWS, (chains > 0 ? chains : 1)>(codes, low, panel, x, stride, steps, sums);
    }
}

// What the sums have too much, per row and group: ZERO * sum(x), and for planes sum(dither x) too.
struct Corrections {
    const int32_t* at;
    int groups;  // per row
};

// One tile: PANELS panels from `panel`, ROWS rows of x from `row`.
template <Kind kind, bool grouped, bool unpacked, int PANELS, int ROWS>
INLINE void tile(const Matrix& m, int panel, const Activations& x, int row, Corrections corrections, float* out,
                 size_t out_stride) {
    using S = typename StepOf<kind, unpacked>::Type;
    const size_t bytes = static_cast<size_t>(m.padded / S::COLUMNS) * 64;
    const uint8_t* codes = m.codes + panel * bytes;
    const uint8_t* low = kind == Kind::panel_planes && !unpacked ? m.low + panel * bytes : codes;
    const int8_t* rows = x.codes + static_cast<size_t>(row) * x.stride;
    I sums[PANELS][ROWS];
    F y[PANELS][ROWS];
    if constexpr (!grouped) {
        tile_sums<S>(codes, low, bytes, rows, x.stride, m.padded / S::COLUMNS, sums);
        UNROLL for (int p = 0; p < PANELS; p++) {
            const F scale = load(static_cast<const float*>(m.scales) + (panel + p) * 16);
            UNROLL for (int r = 0; r < ROWS; r++) {
                y[p][r] = to_float(sums[p][r] - all_int(corrections.at[r])) * (all(x.scales[row + r]) * scale);
            }
        }
    } else {
        const int groups = corrections.groups;
        const uint16_t* scales = static_cast<const uint16_t*>(m.scales) + static_cast<size_t>(panel) * groups * 16;
        UNROLL for (int p = 0; p < PANELS; p++) {
            UNROLL for (int r = 0; r < ROWS; r++) y[p][r] = all(0);
        }
        for (int g = 0; g < groups; g++) {
            const int begin = g * m.group, end = begin + m.group < m.padded ? begin + m.group : m.padded;
            const ptrdiff_t at = static_cast<ptrdiff_t>(begin / S::COLUMNS) * 64;
            tile_sums<S>(codes + at, low + at, bytes, rows + begin, x.stride, (end - begin) / S::COLUMNS, sums);
            UNROLL for (int p = 0; p < PANELS; p++) {
                const F scale = load_half(scales + (static_cast<size_t>(p) * groups + g) * 16);
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const I correction = all_int(corrections.at[static_cast<size_t>(r) * groups + g]);
                    y[p][r] = fma(to_float(sums[p][r] - correction), scale, y[p][r]);
                }
            }
        }
        UNROLL for (int p = 0; p < PANELS; p++) {
            UNROLL for (int r = 0; r < ROWS; r++) y[p][r] = y[p][r] * all(x.scales[row + r]);
        }
    }
    UNROLL for (int p = 0; p < PANELS; p++) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            if (m.bias) y[p][r] = y[p][r] + load(m.bias + (panel + p) * 16);
            store(out + (row + r) * out_stride + (panel + p) * 16, y[p][r]);
        }
    }
}

// panel_float: one chain of fma per output, in the order of the columns.
template <int PANELS, int ROWS>
INLINE void float_tile(const Matrix& m, int panel, const Activations& x, int row, float* out, size_t out_stride) {
    const size_t size = static_cast<size_t>(m.padded) * 16;
    const float* weights = reinterpret_cast<const float*>(m.codes) + panel * size;
    const float* rows = x.floats + static_cast<size_t>(row) * x.stride;
    F y[PANELS][ROWS];
    UNROLL for (int p = 0; p < PANELS; p++) {
        UNROLL for (int r = 0; r < ROWS; r++) y[p][r] = all(0);
    }
    for (int k = 0; k < m.columns; k++) {
        F w[PANELS];
        UNROLL for (int p = 0; p < PANELS; p++) w[p] = load(weights + p * size + static_cast<size_t>(k) * 16);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const F value = all(rows[static_cast<ptrdiff_t>(r) * x.stride + k]);
            UNROLL for (int p = 0; p < PANELS; p++) y[p][r] = fma(value, w[p], y[p][r]);
        }
    }
    UNROLL for (int p = 0; p < PANELS; p++) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            if (m.bias) y[p][r] = y[p][r] + load(m.bias + (panel + p) * 16);
            store(out + (row + r) * out_stride + (panel + p) * 16, y[p][r]);
        }
    }
}

// Panels of codes smaller than a byte, or in two planes, unpacked for many rows: each code is taken apart once instead
// of once per tile.
constexpr int MANY = 12;             // rows from which that pays
constexpr int WIDEST_UNPACKED = 1024;  // columns that have room

template <Kind kind, int PANELS> void unpack(const Matrix& m, int panel, uint8_t* room) {
    using S = Step<kind>;
    const size_t bytes = static_cast<size_t>(m.padded / S::COLUMNS) * 64;
    const uint8_t* codes = m.codes + panel * bytes;
    const uint8_t* low = kind == Kind::panel_planes ? m.low + panel * bytes : codes;
    for (const uint8_t* end = codes + PANELS * bytes; codes < end; codes += 64, low += 64) {
        repeat<S::COLUMNS / 4>([&](auto part) INLINED {
            const Bytes some = [&]() INLINED {
                if constexpr (kind == Kind::panel_planes) {
                    return join<part>(load_bytes(codes), load_bytes(low));
                } else {
                    return S::template load<part>(codes, low);
                }
            }();
            std::memcpy(room, &some, 64);
            room += 64;
        });
    }
}

// The tiles of one kind of matrix, by size.
template <Kind kind, bool grouped, bool unpacked = false> struct Tiles {
    const Matrix& m;
    const Activations& x;
    float* out;
    size_t out_stride;
    Corrections corrections;
    int first_row;  // the row of corrections.at[0]

    template <int PANELS, int ROWS> INLINE void run(int panel, int row) const {
        if constexpr (kind == Kind::panel_float) {
            float_tile<PANELS, ROWS>(m, panel, x, row, out, out_stride);
        } else {
            const Corrections c{corrections.at + static_cast<size_t>(row - first_row) * corrections.groups,
                                corrections.groups};
            tile<kind, grouped, unpacked, PANELS, ROWS>(m, panel, x, row, c, out, out_stride);
        }
    }
    template <int PANELS> void some(int panel, int row, int rows) const {
        switch (rows) {
            case 1: return run<PANELS, 1>(panel, row);
            case 2: if constexpr (Register::ROWS >= 2) return run<PANELS, 2>(panel, row); break;
            case 3: if constexpr (Register::ROWS >= 3) return run<PANELS, 3>(panel, row); break;
            case 4: if constexpr (Register::ROWS >= 4) return run<PANELS, 4>(panel, row); break;
            case 5: if constexpr (Register::ROWS >= 5) return run<PANELS, 5>(panel, row); break;
            case 6: if constexpr (Register::ROWS >= 6) return run<PANELS, 6>(panel, row); break;
        }
    }
    // Rows of one set of panels, in tiles of even height.
    template <int PANELS> void column(int panel, int row, int last_row) const {
        for (int left = last_row - row; left > 0; left = last_row - row) {
            const int tiles = (left + Register::ROWS - 1) / Register::ROWS, rows = (left + tiles - 1) / tiles;
            some<PANELS>(panel, row, rows);
            row += rows;
        }
    }
    // The same, unpacked first.
    template <int PANELS> void unpacked_column(int panel, int row, int last_row, uint8_t* room) const {
        unpack<kind, PANELS>(m, panel, room);
        Matrix one = m;
        one.codes = room;
        const size_t scales = static_cast<size_t>(corrections.groups) * (grouped ? 32 : 64);  // bytes of a panel
        one.scales = static_cast<const uint8_t*>(m.scales) + panel * scales;
        if (one.bias) one.bias += static_cast<size_t>(panel) * 16;
        Tiles<kind, grouped, true>{one, x, out + static_cast<size_t>(panel) * 16, out_stride, corrections, first_row}
            .template column<PANELS>(0, row, last_row);
    }
    void all_panels(int panel, int last, int row, int last_row) const {
        if constexpr (kind != Kind::panel_int8 && kind != Kind::panel_float) {
            if (last_row - row >= MANY && m.padded <= WIDEST_UNPACKED) {
                alignas(64) uint8_t room[Register::PANELS * WIDEST_UNPACKED * 16];
                for (; last - panel >= Register::PANELS; panel += Register::PANELS) {
                    unpacked_column<Register::PANELS>(panel, row, last_row, room);
                }
                for (; panel < last; panel++) unpacked_column<1>(panel, row, last_row, room);
                return;
            }
        }
        if (last_row - row == 1) {
            for (; last - panel >= Register::VECTOR_PANELS; panel += Register::VECTOR_PANELS) {
                run<Register::VECTOR_PANELS, 1>(panel, row);
            }
        }
        for (; last - panel >= Register::PANELS; panel += Register::PANELS) {
            column<Register::PANELS>(panel, row, last_row);
        }
        for (; panel < last; panel++) column<1>(panel, row, last_row);
    }
};

template <Kind kind> int32_t correction(const Matrix& m, const int8_t* x, int begin, int end) {
    I total = all_int(0), dithered = all_int(0);
    for (int k = begin; k < end; k += 16) {
        const I values = load_int8(x + k);
        total = total + values;
        if constexpr (kind == Kind::panel_planes) dithered = dithered + values * load_int32(m.dither + k);
    }
    return Step<kind>::ZERO * sum(total) + sum(dithered);
}

template <Kind kind, bool grouped>
void linear_kind(const Matrix& m, int first, int last, const Activations& x, float* out, size_t out_stride) {
    constexpr int ROOM = 4096;  // corrections at hand: the rows of x are taken in slices that need no more
    int32_t corrections[ROOM];
    const int groups = grouped ? (m.padded + m.group - 1) / m.group : 1;
    const int slice = groups < ROOM ? ROOM / groups : 1;
    for (int row = 0; row < x.rows; row += slice) {
        const int last_row = row + slice < x.rows ? row + slice : x.rows;
        if constexpr (kind != Kind::panel_float) {
            for (int r = row; r < last_row; r++) {
                const int8_t* codes = x.codes + static_cast<size_t>(r) * x.stride;
                int32_t* c = corrections + static_cast<size_t>(r - row) * groups;
                if constexpr (!grouped && kind != Kind::panel_planes) {
                    *c = Step<kind>::ZERO * x.sums[r];
                } else if constexpr (!grouped) {
                    *c = correction<kind>(m, codes, 0, m.padded);
                } else {
                    for (int g = 0; g < groups; g++) {
                        const int end = (g + 1) * m.group;
                        c[g] = correction<kind>(m, codes, g * m.group, end < m.padded ? end : m.padded);
                    }
                }
            }
        }
        Tiles<kind, grouped>{m, x, out, out_stride, {corrections, groups}, row}.all_panels(first, last, row, last_row);
    }
}

template <Kind kind>
void linear_of(const Matrix& m, int first, int last, const Activations& x, float* out, size_t out_stride) {
    m.group ? linear_kind<kind, true>(m, first, last, x, out, out_stride)
            : linear_kind<kind, false>(m, first, last, x, out, out_stride);
}

void linear(const Matrix& m, int first, int last, const Activations& x, float* out, size_t out_stride) {
    switch (m.kind) {
        case Kind::panel_float: return linear_kind<Kind::panel_float, false>(m, first, last, x, out, out_stride);
        case Kind::panel_int8: return linear_of<Kind::panel_int8>(m, first, last, x, out, out_stride);
        case Kind::panel_planes: return linear_of<Kind::panel_planes>(m, first, last, x, out, out_stride);
        case Kind::panel_int4: return linear_of<Kind::panel_int4>(m, first, last, x, out, out_stride);
        case Kind::panel_ternary: return linear_of<Kind::panel_ternary>(m, first, last, x, out, out_stride);
        default: return;  // not a matrix: the reader of files lets none through
    }
}

// The high plane is a panel_int4 whose codes are not centred.
template <int PANELS>
INLINE void approximate_tile(const Matrix& m, int panel, const Activations& x, float correction, float* out) {
    using S = Step<Kind::panel_int4>;
    const size_t bytes = static_cast<size_t>(m.padded / S::COLUMNS) * 64;
    const uint8_t* codes = m.codes + panel * bytes;
    I sums[PANELS][1];
    tile_sums<S>(codes, codes, bytes, x.codes, 0, m.padded / S::COLUMNS, sums);
    UNROLL for (int p = 0; p < PANELS; p++) {
        const F scale = all(x.scales[0]) * load(static_cast<const float*>(m.scales) + (panel + p) * 16);
        store(out + (panel + p) * 16, fma(all(16), to_float(sums[p][0]), all(correction)) * scale);
    }
}

void approximate(const Matrix& m, int first, int last, const Activations& x, float correction, float* out) {
    constexpr int P = Register::VECTOR_PANELS;
    for (; last - first >= P; first += P) approximate_tile<P>(m, first, x, correction, out);
    for (; first < last; first++) approximate_tile<1>(m, first, x, correction, out);
}

void exact_panel(const Matrix& m, int panel, const Activations& x, float* out16) {
    const size_t bytes = static_cast<size_t>(m.padded) * 8, groups = m.group ? (m.padded + m.group - 1) / m.group : 1;
    Matrix one = m;
    one.codes += panel * bytes;
    one.low += panel * bytes;
    one.scales = static_cast<const uint8_t*>(m.scales) + panel * groups * (m.group ? 32 : 64);
    if (one.bias) one.bias += static_cast<size_t>(panel) * 16;
    Activations first_row = x;
    first_row.rows = 1;
    linear_of<Kind::panel_planes>(one, 0, 1, first_row, out16, 0);
}

template <Kind kind> int code(const Matrix& m, int index, int k) {  // of row `index`, column k
    constexpr int COLUMNS = kind == Kind::panel_int8 ? 4 : kind == Kind::panel_ternary ? 16 : 8;
    const int lane = index % 16, inside = k % COLUMNS;
    const size_t at = ((static_cast<size_t>(index / 16) * (m.padded / COLUMNS) + k / COLUMNS) * 16 + lane) * 4 + k % 4;
    if constexpr (kind == Kind::panel_int8) return m.codes[at] - 128;
    if constexpr (kind == Kind::panel_ternary) return (m.codes[at] >> (inside / 4 * 2) & 3) - 1;
    if constexpr (kind == Kind::panel_int4) return (m.codes[at] >> (inside / 4 * 4) & 15) - 8;
    const int shift = inside / 4 * 4;
    return (m.codes[at] >> shift & 15) * 16 + (m.low[at] >> shift & 15) - 128 - m.dither[k];
}

template <Kind kind> void row_of(const Matrix& m, int index, float* y) {
    const int groups = m.group ? (m.padded + m.group - 1) / m.group : 1;
    const int panel = index / 16, lane = index % 16;
    for (int g = 0; g < groups; g++) {
        alignas(64) float scales[16];
        if (m.group) {
            const size_t at = (static_cast<size_t>(panel) * groups + g) * 16;
            store(scales, load_half(static_cast<const uint16_t*>(m.scales) + at));
        } else {
            store(scales, load(static_cast<const float*>(m.scales) + panel * 16));
        }
        const int end = m.group && (g + 1) * m.group < m.columns ? (g + 1) * m.group : m.columns;
        for (int k = g * m.group; k < end; k++) y[k] = static_cast<float>(code<kind>(m, index, k)) * scales[lane];
    }
}

void row(const Matrix& m, int index, float* y) {
    switch (m.kind) {
        case Kind::panel_float: {
            const float* lane = reinterpret_cast<const float*>(m.codes) +
                                static_cast<size_t>(index / 16) * m.padded * 16 + index % 16;
            for (int k = 0; k < m.columns; k++) y[k] = lane[static_cast<size_t>(k) * 16];
            return;
        }
        case Kind::panel_int8: return row_of<Kind::panel_int8>(m, index, y);
        case Kind::panel_planes: return row_of<Kind::panel_planes>(m, index, y);
        case Kind::panel_int4: return row_of<Kind::panel_int4>(m, index, y);
        case Kind::panel_ternary: return row_of<Kind::panel_ternary>(m, index, y);
        default: return;
    }
}

}  // namespace tinylm::ISA
