// One vector of floats of the instruction set this file is compiled for, and bfloat16 in memory.
//
// Everything lives in an unnamed namespace: files compiled for different instruction sets must share no code.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tinylm::training {
namespace {

// A float's upper half, rounded to even; NaN stays NaN.
struct bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline bfloat16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline void put(float* to, float x) { *to = x; }
inline void put(bfloat16* to, float x) { *to = narrow(x); }

// Of whole numbers. (Those of the standard library are templates, which the linker may share between files.)
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long clamp(long x, long low, long high) { return max(low, min(x, high)); }

#if defined(__AVX512F__)

using Vec = __m512;
using Mask = __mmask16;
constexpr int LANES = 16;
constexpr int TILE_ROWS = 14;  // 14 x 2 sums, 2 vectors of B and a broadcast fill the 32 registers

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where one is NaN
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a); }

inline Mask first(long n) { return n >= LANES ? Mask(0xffff) : Mask((1u << n) - 1); }
inline Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Vec x, Mask m) { _mm512_mask_storeu_ps(p, m, x); }

inline Vec widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m256i narrow(Vec x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), even, nan);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
inline Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const bfloat16* p, Mask m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
inline void store(bfloat16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline void store(bfloat16* p, Vec x, Mask m) { _mm256_mask_storeu_epi16(p, m, narrow(x)); }

inline Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

#else  // AVX2 and FMA

using Vec = __m256;
using Mask = __m256i;
constexpr int LANES = 8;
constexpr int TILE_ROWS = 6;  // 6 x 2 sums, 2 vectors of B and a broadcast of 16 registers

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec fill(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where one is NaN
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
inline float sum(Vec a) {
    float x[LANES];
    _mm256_storeu_ps(x, a);
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
inline float largest(Vec a) {
    float x[LANES], most;
    _mm256_storeu_ps(x, a);
    most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

inline Mask first(long n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n < LANES ? n : LANES)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store(float* p, Vec x, Mask m) { _mm256_maskstore_ps(p, m, x); }

inline int count(Mask m) { return __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }
inline Vec load(const bfloat16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const bfloat16* p, Mask m) {
    bfloat16 some[LANES] = {};
    std::memcpy(some, p, count(m) * sizeof *p);
    return load(some);
}
inline void store(bfloat16* p, Vec x, Mask m) {
    float some[LANES];
    store(some, x);
    for (int i = 0; i < count(m); i++) p[i] = narrow(some[i]);
}
inline void store(bfloat16* p, Vec x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    Vec unordered = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(even, nan, _mm256_castps_si256(unordered)), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}

inline Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// For n in -126 .. 127.
inline Vec times_power_of_two(Vec x, Vec n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}

#endif

// exp(x), to 2 units in the last place for x in -87 .. 88; beyond, it stays at the ends of that range, which is 0 and
// infinity for all that is done with it here. NaN stays NaN.
inline Vec exp(Vec x) {
    x = min(fill(88.0f), max(fill(-87.0f), x));
    Vec n = round(x * fill(1.44269504f));
    Vec f = fma(n, fill(-0.693359375f), x);
    f = fma(n, fill(2.12194440e-4f), f);
    Vec p = fill(1.9875691500e-4f);  // Cephes, expf
    p = fma(p, f, fill(1.3981999507e-3f));
    p = fma(p, f, fill(8.3334519073e-3f));
    p = fma(p, f, fill(4.1665795894e-2f));
    p = fma(p, f, fill(1.6666665459e-1f));
    p = fma(p, f, fill(5.0000001201e-1f));
    p = fma(p, f * f, f) + fill(1.0f);
    return times_power_of_two(p, n);
}

// whole(at) for every whole vector of 0 .. n, and rest(at, mask) for what is left.
template <class Whole, class Rest>
inline void each(long n, Whole whole, Rest rest) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) whole(i);
    if (i < n) rest(i, first(n - i));
}

}  // namespace
}  // namespace tinylm::training
