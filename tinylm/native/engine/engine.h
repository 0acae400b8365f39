// The forward pass: one for everything. A pass takes spans of tokens, each going on with one sequence.
//
//     decoding      a span of one token per sequence
//     a prompt      a long span
//     speculation   a span of the last token and the drafted ones
//     an encoder    a span per whole text
//
// The rows of all spans go through the matrices together. Every token writes its own keys and values first and then
// attends to the cache, so that a token's features are the same bits however the text was cut into spans.
#pragma once
#include <vector>

#include "buffer.h"
#include "cache.h"
#include "model.h"
#include "threads.h"

namespace tinylm {

struct Span {
    int sequence, first, count;  // the sequence's positions first .. first + count - 1
    const int32_t* tokens;
    const int32_t* types;  // null: zeros
};

class Session {
public:
    Session(const Model& model, int sequences, int threads);  // threads 0: by the weights' size

    // Everything before the head: features of all spans' tokens, row by row. All sizes have been checked by the caller.
    void trunk(const Span* spans, int count);
    // The head's output for `count` of these rows (null: the first ones), one row of `output_stride` floats each.
    void head(const int* rows, int count);
    // The same into somebody's own memory. A matrix writes whole panels: rows need room for them, see `whole_rows`.
    void head(const int* rows, int count, float* out, int stride);
    bool whole_rows() const { return output_stride_ == model.outputs; }

    // The head from its high plane alone, half the bytes: |output - exact| <= margin(i) * scale of the token, with a
    // probability of 1 - 1e-9 per row (sampling.cc). `exact_panel` then computes 16 outputs as `head` would.
    void screen(const int* rows, int count);
    float margin(int i) const;
    void exact_panel(int i, int panel, float* out16) const;

    const float* features(int row) const { return x_.data() + static_cast<size_t>(row) * width_; }
    float* features(int row) { return x_.data() + static_cast<size_t>(row) * width_; }
    float* output(int row) { return output_.data() + static_cast<size_t>(row) * output_stride_; }
    int output_stride() const { return output_stride_; }
    void make_sequences(int count);  // at least so many
    int sequences() const { return static_cast<int>(caches_.size()); }
    int best_rows() const { return best_rows_; }  // of a pass over a long prompt
    size_t bytes() const;

    const Model& model;
    Threads threads;

private:
    friend class Worker;
    struct Row {
        int token, type, position, span;
    };
    // Rows of activations on their way into a matrix.
    struct Stage {
        Buffer<float> floats;  // [rows][width]
        Buffer<int8_t> codes;  // [rows][widest]
        Buffer<float> scales;  // [rows]
        Buffer<int32_t> sums;
        Buffer<float> normed;  // [rows][widest]: floats after a matrix's own norm; empty where none has one
        Stage() = default;
        Stage(size_t rows, size_t width, size_t widest, bool own_norms)
            : floats(rows * width),
              codes(rows * widest),
              scales(rows),
              sums(rows),
              normed(own_norms ? rows * widest : 0) {}
        size_t bytes() const {
            return floats.bytes() + codes.bytes() + scales.bytes() + sums.bytes() + normed.bytes();
        }
    };
    struct Scratch {
        std::vector<Query> queries;
        Buffer<float> floats;
    };
    void make_room(int rows);
    void make_output(int rows);
    void make_turns(int positions);
    Stage& stage(int rows, int thread);
    Activations picked(int i) const;

    const int width_, queries_, keys_, hidden_, widest_;  // floats per row, multiples of 16
    const int output_stride_, best_rows_;
    std::vector<Cache> caches_;
    int room_ = 0, output_room_ = 0;

    std::vector<Span> spans_;
    std::vector<Row> rows_;
    Buffer<float> x_, block_out_, other_out_;  // [rows][width]: the residual stream; what attention and MLP add to it
    Buffer<float> q_, k_, v_, attended_;       // [rows][queries or keys]
    Buffer<float> up_, gate_;                  // [rows][hidden]
    Buffer<float> output_;                     // [rows][output_stride]
    Stage shared_;
    std::vector<Stage> own_;        // one per thread, for a few rows
    std::vector<Scratch> scratch_;  // one per thread, for attention
    static constexpr int BALANCES = 8;
    Balance balances_[BALANCES];        // by the binary length of a pass's rows
    int picked_ = 0;                    // rows that the head read last
    Buffer<float> cosines_, sines_;     // [positions][rotary / 2, a multiple of 16]
    int turned_ = 0, turn_stride_ = 0;  // positions they hold, floats per position
};

}  // namespace tinylm
