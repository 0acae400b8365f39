// Which table of kernels: the best that this processor and operating system can run, or one by name.
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tinylm {

namespace scalar { extern const Kernels table; }

#if defined(__x86_64__) || defined(_M_X64)

namespace avx512 { extern const Kernels table; }
namespace avxvnni { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }

namespace {

struct Registers { unsigned a, b, c, d; };

Registers cpuid(unsigned leaf, unsigned part) {
#if defined(_MSC_VER)
    int r[4];
    __cpuidex(r, static_cast<int>(leaf), static_cast<int>(part));
    return {static_cast<unsigned>(r[0]), static_cast<unsigned>(r[1]), static_cast<unsigned>(r[2]),
            static_cast<unsigned>(r[3])};
#else
    Registers r{};
    __cpuid_count(leaf, part, r.a, r.b, r.c, r.d);
    return r;
#endif
}

unsigned saved_registers() {  // by the operating system, when it switches threads
#if defined(_MSC_VER)
    return static_cast<unsigned>(_xgetbv(0));
#else
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
}

bool has(unsigned word, int bit) { return word >> bit & 1; }

struct Features { bool avx2, avxvnni, avx512; };

Features features() {
    Features f{};
    const unsigned leaves = cpuid(0, 0).a;
    if (leaves < 7) return f;
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
    const bool xsave = has(one.c, 27), fma = has(one.c, 12), f16c = has(one.c, 29), avx = has(one.c, 28);
    if (!xsave || !avx) return f;
    const unsigned saved = saved_registers();
    const bool bmi = has(seven.b, 3) && has(seven.b, 8);  // compilers use them where they may use AVX2
    f.avx2 = (saved & 0x06) == 0x06 && fma && f16c && bmi && has(seven.b, 5);
    f.avxvnni = f.avx2 && seven.a >= 1 && has(cpuid(7, 1).a, 4);
    const bool f_dq_cd_bw_vl = has(seven.b, 16) && has(seven.b, 17) && has(seven.b, 28) && has(seven.b, 30) &&
                               has(seven.b, 31);
    f.avx512 = f.avx2 && (saved & 0xE6) == 0xE6 && f_dq_cd_bw_vl && has(seven.c, 11);
    return f;
}

const Kernels* available(int i) {  // best first; null where this processor lacks it
    static const Features f = features();
    switch (i) {
        case 0: return f.avx512 ? &avx512::table : nullptr;
        case 1: return f.avxvnni ? &avxvnni::table : nullptr;
        case 2: return f.avx2 ? &avx2::table : nullptr;
        default: return &scalar::table;
    }
}
constexpr int TABLES = 4;

}  // namespace

#elif defined(__aarch64__) || defined(_M_ARM64)

namespace neon { extern const Kernels table; }

namespace {

bool dot_products() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
#else
    return false;
#endif
}

const Kernels* available(int i) {
    if (i == 0) return dot_products() ? &neon::table : nullptr;
    return &scalar::table;
}
constexpr int TABLES = 2;

}  // namespace

#else

namespace {
const Kernels* available(int) { return &scalar::table; }
constexpr int TABLES = 1;
}  // namespace

#endif

const Kernels* kernels(const char* name) {
    for (int i = 0; i < TABLES; i++) {
        const Kernels* table = available(i);
        if (table && (!name || !*name || std::strcmp(table->name, name) == 0)) return table;
    }
    return nullptr;
}

}  // namespace tinylm
