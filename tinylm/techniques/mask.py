r"""Masks over weight matrices: which weights does a frozen model need?

    edit(model, r"blocks\.\d+\.(attn|mlp)\.\w+", "mask", rule="continuous")

The weights stay as they are (no gradient reaches them); what learns is one score per weight. `probe.find` trains the
scores of a whole model; `TrainConfig(rates=(r".*=0", r".*\.scores=1"))` does so in an ordinary training, where "topk"
needs no penalty. A score of weight w starts at 0 (at |w| for "topk"); a weight that is exactly 0 is never kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tinylm.parts import Linear
from tinylm.techniques import EditError, Technique, technique
from tinylm.techniques.rounding import Stored, one_of, require, through

NEVER = -1e6  # the score of a weight that is 0 already
LOW, HIGH, BETA = -0.1, 1.1, 2 / 3  # hard concrete: the stretched interval and the noise's temperature
BISECTIONS = 40


def continuous(scores: Array, heat: Array | float) -> Array:
    """sigmoid(heat * score): deterministic, sharper as the heat grows (Savarese et al. 2020)."""
    return jax.nn.sigmoid(heat * scores)


def hard_concrete(scores: Array, noise: Array | None = None) -> Array:
    """A stretched and clipped binary concrete gate (Louizos et al. 2018, eq. 10 and 11); without noise the mean one."""
    drawn = scores if noise is None else (jnp.log(noise) - jnp.log1p(-noise) + scores) / BETA
    return jnp.clip(jax.nn.sigmoid(drawn) * (HIGH - LOW) + LOW, 0, 1)


def open_chance(scores: Array) -> Array:
    """The probability that a hard concrete gate is not 0 (the same, eq. 12): its share in the expected size."""
    return jax.nn.sigmoid(scores - BETA * jnp.log(-LOW / HIGH))


def top(scores: Array, share: float) -> Array:
    """1.0 where a score is among the largest `share` of its matrix, else 0.0; ties at the edge are left out together.

    By bisection, since a sort takes far longer than the rest of a step on a CPU.
    """
    count = round(share * scores.size)
    low, high = scores.min() - 1, scores.max()

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        fits = jnp.sum(scores > middle, dtype=jnp.int32) <= count
        return jnp.where(fits, ends[0], middle), jnp.where(fits, middle, ends[1])

    return (scores > jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))[1]).astype(jnp.float32)


def drawn_from(scores: Array, clock: Array) -> Array:
    """Numbers in (0, 1), new for every step: a hash of the place and the clock, so that no key is needed."""
    key = jax.random.fold_in(jax.random.key(0), clock.astype(jnp.int32))
    return jax.random.uniform(key, scores.shape, minval=1e-6, maxval=1 - 1e-6)


@technique("mask")
class Mask(Technique):
    """A matrix of which a part is kept: `weight()` is the frozen matrix times the mask. Biases are never masked.

    Settings:
        rule: how scores become a mask: "continuous" (sigmoid(heat * score)), "hard_concrete" (noisy gates), "topk"
            (0 or 1, gradients straight through; Ramanujan et al. 2020), or "binary" (what was found; learns nothing).
        growth: of the heat of "continuous", per training step.
        keep: share of the matrix that "topk" keeps.
        noise: whether the gates of "hard_concrete" are drawn, or stand at their mean.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        rngs: nnx.Rngs,
        rule: str = "continuous",
        growth: float = 1.001,
        keep: float = 0.1,
        noise: bool = True,
    ):
        super().__init__(inner, rngs=rngs)
        self.rule = one_of("rule", rule, ("continuous", "hard_concrete", "topk", "binary"))
        require(growth >= 1, "growth", growth, "must be at least 1")
        require(0 < keep <= 1, "keep", keep, "must be above 0 and at most 1")
        self.growth, self.keep, self.noise = growth, keep, noise
        if not hasattr(inner, "weight"):
            raise EditError(f"a {type(inner).__name__} is more than a matrix: mask before it is put on, or fold it")
        w = self.inner.weight()
        if rule == "binary":
            self.scores = Stored((w != 0).astype(jnp.int8))
        else:
            self.scores = nnx.Param(jnp.where(w == 0, NEVER, jnp.abs(w) if rule == "topk" else jnp.zeros_like(w)))
        self.clock = Stored(jnp.float32(0))  # training steps since; see `techniques.ticked`

    def soft(self) -> Float[Array, "inputs outputs"]:
        """The mask that acts now."""
        scores = self.scores[...].astype(jnp.float32)
        clock = jax.lax.stop_gradient(self.clock[...].astype(jnp.float32))
        if self.rule == "continuous":
            return continuous(scores, self.growth**clock)
        if self.rule == "hard_concrete":
            return hard_concrete(scores, drawn_from(scores, clock) if self.noise else None)
        return scores if self.rule == "binary" else through(scores, top(jax.lax.stop_gradient(scores), self.keep))

    def size(self) -> Array:
        """How many weights are kept, as far as the rule can say it smoothly: what a penalty is put on."""
        chance = open_chance(self.scores[...].astype(jnp.float32)) if self.rule == "hard_concrete" else self.soft()
        return chance.sum()

    def kept(self) -> Array:
        """The decided mask, boolean: score above 0, or among the top."""
        scores = self.scores[...]
        return top(scores, self.keep) > 0 if self.rule == "topk" else scores > 0

    def weight(self) -> Float[Array, "inputs outputs"]:
        """The matrix times the mask; gradients reach the scores alone."""
        return jax.lax.stop_gradient(self.inner.weight()) * self.soft()

    __call__ = Linear.__call__  # a wrapped technique that rounds its inputs does not do so under a mask
