// Which table of kernels this processor runs, and the buffers they use again.
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace tinylm::training {

#if defined(__x86_64__) || defined(_M_X64)

extern const Kernels avx512bf16, avx512, avx2;

static bool runs_here(const Kernels& table) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    if (&table == &avx2) return true;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide && (&table == &avx512 || __builtin_cpu_supports("avx512bf16"));
}

const Kernels* kernels(const char* name) {
    for (const Kernels* table : {&avx512bf16, &avx512, &avx2})
        if ((!*name || !std::strcmp(name, table->name)) && runs_here(*table)) return table;
    return nullptr;
}

#else

const Kernels* kernels(const char*) { return nullptr; }

#endif

namespace {

// Buffers not in use. They are few: at most as many as were ever in use at once.
struct Free {
    struct Buffer {
        void* data;
        size_t bytes;
    };
    std::mutex lock;
    std::vector<Buffer> buffers;

    ~Free() {
        for (const Buffer& buffer : buffers) std::free(buffer.data);
    }
};

Free& unused() {
    static Free buffers;
    return buffers;
}

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), bytes_((bytes + 4095) / 4096 * 4096) {
    if (bytes == 0) return;
    Free& free = unused();
    {
        const std::lock_guard guard(free.lock);
        size_t best = free.buffers.size();  // the smallest that is large enough
        for (size_t i = 0; i < free.buffers.size(); i++) {
            const bool first = best == free.buffers.size();
            const size_t bytes = free.buffers[i].bytes;
            if (bytes >= bytes_ && (first || bytes < free.buffers[best].bytes)) best = i;
        }
        if (best < free.buffers.size() && free.buffers[best].bytes <= 4 * bytes_) {
            data_ = free.buffers[best].data;
            bytes_ = free.buffers[best].bytes;
            free.buffers[best] = free.buffers.back();
            free.buffers.pop_back();
            return;
        }
    }
    // Room beyond the end: the last vector of a packed panel may be stored whole.
    if (!(data_ = std::aligned_alloc(4096, bytes_ + 4096))) throw std::bad_alloc();
}

Scratch::~Scratch() {
    if (!data_) return;
    Free& free = unused();
    const std::lock_guard guard(free.lock);
    free.buffers.push_back({data_, bytes_});
}

}  // namespace tinylm::training
