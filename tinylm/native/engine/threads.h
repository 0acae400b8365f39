// Persistent threads that work on one thing together, with a barrier of a third of a microsecond.
//
// A token of a tiny model takes 5 to 500 microseconds and passes some thirty barriers, so a waiting thread spins; but
// only for a while, then it sleeps until it is woken: an idle engine uses no processor time.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace tinylm {

class Threads {
public:
    explicit Threads(int count);  // the caller of `run` is one of them
    ~Threads();
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

    int count() const { return static_cast<int>(threads_.size()) + 1; }

    // How many work from now on: all of them, or only the caller while the others sleep.
    void use_all(bool all) { active_ = all ? count() : 1; }
    int active() const { return active_; }

    // Calls work(id), id = 0 .. active - 1, on so many threads, and returns when all are done.
    template <class Work>
    void run(Work&& work) {
        using Plain = std::remove_reference_t<Work>;
        task_ = [](void* context, int id) { (*static_cast<Plain*>(context))(id); };
        context_ = const_cast<void*>(static_cast<const void*>(&work));
        start();
    }

    // Inside work: waits until every thread is here.
    void barrier();

    // The share of `total` things that belongs to one of `count`.
    struct Share {
        int first, last;
    };
    static Share share(int total, int id, int count) {
        return {static_cast<int>(static_cast<int64_t>(total) * id / count),
                static_cast<int>(static_cast<int64_t>(total) * (id + 1) / count)};
    }

private:
    void start();
    void serve(int id);

    void (*task_)(void*, int) = nullptr;
    void* context_ = nullptr;
    bool ending_ = false;
    int active_ = 1;
    alignas(64) std::atomic<uint32_t> round_{0};    // of `run`
    alignas(64) std::atomic<uint32_t> arrived_{0};  // at the barrier
    alignas(64) std::atomic<uint32_t> passed_{0};   // barriers so far
    std::vector<std::thread> threads_;
};

// Are all threads sooner than one? On a busy machine they are not: each barrier waits for the processor that does
// something else. Both ways are timed, and now and then the slower one is tried again.
class Balance {
public:
    bool together();
    void took(double seconds);  // for a row, since the last answer

private:
    double seconds_[2] = {0, 0};  // typical ones: alone, together
    bool last_ = true, better_ = true, cold_ = true;
    int patience_ = FIRST, left_ = FIRST;
    static constexpr int FIRST = 8, LONGEST = 4096;
};

}  // namespace tinylm
