#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../tinylm.h"

namespace tinylm {
namespace {

constexpr float LEAST_INPUT = 1e-30f;
constexpr int SCREENED_FROM = 2048;  // ids from which on reading half the head first saves time

bool all_finite(const float* x, size_t n) {
    return std::all_of(x, x + n, [](float value) { return std::isfinite(value); });
}

bool all_scales(const float* x, size_t n) {
    return std::all_of(x, x + n, [](float value) { return value >= 0 && std::isfinite(value); });
}

bool is_gated(Mlp mlp) { return mlp <= Mlp::reglu; }

// The same numbers in one place: what one norm has made of an input serves every matrix that has it.
void share(NormWeights& norm, const NormWeights& other, int n) {
    const auto same = [n](const float* a, const float* b) { return a && b ? std::equal(a, a + n, b) : a == b; };
    if (same(norm.scale, other.scale) && same(norm.bias, other.bias)) norm = other;
}

}  // namespace

Model::Model(const char* path, const Options& options)
    : file(path, options.check), constants(file.constants()), kernels(tinylm::kernels(options.kernels)) {
    const Constants& c = constants;
    if (!kernels) fail(TLM_ARGUMENT, "kernels = %s: not in this build or not on this processor", options.kernels);
    gated = is_gated(c.mlp);
    embed = matrix("embed", c.vocab, c.width);
    if (c.learned) positions = floats("embed_positions", c.context, c.width);
    if (c.token_types) types = floats("embed_types", c.token_types, c.width);
    if (c.embed_norm) embed_norm = norm_weights("embed_norm", c.width);
    const int32_t* windows = integers("windows", c.layers, 0, INT32_MAX);
    const int32_t* rotates = integers("rotates", c.layers, 0, 1);
    for (int i = 0; i < c.layers; i++) layers.push_back(layer(i, windows, rotates));
    if (c.rotary && std::none_of(rotates, rotates + c.layers, [](int32_t rotate) { return rotate; }))
        fail(TLM_FILE, "constant rotary = %d, and no layer rotates", c.rotary);
    if (c.block != Block::post) norm = norm_weights("norm", c.width);
    read_head();
    const int cache = options.cache ? options.cache : c.cache;
    if (cache == 2 && c.head_width % 16)
        fail(TLM_ARGUMENT, "an int8 cache needs heads of a multiple of 16, not %d", c.head_width);
    int8_cache = cache ? cache == 2 : c.head_width % 16 == 0 && c.head_width >= 32;
    screened = options.screen && decoder() && head.kind == Kind::panel_planes && head.rows >= SCREENED_FROM &&
               !head.bias && !c.softcap;
    for (const char* name : {"tokenizer", "provenance", "pieces", "grams"}) file.find(name);
    if (const Tensor* merges = file.find("merges")) encoder.emplace(*merges, c.known);
    for (const Tensor& tensor : file.tensors())
        if (!tensor.used) fail(TLM_FILE, "tensor %s: this program does not know what it is for", tensor.name.data());
}

bool Model::ends(int token) const {
    return std::find(std::begin(constants.ends), std::end(constants.ends), token) != std::end(constants.ends);
}

const Tensor& Model::need(const std::string& name, int rows, int columns) const {
    const Tensor* tensor = file.find(name);
    if (!tensor) fail(TLM_FILE, "the file has no tensor %s", name.c_str());
    if (tensor->rows != rows || tensor->columns != columns)
        fail(TLM_FILE, "tensor %s is %d x %d and must be %d x %d", name.c_str(), tensor->rows, tensor->columns, rows,
             columns);
    return *tensor;
}

const float* Model::floats(const std::string& name, int rows, int columns) const {
    const Tensor& tensor = need(name, rows, columns);
    if (tensor.kind != Kind::floats) fail(TLM_FILE, "tensor %s must hold plain floats", name.c_str());
    const auto* x = reinterpret_cast<const float*>(tensor.data);
    if (!all_finite(x, tensor.bytes / 4)) fail(TLM_FILE, "tensor %s holds numbers that are not finite", name.c_str());
    return x;
}

const float* Model::floats_if_any(const std::string& name, int columns) const {
    return file.find(name) ? floats(name, 1, columns) : nullptr;
}

const int32_t* Model::integers(const std::string& name, int columns, int least, int most) const {
    const Tensor& tensor = need(name, 1, columns);
    if (tensor.kind != Kind::ints) fail(TLM_FILE, "tensor %s must hold int32", name.c_str());
    const auto* x = reinterpret_cast<const int32_t*>(tensor.data);
    for (int i = 0; i < columns; i++)
        if (x[i] < least || x[i] > most)
            fail(TLM_FILE, "tensor %s holds %d: must be between %d and %d", name.c_str(), x[i], least, most);
    return x;
}

NormWeights Model::norm_weights(const std::string& name, int width) const {
    NormWeights weights{floats(name + ".scale", 1, width), nullptr};
    if (constants.norm == Norm::layernorm) weights.bias = floats(name + ".bias", 1, width);
    return weights;
}

Matrix Model::matrix(const std::string& name, int rows, int columns) {
    const Tensor& tensor = need(name, rows, columns);
    if (!is_panel(tensor.kind)) fail(TLM_FILE, "tensor %s must be a matrix in panels", name.c_str());
    if (constants.activations == 32 && tensor.kind != Kind::panel_float)
        fail(TLM_FILE, "tensor %s: float activations need float weights", name.c_str());
    check_padding(tensor);
    Matrix m{};
    m.kind = tensor.kind;
    m.rows = rows, m.columns = columns, m.group = tensor.group;
    m.panels = static_cast<int>(round_up(rows, LANES) / LANES), m.padded = static_cast<int>(round_up(columns, LANES));
    m.codes = tensor.data;
    const size_t codes = code_bytes(tensor.kind, rows, columns);
    if (m.kind != Kind::panel_float) m.scales = tensor.data + round_up(codes, 64);
    if (m.kind == Kind::panel_planes && m.group)
        fail(TLM_FILE, "tensor %s: planes have one scale per row", name.c_str());
    if (m.kind == Kind::panel_planes) {
        m.low = m.codes + codes / 2;
        m.dither = integers(name + ".dither", m.padded, -8, 7);
    } else if (m.kind == Kind::packed_ternary) {
        m.kind = Kind::panel_ternary;
        m.codes = unpacked(tensor);
    }
    m.bias = floats_if_any(name + ".bias", rows);
    if (const float* scale = floats_if_any(name + ".input", 1)) {
        if (!(*scale >= LEAST_INPUT))
            fail(TLM_FILE, "tensor %s.input = %g: must be at least %g", name.c_str(), *scale, LEAST_INPUT);
        m.input = *scale;
    }
    weight_bytes += m.kind == tensor.kind ? tensor.bytes : unpacked_.back().size() + tensor.bytes - codes;
    return m;
}

// Outputs behind the last row are zero whatever the activations: buffers stay padded with zeros. Scales are finite.
void Model::check_padding(const Tensor& tensor) const {
    const int rows = static_cast<int>(round_up(tensor.rows, LANES)),
              padded = static_cast<int>(round_up(tensor.columns, LANES));
    const auto wrong = [&tensor] {
        fail(TLM_FILE, "tensor %s: a row behind the last is not zero", tensor.name.data());
    };
    const auto impossible = [&tensor] {
        fail(TLM_FILE, "tensor %s: a scale is negative or not finite", tensor.name.data());
    };
    if (tensor.kind == Kind::panel_float) {
        const auto* last = reinterpret_cast<const float*>(tensor.data) + static_cast<size_t>(rows - LANES) * padded;
        for (int k = 0; k < padded; k++)
            for (int row = tensor.rows; row < rows; row++)
                if (last[k * LANES + row % LANES] != 0) wrong();
        return;
    }
    const uint8_t* scales = tensor.data + round_up(code_bytes(tensor.kind, tensor.rows, tensor.columns), 64);
    if (tensor.group == 0) {
        const auto* scale = reinterpret_cast<const float*>(scales);
        if (!all_scales(scale, rows)) impossible();
        for (int row = tensor.rows; row < rows; row++)
            if (scale[row] != 0) wrong();
        return;
    }
    const auto* scale = reinterpret_cast<const uint16_t*>(scales);  // float16
    const int groups = (padded + tensor.group - 1) / tensor.group;
    for (int row = 0; row < rows; row++)
        for (int g = 0; g < groups; g++) {
            const uint16_t bits = scale[(static_cast<size_t>(row / LANES) * groups + g) * LANES + row % LANES];
            if (bits >= 0x7C00) impossible();
            if (row >= tensor.rows && bits) wrong();
        }
}

// Five weights to a byte become four: base 3 is smaller on disk, two bits are faster to read.
const uint8_t* Model::unpacked(const Tensor& tensor) {
    Buffer<uint8_t> panels(code_bytes(Kind::panel_ternary, tensor.rows, tensor.columns));
    const size_t fields = 4 * panels.size(), bytes = (fields + 4) / 5;
    for (size_t i = 0, field = 0; i < bytes; i++) {
        int rest = tensor.data[i];
        if (rest >= 243) fail(TLM_FILE, "tensor %s: byte %d is none of five ternary weights", tensor.name.data(), rest);
        for (int t = 0; t < 5 && field < fields; t++, field++, rest /= 3)
            panels[field / 4] |= static_cast<uint8_t>(rest % 3 << field % 4 * 2);
    }
    unpacked_.push_back(std::move(panels));
    return unpacked_.back().data();
}

Projection Model::projection(const std::string& name, int rows, int columns) {
    Projection projection{matrix(name, rows, columns), {}};
    projection.norm.scale = floats_if_any(name + ".norm.scale", columns);
    if (projection.norm.scale) projection.norm.bias = floats_if_any(name + ".norm.bias", columns), own_norms = true;
    return projection;
}

// The norm in front of attention or an MLP, which may be left out where all that read it have norms of their own.
NormWeights Model::norm_before(const std::string& name, std::initializer_list<const Projection*> readers) const {
    const bool all = std::all_of(readers.begin(), readers.end(), [](const Projection* p) { return p->norm.scale; });
    if (all && constants.block != Block::post && !file.find(name + ".scale")) return {};
    return norm_weights(name, constants.width);
}

Layer Model::layer(int number, const int32_t* windows, const int32_t* rotates) {
    const Constants& c = constants;
    const std::string block = "blocks." + std::to_string(number), attn = block + ".attn.", mlp = block + ".mlp.";
    const int queries = c.heads * c.head_width, keys = c.kv_heads * c.head_width;
    Layer layer{};
    layer.q = projection(attn + "q", queries, c.width);
    layer.k = projection(attn + "k", keys, c.width);
    layer.v = projection(attn + "v", keys, c.width);
    layer.o = projection(attn + "o", c.width, queries);
    layer.attn_norm = norm_before(block + ".attn_norm", {&layer.q, &layer.k, &layer.v});
    share(layer.k.norm, layer.q.norm, c.width);
    share(layer.v.norm, layer.k.norm, c.width);
    if (c.qk_norm) {
        layer.q_norm = floats(attn + "q_norm.scale", 1, c.head_width);
        layer.k_norm = floats(attn + "k_norm.scale", 1, c.head_width);
    }
    layer.up = projection(mlp + "up", c.hidden, c.width);
    layer.down = projection(mlp + "down", c.width, c.hidden);
    if (gated) layer.gate = projection(mlp + "gate", c.hidden, c.width);
    layer.mlp_norm = norm_before(block + ".mlp_norm", {&layer.up, gated ? &layer.gate : &layer.up});
    if (gated) share(layer.gate.norm, layer.up.norm, c.width);
    layer.window = windows[number];
    layer.rotates = rotates[number] != 0;
    if (layer.rotates && c.rotary == 0) fail(TLM_FILE, "layer %d rotates, and constant rotary = 0", number);
    return layer;
}

void Model::read_head() {
    const Constants& c = constants;
    const bool own = file.find("head.out") != nullptr;
    outputs = c.head == Head::classes ? c.classes : c.head == Head::none ? c.width : c.vocab;
    if (c.head == Head::none) return;
    if (c.head == Head::mlm || (c.head == Head::classes && !c.bare)) dense = matrix("head.dense", c.width, c.width);
    if (c.head == Head::mlm) head_norm = norm_weights("head.norm", c.width);
    const bool tied = (c.head == Head::tied || c.head == Head::mlm) && !own;
    if (own) weight_bytes -= file.find("embed")->bytes;  // only one of its rows is read
    head = tied ? embed : matrix("head.out", outputs, c.width);
    if (c.head == Head::mlm) head.bias = floats("head.bias", 1, c.vocab);
}

}  // namespace tinylm
