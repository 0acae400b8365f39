// NEON of 64-bit ARM with dot products (ARMv8.2): sixteen lanes are four registers.
#pragma once
#include <arm_neon.h>

namespace tinylm::ISA {

struct Register {
    static constexpr int COUNT = 4, OFFSET = 0;  // sdot multiplies signed bytes
    // 1 panel x 6 rows of sums fill 24 of 32 registers.
    static constexpr int PANELS = 1, ROWS = 6, VECTOR_PANELS = 2, VECTOR_UNROLL = 2, QUERIES = 2, SUMS = 4;
    static constexpr bool UNSIGNED_CODES = false;

    using Float = float32x4_t;
    using Int = int32x4_t;
    using Mask = uint32x4_t;
    using Bytes = uint8x16_t;
    struct Wide { int8x16_t v; };
    struct Pairs { int16x4_t even, odd; };  // by position
    struct Four { int8x16_t v; };
    struct Two { int16x4_t even, odd; };

    static INLINE Float all(float x) { return vdupq_n_f32(x); }
    static INLINE Float load(const float* p) { return vld1q_f32(p); }
    static INLINE void store(float* p, Float a) { vst1q_f32(p, a); }
    static INLINE Float add(Float a, Float b) { return vaddq_f32(a, b); }
    static INLINE Float sub(Float a, Float b) { return vsubq_f32(a, b); }
    static INLINE Float mul(Float a, Float b) { return vmulq_f32(a, b); }
    static INLINE Float div(Float a, Float b) { return vdivq_f32(a, b); }
    static INLINE Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
    static INLINE Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static INLINE Float min(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
    static INLINE Float round(Float a) { return vrndnq_f32(a); }
    static INLINE Float power(Float p, Float n) {
        return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)));
    }

    static INLINE uint32x4_t u(Int a) { return vreinterpretq_u32_s32(a); }
    static INLINE Int all_int(int32_t x) { return vdupq_n_s32(x); }
    static INLINE Int add_int(Int a, Int b) { return vaddq_s32(a, b); }
    static INLINE Int sub_int(Int a, Int b) { return vsubq_s32(a, b); }
    static INLINE Int mul_int(Int a, Int b) { return vmulq_s32(a, b); }
    static INLINE Int and_int(Int a, Int b) { return vandq_s32(a, b); }
    static INLINE Int or_int(Int a, Int b) { return vorrq_s32(a, b); }
    static INLINE Int xor_int(Int a, Int b) { return veorq_s32(a, b); }
    static INLINE Int max_int(Int a, Int b) { return vmaxq_s32(a, b); }
    template <int n> static INLINE Int shift_left(Int a) { return vshlq_n_s32(a, n); }
    template <int n> static INLINE Int shift_right(Int a) { return vreinterpretq_s32_u32(vshrq_n_u32(u(a), n)); }
    template <int n> static INLINE Int shift_arithmetic(Int a) { return vshrq_n_s32(a, n); }
    static INLINE Float to_float(Int a) { return vcvtq_f32_s32(a); }
    static INLINE Int to_int(Float a) { return vcvtnq_s32_f32(a); }
    static INLINE Float as_float(Int a) { return vreinterpretq_f32_s32(a); }
    static INLINE Int as_int(Float a) { return vreinterpretq_s32_f32(a); }

    static INLINE Mask less_int(Int a, Int b) { return vcltq_s32(a, b); }
    static INLINE Mask equal(Float a, Float b) { return vceqq_f32(a, b); }
    static INLINE Mask equal_int(Int a, Int b) { return vceqq_s32(a, b); }
    static INLINE Float select(Mask m, Float a, Float b) { return vbslq_f32(m, a, b); }
    static INLINE uint32_t bits(Mask m) {
        const uint32_t weights[4] = {1, 2, 4, 8};
        return vaddvq_u32(vandq_u32(m, vld1q_u32(weights)));
    }

    static INLINE Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
    template <int n> static INLINE Bytes field(Bytes a) {
        if constexpr (n == 0) return vandq_u8(a, vdupq_n_u8(3));
        else if constexpr (n == 3) return vshrq_n_u8(a, 6);
        else return vandq_u8(vshrq_n_u8(a, 2 * n), vdupq_n_u8(3));
    }
    static INLINE Bytes mask(Bytes a, int m) { return vandq_u8(a, vdupq_n_u8(static_cast<uint8_t>(m))); }
    template <int n> static INLINE Bytes nibble(Bytes a) {
        if constexpr (n == 0) return vandq_u8(a, vdupq_n_u8(15));
        else return vshrq_n_u8(a, 4);
    }
    template <int n> static INLINE Bytes join(Bytes high, Bytes low) {
        if constexpr (n == 0) return vsliq_n_u8(low, high, 4);  // high's low nibble above low's
        else return vsriq_n_u8(high, low, 4);
    }
    static INLINE Wide wide(Bytes a) { return {vreinterpretq_s8_u8(veorq_u8(a, vdupq_n_u8(128)))}; }
    static INLINE Four four(const int8_t* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return {vreinterpretq_s8_s32(vdupq_n_s32(x))};
    }
    static INLINE Two two(const int16_t* p) { return {vdup_n_s16(p[0]), vdup_n_s16(p[1])}; }
    static INLINE Int dot(Int s, Bytes a, Four x) { return vdotq_s32(s, vreinterpretq_s8_u8(a), x.v); }
    static INLINE Int dot_wide(Int s, Wide a, Four x) { return vdotq_s32(s, a.v, x.v); }
    static INLINE Pairs load_pairs(const int8_t* p) {
        const int16x8_t both = vmovl_s8(vld1_s8(p));
        return {vget_low_s16(vuzp1q_s16(both, both)), vget_low_s16(vuzp2q_s16(both, both))};
    }
    static INLINE Int dot_pairs(Int s, Pairs a, Two x) {
        return vmlal_s16(vmlal_s16(s, a.even, x.even), a.odd, x.odd);
    }

    static INLINE Int load_int8(const int8_t* p) {
        int32_t four_bytes;
        std::memcpy(&four_bytes, p, 4);
        return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four_bytes)))));
    }
    static INLINE Int load_int32(const int32_t* p) { return vld1q_s32(p); }
    static INLINE Float load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static INLINE int16x8_t pack(Int a, Int b) { return vcombine_s16(vmovn_s32(a), vmovn_s32(b)); }
    static INLINE void store_int8(int8_t* p, const Int (&a)[4]) {
        vst1q_s8(p, vcombine_s8(vmovn_s16(pack(a[0], a[1])), vmovn_s16(pack(a[2], a[3]))));
    }
    static INLINE void store_int16(int16_t* p, const Int (&a)[4]) {
        vst1q_s16(p, pack(a[0], a[1]));
        vst1q_s16(p + 8, pack(a[2], a[3]));
    }
    static INLINE void load_some(const float* p, int n, Float (&a)[4]) {
        float x[16] = {};
        for (int k = 0; k < n; k++) x[k] = p[k];
        for (int k = 0; k < 4; k++) a[k] = load(x + k * 4);
    }
    static INLINE void store_some(float* p, int n, const Float (&a)[4]) {
        float x[16];
        for (int k = 0; k < 4; k++) store(x + k * 4, a[k]);
        for (int k = 0; k < n; k++) p[k] = x[k];
    }
    static INLINE float sum(Float a) {
        const float32x2_t c = vadd_f32(vget_low_f32(a), vget_high_f32(a));
        return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
    }
    static INLINE float largest(Float a) { return vmaxvq_f32(a); }
    static INLINE int32_t sum_int(Int a) { return vaddvq_s32(a); }
    static INLINE int32_t largest_int(Int a) { return vmaxvq_s32(a); }
};

}  // namespace tinylm::ISA
