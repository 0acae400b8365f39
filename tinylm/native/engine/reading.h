// Whole texts through the model: features, outputs, and how probable each token was.
#pragma once
#include "generation.h"

namespace tinylm {

// As tlm_forward and tlm_score; the arguments have been checked.
void forward(Generation& generation, int texts, const int32_t* lengths, const int32_t* tokens, const int32_t* types,
             int what, float* out, Generation::Cancel cancel);
void score(Generation& generation, const int32_t* tokens, int64_t count, double* logs, Generation::Cancel cancel);

}  // namespace tinylm
