// Zeroed memory, aligned to 64 bytes. Pages that were never touched take no memory, so room may be generous.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace tinylm {

template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t count) : size_(count) {
        if (count > (SIZE_MAX - 128) / sizeof(T)) throw std::bad_alloc();
        block_ = std::calloc(count * sizeof(T) + 128, 1);  // 64 for the alignment, 64 that may be read behind the end
        if (!block_) throw std::bad_alloc();
        data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block_) + 63) & ~uintptr_t{63});
    }
    ~Buffer() { std::free(block_); }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }
    size_t size() const { return size_; }
    size_t bytes() const { return size_ * sizeof(T); }

private:
    void swap(Buffer& other) {
        std::swap(block_, other.block_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }

    void* block_ = nullptr;
    T* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace tinylm
