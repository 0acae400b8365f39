// A model: the tensors of a file as matrices, norms and layers. Immutable; everything points into the mapped file.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "buffer.h"
#include "file.h"
#include "kernels.h"
#include "text.h"

namespace tinylm {

struct NormWeights {
    const float* scale = nullptr;  // null: there is no norm
    const float* bias = nullptr;   // null: an RMSNorm, else a layernorm
};

// A matrix of a block, which may have a norm of its own: of its input, before that is rounded.
struct Projection : Matrix {
    NormWeights norm;
};

struct Layer {
    NormWeights attn_norm, mlp_norm;
    Projection q, k, v, o;
    const float *q_norm, *k_norm;  // null: none
    Projection up, down, gate;     // gate.codes null: not gated
    int window;                    // 0: all
    bool rotates;
};

struct Options {
    const char* kernels = nullptr;
    int cache = 0;
    bool screen = true, check = true;
};

class Model {
public:
    Model(const char* path, const Options& options);  // throws Error

    File file;
    Constants constants;
    const Kernels* kernels;
    Matrix embed;
    const float *positions = nullptr, *types = nullptr;  // [context][width], [token types][width]
    NormWeights embed_norm, norm;
    std::vector<Layer> layers;
    Matrix dense{},
        head{};  // dense.codes null: the head is one matrix; head.codes null: none, the features are the output
    NormWeights head_norm;  // mlm's
    int outputs;            // columns of the head's output
    bool int8_cache, screened, gated;
    bool own_norms = false;  // some matrix has one
    size_t weight_bytes = 0;
    std::optional<Encoder> encoder;  // none: texts become ids elsewhere

    bool decoder() const { return constants.kind == ModelKind::decoder; }
    bool ends(int token) const;  // does a text end at this token?

private:
    const Tensor& need(const std::string& name, int rows, int columns) const;
    const float* floats(const std::string& name, int rows, int columns) const;
    const float* floats_if_any(const std::string& name, int columns) const;
    const int32_t* integers(const std::string& name, int columns, int least, int most) const;
    NormWeights norm_weights(const std::string& name, int width) const;
    NormWeights norm_before(const std::string& name, std::initializer_list<const Projection*> readers) const;
    Matrix matrix(const std::string& name, int rows, int columns);
    Projection projection(const std::string& name, int rows, int columns);
    void check_padding(const Tensor& tensor) const;
    const uint8_t* unpacked(const Tensor& tensor);
    Layer layer(int number, const int32_t* windows, const int32_t* rotates);
    void read_head();

    std::vector<Buffer<uint8_t>> unpacked_;
};

}  // namespace tinylm
