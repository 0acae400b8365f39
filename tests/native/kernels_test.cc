// Every kernel of every instruction set this processor has, against loops that follow the words of the specification
// (tinylm/engine/twin.py), bit for bit. Buffers have exactly the size kernels may touch: a sanitizer sees the rest.
//
// Compile with kernels.cc of each instruction set and dispatch.cc, without contraction (-ffp-contract=off).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../tinylm/native/engine/gumbel.h"
#include "../../tinylm/native/engine/kernels.h"

using namespace tinylm;

namespace {

std::mt19937 random_bits(20240607);
int uniform(int low, int high) { return low + static_cast<int>(random_bits() % static_cast<unsigned>(high - low + 1)); }
float normal() { return std::normal_distribution<float>()(random_bits); }
using Floats = std::vector<float>;

Floats normals(int n, float size = 1) {
    Floats x(n);
    for (float& v : x) v = normal() * size;
    return x;
}

int checks = 0, failures = 0;

void same(const char* isa, const char* what, const float* got, const float* expected, size_t n) {
    checks++;
    for (size_t i = 0; i < n; i++) {
        const bool equal = std::isnan(expected[i]) ? std::isnan(got[i]) : std::bit_cast<uint32_t>(got[i]) ==
                                                                              std::bit_cast<uint32_t>(expected[i]);
        if (equal) continue;
        if (++failures < 30) std::printf("%s: %s: [%zu] %a, expected %a\n", isa, what, i, got[i], expected[i]);
        return;
    }
}

void same(const char* isa, const char* what, long long got, long long expected) {
    checks++;
    if (got != expected && ++failures < 30) std::printf("%s: %s: %lld, expected %lld\n", isa, what, got, expected);
}

// --- the words of the specification

float lanesum(const Floats& lanes) {
    float a[16];
    for (int i = 0; i < 16; i++) a[i] = lanes[i];
    for (int half = 8; half; half /= 2) {
        for (int i = 0; i < half; i++) a[i] = a[i] + a[i + half];
    }
    return a[0];
}
float at_least(float a, float b) { return a > b ? a : b; }

float ref_exp2(float x) {
    x = at_least(-126.0f, x);
    x = 126.0f < x ? 126.0f : x;
    const float n = std::nearbyint(x), f = x - n;
    float p = 0.00132647273f;
    for (float c : {0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.0f}) p = std::fma(p, f, c);
    return std::isnan(x) ? x : std::ldexp(p, static_cast<int>(n));
}
float ref_exp(float x) { return ref_exp2(x * 1.44269504f); }
float ref_tanh(float x) { return 1.0f - 2.0f / (1.0f + ref_exp(2.0f * x)); }
float ref_erf(float x) {
    const float a = std::fabs(x), t = 1.0f / std::fma(0.3275911f, a, 1.0f);
    float p = 1.061405429f;
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = std::fma(p, t, c);
    return std::copysign(1.0f - (p * t) * ref_exp(-(a * a)), x);
}
float ref_gelu(float x) { return (0.5f * x) * (1.0f + ref_erf(x * 0.70710678f)); }
float ref_activation(int mlp, float x) {
    switch (mlp) {
        case 0: return x / (1.0f + ref_exp(-x));
        case 1: case 3: return ref_gelu(x);
        case 4: return (0.5f * x) * (1.0f + ref_tanh(0.79788456f * std::fma(0.044715f * x, x * x, x)));
        case 2: return at_least(0, x);
        default: return at_least(0, x) * at_least(0, x);
    }
}

float ref_quantize(const float* x, int n, float fixed, int8_t* codes) {
    float m = 0;
    for (int i = 0; i < n; i++) m = std::isnan(x[i]) || std::isnan(m) ? NAN : std::fmax(m, std::fabs(x[i]));
    std::fill(codes, codes + n, int8_t{0});
    if (!(m < INFINITY)) return NAN;
    if (fixed == 0 && m < 1e-30f) return 0;
    const float inverse = fixed != 0 ? 1.0f / fixed : 127.0f / m;
    for (int i = 0; i < n; i++) {
        codes[i] = static_cast<int8_t>(std::nearbyint(std::fmin(127.0f, std::fmax(-127.0f, x[i] * inverse))));
    }
    return fixed != 0 ? fixed : m / 127.0f;
}

// --- matrices: random weights, packed by the words of the format

float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31;
    const float magnitude = exponent ? std::ldexp(1.0f + (h & 1023) / 1024.0f, exponent - 15)
                                     : std::ldexp((h & 1023) / 1024.0f, -14);
    return h >> 15 ? -magnitude : magnitude;
}

struct Packed {
    Matrix m{};
    std::vector<int> weights;        // [rows of panels][padded]
    Floats floats;                   // the same of panel_float
    std::vector<uint8_t> codes, low;
    Floats scales, bias;
    std::vector<uint16_t> halves;
    std::vector<int32_t> dither;
};

Packed make_matrix(Kind kind, int rows, int columns, int group, bool bias) {
    Packed p;
    Matrix& m = p.m;
    m.kind = kind, m.rows = rows, m.columns = columns, m.group = group;
    m.panels = (rows + 15) / 16, m.padded = (columns + 15) / 16 * 16;
    const int height = m.panels * 16, groups = group ? (m.padded + group - 1) / group : 1;
    const int limit = kind == Kind::panel_int8     ? 127
                      : kind == Kind::panel_planes ? 120
                      : kind == Kind::panel_int4   ? 7
                                                   : 1;
    p.weights.assign(static_cast<size_t>(height) * m.padded, 0);
    p.dither.assign(m.padded, 0);
    const bool extreme = uniform(0, 3) == 0;  // every weight at a limit: what would overflow does
    for (int r = 0; r < rows; r++) {
        for (int k = 0; k < columns; k++) {
            p.weights[static_cast<size_t>(r) * m.padded + k] =
                extreme ? (uniform(0, 7) ? -limit : limit) : uniform(-limit, limit);
        }
    }
    for (int k = 0; k < m.padded; k++) p.dither[k] = extreme ? (uniform(0, 7) ? -8 : 7) : uniform(-8, 7);
    if (kind == Kind::panel_float) {
        p.floats.assign(static_cast<size_t>(height) * m.padded, 0);
        for (int r = 0; r < rows; r++) {
            const size_t lane = static_cast<size_t>(r / 16) * m.padded * 16 + r % 16;
            for (int k = 0; k < columns; k++) p.floats[lane + k * 16] = normal();
        }
        m.codes = reinterpret_cast<const uint8_t*>(p.floats.data());
    } else {
        const int step = kind == Kind::panel_int8 ? 4 : kind == Kind::panel_ternary ? 16 : 8;
        p.codes.assign(static_cast<size_t>(height) * m.padded * 4 / step, 0);
        p.low.assign(kind == Kind::panel_planes ? p.codes.size() : 0, 0);
        for (int r = 0; r < height; r++) {
            for (int k = 0; k < m.padded; k++) {
                const int w = p.weights[static_cast<size_t>(r) * m.padded + k], i = k % step / 4;
                const size_t block = static_cast<size_t>(r / 16) * (m.padded / step) + k / step;
                const size_t at = block * 64 + r % 16 * 4 + k % 4;
                switch (kind) {
                    case Kind::panel_int8: p.codes[at] = static_cast<uint8_t>(w + 128); break;
                    case Kind::panel_int4: p.codes[at] |= static_cast<uint8_t>((w + 8) << 4 * i); break;
                    case Kind::panel_ternary: p.codes[at] |= static_cast<uint8_t>((w + 1) << 2 * i); break;
                    default: {
                        const int u = w + 128 + p.dither[k];
                        p.codes[at] |= static_cast<uint8_t>((u >> 4) << 4 * i);
                        p.low[at] |= static_cast<uint8_t>((u & 15) << 4 * i);
                    }
                }
            }
        }
        m.codes = p.codes.data();
        m.low = kind == Kind::panel_planes ? p.low.data() : nullptr;
        m.dither = kind == Kind::panel_planes ? p.dither.data() : nullptr;
        if (group) {
            p.halves.resize(static_cast<size_t>(m.panels) * groups * 16);
            for (uint16_t& h : p.halves) h = static_cast<uint16_t>(random_bits() % 0x3C00);  // 0 to 1, subnormal too
            m.scales = p.halves.data();
        } else {
            p.scales.resize(height);
            for (int r = 0; r < height; r++) p.scales[r] = r < rows ? std::fabs(normal()) * 0.01f : 0;
            m.scales = p.scales.data();
        }
    }
    if (bias) {
        p.bias.assign(height, 0);
        for (int r = 0; r < rows; r++) p.bias[r] = normal();
        m.bias = p.bias.data();
    }
    return p;
}

float weight_scale(const Packed& p, int r, int k) {
    const int group = p.m.group, groups = group ? (p.m.padded + group - 1) / group : 1;
    if (!group) return p.scales[r];
    return half_to_float(p.halves[(static_cast<size_t>(r / 16) * groups + k / group) * 16 + r % 16]);
}

float ref_linear(const Packed& p, const Activations& x, int r, int sample) {
    const Matrix& m = p.m;
    const int8_t* codes = x.codes + static_cast<size_t>(sample) * x.stride;
    float y = 0;
    if (m.kind == Kind::panel_float) {
        for (int k = 0; k < m.columns; k++) {
            const float w = p.floats[(static_cast<size_t>(r / 16) * m.padded + k) * 16 + r % 16];
            y = std::fma(x.floats[static_cast<size_t>(sample) * x.stride + k], w, y);
        }
        return m.bias ? y + m.bias[r] : y;
    }
    const int group = m.group ? m.group : m.padded;
    for (int begin = 0; begin < m.padded; begin += group) {
        int32_t total = 0;
        for (int k = begin; k < begin + group && k < m.padded; k++) {
            total += p.weights[static_cast<size_t>(r) * m.padded + k] * codes[k];
        }
        if (m.group) y = std::fma(static_cast<float>(total), weight_scale(p, r, begin), y);
        else y = static_cast<float>(total) * (x.scales[sample] * p.scales[r]);
    }
    if (m.group) y = y * x.scales[sample];
    return m.bias ? y + m.bias[r] : y;
}

void test_linear(const Kernels& k) {
    const Kind kinds[] = {Kind::panel_float, Kind::panel_int8, Kind::panel_planes, Kind::panel_int4,
                          Kind::panel_ternary};
    for (int trial = 0; trial < 240; trial++) {
        const Kind kind = kinds[trial % 5];
        const int group = kind == Kind::panel_float || uniform(0, 1) ? 0 : 16 * uniform(1, 4);
        const int columns = uniform(0, 3) ? uniform(1, 200) : uniform(200, 700), rows = uniform(1, 230);
        const Packed p = make_matrix(kind, rows, columns, group, uniform(0, 1));
        const Matrix& m = p.m;
        const int samples = uniform(0, 2) ? uniform(1, 15) : 1, stride = m.padded + 16 * uniform(0, 1);
        std::vector<int8_t> codes(static_cast<size_t>(samples) * stride, 0);
        Floats floats(static_cast<size_t>(samples) * stride, 0), scales(samples);
        std::vector<int32_t> sums(samples, 0);
        const bool extreme = uniform(0, 3) == 0;
        for (int s = 0; s < samples; s++) {
            scales[s] = std::fabs(normal());
            for (int c = 0; c < columns; c++) {
                const int code = extreme ? (uniform(0, 7) ? -127 : 127) : uniform(-127, 127);
                codes[static_cast<size_t>(s) * stride + c] = static_cast<int8_t>(code);
                floats[static_cast<size_t>(s) * stride + c] = normal();
                sums[s] += code;
            }
        }
        const Activations x{samples, stride, codes.data(), scales.data(), sums.data(), floats.data()};
        const int width = m.panels * 16;
        Floats expected(static_cast<size_t>(samples) * width), got(expected.size(), 12345);
        for (int s = 0; s < samples; s++) {
            for (int r = 0; r < width; r++) expected[static_cast<size_t>(s) * width + r] = ref_linear(p, x, r, s);
        }
        const int middle = uniform(0, m.panels);
        k.linear(m, 0, middle, x, got.data(), width);
        k.linear(m, middle, m.panels, x, got.data(), width);
        char what[80];
        std::snprintf(what, sizeof what, "linear kind %d, %d x %d, group %d, %d samples", static_cast<int>(kind), rows,
                      columns, group, samples);
        same(k.name, what, got.data(), expected.data(), got.size());

        const int index = uniform(0, rows - 1);
        Floats row(columns), expected_row(columns);
        for (int c = 0; c < columns; c++) {
            expected_row[c] = kind == Kind::panel_float
                                  ? p.floats[(static_cast<size_t>(index / 16) * m.padded + c) * 16 + index % 16]
                                  : static_cast<float>(p.weights[static_cast<size_t>(index) * m.padded + c]) *
                                        weight_scale(p, index, c);
        }
        k.row(m, index, row.data());
        same(k.name, "row", row.data(), expected_row.data(), row.size());

        if (kind != Kind::panel_planes) continue;
        const int panel = uniform(0, m.panels - 1);
        Floats sixteen(16);
        k.exact_panel(m, panel, x, sixteen.data());
        same(k.name, "exact_panel", sixteen.data(), expected.data() + panel * 16, 16);
        if (group) continue;
        const float correction = normal();
        for (int r = 0; r < width; r++) {
            int high = 0;
            for (int c = 0; c < m.padded; c++) {
                high += ((p.weights[static_cast<size_t>(r) * m.padded + c] + 128 + p.dither[c]) >> 4) * codes[c];
            }
            expected[r] = std::fma(16.0f, static_cast<float>(high), correction) * (scales[0] * p.scales[r]);
        }
        k.approximate(m, 0, m.panels, x, correction, got.data());
        same(k.name, "approximate", got.data(), expected.data(), width);
    }
}

void test_rows(const Kernels& k) {
    for (int n = 1; n < 90; n++) {
        const Floats x = normals(n, 3), scale = normals(n), bias = normals(n);
        Floats lanes(16, 0), sums(16, 0), y(n), expected(n);
        for (int i = 0; i < n; i++) lanes[i % 16] = std::fma(x[i], x[i], lanes[i % 16]);
        float r = 1.0f / std::sqrt(lanesum(lanes) / static_cast<float>(n) + 1e-5f);
        for (int i = 0; i < n; i++) expected[i] = (x[i] * r) * scale[i];
        k.rmsnorm(x.data(), scale.data(), n, 1e-5f, y.data());
        same(k.name, "rmsnorm", y.data(), expected.data(), n);

        for (int i = 0; i < n; i++) sums[i % 16] += x[i];
        const float mean = lanesum(sums) / static_cast<float>(n);
        lanes.assign(16, 0);
        for (int i = 0; i < n; i++) lanes[i % 16] = std::fma(x[i] - mean, x[i] - mean, lanes[i % 16]);
        r = 1.0f / std::sqrt(lanesum(lanes) / static_cast<float>(n) + 1e-5f);
        for (int i = 0; i < n; i++) expected[i] = std::fma((x[i] - mean) * r, scale[i], bias[i]);
        k.layernorm(x.data(), scale.data(), bias.data(), n, 1e-5f, y.data());
        same(k.name, "layernorm", y.data(), expected.data(), n);

        for (int variant = 0; variant < 7; variant++) {
            Floats z = x;
            const float fixed = variant == 1 ? 0.01f : 0;
            if (variant == 2) z[uniform(0, n - 1)] = NAN;
            if (variant == 3) z[uniform(0, n - 1)] = -INFINITY;
            if (variant == 4) z = normals(n, 1e-32f);
            if (variant == 5) z = normals(n, 1e-28f);
            if (variant == 6) z = normals(n, 1e37f);
            const int padded = (n + 15) / 16 * 16 + 16 * uniform(0, 1);
            std::vector<int8_t> codes(padded, 77), expected_codes(padded, 0);
            int32_t sum, expected_sum = 0;
            const float s = k.quantize(z.data(), n, padded, fixed, codes.data(), &sum);
            const float expected_scale = ref_quantize(z.data(), n, fixed, expected_codes.data());
            for (int8_t c : expected_codes) expected_sum += c;
            same(k.name, "quantize: scale", &s, &expected_scale, 1);
            same(k.name, "quantize: sum", sum, expected_sum);
            same(k.name, "quantize: codes", std::memcmp(codes.data(), expected_codes.data(), padded), 0);
        }

        Floats a = x;
        a[uniform(0, n - 1)] = uniform(0, 1) ? 0.0f : -1e30f;
        if (n % 3 == 0) a[uniform(0, n - 1)] = INFINITY;
        if (n % 5 == 0) a[uniform(0, n - 1)] = NAN;
        for (int mlp = 0; mlp < 6; mlp++) {
            for (int i = 0; i < n; i++) expected[i] = ref_activation(mlp, a[i]) * (mlp < 3 ? bias[i] : 1.0f);
            y = a;
            mlp < 3 ? k.gate(mlp, a.data(), bias.data(), y.data(), n) : k.activate(mlp, y.data(), n);
            same(k.name, mlp < 3 ? "gate" : "activate", y.data(), expected.data(), n);
        }
        for (int i = 0; i < n; i++) expected[i] = ref_tanh(a[i]);
        k.tanh_all((y = a).data(), n);
        same(k.name, "tanh_all", y.data(), expected.data(), n);
        for (int i = 0; i < n; i++) expected[i] = 30.0f * ref_tanh(a[i] / 30.0f);
        k.softcap((y = a).data(), n, 30);
        same(k.name, "softcap", y.data(), expected.data(), n);
        for (int i = 0; i < n; i++) expected[i] = x[i] + bias[i];
        k.add((y = x).data(), bias.data(), n);
        same(k.name, "add", y.data(), expected.data(), n);

        const Floats pairs = normals(2 * n), cosines = normals(n), sines = normals(n);
        Floats rotated = pairs, expected_pairs(2 * n);
        for (int i = 0; i < n; i++) {
            const float p = pairs[i], q = pairs[i + n];
            expected_pairs[i] = std::fma(p, cosines[i], -(q * sines[i]));
            expected_pairs[i + n] = std::fma(q, cosines[i], p * sines[i]);
        }
        k.rotate(rotated.data(), cosines.data(), sines.data(), n);
        same(k.name, "rotate", rotated.data(), expected_pairs.data(), 2 * n);
    }
}

void test_choice(const Kernels& k) {
    for (int n = 1; n < 120; n++) {
        Floats x(n);
        for (float& v : x) v = static_cast<float>(uniform(-6, 6));  // ties
        if (n % 4 == 0) x[uniform(0, n - 1)] = NAN;
        if (n % 7 == 0) x.assign(n, -INFINITY);
        if (n % 11 == 0) x.assign(n, -2.0f);
        int best = 0;
        float most = -INFINITY;
        for (int i = 0; i < n; i++) {
            if (x[i] > most) most = x[best = i];
        }
        same(k.name, "argmax", k.argmax(x.data(), n), best);
        same(k.name, "largest", k.largest(x.data(), n) == most, 1);

        const uint64_t key = gumbel_key(random_bits(), 3, n);
        const int first = uniform(0, 50000);
        Floats y(n), expected(n);
        for (int i = 0; i < n; i++) expected[i] = x[i] * 1.7f + gumbel(key, static_cast<uint32_t>(first + i));
        k.add_gumbel(x.data(), 1.7f, key, first, n, y.data());
        same(k.name, "add_gumbel", y.data(), expected.data(), n);
    }
}

// --- attention

struct Head {
    int width, positions;
    Floats keys, values;  // [position][width]
};

std::vector<float> attention_weights(const Floats& scores, const Query& q, float* total) {
    float most = -INFINITY;
    Floats p(scores.size(), 0), lanes(16, 0);
    for (int t = q.low; t < q.high; t++) most = at_least(scores[t], most);
    for (int t = q.low; t < q.high; t++) lanes[t % 16] += p[t] = ref_exp2(scores[t] - most);
    *total = lanesum(lanes);
    return p;
}

void ref_attend_float(const Head& h, const Query& q, float factor, float* out) {
    Floats scores(h.positions, 0);
    for (int t = q.low; t < q.high; t++) {
        for (int d = 0; d < h.width; d++) scores[t] = std::fma(q.x[d] * factor, h.keys[t * h.width + d], scores[t]);
    }
    float total;
    const Floats p = attention_weights(scores, q, &total);
    for (int d = 0; d < h.width; d++) {
        Floats lanes(16, 0);
        for (int t = q.low; t < q.high; t++) lanes[t % 16] = std::fma(p[t], h.values[t * h.width + d], lanes[t % 16]);
        out[d] = lanesum(lanes) * (1.0f / total);
    }
}

void ref_attend_int8(const Head& h, const Query& q, float factor, float* out) {
    const int w = h.width;
    Floats scores(h.positions, 0), value_scales(h.positions, 0);
    std::vector<int8_t> x(w), key(w), values(static_cast<size_t>(h.positions) * w);
    const float sq = ref_quantize(q.x, w, 0, x.data());
    for (int t = q.low; t < q.high; t++) {
        const float ks = ref_quantize(&h.keys[t * w], w, 0, key.data());
        value_scales[t] = ref_quantize(&h.values[t * w], w, 0, &values[t * w]);
        int acc = 0;
        for (int d = 0; d < w; d++) acc += x[d] * key[d];
        scores[t] = static_cast<float>(acc) * ((sq * factor) * ks);
    }
    float total, m = 0;
    const Floats p = attention_weights(scores, q, &total);
    for (int t = q.low; t < q.high; t++) {
        const float u = p[t] * value_scales[t];
        m = std::isnan(m) || std::isnan(u) ? NAN : std::fmax(m, u);
    }
    for (int d = 0; d < w; d++) {
        float o = 0;
        for (int chunk = 0; chunk < q.high; chunk += CHUNK) {
            int32_t acc = 0;
            for (int t = std::max(chunk, q.low); t < std::min(chunk + CHUNK, q.high); t++) {
                const float u = p[t] * value_scales[t];
                const int code = m >= 1e-30f ? static_cast<int>(std::nearbyint(u * (32767.0f / m))) : 0;
                acc += code * values[t * w + d];
            }
            o = o + static_cast<float>(acc);
        }
        out[d] = o * ((m / 32767.0f) * (1.0f / total));
    }
}

void test_attention(const Kernels& k) {
    for (int trial = 0; trial < 160; trial++) {
        const bool int8 = trial % 2;
        Head h;
        h.width = int8 ? 16 * uniform(1, 9) : uniform(1, 70);
        h.positions = trial % 8 < 2 ? uniform(250, 800) : uniform(1, 80);
        const int stored = (h.positions + 15) / 16 * 16, w = h.width, count = uniform(1, 11);
        h.keys = normals(h.positions * w);
        h.values = normals(h.positions * w, trial % 16 == 5 ? 1e-35f : 1);
        const bool broken = trial % 10 == 7;  // one position that only some queries see has no numbers
        if (broken) h.values[(h.positions - 1) * w] = NAN;
        // What was never stored may hold anything
        Floats keys(static_cast<size_t>(stored) * w, NAN), values(keys), key_scales(stored, NAN);
        Floats value_scales(stored, NAN);
        std::vector<uint8_t> key_codes(static_cast<size_t>(stored) * w, 99);
        std::vector<int8_t> value_codes(key_codes.size(), 99);
        const FloatCache fc{keys.data(), values.data()};
        const Int8Cache ic{key_codes.data(), value_codes.data(), key_scales.data(), value_scales.data()};
        for (int t = 0; t < h.positions; t++) {
            int8 ? k.store_int8(ic, w, t, &h.keys[t * w], &h.values[t * w])
                 : k.store_float(fc, w, t, &h.keys[t * w], &h.values[t * w]);
        }
        const Floats x = normals(count * w, trial % 5 ? 1 : 8);
        Floats out(x.size()), expected(x.size());
        std::vector<Query> queries(count);
        int longest = 0;
        for (int j = 0; j < count; j++) {
            Query& q = queries[j];
            q = {&x[j * w], &out[j * w], 0, 0};
            q.high = trial % 3 == 0 ? std::max(1, h.positions - count + 1 + j) : uniform(1, h.positions);
            q.low = trial % 4 == 0 ? uniform(0, q.high - 1) : 0;
            longest = std::max(longest, q.high);
            (int8 ? ref_attend_int8 : ref_attend_float)(h, q, 0.3f, &expected[j * w]);
        }
        Floats scratch(static_cast<size_t>(count) * ((longest + 15) / 16 * 16 + 64));
        if (int8) k.attend_int8(ic, w, queries.data(), count, 0.3f, scratch.data());
        else k.attend_float(fc, w, queries.data(), count, 0.3f, scratch.data());
        char what[80];
        std::snprintf(what, sizeof what, "attend_%s, width %d, %d positions, %d queries", int8 ? "int8" : "float", w,
                      h.positions, count);
        same(k.name, what, out.data(), expected.data(), out.size());
    }
}

}  // namespace

int main() {
    int tables = 0;
    for (const char* name : {"avx512", "avxvnni", "avx2", "neon", "scalar"}) {
        const Kernels* k = kernels(name);
        if (!k) continue;
        tables++;
        random_bits.seed(20240607);
        const int before = failures;
        test_rows(*k);
        test_choice(*k);
        test_linear(*k);
        test_attention(*k);
        std::printf("%s: %s\n", name, failures == before ? "ok" : "FAILED");
    }
    if (!kernels("") || kernels("sse9") || !tables) failures++;
    std::printf("%d checks, %d failures\n", checks, failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
