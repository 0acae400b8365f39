#include "generation.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "gumbel.h"

namespace tinylm {
namespace {
constexpr int MOST_SCREENED = 8;  // rows: for more the whole head, which is read once for all of them, takes less time
}

int64_t window(int64_t length, int context) {
    const int64_t half = std::max(1, context / 2);
    return std::max<int64_t>(0, (length - context + half - 1) / half * half);
}

Generation::Generation(const Model& model, int sequences, int threads)
    : session(model, sequences, threads), model_(model), texts_(sequences), samplers_(session.threads.count()) {
    if (const Tensor* grams = model.file.find("grams")) {
        own_draft_ = std::make_unique<Draft>(Draft::read(grams->data, grams->bytes));
        use(own_draft_.get());
    }
}

void Generation::use(const Draft* draft) {
    if (draft && draft->vocab() > model_.constants.vocab)
        fail(TLM_ARGUMENT, "a table of drafts for %d ids, and the model has %d", draft->vocab(),
             model_.constants.vocab);
    draft_ = draft;
}

void Generation::use(const Model* smaller) {
    smaller_.reset();
    if (!smaller) return;
    const Tensor *pieces = model_.file.find("pieces"), *others = smaller->file.find("pieces");
    const bool alike = smaller->constants.known == model_.constants.known && !pieces == !others &&
                       (!pieces || std::equal(pieces->data, pieces->data + pieces->bytes, others->data,
                                              others->data + others->bytes));
    if (!alike) fail(TLM_ARGUMENT, "the model for drafts has other tokens: take one with the same tokenizer");
    smaller_ = std::make_unique<Generation>(*smaller, 1, 1);  // small enough for one thread, and none that spins
}

void Generation::forget() {
    for (Text& text : texts_) text.cached.clear();
}

void Generation::start(int sequence, const int32_t* prompt, int count, const tlm_settings& settings) {
    Text& text = texts_[sequence];
    text.settings = settings;
    text.made = 0;
    text.ended = settings.most == 0 ? TLM_MOST : TLM_GOES_ON;
    text.tokens.clear();
    text.distinct.clear();
    text.listed.assign(settings.repetition_penalty != 1 ? model_.constants.vocab : 0, false);
    if (settings.speculate) text.lookup.clear();
    for (int i = 0; i < count; i++) append(text, prompt[i]);
}

void Generation::append(Text& text, int32_t token) {
    if (text.settings.speculate) text.lookup.push(text.tokens, static_cast<int>(text.tokens.size()));
    text.tokens.push_back(token);
    if (text.listed.empty() || text.listed[token]) return;
    text.listed[token] = true;
    // Every text begins with one of these, and a penalty would keep it from ending.
    if (token != model_.constants.begin && !model_.ends(token) && token < model_.constants.known)
        text.distinct.push_back(token);
}

void Generation::next(int most, int milliseconds, int32_t* tokens, int32_t* made, int32_t* ended, Cancel cancel) {
    using Clock = std::chrono::steady_clock;
    const auto begun = Clock::now();
    std::fill(made, made + texts_.size(), 0);
    const auto report = [&] {
        for (size_t i = 0; i < texts_.size(); i++) ended[i] = texts_[i].ended;
    };
    report();
    for (bool full = false; !full;) {
        if (cancel && *cancel) fail(TLM_CANCELLED, "cancelled");
        plan(most, made);
        if (spans_.empty()) break;
        const auto before = Clock::now();
        int given = 0, drafted = 0;
        try {
            session.trunk(spans_.data(), static_cast<int>(spans_.size()));
            if (!rows_.empty()) choose();
        } catch (...) {
            for (Text& text : texts_) text.ended = TLM_MOST;
            forget();
            report();
            throw;
        }
        for (size_t i = 0; i < texts_.size(); i++) {
            Text& text = texts_[i];
            if (!text.is_read) continue;
            drafted += text.drafted;
            const int more = accept(text, tokens + i * most + made[i]);
            made[i] += more;
            given += more;
            full |= made[i] == most;
        }
        const auto now = Clock::now();
        if (decoding_) {
            pace_.passed(drafted, std::max(1, given), std::chrono::duration<double>(now - before).count());
            counts.passes++;
            counts.tokens += given;
        }
        if (milliseconds && now - begun >= std::chrono::milliseconds(milliseconds)) break;
    }
    report();
}

// The spans of a pass: of each text what the cache lacks, and drafts behind it. Long prompts come in pieces.
void Generation::plan(int most, const int32_t* made) {
    spans_.clear(), rows_.clear(), row_texts_.clear();
    decoding_ = true;
    int rows = 0;
    for (size_t i = 0; i < texts_.size(); i++) {
        Text& text = texts_[i];
        text.is_read = false;
        if (text.ended) continue;
        const auto length = static_cast<int64_t>(text.tokens.size());
        const int64_t from = window(length, model_.constants.context);
        const int32_t* seen = text.tokens.data() + from;
        const int count = static_cast<int>(length - from);
        // The last token is always read again: its logits are what is wanted.
        const auto differs = std::mismatch(text.cached.begin(), text.cached.end(), seen, seen + count - 1).first;
        const int held = static_cast<int>(differs - text.cached.begin());
        int piece = count - held;
        if (piece > 1) {
            piece = std::min(piece, std::max(1, session.best_rows() - rows));
            decoding_ = false;
        }
        text.is_read = held + piece == count;
        text.cached.resize(held);
        text.cached.insert(text.cached.end(), seen + held, seen + held + piece);
        const bool decodes = text.is_read && piece == 1;
        text.drafted = decodes ? draft(text, std::min(model_.constants.context - count, most - made[i] - 1)) : 0;
        text.cached.insert(text.cached.end(), text.drafts, text.drafts + text.drafted);
        spans_.push_back({static_cast<int>(i), held, piece + text.drafted, text.cached.data() + held, nullptr});
        rows += piece + text.drafted;
        for (int row = rows - text.drafted - 1; text.is_read && row < rows; row++) {
            rows_.push_back(row);
            row_texts_.push_back(static_cast<int>(i));
        }
    }
}

// Guesses as long as they pay; returns how many. They stand behind the text only while the next one is looked up.
int Generation::draft(Text& text, int most) {
    const tlm_settings& s = text.settings;
    most = std::min({most, s.speculate, MOST_DRAFTED, s.most < 0 ? MOST_DRAFTED : s.most - text.made - 1});
    float chance = 1;
    int drafted = 0;
    for (; drafted < most; drafted++) {
        int order;
        int token = text.lookup.next(text.tokens, &order);
        int kind = token < 0 ? -1 : Pace::kind_of_lookup(order);
        if (draft_) {
            const Draft::Guess guess = draft_->next(text.tokens.data(), static_cast<int>(text.tokens.size()));
            const int other = Pace::kind_of_chance(guess.chance);
            if (guess.token >= 0 && (kind < 0 || pace_.chance(other) > pace_.chance(kind)))
                token = guess.token, kind = other;
        }
        if (kind < 0 && smaller_ && texts_.size() == 1) {
            drafted += ask(text, drafted, pace_.worth(chance, most - drafted));
            break;
        }
        if (kind < 0 || !pace_.pays(chance *= pace_.chance(kind)) || token >= model_.constants.known ||
            model_.ends(token))
            break;
        text.drafts[drafted] = token;
        text.kinds[drafted] = kind;
        text.tokens.push_back(token);
    }
    text.tokens.resize(text.tokens.size() - drafted);
    return drafted;
}

// Up to `count` tokens of the smaller model, with the text's own settings: a token is chosen with the noise of its
// place, so that two models that nearly agree choose the same one at any temperature.
int Generation::ask(Text& text, int drafted, int count) {
    if (count <= 0) return 0;
    tlm_settings settings = text.settings;
    settings.most = count, settings.speculate = 0;
    int32_t made = 0, ended;
    const auto begun = std::chrono::steady_clock::now();
    try {
        smaller_->start(0, text.tokens.data(), static_cast<int>(text.tokens.size()), settings);
        smaller_->next(count, 0, text.drafts + drafted, &made, &ended, nullptr);
    } catch (const Error&) {
        smaller_.reset();  // its logits are not finite: no reason to end this text
        return 0;
    }
    pace_.asked(made + 1, std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
    std::fill_n(text.kinds + drafted, made, Pace::MODEL);
    text.tokens.insert(text.tokens.end(), text.drafts + drafted, text.drafts + drafted + made);
    return made;
}

// The model's choice after each of the pass's rows. A choice behind a wrong draft is made all the same and dropped.
void Generation::choose() {
    const int rows = static_cast<int>(rows_.size());
    bool screened = unscreened_ == 0 && rows <= MOST_SCREENED;
    if (unscreened_) unscreened_--;
    for (const int text : row_texts_) screened = screened && Sampler::can_screen(model_, texts_[text].settings);
    if (screened)
        session.screen(rows_.data(), rows);
    else
        session.head(rows_.data(), rows);
    const auto one = [&](int thread, int from, int to) {
        for (int i = from; i < to; i++) {
            Text& text = texts_[row_texts_[i]];
            if (i == 0 || row_texts_[i - 1] != row_texts_[i]) text.picked = 0;
            if (text.picked && text.drafts[text.picked - 1] != text.picks[text.picked - 1]) continue;
            text.picks[text.picked] = choose(text, i, text.picked, screened, samplers_[thread]);
            text.picked++;
        }
    };
    if (texts_.size() == 1 || session.threads.active() == 1) {
        one(0, 0, rows);
    } else {
        // Whole texts to a thread. An error is carried over to this one.
        std::vector<std::unique_ptr<Error>> errors(samplers_.size());
        session.threads.run([&](int id) {
            auto [from, to] = Threads::share(rows, id, session.threads.active());
            while (from > 0 && from < rows && row_texts_[from] == row_texts_[from - 1]) from++;
            while (to > 0 && to < rows && row_texts_[to] == row_texts_[to - 1]) to++;
            try {
                one(id, from, to);
            } catch (const Error& error) {
                errors[id] = std::make_unique<Error>(error);
            }
        });
        for (const auto& error : errors)
            if (error) throw *error;
    }
    if (!screened) return;
    counts.screened += rows;
    uint64_t in_vain = 0;
    for (Sampler& sampler : samplers_) {
        counts.rescored += std::exchange(sampler.rescored, 0);
        in_vain += std::exchange(sampler.in_vain, 0);
    }
    patience_ = in_vain ? std::min(2 * patience_, 256) : 1;
    if (in_vain) unscreened_ = patience_;
}

// The token `ahead` places behind the text's end.
int Generation::choose(Text& text, int row, int ahead, bool screened, Sampler& sampler) {
    const tlm_settings& s = text.settings;
    const uint64_t key = gumbel_key(s.seed, s.stream, text.tokens.size() + ahead);
    if (screened) return sampler.choose_screened(session, row, session.output(row), s, key);
    if (text.listed.empty() || ahead == 0) return sampler.choose(model_, session.output(row), s, text.distinct, key);
    std::vector<int32_t> seen = text.distinct;  // and the drafts that were right
    for (int i = 0; i < ahead; i++) {
        const int32_t token = text.drafts[i];
        if (!text.listed[token] && std::find(text.drafts, text.drafts + i, token) == text.drafts + i)
            seen.push_back(token);
    }
    return sampler.choose(model_, session.output(row), s, seen, key);
}

// Takes the choices up to the first that was drafted wrongly, and it itself; returns how many.
int Generation::accept(Text& text, int32_t* tokens) {
    int given = 0;
    for (int i = 0; i < text.picked; i++) {
        const int32_t token = text.picks[i];
        if (i < text.drafted) {
            const bool right = text.drafts[i] == token;
            pace_.checked(text.kinds[i], right);
            counts.drafted++;
            counts.accepted += right;
            if (text.kinds[i] == Pace::MODEL) counts.asked++, counts.taken += right;
        }
        if (model_.ends(token)) {
            text.ended = TLM_END_TOKEN;
            break;
        }
        append(text, token);
        tokens[given++] = token;
        if (++text.made == text.settings.most) {
            text.ended = TLM_MOST;
            break;
        }
    }
    return given;
}

}  // namespace tinylm
