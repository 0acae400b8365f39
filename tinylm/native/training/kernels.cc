// Compiled once per instruction set, with its compiler flags and TINYLM_KERNELS set to the name of its table.
#include "attention.h"
#include "gemm.h"
#include "loss.h"
#include "orthogonal.h"
#include "pointwise.h"

#define QUOTED(x) #x
#define NAME_OF(x) QUOTED(x)

namespace tinylm::training {
namespace {

void any_product(const Product& x, Pool& pool) {
    x.pairs ? product<Pairs>(x, pool) : product<Single>(x, pool);
}

void any_loss(const Loss& x, Pool& pool) {
    x.pairs ? loss<Pairs, bfloat16>(x, pool) : loss<Single, float>(x, pool);
}

void any_rotate(const Rotation& x, Pool& pool) { x.half ? rotate<bfloat16>(x, pool) : rotate<float>(x, pool); }

void any_gate(const Gate& x, Pool& pool) { x.half ? gate<bfloat16>(x, pool) : gate<float>(x, pool); }

}  // namespace

extern const Kernels TINYLM_KERNELS;
const Kernels TINYLM_KERNELS = {
    .name = NAME_OF(TINYLM_KERNELS),
    .product = any_product,
    .loss = any_loss,
    .attention = attention,
    .attention_back = attention_back,
    .orthogonalize = orthogonalize<Pairs>,
    .rotate = any_rotate,
    .gate = any_gate,
};

}  // namespace tinylm::training
