// Text to token ids: byte-pair encoding (Sennrich et al. 2016) with the ids that the `tokenizers` library gives, for
// tokenizers whose rules are in the file. The tensor "merges", in 32-bit words (tinylm/engine/encoding.py):
//
//     rules, number of characters, number of merges, 0
//     256 ids of the bytes
//     (code point, id) of each character that has a token, ascending
//     (left id, right id, the id that they become) of each merge, the most urgent first
#pragma once
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "file.h"

namespace tinylm {

class Encoder {
public:
    // Checks all of the tensor. Throws Error.
    Encoder(const Tensor& tensor, int known);

    // Appends the ids of a text of UTF-8. False where a character is not known to be a letter, a number or neither, and
    // that matters: `ids` is then as it was. Throws Error for bytes that are not UTF-8. Any number of threads may call it.
    bool encode(std::string_view text, std::vector<int32_t>& ids) const;

private:
    enum Rule : uint32_t {
        WORDS = 1,        // GPT-2's pattern cuts the text into words, whose bytes are merged
        SPACES = 2,       // characters are merged, a space being U+2581; those without a token are their bytes
        FRONT = 4,        // a U+2581 comes in front of a text
        FRONT_ONCE = 8,   // but not of one that begins with one
        EACH_SPACE = 16,  // a word begins at every U+2581
    };
    struct Symbol {
        int32_t id, before, after;  // places of its neighbours, -1: none
        bool merged;                // it is part of the one before
    };
    struct Candidate {
        uint32_t rank;
        int32_t place, result;
        bool operator<(const Candidate& other) const {  // a heap has its largest on top: the one to be merged first
            return rank != other.rank ? rank > other.rank : place > other.place;
        }
    };
    struct Scratch {
        std::vector<Symbol> symbols;
        std::vector<Candidate> heap;
    };

    void encode_words(std::string_view text, std::vector<int32_t>& ids) const;
    void encode_spaced(std::string_view text, std::vector<int32_t>& ids) const;
    void merge(Scratch& scratch, std::vector<int32_t>& ids) const;
    void propose(Scratch& scratch, int32_t place) const;
    int32_t find(int32_t left, int32_t right) const;
    int32_t character(uint32_t code) const;
    void build() const;

    const uint32_t *bytes_, *characters_, *merges_;
    uint32_t rules_, character_count_, merge_count_;
    mutable std::once_flag built_;
    mutable std::vector<int32_t> table_;  // of merges' numbers, hashed by their pairs; -1: free
};

}  // namespace tinylm
