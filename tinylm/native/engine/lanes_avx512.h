// AVX512 (F, BW, VL, DQ) with VNNI: sixteen lanes are one register.
#pragma once
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 sees faults in its own intrinsics (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace tinylm::ISA {

struct Register {
    static constexpr int COUNT = 1, OFFSET = 128;
    // 4 panels x 4 rows are 16 sums for 8 loads, which reaches vpdpbusd's peak; with 6 rows, GCC runs out of registers.
    // A single row needs 8 sums in flight to hide the latency.
    static constexpr int PANELS = 4, ROWS = 4, VECTOR_PANELS = 4, VECTOR_UNROLL = 2, QUERIES = 4, SUMS = 16;
    static constexpr bool UNSIGNED_CODES = true;  // dot() takes codes up to 255

    using Float = __m512;
    using Int = __m512i;
    using Mask = __mmask16;
    using Bytes = __m512i;
    struct Wide { __m512i v; };
    struct Pairs { __m512i v; };
    struct Four { __m512i v; };
    struct Two { __m512i v; };

    static INLINE Float all(float x) { return _mm512_set1_ps(x); }
    static INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
    static INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
    static INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
    static INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
    static INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
    static INLINE Float round(Float a) {
        return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static INLINE Float power(Float p, Float n) { return _mm512_scalef_ps(p, n); }

    static INLINE Int all_int(int32_t x) { return _mm512_set1_epi32(x); }
    static INLINE Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static INLINE Int sub_int(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    static INLINE Int mul_int(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
    static INLINE Int and_int(Int a, Int b) { return _mm512_and_si512(a, b); }
    static INLINE Int or_int(Int a, Int b) { return _mm512_or_si512(a, b); }
    static INLINE Int xor_int(Int a, Int b) { return _mm512_xor_si512(a, b); }
    static INLINE Int max_int(Int a, Int b) { return _mm512_max_epi32(a, b); }
    template <int n> static INLINE Int shift_left(Int a) { return _mm512_slli_epi32(a, n); }
    template <int n> static INLINE Int shift_right(Int a) { return _mm512_srli_epi32(a, n); }
    template <int n> static INLINE Int shift_arithmetic(Int a) { return _mm512_srai_epi32(a, n); }
    static INLINE Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
    static INLINE Int to_int(Float a) { return _mm512_cvtps_epi32(a); }
    static INLINE Float as_float(Int a) { return _mm512_castsi512_ps(a); }
    static INLINE Int as_int(Float a) { return _mm512_castps_si512(a); }

    static INLINE Mask less_int(Int a, Int b) { return _mm512_cmplt_epi32_mask(a, b); }
    static INLINE Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static INLINE Mask equal_int(Int a, Int b) { return _mm512_cmpeq_epi32_mask(a, b); }
    static INLINE Float select(Mask m, Float a, Float b) { return _mm512_mask_mov_ps(b, m, a); }
    static INLINE uint32_t bits(Mask m) { return m; }

    static INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    template <int n> static INLINE Bytes field(Bytes a) {
        return _mm512_and_si512(n ? _mm512_srli_epi16(a, 2 * n) : a, _mm512_set1_epi8(3));
    }
    static INLINE Bytes mask(Bytes a, int m) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(m))); }
    template <int n> static INLINE Bytes nibble(Bytes a) {
        return _mm512_and_si512(n ? _mm512_srli_epi16(a, 4) : a, _mm512_set1_epi8(15));
    }
    template <int n> static INLINE Bytes join(Bytes high, Bytes low) {
        constexpr int choose = 0xCA;  // a ? b : c, bit by bit
        return _mm512_ternarylogic_epi32(_mm512_set1_epi8(-16), n ? high : _mm512_slli_epi16(high, 4),
                                         n ? _mm512_srli_epi16(low, 4) : low, choose);
    }
    static INLINE Wide wide(Bytes a) { return {a}; }
    static INLINE Four four(const int8_t* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return {_mm512_set1_epi32(x)};
    }
    static INLINE Two two(const int16_t* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return {_mm512_set1_epi32(x)};
    }
    static INLINE Int dot(Int s, Bytes a, Four x) { return _mm512_dpbusd_epi32(s, a, x.v); }
    static INLINE Int dot_wide(Int s, Wide a, Four x) { return _mm512_dpbusd_epi32(s, a.v, x.v); }
    static INLINE Pairs load_pairs(const int8_t* p) {
        return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static INLINE Int dot_pairs(Int s, Pairs a, Two x) { return _mm512_dpwssd_epi32(s, a.v, x.v); }

    static INLINE Int load_int8(const int8_t* p) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static INLINE Int load_int32(const int32_t* p) { return _mm512_loadu_si512(p); }
    static INLINE Float load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static INLINE void store_int8(int8_t* p, const Int (&a)[1]) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a[0]));
    }
    static INLINE void store_int16(int16_t* p, const Int (&a)[1]) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a[0]));
    }
    static INLINE void load_some(const float* p, int n, Float (&a)[1]) {
        a[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
    }
    static INLINE void store_some(float* p, int n, const Float (&a)[1]) {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a[0]);
    }
    static INLINE float sum(Float a) {
        const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
        __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
        c = _mm_add_ps(c, _mm_movehl_ps(c, c));
        return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
    }
    static INLINE int32_t sum_int(Int a) { return _mm512_reduce_add_epi32(a); }
    static INLINE int32_t largest_int(Int a) { return _mm512_reduce_max_epi32(a); }
    static INLINE float largest(Float a) { return _mm512_reduce_max_ps(a); }
};

}  // namespace tinylm::ISA
