#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace tinylm {
namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr float FULL_WEIGHT = 1 << 30, LEAST_EXPONENT = -31;  // below 2^-31 of the largest, a token's weight is 0
constexpr int BUCKETS_PER_E = 24, BUCKETS = 24 * BUCKETS_PER_E;
constexpr int BLOCK = 64;
constexpr int SCREENED_SHARE = 8;  // of all rows: where more than one in so many can win, the whole head costs less

bool before(const Candidate& a, const Candidate& b) { return a.x > b.x || (a.x == b.x && a.id < b.id); }

bool all_finite(const float* x, int n) {
    int32_t infinite = 0;  // of 16 at a time: this runs over every logit
    for (int i = 0; i < n; i++) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        infinite |= (bits & 0x7F800000) == 0x7F800000;
    }
    return !infinite;
}

float inverse_of(float temperature) { return std::min(1.0f / temperature, FLT_MAX); }

// exp(x * inverse) in 2^-30. An integer, so that sums are exact in any order; no fma, so that every processor agrees.
int32_t weight_of(float x, float inverse) {
    const float t = x * inverse * LOG2_E;
    if (!(t >= LEAST_EXPONENT)) return 0;
    const float n = std::nearbyint(t), f = t - n;
    float p = 0.00132647273f;
    p = p * f + 0.00967151299f;
    p = p * f + 0.0555073358f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
    return static_cast<int32_t>(std::ldexp(p, static_cast<int>(n) + 30));
}

// Calls found(i) for each i where test(i), looking at a block at once: few are expected.
template <class Test, class Found>
void find_few(int n, Test test, Found found) {
    for (int start = 0; start < n; start += BLOCK) {
        const int end = std::min(n, start + BLOCK);
        int any = 0;
        for (int i = start; i < end; i++) any |= test(i);
        for (int i = start; any && i < end; i++)
            if (test(i)) found(i);
    }
}

bool filtered(const tlm_settings& s) { return s.top_k > 0 || s.top_p < 1 || s.min_p > 0; }

}  // namespace

int Sampler::choose(const Model& model, float* logits, const tlm_settings& s, const std::vector<int32_t>& seen,
                    uint64_t key) {
    const Kernels& kernels = *model.kernels;
    const int n = model.constants.known;
    if (!all_finite(logits, n))
        fail(TLM_NUMBERS, "the model's logits are not finite: its weights are damaged or training diverged");
    if (s.repetition_penalty != 1)
        for (const int32_t id : seen) {
            const float x = logits[id];
            logits[id] = std::clamp(x > 0 ? x / s.repetition_penalty : x * s.repetition_penalty, -FLT_MAX, FLT_MAX);
        }
    if (s.temperature == 0) return kernels.argmax(logits, n);

    const float most = kernels.largest(logits, n), inverse = inverse_of(s.temperature);
    for (int i = 0; i < n; i++) logits[i] -= most;
    if (!filtered(s)) {
        scores_.resize(n);
        kernels.add_gumbel(logits, inverse, key, 0, n, scores_.data());
        return kernels.argmax(scores_.data(), n);
    }
    candidates_.clear();
    if (s.top_k > 0) {
        float least = -INFINITY;  // what the k-th best so far has; a later equal one ranks lower
        const size_t k = std::min(s.top_k, n), room = std::max<size_t>(2 * k, BLOCK);
        find_few(
            n, [&](int i) { return logits[i] > least; },
            [&](int i) {
                candidates_.push_back({i, logits[i], 0});
                if (candidates_.size() < room) return;
                keep_best(k);
                least = candidates_.back().x;
            });
    } else {  // what weighs nothing passes neither top_p nor min_p
        find_few(
            n, [&](int i) { return logits[i] * inverse * LOG2_E >= LEAST_EXPONENT; },
            [&](int i) { candidates_.push_back({i, logits[i], 0}); });
    }
    return choose_among_candidates(kernels, s, inverse, key);
}

int Sampler::choose_among_candidates(const Kernels& kernels, const tlm_settings& s, float inverse, uint64_t key) {
    if (s.top_k > 0) keep_best(s.top_k);
    if (s.top_p < 1 || s.min_p > 0) keep_nucleus(s.top_p, s.min_p, inverse);
    Candidate best{-1, 0, 0};
    for (const Candidate& candidate : candidates_) {
        Candidate noisy{candidate.id, 0, 0};
        kernels.add_gumbel(&candidate.x, inverse, key, candidate.id, 1, &noisy.x);
        if (best.id < 0 || before(noisy, best)) best = noisy;
    }
    return best.id;
}

// The k first of the ranking, the last of them at the end.
void Sampler::keep_best(size_t k) {
    if (candidates_.size() <= k) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + (k - 1), candidates_.end(), before);
    candidates_.resize(k);
}

// Those with less than top_p before them in the ranking and at least min_p of the largest weight. Only the bucket in
// which top_p is reached needs to be sorted.
void Sampler::keep_nucleus(double top_p, double min_p, float inverse) {
    std::vector<int64_t> sums(BUCKETS);
    const auto bucket = [inverse](const Candidate& c) {
        return static_cast<int>(std::min(c.x * inverse * -BUCKETS_PER_E, static_cast<float>(BUCKETS - 1)));
    };
    int64_t total = 0;
    for (Candidate& candidate : candidates_) {
        candidate.weight = weight_of(candidate.x, inverse);
        sums[bucket(candidate)] += candidate.weight;
        total += candidate.weight;
    }
    std::vector<Candidate> kept;
    const double enough = top_p < 1 ? top_p * static_cast<double>(total) : INFINITY;
    int64_t sum = 0;
    int last = 0;  // the bucket in which it is enough, or the last
    while (last < BUCKETS - 1 && static_cast<double>(sum + sums[last]) < enough) sum += sums[last++];
    std::vector<Candidate> border;
    for (const Candidate& candidate : candidates_) {
        const int place = bucket(candidate);
        if (place < last) kept.push_back(candidate);
        if (place == last) border.push_back(candidate);
    }
    std::sort(border.begin(), border.end(), before);
    for (const Candidate& candidate : border) {
        if (!(static_cast<double>(sum) < enough)) break;
        kept.push_back(candidate);
        sum += candidate.weight;
    }
    if (min_p > 0) std::erase_if(kept, [min_p](const Candidate& c) { return c.weight < min_p * FULL_WEIGHT; });
    candidates_.swap(kept);
}

// ---- the screened head

bool Sampler::can_screen(const Model& model, const tlm_settings& s) {
    const bool nucleus = s.top_p < 1 && s.top_k == 0;  // needs every logit; behind top_k only those it leaves
    return model.screened && s.repetition_penalty == 1 && !nucleus && (s.temperature == 0 || s.temperature >= 1e-2f);
}

// Bounds of every logit from the approximate ones decide which rows can matter: can be the largest, one of the k
// largest, near enough to the largest for min_p, or win with the noise that is theirs. Those are computed exactly.
int Sampler::choose_screened(const Session& session, int i, float* approximate, const tlm_settings& s, uint64_t key) {
    const Model& model = session.model;
    const Kernels& kernels = *model.kernels;
    const int n = model.constants.known;
    const auto* scales = static_cast<const float*>(model.head.scales);
    const float margin = session.margin(i), inverse = s.temperature > 0 ? inverse_of(s.temperature) : 0;
    if (!std::isfinite(margin))
        fail(TLM_NUMBERS, "the model's features are not finite: its weights are damaged or training diverged");

    bounds_.resize(n);  // lower bounds
    for (int r = 0; r < n; r++) bounds_[r] = approximate[r] - margin * scales[r];
    float least =
        s.top_k > 0 ? kth_largest(bounds_.data(), n, std::min(s.top_k, n)) : kernels.largest(bounds_.data(), n);
    if (s.top_k == 0 && s.min_p > 0) least += std::log(s.min_p) * s.temperature * 1.0001f - 1e-4f * s.temperature;
    const bool noisy = s.temperature > 0 && !filtered(s);
    float least_score = INFINITY;
    const float slack = 1e-4f;  // of the rounding of scores, which are a few hundred at most
    if (noisy) {
        scores_.resize(n);
        kernels.add_gumbel(approximate, inverse, key, 0, n, scores_.data());
        for (int r = 0; r < n; r++) bounds_[r] = scores_[r] - margin * scales[r] * inverse;
        least_score = kernels.largest(bounds_.data(), n) - slack;
    }
    candidates_.clear();
    const float* scores = noisy ? scores_.data() : approximate;
    find_few(
        n,
        [&](int r) {
            const float reach = margin * scales[r];
            return (approximate[r] + reach >= least) | (scores[r] + reach * inverse + slack >= least_score);
        },
        [&](int r) { candidates_.push_back({r, 0, 0}); });
    if (candidates_.size() * SCREENED_SHARE > static_cast<size_t>(n)) {
        static const std::vector<int32_t> none;
        in_vain++;
        for (int panel = 0; panel < model.head.panels; panel++)
            session.exact_panel(i, panel, approximate + panel * LANES);
        return choose(model, approximate, s, none, key);
    }

    float most = -INFINITY;
    alignas(64) float exact[LANES];
    int panel = -1;
    for (Candidate& candidate : candidates_) {
        if (candidate.id / LANES != panel) session.exact_panel(i, panel = candidate.id / LANES, exact);
        candidate.x = exact[candidate.id % LANES];
        most = std::max(most, candidate.x);
    }
    rescored += candidates_.size();
    if (s.temperature == 0) return std::min_element(candidates_.begin(), candidates_.end(), before)->id;
    for (Candidate& candidate : candidates_) candidate.x -= most;
    return choose_among_candidates(kernels, s, inverse, key);
}

float Sampler::kth_largest(const float* x, int n, int k) {
    std::vector<float> best;
    float least = -INFINITY;
    const size_t room = std::max(2 * k, BLOCK);
    const auto cut = [&] {
        std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), std::greater<>());
        best.resize(k);
        least = best.back();
    };
    find_few(
        n, [&](int i) { return x[i] > least; },
        [&](int i) {
            best.push_back(x[i]);
            if (best.size() >= room) cut();
        });
    cut();
    return least;
}

}  // namespace tinylm
