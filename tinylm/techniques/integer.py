"""Whole numbers of 8, 4 or 2 bits, trained through their rounding, with found or learned scales.

edit(model, r"blocks\\.\\d+\\.(attn|mlp)\\.\\w+", "int4", per=64)
edit(model, r"blocks\\.\\d+\\.(attn|mlp)\\.\\w+", "lsq", bits=2)
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from tinylm.techniques import technique
from tinylm.techniques.rounding import (
    EPS,
    SCALES,
    Cells,
    Per,
    Rounding,
    cut,
    kept,
    mean,
    nearest,
    one_of,
    require,
    through,
    whole,
)


class Integer(Rounding):
    """A matrix of whole numbers times a scale, which is found anew in every forward pass.

    Settings:
        scale: "max", so that nothing is clipped, or "mse", the one of least squared error (and "mean", "median").
        per: "tensor", "channel" or inputs per group.
        half: scales are float16 numbers; of groups of 32, float32 ones would be a fifth of int4's bytes.
        activations, norm, norm_eps: as of "ternary".
    """

    bits: ClassVar[int] = 8
    usual: ClassVar[str] = "max"

    def __init__(
        self,
        inner: nnx.Module,
        *,
        rngs: nnx.Rngs,
        scale: str = "",
        per: Per = "channel",
        half: bool = False,
        activations: str = "int8",
        norm: str = "none",
        norm_eps: float = 1e-5,
    ):
        low, high = span(self.bits)
        own = {"per": per, "activations": activations, "norm": norm, "norm_eps": norm_eps}
        super().__init__(inner, rngs=rngs, low=low, high=high, **own)
        self.scale, self.half = one_of("scale", scale or self.usual, SCALES), half

    def code(self, cells: Cells) -> tuple[jax.Array, jax.Array]:
        scale = kept(jnp.maximum(SCALES[self.scale](cells, self.low, self.high), EPS / self.high), self.half)
        return nearest(cells.x, scale, self.low, self.high), scale


def span(bits: int) -> tuple[int, int]:
    """Smallest and largest code: -127..127, -7..7, so that both signs reach as far; of 2 bits all four, -2..1."""
    return (-2, 1) if bits == 2 else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


@technique("int8")
class Int8(Integer):
    """-127..127."""


@technique("int4")
class Int4(Integer):
    """-7..7."""

    bits = 4


@technique("int2")
class Int2(Integer):
    """-2..1, by default with the scale of least squared error: the largest magnitude would leave most weights at 0."""

    bits, usual = 2, "mse"


@technique("lsq")
class LSQ(Rounding):
    """Whole numbers with a learned scale (learned step size quantization, Esser et al. 2020).

    With v = w / step the gradients are those of the paper: dw_hat/dw is 1 inside the range and 0 outside; dw_hat/dstep
    is round(v) - v inside and the nearer end outside; that of the step is scaled by 1 / sqrt(weights * largest code).
    The step is kept as its logarithm, so that it stays positive and one learning rate suits steps of every size: the
    gradient there is the paper's times the step. It starts at 2 mean|w| / sqrt(largest code).

    Settings: bits: 2 to 8. per, activations, norm, norm_eps: as of "int8".
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        rngs: nnx.Rngs,
        bits: int = 4,
        per: Per = "channel",
        activations: str = "int8",
        norm: str = "none",
        norm_eps: float = 1e-5,
    ):
        require(type(bits) is int and 2 <= bits <= 8, "bits", bits, "must be 2 to 8")
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        own = {"per": per, "activations": activations, "norm": norm, "norm_eps": norm_eps}
        super().__init__(inner, rngs=rngs, low=low, high=high, **own)
        cells = cut(self.matrix(), per)
        start = jnp.maximum(2 * mean(cells, low, high) / high**0.5, EPS)
        # One axis: optimisers decay matrices, and Muon makes them orthogonal.
        self.log_step = nnx.Param(jnp.log(start).reshape(-1))

    def _step(self, cells: Cells) -> jax.Array:
        """The steps of the cells (groups 1 outputs), their gradients scaled."""
        groups, _, outputs = cells.x.shape
        shape = (1, 1, 1) if self.per == "tensor" else (groups, 1, outputs)
        step = jnp.exp(self.log_step[...].astype(jnp.float32)).reshape(shape)
        factor = 1 / jnp.sqrt(jnp.asarray(cells.sizes * self.high, jnp.float32))
        return through(step * factor, step)

    def code(self, cells: Cells) -> tuple[jax.Array, jax.Array]:
        step = self._step(cells)
        return nearest(cells.x, step, self.low, self.high), step

    def weight(self) -> Any:
        w = self.matrix().astype(jnp.float32)
        cells = cut(w, self.per)
        step = self._step(cells)
        v = jnp.clip(cells.x / step, self.low, self.high)
        found = whole(through(v, jnp.round(v)) * step, len(w))
        return found.T if self.is_embedding else found
