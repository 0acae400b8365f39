// Texts in the making: prompts are read, tokens chosen, drafts checked, and what outgrows the context is read anew.
#pragma once
#include <memory>
#include <vector>

#include "draft.h"
#include "engine.h"
#include "sampling.h"
#include "../tinylm.h"

namespace tinylm {

// First token seen of a text of `length` tokens: 0 while it fits, then moved on by half a context at a time.
int64_t window(int64_t length, int context);

class Generation {
public:
    using Cancel = const volatile int*;

    Generation(const Model& model, int sequences, int threads);

    void start(int sequence, const int32_t* prompt, int count, const tlm_settings& settings);
    void next(int most, int milliseconds, int32_t* tokens, int32_t* made, int32_t* ended, Cancel cancel);
    void stop(int sequence) { texts_[sequence].ended = TLM_MOST; }
    void use(const Draft* draft);
    // Where a lone text's drafts run out, this model writes some: a smaller one with the same tokens. Null: none.
    void use(const Model* smaller);
    int texts() const { return static_cast<int>(texts_.size()); }
    void forget();  // the caches' contents: another pass has used them

    Session session;
    tlm_counts counts{};

private:
    static constexpr int MOST_DRAFTED = 7;

    struct Text {
        std::vector<int32_t> tokens, cached;  // all of it; those whose keys and values the cache holds
        tlm_settings settings{};
        int made = 0, ended = TLM_MOST;
        std::vector<int32_t> distinct;  // ids that the repetition penalty acts on
        std::vector<bool> listed;
        Lookup lookup;
        int drafted = 0;  // tokens after `tokens` in this pass, and what kind of guess each was
        int32_t drafts[MOST_DRAFTED];
        int kinds[MOST_DRAFTED];
        int32_t picks[MOST_DRAFTED + 1];  // what the model chose after them
        int picked = 0;
        bool is_read = false;  // its last token is in this pass
    };

    int draft(Text& text, int most);
    int ask(Text& text, int drafted, int count);
    void plan(int most, const int32_t* made);
    void choose();
    int choose(Text& text, int row, int ahead, bool screened, Sampler& sampler);
    int accept(Text& text, int32_t* tokens);
    void append(Text& text, int32_t token);

    const Model& model_;
    std::vector<Text> texts_;
    std::vector<Sampler> samplers_;  // one per thread
    const Draft* draft_ = nullptr;
    std::unique_ptr<Draft> own_draft_;  // from the file
    std::unique_ptr<Generation> smaller_;
    Pace pace_;
    int unscreened_ = 0, patience_ = 1;  // passes until the screened head is tried again, after it was of no use

    // One pass.
    std::vector<Span> spans_;
    bool decoding_ = false;              // none of them reads a prompt
    std::vector<int> rows_, row_texts_;  // rows whose logits are wanted, and whose they are
};

}  // namespace tinylm
