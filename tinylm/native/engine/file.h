// A .tlm file: mapped into memory, checked completely before anything is used.
//
// The layout is described in tinylm/engine/file.py. Nothing is trusted: sizes, offsets, names, shapes, checksum and
// every constant are checked, whatever the checksum says, and no size in the file asks for more memory than the file's
// own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace tinylm {

// What the C interface turns into a status code and a text.
struct Error {
    int status;
    std::string text;
};
[[noreturn]] void fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));

enum class ModelKind : int32_t { decoder, encoder };
enum class Norm : int32_t { rmsnorm, layernorm };
enum class Block : int32_t { pre, post, parallel };
enum class Mlp : int32_t { swiglu, geglu, reglu, gelu, gelu_tanh, relu2 };
enum class Head : int32_t { tied, untied, mlm, classes, none };
enum class Pooling : int32_t { cls, mean, last };

// The 64 fields at byte 64: integers in 0 .. 39, floats from 40 on. Names as in ModelConfig.
struct Constants {
    ModelKind kind;
    int32_t vocab, context, width, layers, heads, kv_heads, head_width, hidden;
    Norm norm;
    Block block;
    Mlp mlp;
    int32_t rotary, qk_norm;
    Head head;
    int32_t classes, embed_norm, token_types, learned;
    int32_t known;    // ids from here on have no text and are never sampled
    int32_t begin;    // -1: none
    int32_t ends[4];  // ids that end a text; -1: unused
    int32_t tensors;
    int32_t activations;  // 8: int8 codes, one scale per token; 32: float
    int32_t cache;        // 0: by the head's width, 1: float32, 2: int8
    int32_t members;
    Pooling pooling;  // what a classes head reads
    int32_t bare;     // 1: a classes head without head.dense and its tanh
    int32_t unused[9];
    float norm_eps, theta, attention_scale, softcap;
    float unused_floats[20];
};
static_assert(sizeof(Constants) == 256);

struct Tensor {
    std::string_view name;
    Kind kind;
    int rows, columns, group;
    const uint8_t* data;
    size_t bytes;
    mutable bool used = false;  // set by `find`: what nobody asked for is not understood
};

class File {
public:
    File(const char* path, bool check);  // throws Error; without `check` the checksum is not looked at
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const Constants& constants() const { return constants_; }
    const std::vector<Tensor>& tensors() const { return tensors_; }
    const Tensor* find(std::string_view name) const;  // null: there is none
    size_t size() const { return size_; }

private:
    void map(const char* path);
    void unmap();
    void check_header(bool checksum) const;
    void check_constants();
    void read_table();

    const uint8_t* data_ = nullptr;
    size_t size_ = 0;
    Constants constants_{};
    std::vector<Tensor> tensors_;  // sorted by name
};

// Bytes of a tensor's codes, and of all of it; 0 when kind, shape and group do not go together.
size_t code_bytes(Kind kind, int rows, int columns);
size_t tensor_bytes(Kind kind, int rows, int columns, int group);

inline bool is_panel(Kind kind) { return kind >= Kind::panel_float && kind <= Kind::packed_ternary; }
inline size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// CRC-32C (Castagnoli), by the processor's instruction where it has one.
uint32_t crc32c(const uint8_t* data, size_t size);

}  // namespace tinylm
