// What the kernels ask of their surroundings: work in parallel, and buffers that are used again.
#pragma once
#include <cstddef>

namespace tinylm::training {

// Runs body(i) for i in 0 .. count, in any order and on any thread; returns when all are done.
struct Pool {
    virtual void run(long count, void (*body)(void* context, long i), void* context) = 0;

    template <class Body>
    void each(long count, Body body) {
        if (count == 1) return body(0);
        run(count, [](void* context, long i) { (*static_cast<Body*>(context))(i); }, &body);
    }

protected:
    ~Pool() = default;
};

// All of it on the calling thread.
struct Alone final : Pool {
    void run(long count, void (*body)(void*, long), void* context) override {
        for (long i = 0; i < count; i++) body(context, i);
    }
};

// Memory for intermediate values, aligned to 64 bytes. Freed buffers are kept for the next: fresh pages cost more than
// many of the products that are computed in them. Throws std::bad_alloc.
class Scratch {
public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }

private:
    void* data_;
    size_t bytes_;
};

}  // namespace tinylm::training
