#include "threads.h"

#include <algorithm>
#include <system_error>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace tinylm {
namespace {

constexpr int SPINS = 2000;  // about 50 microseconds: longer than one waits inside a token, shorter than anyone notices

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");  // `yield` takes no time on most of these processors
#endif
}

// Returns once `value` is no longer `old`.
void wait_for_change(std::atomic<uint32_t>& value, uint32_t old) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void change(std::atomic<uint32_t>& value) {
    value.fetch_add(1, std::memory_order_release);
    value.notify_all();  // a system call only when someone sleeps
}

}  // namespace

Threads::Threads(int count) {
    try {
        for (int id = 1; id < count; id++) threads_.emplace_back([this, id] { serve(id); });
    } catch (const std::system_error&) {
        // As many as there can be; the results do not depend on it.
    }
    active_ = this->count();
}

Threads::~Threads() {
    ending_ = true;
    change(round_);
    for (std::thread& thread : threads_) thread.join();
}

void Threads::start() {
    if (active_ > 1) change(round_);
    task_(context_, 0);
    barrier();  // also makes what the others wrote visible here
}

void Threads::serve(int id) {
    for (uint32_t round = 0;; round++) {
        wait_for_change(round_, round);
        if (ending_) return;
        task_(context_, id);
        barrier();
    }
}

void Threads::barrier() {
    if (active_ == 1) return;
    const uint32_t passed = passed_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_.size()) {
        arrived_.store(0, std::memory_order_relaxed);
        change(passed_);
    } else {
        wait_for_change(passed_, passed);
    }
}

bool Balance::together() {
    if (seconds_[1] == 0 || seconds_[0] == 0) return last_ = seconds_[1] == 0;
    const bool better = seconds_[1] < seconds_[0];
    if (better != better_) better_ = better, patience_ = left_ = FIRST;
    if (--left_ > 0) return last_ = better;
    patience_ = left_ = std::min(2 * patience_, LONGEST);
    return last_ = !better;
}

void Balance::took(double seconds) {
    // The first pass finds caches and memory cold: it says nothing.
    if (cold_) return void(cold_ = false);
    double& typical = seconds_[last_];
    const int weight = last_ == better_ ? 8 : 2;  // the way that is rarely tried must not live on old times
    typical = typical == 0 ? seconds : typical + (std::min(seconds, 4 * typical) - typical) / weight;  // no pauses
}

}  // namespace tinylm
