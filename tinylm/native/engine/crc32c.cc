// CRC-32C: reflected polynomial 0x82F63B78, as in iSCSI, ext4 and SSE 4.2's instruction.
#include <array>
#include <cstring>

#include "file.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <nmmintrin.h>
#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
#include <arm_acle.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

namespace tinylm {
namespace {

constexpr uint32_t POLYNOMIAL = 0x82F63B78u;

constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
        tables[0][byte] = crc;
    }
    for (int t = 1; t < 8; t++)
        for (int byte = 0; byte < 256; byte++)
            tables[t][byte] = (tables[t - 1][byte] >> 8) ^ tables[0][tables[t - 1][byte] & 255];
    return tables;
}

uint64_t load(const uint8_t* data) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    return word;
}

uint32_t by_table(uint32_t crc, const uint8_t* data, size_t size) {
    static constexpr auto tables = make_tables();
    for (; size >= 8; data += 8, size -= 8) {
        const uint64_t word = load(data) ^ crc;
        crc = 0;
        for (int t = 0; t < 8; t++) crc ^= tables[7 - t][(word >> (8 * t)) & 255];
    }
    for (; size; data++, size--) crc = (crc >> 8) ^ tables[0][(crc ^ *data) & 255];
    return crc;
}

// The product of two polynomials modulo the CRC's (bit 31 is x^0).
uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = (b >> 1) ^ (b & 1 ? POLYNOMIAL : 0);
    }
    return product;
}

// The CRC after `bytes` more zero bytes: times x^(8 bytes).
uint32_t shift(uint32_t crc, uint64_t bytes) {
    for (uint32_t power = 1u << 23; bytes; bytes >>= 1, power = multiply(power, power))
        if (bytes & 1) crc = multiply(power, crc);
    return crc;
}

#if defined(__x86_64__) || defined(_M_X64)
#define TARGET __attribute__((target("sse4.2")))
TARGET inline uint32_t step(uint32_t crc, uint64_t word) { return static_cast<uint32_t>(_mm_crc32_u64(crc, word)); }
bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__linux__)
#define TARGET __attribute__((target("+crc")))
TARGET inline uint32_t step(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
bool has_instruction() { return getauxval(AT_HWCAP) & (1 << 7); }  // HWCAP_CRC32
#elif defined(__aarch64__) && defined(__APPLE__)
#define TARGET __attribute__((target("crc")))
TARGET inline uint32_t step(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
bool has_instruction() { return true; }
#else
#define TARGET
inline uint32_t step(uint32_t crc, uint64_t) { return crc; }
bool has_instruction() { return false; }
#endif

// The instruction takes three cycles and a new one can start in each: three parts of the data are read at a time.
TARGET uint32_t by_instruction(uint32_t crc, const uint8_t* data, size_t size) {
    const size_t part = size / 24 * 8;
    uint32_t a = crc, b = 0, c = 0;
    for (size_t at = 0; at < part; at += 8) {
        a = step(a, load(data + at));
        b = step(b, load(data + part + at));
        c = step(c, load(data + 2 * part + at));
    }
    return by_table(shift(shift(a, part) ^ b, part) ^ c, data + 3 * part, size - 3 * part);
}

}  // namespace

uint32_t crc32c(const uint8_t* data, size_t size) {
    return ~(has_instruction() ? by_instruction : by_table)(~0u, data, size);
}

}  // namespace tinylm
