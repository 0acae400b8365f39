// One lane a register, in plain C++: for any processor, and to check the others against.
#pragma once

namespace tinylm::ISA {

struct Register {
    static constexpr int COUNT = 16, OFFSET = 0;
    static constexpr int PANELS = 1, ROWS = 1, VECTOR_PANELS = 1, VECTOR_UNROLL = 1, QUERIES = 1, SUMS = 1;
    static constexpr bool UNSIGNED_CODES = true;

    struct Bytes { uint8_t v[4]; };
    struct Wide { int8_t v[4]; };
    struct Four { int8_t v[4]; };
    struct Two { int16_t v[2]; };
    using Float = float;
    using Int = int32_t;
    using Mask = bool;
    using Pairs = Two;

    static Float all(float x) { return x; }
    static Float load(const float* p) { return *p; }
    static void store(float* p, Float a) { *p = a; }
    static Float add(Float a, Float b) { return a + b; }
    static Float sub(Float a, Float b) { return a - b; }
    static Float mul(Float a, Float b) { return a * b; }
    static Float div(Float a, Float b) { return a / b; }
    static Float max(Float a, Float b) { return a > b ? a : b; }
    static Float min(Float a, Float b) { return a < b ? a : b; }
    static Float fma(Float a, Float b, Float c) {
#ifdef FP_FAST_FMAF
        return std::fma(a, b, c);
#else
        // The product is exact in double. Rounding the sum to double and then to float would round twice, so the double
        // sum is rounded to odd: where it is inexact, its last bit is made one.
        const double p = static_cast<double>(a) * b, c2 = c, s = p + c2, back = s - p;
        const double error = (p - (s - back)) + (c2 - back);
        if (!(error != 0) || !(s - s == 0)) return static_cast<float>(s);
        uint64_t u;
        std::memcpy(&u, &s, 8);
        if (!(u & 1)) u += (error > 0) == (s > 0) ? 1 : -1;
        double odd;
        std::memcpy(&odd, &u, 8);
        return static_cast<float>(odd);
#endif
    }
    static Float round(Float a) { return (a + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23 leaves no bits for a fraction
    static Float power(Float p, Float n) {
        return p * as_float(static_cast<int32_t>(static_cast<uint32_t>(to_int(n) + 127) << 23));
    }

    static uint32_t u(Int a) { return static_cast<uint32_t>(a); }
    static Int i(uint32_t a) { return static_cast<Int>(a); }
    static Int all_int(int32_t x) { return x; }
    static Int add_int(Int a, Int b) { return i(u(a) + u(b)); }
    static Int sub_int(Int a, Int b) { return i(u(a) - u(b)); }
    static Int mul_int(Int a, Int b) { return i(u(a) * u(b)); }
    static Int and_int(Int a, Int b) { return a & b; }
    static Int or_int(Int a, Int b) { return a | b; }
    static Int xor_int(Int a, Int b) { return a ^ b; }
    static Int max_int(Int a, Int b) { return a > b ? a : b; }
    template <int n> static Int shift_left(Int a) { return i(u(a) << n); }
    template <int n> static Int shift_right(Int a) { return i(u(a) >> n); }
    template <int n> static Int shift_arithmetic(Int a) { return a >> n; }
    static Float to_float(Int a) { return static_cast<float>(a); }
    static Int to_int(Float a) {
        const float r = round(a);
        return r > -4194304.0f && r < 4194304.0f ? static_cast<int32_t>(r) : 0;
    }
    static Float as_float(Int a) { Float f; std::memcpy(&f, &a, 4); return f; }
    static Int as_int(Float a) { Int b; std::memcpy(&b, &a, 4); return b; }

    static Mask less_int(Int a, Int b) { return a < b; }
    static Mask equal(Float a, Float b) { return a == b; }
    static Mask equal_int(Int a, Int b) { return a == b; }
    static Float select(Mask m, Float a, Float b) { return m ? a : b; }
    static uint32_t bits(Mask m) { return m; }

    static Bytes load_bytes(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
    template <class Op> static Bytes map(Op op) { return {{op(0), op(1), op(2), op(3)}}; }
    template <int n> static Bytes field(Bytes a) {
        return map([&](int k) { return static_cast<uint8_t>(a.v[k] >> (2 * n) & 3); });
    }
    static Bytes mask(Bytes a, int m) {
        return map([&](int k) { return static_cast<uint8_t>(a.v[k] & m); });
    }
    template <int n> static Bytes nibble(Bytes a) {
        return map([&](int k) { return static_cast<uint8_t>(a.v[k] >> (4 * n) & 15); });
    }
    template <int n> static Bytes join(Bytes high, Bytes low) {
        return map([&](int k) {
            return static_cast<uint8_t>((high.v[k] >> (4 * n) & 15) << 4 | (low.v[k] >> (4 * n) & 15));
        });
    }
    static Wide wide(Bytes a) {
        const auto centred = [&](int k) { return static_cast<int8_t>(a.v[k] - 128); };
        return {{centred(0), centred(1), centred(2), centred(3)}};
    }
    static Four four(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
    static Two two(const int16_t* p) { return {{p[0], p[1]}}; }
    static Int dot(Int s, Bytes a, Four x) {
        return s + a.v[0] * x.v[0] + a.v[1] * x.v[1] + a.v[2] * x.v[2] + a.v[3] * x.v[3];
    }
    static Int dot_wide(Int s, Wide a, Four x) {
        return s + a.v[0] * x.v[0] + a.v[1] * x.v[1] + a.v[2] * x.v[2] + a.v[3] * x.v[3];
    }
    static Pairs load_pairs(const int8_t* p) { return {{p[0], p[1]}}; }
    static Int dot_pairs(Int s, Pairs a, Two x) { return s + a.v[0] * x.v[0] + a.v[1] * x.v[1]; }

    static Int load_int8(const int8_t* p) { return *p; }
    static Int load_int32(const int32_t* p) { return *p; }
    static Float load_half(const uint16_t* p) {
        // Exponents of halves are 112 below those of floats: shift, then multiply, which also makes subnormals right.
        const uint32_t sign = static_cast<uint32_t>(*p & 0x8000) << 16, rest = *p & 0x7FFF;
        if (rest >= 0x7C00) return as_float(i(sign | 0x7F800000u | (rest & 0x3FF) << 13));
        return as_float(i(sign | u(as_int(as_float(i(rest << 13)) * 0x1p112f))));
    }
    static void store_int8(int8_t* p, const Int (&a)[16]) {
        for (int k = 0; k < 16; k++) p[k] = static_cast<int8_t>(a[k]);
    }
    static void store_int16(int16_t* p, const Int (&a)[16]) {
        for (int k = 0; k < 16; k++) p[k] = static_cast<int16_t>(a[k]);
    }
    static void load_some(const float* p, int n, Float (&a)[16]) {
        for (int k = 0; k < 16; k++) a[k] = k < n ? p[k] : 0;
    }
    static void store_some(float* p, int n, const Float (&a)[16]) {
        for (int k = 0; k < n; k++) p[k] = a[k];
    }
    static float sum(Float a) { return a; }
    static int32_t sum_int(Int a) { return a; }
    static int32_t largest_int(Int a) { return a; }
    static float largest(Float a) { return a; }
};

}  // namespace tinylm::ISA
