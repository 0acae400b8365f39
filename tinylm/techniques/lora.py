r"""Low-rank adapters: a frozen matrix plus a product of two thin ones that learns (Hu et al. 2021, arXiv 2106.09685).

edit(model, r"blocks\.\d+\.attn\.[qv]", "lora", rank=8)
train(model, tokens, TrainConfig(..., rates=ADAPTERS))      # nothing else of the model moves
fold(model)                                                 # one plain matrix again, at no cost
"""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from tinylm.techniques import EditError, Technique, technique
from tinylm.techniques.rounding import require

ADAPTERS = (r".*=0", r".*\.lora_[ab]=1")
"""`TrainConfig.rates` that train the adapters alone."""


@technique("lora")
class Lora(Technique):
    """weight() = W + alpha / rank * A B, with W frozen, A (inputs, rank) and B (rank, outputs).

    B starts at zero, so the model computes what it did; A is uniform within 1 / sqrt(inputs), as peft's is. Biases stay
    the wrapped module's. `fold` is exact up to the rounding of one addition.

    Settings:
        rank: of the product, at most that of a matrix of this shape.
        alpha: the product is scaled by alpha / rank, so that a rate found at one rank does for others.
    """

    def __init__(self, inner: nnx.Module, *, rngs: nnx.Rngs, rank: int = 8, alpha: float = 16.0):
        super().__init__(inner, rngs=rngs)
        if not hasattr(inner, "weight"):
            raise EditError(f"a {type(inner).__name__} is more than a matrix: give it LoRA first, or fold it")
        inputs, outputs = self.inner.weight().shape
        whole = type(rank) is int and 1 <= rank <= min(inputs, outputs)
        require(whole, "rank", rank, f"must be a whole number from 1 to {min(inputs, outputs)}, a side of the matrix")
        require(alpha > 0, "alpha", alpha, "must be above 0")
        self.scale = alpha / rank
        self.lora_a = nnx.Param(rngs.params.uniform((inputs, rank), minval=-1, maxval=1) / inputs**0.5)
        self.lora_b = nnx.Param(jax.numpy.zeros((rank, outputs)))

    def weight(self) -> Float[Array, "inputs outputs"]:
        """The effective dense matrix, in float32."""
        return jax.lax.stop_gradient(self.inner.weight()) + self.scale * self.lora_a[...] @ self.lora_b[...]

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        y = jax.lax.stop_gradient(self.inner)(x)
        a, b = (part[...].astype(x.dtype) for part in (self.lora_a, self.lora_b))
        return y + self.scale * (x @ a) @ b
