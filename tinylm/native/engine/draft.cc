#include "draft.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "file.h"
#include "gumbel.h"
#include "../tinylm.h"

namespace tinylm {
namespace {

constexpr uint32_t MAGIC = 0x6D617267;  // "gram"
constexpr size_t HEADER = 16, SLOT = 8;
constexpr int TRIES = 32;  // slots after a context's own in which it may lie
constexpr int LOOKUP_SLOTS = 1 << 12;
constexpr int LOOKUP_TOKENS[Lookup::ORDERS] = {2, 4};
constexpr float PRIOR[Lookup::ORDERS] = {0.35f, 0.7f};
constexpr float PRIOR_OF_MODEL = 0.7f;

uint64_t hash(const int32_t* tokens, int count) {
    uint64_t h = static_cast<uint64_t>(count);
    for (int i = 0; i < count; i++) h = mix64((h ^ static_cast<uint32_t>(tokens[i])) + 0x9E3779B97F4A7C15ull);
    return h;
}

uint32_t tag_of(uint64_t context) { return static_cast<uint32_t>(context >> 32) | 1; }

}  // namespace

// ---- a corpus

Draft Draft::learn(const int32_t* tokens, size_t count, int vocab, size_t most) {
    struct Seen {
        uint64_t context;
        int32_t token;
        bool operator<(const Seen& other) const {
            return context < other.context || (context == other.context && token < other.token);
        }
    };
    struct Entry {
        uint64_t context;
        uint32_t token, times, all;
    };
    std::vector<Entry> entries;
    std::vector<Seen> seen;
    for (int order = SHORTEST; order <= LONGEST; order++) {
        seen.clear();
        for (size_t i = order; i < count; i++) seen.push_back({hash(tokens + i - order, order), tokens[i]});
        std::sort(seen.begin(), seen.end());
        for (size_t i = 0; i < seen.size();) {  // one context after the other, in it one token after the other
            Entry best{seen[i].context, 0, 0, 0};
            while (i < seen.size() && seen[i].context == best.context) {
                const size_t first = i;
                while (i < seen.size() && !(seen[first] < seen[i])) i++;
                const auto times = static_cast<uint32_t>(i - first);
                if (times > best.times) best.token = seen[first].token, best.times = times;
                best.all += times;
            }
            if (best.times > 1) entries.push_back(best);
        }
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
        return a.times > b.times || (a.times == b.times && a.context < b.context);
    });
    if (most && entries.size() > most) entries.resize(most);

    Draft draft;
    const uint64_t slots = std::bit_ceil(std::max<uint64_t>(entries.size() * 4 / 3, 64));
    draft.vocab_ = vocab;
    draft.mask_ = slots - 1;
    draft.bytes_.resize(HEADER + SLOT * slots);
    const uint32_t head[2] = {MAGIC, static_cast<uint32_t>(vocab)};
    std::memcpy(draft.bytes_.data(), head, sizeof head);
    std::memcpy(draft.bytes_.data() + 8, &slots, 8);
    for (const Entry& entry : entries)  // the most frequent first: they find room
        draft.insert(entry.context,
                     entry.token << 8 | static_cast<uint32_t>(std::lround(255.0 * entry.times / entry.all)));
    return draft;
}

void Draft::insert(uint64_t context, uint32_t value) {
    for (int i = 0; i < TRIES; i++) {
        uint8_t* at = bytes_.data() + HEADER + SLOT * ((context + i) & mask_);
        const Slot mine{tag_of(context), value}, there = slot(context + i);
        if (there.tag == mine.tag) return;
        if (there.tag) continue;
        std::memcpy(at, &mine, SLOT);
        return;
    }
}

Draft Draft::read(const uint8_t* data, size_t size) {
    uint32_t head[2];
    uint64_t slots = 0;
    if (size >= HEADER) {
        std::memcpy(head, data, sizeof head);
        std::memcpy(&slots, data + 8, 8);
    }
    const bool whole =
        slots && std::has_single_bit(slots) && slots == (size - HEADER) / SLOT && (size - HEADER) % SLOT == 0;
    if (!whole || head[0] != MAGIC || head[1] < 1 || head[1] > 1 << 24)
        fail(TLM_FILE, "these bytes are no table of drafts, or damaged");
    Draft draft;
    draft.bytes_.assign(data, data + size);
    draft.mask_ = slots - 1;
    draft.vocab_ = static_cast<int>(head[1]);
    for (uint64_t i = 0; i < slots; i++)
        if (static_cast<int>(draft.slot(i).value >> 8) >= draft.vocab_)
            fail(TLM_FILE, "a table of drafts with token %u of %d", draft.slot(i).value >> 8, draft.vocab_);
    return draft;
}

Draft::Slot Draft::slot(uint64_t number) const {
    Slot slot;
    std::memcpy(&slot, bytes_.data() + HEADER + SLOT * (number & mask_), SLOT);
    return slot;
}

Draft::Guess Draft::next(const int32_t* text, int length) const {
    for (int order = std::min(LONGEST, length); order >= SHORTEST; order--) {
        const uint64_t context = hash(text + length - order, order);
        for (int i = 0; i < TRIES; i++) {
            const Slot found = slot(context + i);
            if (!found.tag) break;
            if (found.tag == tag_of(context)) return {static_cast<int>(found.value >> 8), (found.value & 255) / 255.0f};
        }
    }
    return {-1, 0};
}

// ---- the text itself

void Lookup::clear() {
    for (auto& latest : latest_) latest.assign(LOOKUP_SLOTS, 0);
}

void Lookup::push(const std::vector<int32_t>& text, int position) {
    for (int order = 0; order < ORDERS; order++) {
        const int tokens = LOOKUP_TOKENS[order];
        if (position >= tokens) latest_[order][hash(text.data() + position - tokens, tokens) % LOOKUP_SLOTS] = position;
    }
}

int Lookup::next(const std::vector<int32_t>& text, int* order) const {
    const int length = static_cast<int>(text.size());
    for (*order = ORDERS - 1; *order >= 0; --*order) {
        const int tokens = LOOKUP_TOKENS[*order];
        if (length <= tokens) continue;
        const int32_t* context = text.data() + length - tokens;
        const int after = latest_[*order][hash(context, tokens) % LOOKUP_SLOTS];
        if (after >= tokens && after < length && std::equal(context, context + tokens, text.data() + after - tokens))
            return text[after];
    }
    return -1;
}

// ---- how many

Pace::Pace() {
    for (int kind = 0; kind < KINDS; kind++)
        chances_[kind] =
            kind < Lookup::ORDERS ? PRIOR[kind] : (kind - Lookup::ORDERS + 0.5f) / (MODEL - Lookup::ORDERS);
    chances_[MODEL] = PRIOR_OF_MODEL;
}

int Pace::kind_of_chance(float chance) {
    constexpr int buckets = MODEL - Lookup::ORDERS;
    return Lookup::ORDERS + std::min(buckets - 1, static_cast<int>(chance * buckets));
}

void Pace::checked(int kind, bool right) { chances_[kind] += ((right ? 1 : 0) - chances_[kind]) / 32; }

void Pace::passed(int drafted, int tokens, double seconds) {
    const auto follow = [](double& mean, double value) { mean = mean == 0 ? value : mean + (value - mean) / 16; };
    if (drafted == 0) {
        follow(pass_, seconds);
        if (row_ == 0) row_ = 0.05 * pass_;
        row_ *= 0.99, draft_ *= 0.99;  // what once seemed dear is tried again some time
    } else if (pass_ > 0) {
        follow(row_, std::clamp((seconds - pass_) / drafted, 0.01 * pass_, pass_));
    }
    follow(rate_, tokens / seconds);
}

void Pace::asked(int tokens, double seconds) {
    draft_ = draft_ == 0 ? seconds / tokens : draft_ + (seconds / tokens - draft_) / 16;
}

bool Pace::pays(float chance) const { return pass_ > 0 && chance > row_ * rate_; }

int Pace::worth(float chance, int most) const {
    int count = 0;
    while (count < most && pass_ > 0 && (chance *= chances_[MODEL]) > (row_ + draft_) * rate_) count++;
    return count;
}

}  // namespace tinylm
