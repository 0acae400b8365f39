// Sixteen lanes of float or int32, written once over the registers of one instruction set.
//
// A file compiled for an instruction set defines TINYLM_AVX512, TINYLM_AVXVNNI, TINYLM_AVX2 or TINYLM_NEON (none: plain
// C++), and gets the types below inside namespace tinylm::ISA, so that several may be linked into one library.
// lanes_*.h say what a register of each can do. Every function here has one result, the same bits everywhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(_MSC_VER)
#define INLINE __forceinline
#define INLINED
#define UNROLL
#else
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // after the parameters of a lambda
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#endif

#if defined(TINYLM_AVX512)
#define ISA avx512
#include "lanes_avx512.h"
#elif defined(TINYLM_AVXVNNI)
#define ISA avxvnni
#include "lanes_avx2.h"
#elif defined(TINYLM_AVX2)
#define ISA avx2
#include "lanes_avx2.h"
#elif defined(TINYLM_NEON)
#define ISA neon
#include "lanes_neon.h"
#else
#define ISA scalar
#include "lanes_scalar.h"
#endif

namespace tinylm::ISA {

constexpr int N = Register::COUNT;  // registers that make sixteen lanes

struct F { Register::Float v[N]; };
struct I { Register::Int v[N]; };
struct Mask { Register::Mask v[N]; };
struct Bytes { Register::Bytes v[N]; };      // 64 unsigned codes, four to a lane
struct Wide { Register::Wide v[N]; };        // the same, ready for dot(): codes from 0 to 255
struct Pairs { Register::Pairs v[N]; };      // 32 int8 values as int16, two to a lane
using Four = Register::Four;                 // four int8 values, the same in every lane
using Two = Register::Two;                   // two int16 values, the same in every lane

using Every = std::make_integer_sequence<int, N>;

// f(0), ... f(n - 1), with constants: for arrays of sums that must stay in registers, where compilers fail with a loop.
template <class Call, int... k> INLINE void repeat_each(Call f, std::integer_sequence<int, k...>) {
    (f(std::integral_constant<int, k>{}), ...);
}
template <int n, class Call> INLINE void repeat(Call f) { repeat_each(f, std::make_integer_sequence<int, n>{}); }

// Op on each register of the operands.
template <class R, auto Op, class A, int... K>
INLINE R each(const A& a, std::integer_sequence<int, K...>) { return R{{Op(a.v[K])...}}; }
template <class R, auto Op, class A, class B, int... K>
INLINE R each(const A& a, const B& b, std::integer_sequence<int, K...>) { return R{{Op(a.v[K], b.v[K])...}}; }
template <class R, auto Op, class A, class B, class C, int... K>
INLINE R each(const A& a, const B& b, const C& c, std::integer_sequence<int, K...>) {
    return R{{Op(a.v[K], b.v[K], c.v[K])...}};
}
// The same, where the last operand is one register for all lanes.
template <class R, auto Op, class A, class B, class S, int... K>
INLINE R each_with(const A& a, const B& b, const S& s, std::integer_sequence<int, K...>) {
    return R{{Op(a.v[K], b.v[K], s)...}};
}
// Op on the address of each register's first lane, lanes `Step` elements apart.
template <class R, auto Op, int Step, class T, int... K>
INLINE R each_at(const T* p, std::integer_sequence<int, K...>) { return R{{Op(p + K * (16 / N) * Step)...}}; }
template <class R, auto Op, class T, int... K>
INLINE R each_all(T x, std::integer_sequence<int, K...>) { return R{{(static_cast<void>(K), Op(x))...}}; }
template <auto Op, class A, class T, int... K>
INLINE void each_store(T* p, const A& a, std::integer_sequence<int, K...>) { (Op(p + K * (16 / N), a.v[K]), ...); }

INLINE F all(float x) { return each_all<F, Register::all>(x, Every{}); }
INLINE F load(const float* p) { return each_at<F, Register::load, 1>(p, Every{}); }
INLINE void store(float* p, F a) { each_store<Register::store>(p, a, Every{}); }
INLINE F operator+(F a, F b) { return each<F, Register::add>(a, b, Every{}); }
INLINE F operator-(F a, F b) { return each<F, Register::sub>(a, b, Every{}); }
INLINE F operator*(F a, F b) { return each<F, Register::mul>(a, b, Every{}); }
INLINE F operator/(F a, F b) { return each<F, Register::div>(a, b, Every{}); }
INLINE F fma(F a, F b, F c) { return each<F, Register::fma>(a, b, c, Every{}); }  // a * b + c, rounded once
INLINE F max(F a, F b) { return each<F, Register::max>(a, b, Every{}); }  // a > b ? a : b: b if either is NaN
INLINE F min(F a, F b) { return each<F, Register::min>(a, b, Every{}); }  // a < b ? a : b
INLINE F round(F a) { return each<F, Register::round>(a, Every{}); }              // to even; |a| < 2^22
INLINE F power(F p, F n) { return each<F, Register::power>(p, n, Every{}); }      // p * 2^n; n integral, -126 .. 126

INLINE I all_int(int32_t x) { return each_all<I, Register::all_int>(x, Every{}); }
INLINE I operator+(I a, I b) { return each<I, Register::add_int>(a, b, Every{}); }
INLINE I operator-(I a, I b) { return each<I, Register::sub_int>(a, b, Every{}); }
INLINE I operator*(I a, I b) { return each<I, Register::mul_int>(a, b, Every{}); }
INLINE I operator&(I a, I b) { return each<I, Register::and_int>(a, b, Every{}); }
INLINE I operator|(I a, I b) { return each<I, Register::or_int>(a, b, Every{}); }
INLINE I operator^(I a, I b) { return each<I, Register::xor_int>(a, b, Every{}); }
INLINE I max(I a, I b) { return each<I, Register::max_int>(a, b, Every{}); }
template <int n> INLINE I shift_left(I a) { return each<I, Register::shift_left<n>>(a, Every{}); }
template <int n> INLINE I shift_right(I a) { return each<I, Register::shift_right<n>>(a, Every{}); }  // zeros in
template <int n> INLINE I shift_arithmetic(I a) { return each<I, Register::shift_arithmetic<n>>(a, Every{}); }
INLINE F to_float(I a) { return each<F, Register::to_float>(a, Every{}); }
INLINE I to_int(F a) { return each<I, Register::to_int>(a, Every{}); }  // rounded to even; |a| < 2^22
INLINE F as_float(I a) { return each<F, Register::as_float>(a, Every{}); }
INLINE I as_int(F a) { return each<I, Register::as_int>(a, Every{}); }

INLINE Mask operator<(I a, I b) { return each<Mask, Register::less_int>(a, b, Every{}); }
INLINE Mask operator==(F a, F b) { return each<Mask, Register::equal>(a, b, Every{}); }
INLINE Mask operator==(I a, I b) { return each<Mask, Register::equal_int>(a, b, Every{}); }
INLINE F select(Mask m, F a, F b) { return each<F, Register::select>(m, a, b, Every{}); }

// Bytes: codes of weights. field<i> is two bits, i = 0 the lowest; join makes u = 16 * high + low of two nibble planes,
// for the first four columns of a step or the second.
INLINE Bytes load_bytes(const uint8_t* p) { return each_at<Bytes, Register::load_bytes, 4>(p, Every{}); }
template <int i> INLINE Bytes field(Bytes a) { return each<Bytes, Register::field<i>>(a, Every{}); }
template <int i> INLINE Bytes nibble(Bytes a) { return each<Bytes, Register::nibble<i>>(a, Every{}); }
template <int i> INLINE Bytes join(Bytes high, Bytes low) { return each<Bytes, Register::join<i>>(high, low, Every{}); }
INLINE Bytes mask(Bytes a, int m) {
    for (auto& v : a.v) v = Register::mask(v, m);
    return a;
}
INLINE Wide wide(Bytes a) { return each<Wide, Register::wide>(a, Every{}); }
INLINE Four four(const int8_t* p) { return Register::four(p); }
INLINE Two two(const int16_t* p) { return Register::two(p); }
// Each lane adds the products of its four codes with the four values. Bytes: codes up to 127, or 255 if UNSIGNED_CODES.
// Wide: any code, and what is multiplied is code + OFFSET - 128: instruction sets that multiply signed bytes have
// OFFSET 0, the others 128.
constexpr int OFFSET = Register::OFFSET;
INLINE I dot(I sum, Bytes a, Four x) { return each_with<I, Register::dot>(sum, a, x, Every{}); }
INLINE I dot(I sum, Wide a, Four x) { return each_with<I, Register::dot_wide>(sum, a, x, Every{}); }
INLINE Pairs load_pairs(const int8_t* p) { return each_at<Pairs, Register::load_pairs, 2>(p, Every{}); }
INLINE I dot(I sum, Pairs a, Two x) { return each_with<I, Register::dot_pairs>(sum, a, x, Every{}); }

INLINE I load_int8(const int8_t* p) { return each_at<I, Register::load_int8, 1>(p, Every{}); }
INLINE I load_int32(const int32_t* p) { return each_at<I, Register::load_int32, 1>(p, Every{}); }
INLINE F load_half(const uint16_t* p) { return each_at<F, Register::load_half, 1>(p, Every{}); }
INLINE void store_int8(int8_t* p, I a) { Register::store_int8(p, a.v); }     // values must fit
INLINE void store_int16(int16_t* p, I a) { Register::store_int16(p, a.v); }

INLINE I lane_numbers() {
    alignas(64) static constexpr int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_int32(numbers);
}
INLINE Mask lanes_below(int n) { return lane_numbers() < all_int(n); }

// The first n lanes of memory that may end there; zeros in the others.
INLINE F load(const float* p, int n) {
    if (n >= 16) return load(p);
    F a;
    Register::load_some(p, n, a.v);
    return a;
}
INLINE void store(float* p, F a, int n) {
    if (n >= 16) return store(p, a);
    Register::store_some(p, n, a.v);
}

// a[i] + a[i+8], then + [i+4], + [i+2], + [1]: the one order of every sum across lanes.
INLINE float sum(F a) {
    for (int n = N; n > 1; n /= 2) {
        for (int k = 0; k < n / 2; k++) a.v[k] = Register::add(a.v[k], a.v[k + n / 2]);
    }
    return Register::sum(a.v[0]);
}
INLINE int32_t sum(I a) {
    for (int k = 1; k < N; k++) a.v[0] = Register::add_int(a.v[0], a.v[k]);
    return Register::sum_int(a.v[0]);
}
INLINE int32_t largest(I a) {
    for (int k = 1; k < N; k++) a.v[0] = Register::max_int(a.v[0], a.v[k]);
    return Register::largest_int(a.v[0]);
}
INLINE float largest(F a) {
    for (int k = 1; k < N; k++) a.v[0] = Register::max(a.v[0], a.v[k]);
    return Register::largest(a.v[0]);
}
INLINE uint32_t bits(Mask m) {  // lane i in bit i
    uint32_t b = 0;
    for (int k = 0; k < N; k++) b |= Register::bits(m.v[k]) << (k * (16 / N));
    return b;
}

}  // namespace tinylm::ISA
