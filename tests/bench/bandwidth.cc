// The most that a core can read: passes over a buffer in wide loads, nothing else. For engine.py.
//
//     g++ -O3 -march=native -pthread bandwidth.cc -o bandwidth && ./bandwidth BYTES THREADS
//
// Says "ready", then for each number N on standard input reads the buffer N times and answers: seconds, CPU seconds.
// Each of the threads reads its own part, and all wait for one another after every pass, as a token makes them do.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <thread>
#include <vector>

typedef uint64_t Wide __attribute__((vector_size(64)));
constexpr size_t STEP = 8 * sizeof(Wide);  // eight sums, so that no load waits for an addition

static uint64_t read_all(const uint8_t* data, size_t bytes) {
    Wide sums[8] = {};
    for (size_t at = 0; at < bytes; at += STEP)
        for (int i = 0; i < 8; i++) sums[i] ^= *reinterpret_cast<const Wide*>(data + at + i * sizeof(Wide));
    uint64_t total = 0;
    for (auto& sum : sums)
        for (int i = 0; i < 8; i++) total ^= sum[i];
    return total;
}

static double seconds(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

struct Barrier {
    std::atomic<int> arrived{0}, round{0};
    int threads;
    void wait() {
        int now = round.load();
        if (arrived.fetch_add(1) + 1 == threads) {
            arrived.store(0);
            round.store(now + 1);
        } else {
            while (round.load(std::memory_order_acquire) == now) {
            }
        }
    }
};

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: bandwidth BYTES THREADS\n"), 1;
    int threads = std::atoi(argv[2]);
    size_t part = (std::strtoull(argv[1], nullptr, 10) / threads + STEP - 1) / STEP * STEP, huge = 2 << 20;
    size_t room = (part * threads + huge) / huge * huge;
    auto* data = static_cast<uint8_t*>(std::aligned_alloc(huge, room));
#ifdef MADV_HUGEPAGE
    madvise(data, room, MADV_HUGEPAGE);
#endif
    std::memset(data, 1, room);
    std::vector<int> cores;  // those the process may use, one for each thread
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &allowed)) cores.push_back(i);
    std::puts("ready");
    std::fflush(stdout);
    long passes;
    while (std::scanf("%ld", &passes) == 1) {
        Barrier barrier;
        barrier.threads = threads;
        std::atomic<uint64_t> kept{0};
        double begun = seconds(CLOCK_MONOTONIC), spent = seconds(CLOCK_PROCESS_CPUTIME_ID);
        auto work = [&](int mine) {
            cpu_set_t core;
            CPU_ZERO(&core);
            CPU_SET(cores[mine % cores.size()], &core);
            sched_setaffinity(0, sizeof core, &core);
            uint64_t total = 0;
            for (long i = 0; i < passes; i++) {
                total += read_all(data + mine * part, part);
                asm volatile("" ::: "memory");  // every pass reads again
                barrier.wait();
            }
            kept += total;
        };
        std::vector<std::thread> others;
        for (int i = 1; i < threads; i++) others.emplace_back(work, i);
        work(0);
        for (auto& other : others) other.join();
        std::printf("%.9f %.9f\n", seconds(CLOCK_MONOTONIC) - begun, seconds(CLOCK_PROCESS_CPUTIME_ID) - spent);
        std::fflush(stdout);
    }
}
