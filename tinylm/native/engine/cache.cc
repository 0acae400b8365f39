#include "cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace tinylm {

constexpr int LEAST_CAPACITY = 64;  // positions

Cache::Cache(const Model& model)
    : layers_(model.decoder() ? model.constants.layers : 1),  // an encoder's layers need theirs one after the other
      heads_(model.constants.kv_heads),
      most_(static_cast<int>(round_up(model.constants.context, LANES))) {
    const size_t width = model.constants.head_width;
    if (model.int8_cache)
        parts_ = {width, width, sizeof(float), sizeof(float)};
    else
        parts_ = {width * sizeof(float), width * sizeof(float)};
}

size_t Cache::position_bytes() const {
    size_t bytes = 0;
    for (const size_t part : parts_) bytes += part;
    return bytes * layers_ * heads_;
}

void Cache::grow(int positions) {
    if (positions <= capacity_) return;
    const int capacity =
        std::min<int>(std::max<int>(std::bit_ceil(static_cast<unsigned>(positions)), LEAST_CAPACITY), most_);
    Buffer<uint8_t> larger(position_bytes() * capacity);
    const uint8_t* from = data_.data();
    uint8_t* to = larger.data();
    for (int i = 0; capacity_ && i < layers_ * heads_; i++)
        for (const size_t part : parts_) {
            std::memcpy(to, from, part * capacity_);
            from += part * capacity_, to += part * capacity;
        }
    data_ = std::move(larger);
    capacity_ = capacity;
}

uint8_t* Cache::at(int layer, int head) const {
    const size_t number = layers_ == 1 ? head : static_cast<size_t>(layer) * heads_ + head;
    return data_.data() + number * (position_bytes() / (layers_ * heads_)) * capacity_;
}

FloatCache Cache::floats(int layer, int head) const {
    auto* keys = reinterpret_cast<float*>(at(layer, head));
    return {keys, keys + parts_[0] / sizeof(float) * capacity_};
}

Int8Cache Cache::int8(int layer, int head) const {
    uint8_t* keys = at(layer, head);
    uint8_t* values = keys + parts_[0] * capacity_;
    auto* scales = reinterpret_cast<float*>(values + parts_[1] * capacity_);
    return {keys, reinterpret_cast<int8_t*>(values), scales, scales + capacity_};
}

}  // namespace tinylm
