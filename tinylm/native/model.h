// A model: the tensors of a file as matrices, norms and layers. Immutable; everything points into the mapped file.
#pragma once
#include <string>
#include <vector>

#include "buffer.h"
#include "file.h"
#include "kernels.h"

namespace tinylm {

struct NormWeights {
    const float* scale = nullptr;  // null: there is no norm
    const float* bias = nullptr;   // layernorm's
};

struct Layer {
    NormWeights attn_norm, mlp_norm;
    Matrix q, k, v, o;
    const float *q_norm, *k_norm;  // null: none
    Matrix up, down, gate;         // gate.codes null: not gated
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
    size_t weight_bytes = 0;

    bool decoder() const { return constants.kind == ModelKind::decoder; }
    bool ends(int token) const;  // does a text end at this token?

private:
    const Tensor& need(const std::string& name, int rows, int columns) const;
    const float* floats(const std::string& name, int rows, int columns) const;
    const float* floats_if_any(const std::string& name, int columns) const;
    const int32_t* integers(const std::string& name, int columns, int least, int most) const;
    NormWeights norm_weights(const std::string& name, int width) const;
    Matrix matrix(const std::string& name, int rows, int columns);
    void check_padding(const Tensor& tensor) const;
    const uint8_t* unpacked(const Tensor& tensor);
    Layer layer(int number, const int32_t* windows, const int32_t* rotates);
    void read_head();

    std::vector<Buffer<uint8_t>> unpacked_;
};

}  // namespace tinylm
