#include "text.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "../tinylm.h"

namespace tinylm {
namespace {

constexpr std::string_view SPACE = "\u2581";
constexpr uint32_t SPACE_CODE = 0x2581, CODES = 0x110000;
constexpr size_t HEAD = 4 + 256;  // words before the characters

// What GPT-2's pattern tells apart.
enum class Sort { space, letter, number, other, unknown };

// Only of characters that were what they are in the first versions of Unicode already: the library's is another version
// than ours would be. Latin letters, the punctuation and the symbols that go with them, and pictures.
Sort sort_of(uint32_t code) {
    const auto within = [code](uint32_t first, uint32_t last) { return code >= first && code <= last; };
    if (code == ' ' || within('\t', '\r') || code == 0x85 || code == 0xA0) return Sort::space;
    if (within('a', 'z') || within('A', 'Z') || code == 0xAA || code == 0xB5 || code == 0xBA) return Sort::letter;
    if (within('0', '9') || within(0xB2, 0xB3) || code == 0xB9 || within(0xBC, 0xBE)) return Sort::number;
    if (code < 0xC0 || code == 0xD7 || code == 0xF7) return Sort::other;
    if (code < 0x250) return Sort::letter;
    if (within(0x2028, 0x2029) || code == 0x202F) return Sort::space;
    const bool joins = code == 0x200D || code == 0xFE0F;  // pictures
    return joins || within(0x2010, 0x205E) || within(0x1F300, 0x1FAFF) ? Sort::other : Sort::unknown;
}

// The code point that a text begins with, which is cut off.
uint32_t next_code(std::string_view& text) {
    const auto lead = static_cast<uint8_t>(text[0]);
    const int more = lead < 0x80 ? 0 : lead >> 5 == 6 ? 1 : lead >> 4 == 14 ? 2 : lead >> 3 == 30 ? 3 : -1;
    static constexpr uint32_t LEAST[] = {0, 0x80, 0x800, 0x10000};
    bool good = more >= 0 && text.size() > static_cast<size_t>(more);
    uint32_t code = more > 0 ? lead & (0x3F >> more) : lead;
    for (int i = 1; good && i <= more; i++) {
        const auto byte = static_cast<uint8_t>(text[i]);
        good = byte >> 6 == 2;
        code = code << 6 | (byte & 0x3F);
    }
    if (!good || code < LEAST[more] || code >= CODES || (code >= 0xD800 && code < 0xE000))
        fail(TLM_ARGUMENT, "the text is not UTF-8");
    text.remove_prefix(more + 1);
    return code;
}

// Bytes of the word that a text begins with, by GPT-2's pattern
//     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t word(std::string_view text) {
    for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (text.starts_with(ending)) return ending.size();
    // The bytes of the characters of one sort from `begin` on, and those before the last of them.
    const auto run = [text](size_t begin, size_t* but_one) {
        std::string_view left = text.substr(begin);
        Sort sort = Sort::unknown;
        size_t end = begin;
        for (bool first = true; !left.empty(); first = false) {
            const Sort next = sort_of(next_code(left));
            if (!first && next != sort) break;
            sort = next, *but_one = end, end = text.size() - left.size();
        }
        return std::pair(end, sort);
    };
    size_t but_one = 0;
    if (text[0] == ' ' && text.size() > 1)
        if (const auto [end, sort] = run(1, &but_one); sort != Sort::space) return end;
    const auto [end, sort] = run(0, &but_one);
    const bool whole = sort != Sort::space || end == text.size() || but_one == 0;
    return whole ? end : but_one;  // the last space goes with what follows it
}

bool all_known(std::string_view text) {
    while (!text.empty())
        if (sort_of(next_code(text)) == Sort::unknown) return false;
    return true;
}

}  // namespace

Encoder::Encoder(const Tensor& tensor, int known) {
    const auto require = [](bool good) {
        if (!good) fail(TLM_FILE, "tensor merges holds no rules for encoding");
    };
    require(tensor.kind == Kind::bytes && tensor.bytes % 4 == 0 && tensor.bytes / 4 >= HEAD);
    const auto* words = reinterpret_cast<const uint32_t*>(tensor.data);
    const uint64_t count = tensor.bytes / 4;
    rules_ = words[0], character_count_ = words[1], merge_count_ = words[2];
    require(words[3] == 0 && count == HEAD + 2ull * character_count_ + 3ull * merge_count_);
    bytes_ = words + 4, characters_ = words + HEAD, merges_ = characters_ + 2ull * character_count_;
    const bool spaced = rules_ & SPACES;
    require(rules_ < 32 && (spaced || (rules_ <= WORDS && character_count_ == 0)) && !(spaced && rules_ & WORDS));
    const auto known_id = [known](uint32_t id) { return id < static_cast<uint32_t>(known); };
    require(std::all_of(bytes_, characters_, known_id) && std::all_of(merges_, words + count, known_id));
    for (uint32_t i = 0; i < character_count_; i++) {
        const uint32_t code = characters_[2 * i];
        require(code < CODES && known_id(characters_[2 * i + 1]) && (i == 0 || characters_[2 * i - 2] < code));
    }
    require(!spaced || character(SPACE_CODE) >= 0);  // so that no character becomes more ids than it has bytes
}

bool Encoder::encode(std::string_view text, std::vector<int32_t>& ids) const {
    if ((rules_ & WORDS && !all_known(text)) || text.size() >= INT32_MAX / 4) return false;
    if (text.empty()) return true;
    std::call_once(built_, [this] { build(); });
    if (rules_ & SPACES)
        encode_spaced(text, ids);
    else
        encode_words(text, ids);
    return true;
}

void Encoder::encode_words(std::string_view text, std::vector<int32_t>& ids) const {
    Scratch scratch;
    while (!text.empty()) {
        const size_t size = rules_ & WORDS ? word(text) : text.size();
        for (const char c : text.substr(0, size))
            scratch.symbols.push_back({static_cast<int32_t>(bytes_[static_cast<uint8_t>(c)]), 0, 0, false});
        merge(scratch, ids);
        text.remove_prefix(size);
    }
}

void Encoder::encode_spaced(std::string_view text, std::vector<int32_t>& ids) const {
    std::string whole;
    const bool begins = text.starts_with(' ') || text.starts_with(SPACE);
    if (rules_ & FRONT && !(rules_ & FRONT_ONCE && begins)) whole += SPACE;
    for (const char c : text) c == ' ' ? whole += SPACE : whole += c;
    Scratch scratch;
    for (std::string_view left = whole; !left.empty();) {
        const std::string_view at = left;
        const uint32_t code = next_code(left);
        if (rules_ & EACH_SPACE && code == SPACE_CODE) merge(scratch, ids);
        if (const int32_t id = character(code); id >= 0)
            scratch.symbols.push_back({id, 0, 0, false});
        else
            for (const char c : at.substr(0, at.size() - left.size()))
                scratch.symbols.push_back({static_cast<int32_t>(bytes_[static_cast<uint8_t>(c)]), 0, 0, false});
    }
    merge(scratch, ids);
}

// The symbols become the ids of what is left of them, and are gone. As the library does it, down to what happens to a
// candidate whose symbols have changed: it counts as long as they still become the same id.
void Encoder::merge(Scratch& scratch, std::vector<int32_t>& ids) const {
    auto& [symbols, heap] = scratch;
    const auto count = static_cast<int32_t>(symbols.size());
    for (int32_t i = 0; i < count; i++) symbols[i].before = i - 1, symbols[i].after = i + 1 < count ? i + 1 : -1;
    for (int32_t i = 0; i + 1 < count; i++) propose(scratch, i);
    while (!heap.empty()) {
        std::pop_heap(heap.begin(), heap.end());
        const Candidate top = heap.back();
        heap.pop_back();
        Symbol& left = symbols[top.place];
        if (left.merged || left.after < 0) continue;
        Symbol& right = symbols[left.after];
        const int32_t number = find(left.id, right.id);
        if (number < 0 || static_cast<int32_t>(merges_[3ull * number + 2]) != top.result) continue;
        left.id = top.result, left.after = right.after, right.merged = true;
        if (right.after >= 0) symbols[right.after].before = top.place;
        if (left.before >= 0) propose(scratch, left.before);
        if (left.after >= 0) propose(scratch, top.place);
    }
    for (const Symbol& symbol : symbols)
        if (!symbol.merged) ids.push_back(symbol.id);
    symbols.clear();
}

void Encoder::propose(Scratch& scratch, int32_t place) const {
    const Symbol& left = scratch.symbols[place];
    const int32_t number = find(left.id, scratch.symbols[left.after].id);
    if (number < 0) return;
    scratch.heap.push_back({static_cast<uint32_t>(number), place, static_cast<int32_t>(merges_[3ull * number + 2])});
    std::push_heap(scratch.heap.begin(), scratch.heap.end());
}

int32_t Encoder::character(uint32_t code) const {
    uint32_t low = 0, high = character_count_;
    while (low < high) {
        const uint32_t middle = std::midpoint(low, high);
        if (characters_[2ull * middle] < code)
            low = middle + 1;
        else
            high = middle;
    }
    const bool found = low < character_count_ && characters_[2ull * low] == code;
    return found ? static_cast<int32_t>(characters_[2ull * low + 1]) : -1;
}

// ---- the merges by their pairs

namespace {

size_t hash(uint32_t left, uint32_t right) {
    uint64_t x = (uint64_t{left} << 32 | right) * 0x9E3779B97F4A7C15u;
    return static_cast<size_t>(x ^ x >> 32);
}

}  // namespace

void Encoder::build() const {
    table_.assign(std::bit_ceil(2 * size_t{merge_count_} + 1), -1);
    const size_t mask = table_.size() - 1;
    for (uint32_t i = 0; i < merge_count_; i++) {
        const uint32_t* merge = merges_ + 3ull * i;
        size_t at = hash(merge[0], merge[1]) & mask;
        while (table_[at] >= 0 && !std::equal(merge, merge + 2, merges_ + 3ull * table_[at])) at = (at + 1) & mask;
        table_[at] = static_cast<int32_t>(i);  // of a pair that comes twice the last counts
    }
}

// The number of the merge of this pair, -1: they stay apart.
int32_t Encoder::find(int32_t left, int32_t right) const {
    const size_t mask = table_.size() - 1;
    for (size_t at = hash(left, right) & mask; table_[at] >= 0; at = (at + 1) & mask) {
        const uint32_t* merge = merges_ + 3ull * table_[at];
        if (merge[0] == static_cast<uint32_t>(left) && merge[1] == static_cast<uint32_t>(right)) return table_[at];
    }
    return -1;
}

}  // namespace tinylm
