// Keys and values of what was read so far.
#pragma once
#include <vector>

#include "buffer.h"
#include "model.h"

namespace tinylm {

// Keys and values of one sequence, for every layer and key/value head.
class Cache {
public:
    explicit Cache(const Model& model);
    void grow(int positions);  // room for so many, what is held is kept
    size_t bytes() const { return data_.bytes(); }
    size_t position_bytes() const;

    FloatCache floats(int layer, int head) const;
    Int8Cache int8(int layer, int head) const;

private:
    uint8_t* at(int layer, int head) const;

    int layers_, heads_, capacity_ = 0, most_;
    std::vector<size_t> parts_;  // bytes per position: keys, values, and in int8 their scales
    mutable Buffer<uint8_t> data_;
};

}  // namespace tinylm
