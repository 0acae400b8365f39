// Gumbel noise as a pure function of (seed, stream, position, token): what makes a sampled text depend on nothing else.
//
// token = argmax(x + gumbel) samples from softmax(x) (the Gumbel-max trick), one token at a time, in any order, in any
// batch. Everything here is 32-bit arithmetic that every instruction set has, so kernels.cc does it 16 tokens at once;
// compile without contraction of a*b + c (-ffp-contract=off).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace tinylm {

inline uint64_t mix64(uint64_t z) {  // the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The key of one choice. `stream` numbers the sequence in its batch, `position` the chosen token in its text.
inline uint64_t gumbel_key(uint64_t seed, uint64_t stream, uint64_t position) {
    constexpr uint64_t golden = 0x9E3779B97F4A7C15ull;
    uint64_t key = mix64(seed + golden);
    key = mix64((key ^ stream) + golden);
    return mix64((key ^ position) + golden);
}

constexpr uint32_t HASH_A = 0x7FEB352Du, HASH_B = 0x846CA68Bu;  // "lowbias32", Ellis 2018: a bijection of 32 bits

inline uint32_t mix32(uint32_t x) {
    x = (x ^ (x >> 16)) * HASH_A;
    x = (x ^ (x >> 15)) * HASH_B;
    return x ^ (x >> 16);
}

// ln(1 + f) = f - f^2/2 + f^3 * (LOG[8] + LOG[7] f + ... + LOG[0] f^8) for 1 + f in [sqrt(1/2), sqrt(2)): Cephes' logf
constexpr float LOG[9] = {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                          -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
constexpr float LN2 = 0.69314718056f;
constexpr int32_t SQRT_HALF_BITS = 0x3F3504F3;  // the float sqrt(1/2)
constexpr float BELOW_ONE = 0.999999940395355224609375f;  // 1 - 2^-24

inline float log_near_one(float f, float exponent) {
    float p = LOG[0];
    for (int i = 1; i < 9; i++) p = std::fma(p, f, LOG[i]);
    p = std::fma(p, f, -0.5f);
    return std::fma(exponent, LN2, std::fma(p, f * f, f));
}

// Splits x > 0 (normal) into 2^exponent * m with m in [sqrt(1/2), sqrt(2)); returns m - 1, exactly.
inline float split_log(float x, int32_t* exponent) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    *exponent = (bits - SQRT_HALF_BITS) >> 23;
    bits -= static_cast<int32_t>(static_cast<uint32_t>(*exponent) << 23);
    float m;
    std::memcpy(&m, &bits, 4);
    return m - 1.0f;
}

// -ln(-ln(1 - w)), w uniform in (0, 1) and fine near 0: the tail of large noise, which decides what is sampled, is
// exact to 2^-32 where a uniform float near 1 would have steps of 2^-24.
inline float gumbel(uint64_t key, uint32_t token) {
    const uint32_t bits = mix32(mix32(token ^ static_cast<uint32_t>(key)) + static_cast<uint32_t>(key >> 32));
    const float uniform = static_cast<float>(static_cast<int32_t>(bits >> 1)) * 0x1p-31f + 0x1p-32f;
    const float w = uniform < BELOW_ONE ? uniform : BELOW_ONE;
    int32_t exponent;
    float f = split_log(1.0f - w, &exponent);
    if (exponent == 0) f = -w;  // 1 - w has lost w's low bits
    const float waiting = -log_near_one(f, static_cast<float>(exponent));
    f = split_log(waiting, &exponent);
    return -log_near_one(f, static_cast<float>(exponent));
}

}  // namespace tinylm
