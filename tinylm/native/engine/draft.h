// Guesses at the next tokens, for speculation: they are only ever checked, so a bad guess costs time and changes no
// text.
//
// Two sources: what followed the same tokens earlier in this text (prompt lookup), and a table of what mostly follows
// two to four tokens in a corpus. Where neither knows anything, a smaller model may be asked (generation.cc).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tinylm {

// n-grams of a corpus. One entry of 8 bytes per context, in a hash table: its tag, the token that followed most often,
// and how often it did. As bytes (little-endian): u32 magic, u32 vocab, u64 slots (a power of two), then the slots.
class Draft {
public:
    static constexpr int LONGEST = 4, SHORTEST = 2;  // tokens of a context
    struct Guess {
        int token;     // -1: none
        float chance;  // that it follows
    };

    static Draft learn(const int32_t* tokens, size_t count, int vocab, size_t most);
    static Draft read(const uint8_t* data, size_t size);  // throws Error

    Guess next(const int32_t* text, int length) const;  // after the last tokens of a text; the longest context decides
    const std::vector<uint8_t>& bytes() const { return bytes_; }
    int vocab() const { return vocab_; }

private:
    struct Slot {
        uint32_t tag;    // of the context; 0: empty
        uint32_t value;  // token << 8 | chance in 1/255
    };
    Slot slot(uint64_t number) const;
    void insert(uint64_t context, uint32_t value);

    std::vector<uint8_t> bytes_;
    uint64_t mask_ = 0;
    int vocab_ = 0;
};

// Where the last few tokens of a text occurred before.
class Lookup {
public:
    static constexpr int ORDERS = 2;  // contexts of 2 and 4 tokens
    void clear();
    void push(const std::vector<int32_t>& text, int position);  // the token at `position` is known now
    // The token after the latest earlier occurrence of the last tokens of `text`, or -1; `order` says which context
    // matched.
    int next(const std::vector<int32_t>& text, int* order) const;

private:
    std::vector<int32_t> latest_[ORDERS];  // by hash: position after the context
};

// What the tokens drafted so far say about how many more pay: chances by kind of guess, and the cost of a row.
class Pace {
public:
    static constexpr int MODEL = 16, KINDS = 17;  // MODEL: a smaller model's guess
    static int kind_of_lookup(int order) { return order; }
    static int kind_of_chance(float chance);

    float chance(int kind) const { return chances_[kind]; }
    void checked(int kind, bool right);                    // one drafted token was compared
    void passed(int drafted, int tokens, double seconds);  // one pass gave `tokens`
    void asked(int tokens, double seconds);                // a smaller model made so many drafts
    bool pays(float chance) const;                         // would one more row, right with this chance, save time?
    int worth(float chance, int most) const;               // drafts of a smaller model that do, after this chance

    Pace();

private:
    float chances_[KINDS];
    double pass_ = 0, row_ = 0, rate_ = 0;  // seconds of a pass without drafts, of one drafted row; tokens per second
    double draft_ = 0;  // seconds that a smaller model needs for a token
};

}  // namespace tinylm
