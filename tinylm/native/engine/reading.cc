#include "reading.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace tinylm {
namespace {

constexpr int HEAD_FLOATS = 1 << 20;  // of the head's output at once

void look_at(Generation::Cancel cancel) {
    if (cancel && *cancel) fail(TLM_CANCELLED, "cancelled");
}

// The head for rows first .. last - 1 of the last pass, some at a time: done(row, i) finds row's output in output(i).
template <class Done>
void head_of(Session& session, int first, int last, Done done) {
    const int at_once = std::max(1, HEAD_FLOATS / session.output_stride());
    std::vector<int> rows;
    for (int row = first; row < last; row += at_once) {
        rows.clear();
        for (int i = row; i < std::min(last, row + at_once); i++) rows.push_back(i);
        session.head(rows.data(), static_cast<int>(rows.size()));
        done(row, static_cast<int>(rows.size()));
    }
}

// ln softmax(x)[token]
double log_probability(const Kernels& kernels, const float* x, int n, int token) {
    const float most = kernels.largest(x, n);
    double sum = 0;
    for (int i = 0; i < n; i++) sum += std::exp(x[i] - most);
    return static_cast<double>(x[token]) - most - std::log(sum);
}

// The row that a classes head reads of this span, once it is known; -1: not yet, or not any more. A mean takes the place
// of the span's first row; it is summed position after position, as the slow twin does.
int pooled(Session& session, const Span& span, int row, bool whole, std::vector<float>& sums) {
    const int width = static_cast<int>(sums.size());
    switch (session.model.constants.pooling) {
        case Pooling::cls: return span.first == 0 ? row : -1;
        case Pooling::last: return whole ? row + span.count - 1 : -1;
        case Pooling::mean: break;
    }
    if (span.first == 0) std::fill(sums.begin(), sums.end(), 0.0f);
    for (int r = row; r < row + span.count; r++)
        for (int i = 0; i < width; i++) sums[i] += session.features(r)[i];
    if (!whole) return -1;
    const float count = static_cast<float>(span.first + span.count);
    for (int i = 0; i < width; i++) session.features(row)[i] = sums[i] / count;
    return row;
}

}  // namespace

void forward(Generation& generation, int texts, const int32_t* lengths, const int32_t* tokens, const int32_t* types,
             int what, float* out, Generation::Cancel cancel) {
    Session& session = generation.session;
    const Model& model = session.model;
    const bool classes = what == TLM_OUTPUT && model.constants.head == Head::classes;
    const int columns = what == TLM_OUTPUT ? model.outputs : model.constants.width;
    const auto copy = [&](const float* row) { out = std::copy_n(row, columns, out); };
    generation.forget();
    std::vector<Span> spans;
    std::vector<float> sums(model.constants.width);  // of a text whose mean is asked for
    for (int text = 0, first = 0; text < texts;) {
        // Several short texts, or a piece of a long one. An encoder's text cannot be cut.
        spans.clear();
        int rows = 0;
        while (text < texts && (rows == 0 || (first == 0 && rows + lengths[text] <= session.best_rows()))) {
            const int left = lengths[text] - first,
                      piece = model.decoder() ? std::min(left, session.best_rows()) : left;
            spans.push_back({static_cast<int>(spans.size()), first, piece, tokens, types});
            tokens += piece, rows += piece;
            if (types) types += piece;
            first = piece == left ? 0 : first + piece;
            if (first == 0) text++;
            if (piece < left) break;
        }
        look_at(cancel);
        session.make_sequences(static_cast<int>(spans.size()));
        session.trunk(spans.data(), static_cast<int>(spans.size()));
        if (classes) {
            int row = 0;
            for (const Span& span : spans) {
                const bool whole = &span != &spans.back() || first == 0;  // its text ends here
                const int at = pooled(session, span, row, whole, sums);
                if (at >= 0) {
                    session.head(&at, 1);
                    copy(session.output(0));
                }
                row += span.count;
            }
        } else if (what == TLM_OUTPUT && session.whole_rows()) {
            std::vector<int> all(rows);
            std::iota(all.begin(), all.end(), 0);
            session.head(all.data(), rows, out, columns);
            out += static_cast<size_t>(rows) * columns;
        } else if (what == TLM_OUTPUT) {
            head_of(session, 0, rows, [&](int, int n) {
                for (int i = 0; i < n; i++) copy(session.output(i));
            });
        } else {
            for (int row = 0; row < rows; row++) copy(session.features(row));
        }
    }
}

void score(Generation& generation, const int32_t* tokens, int64_t count, double* logs, Generation::Cancel cancel) {
    Session& session = generation.session;
    const Model& model = session.model;
    const int context = model.constants.context;
    generation.forget();
    logs[0] = 0;
    int64_t scored = 1;  // tokens with their logs
    while (scored < count) {
        const int64_t from = window(scored, context), to = std::min(count - 1, from + context);  // what is read
        for (int64_t at = from; at < to;) {
            look_at(cancel);
            const int piece = static_cast<int>(std::min<int64_t>(session.best_rows(), to - at));
            const Span span{0, static_cast<int>(at - from), piece, tokens + at, nullptr};
            session.trunk(&span, 1);
            const int first = static_cast<int>(std::max<int64_t>(0, scored - 1 - at));  // the row that says `scored`
            head_of(session, std::min(first, piece), piece, [&](int row, int n) {
                session.threads.run([&](int id) {
                    for (int i = id; i < n; i += session.threads.active()) {
                        const int64_t target = at + row + i + 1;
                        logs[target] =
                            log_probability(*model.kernels, session.output(i), model.outputs, tokens[target]);
                    }
                });
                scored = at + row + n + 1;
            });
            at += piece;
        }
    }
    for (int64_t i = 0; i < count; i++)
        if (!std::isfinite(logs[i]))
            fail(TLM_NUMBERS, "the model's logits are not finite: its weights are damaged or training diverged");
}

}  // namespace tinylm
