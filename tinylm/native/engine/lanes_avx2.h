// AVX2 with FMA and F16C: sixteen lanes are two registers. With TINYLM_AVXVNNI, also vpdpbusd and vpdpwssd of 256 bits.
#pragma once
#include <immintrin.h>

namespace tinylm::ISA {

struct Register {
    static constexpr int COUNT = 2;
    // 16 registers: sums of 1 panel x 4 rows fill half of them, codes, values and products most of the rest.
    static constexpr int PANELS = 1, ROWS = 4, VECTOR_PANELS = 2, VECTOR_UNROLL = 2, QUERIES = 2, SUMS = 4;

    using Float = __m256;
    using Int = __m256i;
    using Mask = __m256i;
    using Bytes = __m256i;
    struct Pairs { __m256i v; };
    struct Four { __m256i v; };
    struct Two { __m256i v; };

    static INLINE Float all(float x) { return _mm256_set1_ps(x); }
    static INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
    static INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
    static INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
    static INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
    static INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
    static INLINE Float round(Float a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static INLINE Float power(Float p, Float n) {
        const Int exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }

    static INLINE Int all_int(int32_t x) { return _mm256_set1_epi32(x); }
    static INLINE Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static INLINE Int sub_int(Int a, Int b) { return _mm256_sub_epi32(a, b); }
    static INLINE Int mul_int(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
    static INLINE Int and_int(Int a, Int b) { return _mm256_and_si256(a, b); }
    static INLINE Int or_int(Int a, Int b) { return _mm256_or_si256(a, b); }
    static INLINE Int xor_int(Int a, Int b) { return _mm256_xor_si256(a, b); }
    static INLINE Int max_int(Int a, Int b) { return _mm256_max_epi32(a, b); }
    template <int n> static INLINE Int shift_left(Int a) { return _mm256_slli_epi32(a, n); }
    template <int n> static INLINE Int shift_right(Int a) { return _mm256_srli_epi32(a, n); }
    template <int n> static INLINE Int shift_arithmetic(Int a) { return _mm256_srai_epi32(a, n); }
    static INLINE Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
    static INLINE Int to_int(Float a) { return _mm256_cvtps_epi32(a); }
    static INLINE Float as_float(Int a) { return _mm256_castsi256_ps(a); }
    static INLINE Int as_int(Float a) { return _mm256_castps_si256(a); }

    static INLINE Mask less_int(Int a, Int b) { return _mm256_cmpgt_epi32(b, a); }
    static INLINE Mask equal(Float a, Float b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
    static INLINE Mask equal_int(Int a, Int b) { return _mm256_cmpeq_epi32(a, b); }
    static INLINE Float select(Mask m, Float a, Float b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
    static INLINE uint32_t bits(Mask m) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
    }

    static INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static INLINE Bytes load_bytes(const uint8_t* p) { return load_256(p); }
    template <int n> static INLINE Bytes field(Bytes a) {
        return _mm256_and_si256(n ? _mm256_srli_epi16(a, 2 * n) : a, _mm256_set1_epi8(3));
    }
    static INLINE Bytes mask(Bytes a, int m) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(m))); }
    template <int n> static INLINE Bytes nibble(Bytes a) {
        return _mm256_and_si256(n ? _mm256_srli_epi16(a, 4) : a, _mm256_set1_epi8(15));
    }
    template <int n> static INLINE Bytes join(Bytes high, Bytes low) {
        return _mm256_or_si256(_mm256_and_si256(n ? high : _mm256_slli_epi16(high, 4), _mm256_set1_epi8(-16)),
                               nibble<n>(low));
    }
    static INLINE Four four(const int8_t* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return {_mm256_set1_epi32(x)};
    }
    static INLINE Two two(const int16_t* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return {_mm256_set1_epi32(x)};
    }
    static INLINE Pairs load_pairs(const int8_t* p) { return {_mm256_cvtepi8_epi16(load_128(p))}; }

#if defined(TINYLM_AVXVNNI)
    static constexpr int OFFSET = 128;
    static constexpr bool UNSIGNED_CODES = true;  // dot() takes codes up to 255
    struct Wide { __m256i v; };
    static INLINE Wide wide(Bytes a) { return {a}; }
    static INLINE Int dot(Int s, Bytes a, Four x) { return _mm256_dpbusd_avx_epi32(s, a, x.v); }
    static INLINE Int dot_wide(Int s, Wide a, Four x) { return _mm256_dpbusd_avx_epi32(s, a.v, x.v); }
    static INLINE Int dot_pairs(Int s, Pairs a, Two x) { return _mm256_dpwssd_avx_epi32(s, a.v, x.v); }
#else
    static constexpr int OFFSET = 0;
    static constexpr bool UNSIGNED_CODES = false;  // products of codes above 128 would saturate
    // vpmaddubsw adds two products of an unsigned and a signed byte, and saturates. |code - 128| <= 128 times a value
    // in -127 .. 127 with the code's sign: at most 2 * 128 * 127 = 32512, which fits.
    struct Wide { __m256i magnitude, sign; };
    static INLINE Wide wide(Bytes a) {
        const __m256i centred = _mm256_xor_si256(a, _mm256_set1_epi8(-128));
        return {_mm256_abs_epi8(centred), centred};
    }
    static INLINE Int add_products(Int s, __m256i products) {
        return _mm256_add_epi32(s, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
    }
    static INLINE Int dot(Int s, Bytes a, Four x) { return add_products(s, _mm256_maddubs_epi16(a, x.v)); }
    static INLINE Int dot_wide(Int s, Wide a, Four x) {
        return add_products(s, _mm256_maddubs_epi16(a.magnitude, _mm256_sign_epi8(x.v, a.sign)));
    }
    static INLINE Int dot_pairs(Int s, Pairs a, Two x) { return _mm256_add_epi32(s, _mm256_madd_epi16(a.v, x.v)); }
#endif

    static INLINE Int load_int8(const int8_t* p) {
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static INLINE Int load_int32(const int32_t* p) { return load_256(p); }
    static INLINE Float load_half(const uint16_t* p) { return _mm256_cvtph_ps(load_128(p)); }
    static INLINE __m256i pack(const Int (&a)[2]) {  // vpackssdw leaves the quarters as 0 2 1 3
        return _mm256_permute4x64_epi64(_mm256_packs_epi32(a[0], a[1]), 0xD8);
    }
    static INLINE void store_int8(int8_t* p, const Int (&a)[2]) {
        const __m256i b = pack(a);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packs_epi16(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)));
    }
    static INLINE void store_int16(int16_t* p, const Int (&a)[2]) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack(a));
    }
    static INLINE Mask below(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static INLINE void load_some(const float* p, int n, Float (&a)[2]) {
        a[0] = _mm256_maskload_ps(p, below(n));
        a[1] = _mm256_maskload_ps(p + 8, below(n - 8));
    }
    static INLINE void store_some(float* p, int n, const Float (&a)[2]) {
        _mm256_maskstore_ps(p, below(n), a[0]);
        _mm256_maskstore_ps(p + 8, below(n - 8), a[1]);
    }
    static INLINE float sum(Float a) {
        __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        c = _mm_add_ps(c, _mm_movehl_ps(c, c));
        return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
    }
    static INLINE float largest(Float a) {
        __m128 c = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        c = _mm_max_ps(c, _mm_movehl_ps(c, c));
        return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
    }
    static INLINE int32_t sum_int(Int a) {
        __m128i c = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4E));
        return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xB1)));
    }
    static INLINE int32_t largest_int(Int a) {
        __m128i c = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        c = _mm_max_epi32(c, _mm_shuffle_epi32(c, 0x4E));
        return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xB1)));
    }
};

}  // namespace tinylm::ISA
