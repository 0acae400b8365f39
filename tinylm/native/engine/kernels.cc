// The kernels of one instruction set; see lanes.h for how this file becomes several.
#include "kernels.h"

#include "gumbel.h"
#include "lanes.h"

namespace tinylm::ISA {

constexpr float LOG2_E = 1.44269504f;

// 2^x for -126 <= x <= 126 (clamped), relative error below 2e-7; the polynomial is minimax on [-1/2, 1/2].
INLINE F exp2(F x) {
    x = min(all(126), max(all(-126), x));
    const F n = round(x), f = x - n;
    F p = all(0.00132647273f);
    p = fma(p, f, all(0.00967151299f));
    p = fma(p, f, all(0.0555073358f));
    p = fma(p, f, all(0.240222424f));
    p = fma(p, f, all(0.693147004f));
    return power(fma(p, f, all(1)), n);
}

INLINE F exp(F x) { return exp2(x * all(LOG2_E)); }
INLINE F silu(F x) { return x / (all(1) + exp(all(0) - x)); }
INLINE F tanh(F x) { return all(1) - all(2) / (all(1) + exp(x + x)); }
INLINE F relu(F x) { return max(all(0), x); }

// Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
INLINE F erf(F x) {
    const I sign = as_int(x) & all_int(INT32_MIN);
    const F a = as_float(as_int(x) & all_int(0x7FFFFFFF)), t = all(1) / fma(all(0.3275911f), a, all(1));
    F p = all(1.061405429f);
    p = fma(p, t, all(-1.453152027f));
    p = fma(p, t, all(1.421413741f));
    p = fma(p, t, all(-0.284496736f));
    p = fma(p, t, all(0.254829592f));
    const F magnitude = all(1) - (p * t) * exp(all(0) - a * a);
    return as_float(as_int(magnitude) | sign);
}

INLINE F gelu(F x) { return (all(0.5f) * x) * (all(1) + erf(x * all(0.70710678f))); }
INLINE F gelu_tanh(F x) {
    return (all(0.5f) * x) * (all(1) + tanh(all(0.79788456f) * fma(all(0.044715f) * x, x * x, x)));
}

// y[i] = op(x[i]) for the n floats at x; op(i, x) may look at others.
template <class Op> INLINE void map(const float* x, int n, float* y, Op op) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(y + i, op(load(x + i)));
    if (i < n) store(y + i, op(load(x + i, n - i)), n - i);
}
template <class Op> INLINE void map(const float* a, const float* b, int n, float* y, Op op) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(y + i, op(load(a + i), load(b + i)));
    if (i < n) store(y + i, op(load(a + i, n - i), load(b + i, n - i)), n - i);
}

float quantize(const float* x, int n, int padded, float fixed, int8_t* codes, int32_t* sum_of_codes) {
    // The bits of magnitudes compare like the magnitudes, with infinity and then NaN above all numbers.
    I most = all_int(0);
    for (int i = 0; i < n; i += 16) most = max(as_int(load(x + i, n - i)) & all_int(0x7FFFFFFF), most);
    const int32_t most_bits = largest(most);
    float m, scale = fixed, inverse;
    std::memcpy(&m, &most_bits, 4);
    if (!(m < INFINITY)) {
        scale = NAN;
        inverse = 0;
    } else if (fixed != 0) {
        inverse = 1.0f / fixed;
    } else if (m < 1e-30f) {
        scale = inverse = 0;
    } else {
        scale = m / 127.0f;
        inverse = 127.0f / m;
    }
    I total = all_int(0);
    int i = 0;
    for (; i < n; i += 16) {
        F y = load(x + i, n - i) * all(inverse);
        if (!(m < INFINITY)) y = all(0);
        const I code = to_int(max(all(-127), min(all(127), y)));
        total = total + code;
        store_int8(codes + i, code);
    }
    for (; i < padded; i += 16) store_int8(codes + i, all_int(0));
    *sum_of_codes = sum(total);
    return scale;
}

}  // namespace tinylm::ISA

#include "linear.h"
#include "attention.h"

namespace tinylm::ISA {

void rmsnorm(const float* x, const float* scale, int n, float eps, float* y) {
    F squares = all(0);
    for (int i = 0; i < n; i += 16) {
        const F v = load(x + i, n - i);
        squares = fma(v, v, squares);
    }
    const F r = all(1.0f / sqrtf(sum(squares) / static_cast<float>(n) + eps));
    map(x, scale, n, y, [&](F v, F g) { return (v * r) * g; });
}

void layernorm(const float* x, const float* scale, const float* bias, int n, float eps, float* y) {
    F total = all(0), squares = all(0);
    for (int i = 0; i < n; i += 16) total = total + load(x + i, n - i);
    const F mean = all(sum(total) / static_cast<float>(n));
    for (int i = 0; i < n; i += 16) {
        F z = load(x + i, n - i) - mean;
        if (i + 16 > n) z = select(lanes_below(n - i), z, all(0));
        squares = fma(z, z, squares);
    }
    const F r = all(1.0f / sqrtf(sum(squares) / static_cast<float>(n) + eps));
    for (int i = 0; i < n; i += 16) {
        const F z = load(x + i, n - i) - mean;
        store(y + i, fma(z * r, load(scale + i, n - i), load(bias + i, n - i)), n - i);
    }
}

void activate(int mlp, float* x, int n) {
    switch (mlp) {
        case 3: return map(x, n, x, [](F v) { return gelu(v); });
        case 4: return map(x, n, x, [](F v) { return gelu_tanh(v); });
        case 5: return map(x, n, x, [](F v) { return relu(v) * relu(v); });
    }
}

void gate(int mlp, const float* gate, const float* up, float* y, int n) {
    switch (mlp) {
        case 0: return map(gate, up, n, y, [](F g, F u) { return silu(g) * u; });
        case 1: return map(gate, up, n, y, [](F g, F u) { return gelu(g) * u; });
        case 2: return map(gate, up, n, y, [](F g, F u) { return relu(g) * u; });
    }
}

void tanh_all(float* x, int n) {
    map(x, n, x, [](F v) { return tanh(v); });
}

void softcap(float* x, int n, float cap) {
    map(x, n, x, [&](F v) { return all(cap) * tanh(v / all(cap)); });
}

void add(float* x, const float* y, int n) {
    map(x, y, n, x, [](F a, F b) { return a + b; });
}

void rotate(float* x, const float* cosines, const float* sines, int half) {
    for (int i = 0; i < half; i += 16) {
        const int n = half - i;
        const F a = load(x + i, n), b = load(x + half + i, n), c = load(cosines + i, n), s = load(sines + i, n);
        store(x + i, fma(a, c, all(0) - b * s), n);
        store(x + half + i, fma(b, c, a * s), n);
    }
}

float largest_of(const float* x, int n) {
    F most = all(-INFINITY);
    int i = 0;
    for (; i + 16 <= n; i += 16) most = max(load(x + i), most);
    if (i < n) most = max(select(lanes_below(n - i), load(x + i, n - i), all(-INFINITY)), most);
    return largest(most);
}

int argmax(const float* x, int n) {
    const F most = all(largest_of(x, n));
    for (int i = 0; i < n; i += 16) {
        uint32_t equal = bits(load(x + i, n - i) == most);
        if (i + 16 > n) equal &= (1u << (n - i)) - 1;
        for (int lane = 0; equal; lane++, equal >>= 1) {
            if (equal & 1) return i + lane;
        }
    }
    return 0;
}

INLINE I mix(I x) {
    x = (x ^ shift_right<16>(x)) * all_int(static_cast<int32_t>(HASH_A));
    x = (x ^ shift_right<15>(x)) * all_int(static_cast<int32_t>(HASH_B));
    return x ^ shift_right<16>(x);
}

INLINE F log_near_one(F f, I exponent) {
    F p = all(LOG[0]);
    UNROLL for (int i = 1; i < 9; i++) p = fma(p, f, all(LOG[i]));
    p = fma(p, f, all(-0.5f));
    return fma(to_float(exponent), all(LN2), fma(p, f * f, f));
}

INLINE F split_log(F x, I* exponent) {
    const I b = as_int(x);
    *exponent = shift_arithmetic<23>(b - all_int(SQRT_HALF_BITS));
    return as_float(b - shift_left<23>(*exponent)) - all(1);
}

// gumbel.h, sixteen tokens at once
INLINE F gumbel(I token, I key_low, I key_high) {
    const I hash = mix(mix(token ^ key_low) + key_high);
    const F w = min(to_float(shift_right<1>(hash)) * all(0x1p-31f) + all(0x1p-32f), all(BELOW_ONE));
    I exponent;
    F f = split_log(all(1) - w, &exponent);
    f = select(exponent == all_int(0), all(0) - w, f);
    const F waiting = all(0) - log_near_one(f, exponent);
    f = split_log(waiting, &exponent);
    return all(0) - log_near_one(f, exponent);
}

void add_gumbel(const float* x, float inverse, uint64_t key, int first, int n, float* y) {
    const I low = all_int(static_cast<int32_t>(static_cast<uint32_t>(key)));
    const I high = all_int(static_cast<int32_t>(static_cast<uint32_t>(key >> 32)));
    for (int i = 0; i < n; i += 16) {
        const I token = lane_numbers() + all_int(first + i);
        store(y + i, load(x + i, n - i) * all(inverse) + gumbel(token, low, high), n - i);
    }
}

#define NAME(x) #x
#define NAME_OF(x) NAME(x)

extern const Kernels table;
const Kernels table = {
    NAME_OF(ISA), quantize, rmsnorm,  layernorm,   linear,     row,          activate,    gate,        tanh_all,
    softcap,      add,      rotate,   store_float, store_int8, attend_float, attend_int8, approximate, exact_panel,
    argmax,       largest_of, add_gumbel,
};

}  // namespace tinylm::ISA
