// The next token from logits: penalty, temperature, top-k, top-p, min-p, then Gumbel-max, in the order of the kit's
// Sampling.
//
// token = argmax over the kept of (logit - largest) / temperature + gumbel(seed, stream, position, token): a sample
// from the filtered softmax, and a pure function of logits and key. So a text does not depend on what else is in the
// batch or on how many tokens a pass made, and the screened head need only find the rows that can win.
#pragma once
#include <cstdint>
#include <vector>

#include "engine.h"
#include "../tinylm.h"

namespace tinylm {

struct Candidate {
    int id;
    float x;         // logit, then logit - largest
    int32_t weight;  // probability in 2^-30 of the largest
};

class Sampler {
public:
    // From all logits (known ids first), which are changed. `seen`: ids that the penalty acts on.
    // Throws Error where they are not finite.
    int choose(const Model& model, float* logits, const tlm_settings& settings, const std::vector<int32_t>& seen,
               uint64_t key);

    // From the approximate logits of row i of Session::screen; the same token as `choose` would give.
    int choose_screened(const Session& session, int i, float* approximate, const tlm_settings& settings, uint64_t key);

    static bool can_screen(const Model& model, const tlm_settings& settings);

    uint64_t rescored = 0;  // rows computed exactly by choose_screened
    uint64_t in_vain = 0;   // times that so many rows could win that it computed all of them

private:
    int choose_among_candidates(const Kernels& kernels, const tlm_settings& settings, float inverse, uint64_t key);
    void keep_best(size_t k);
    void keep_nucleus(double top_p, double min_p, float inverse);
    float kth_largest(const float* x, int n, int k);

    std::vector<Candidate> candidates_;
    std::vector<float> scores_, bounds_;
};

}  // namespace tinylm
