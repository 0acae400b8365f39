"""A matrix that is its codes and scales: what `tinylm.quantize` makes, stored in few bits and read back bit for bit."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from tinylm import ops
from tinylm.parts import Embedding, Linear
from tinylm.techniques import EditError, technique
from tinylm.techniques.packing import pack, size, unpack
from tinylm.techniques.rounding import (
    EPS,
    Codes,
    Per,
    Rounding,
    Stored,
    cut,
    grouped,
    one_of,
    require,
    root,
    rounded_inputs,
    through,
    whole,
)

STATIC = ("", "symmetric", "affine")


@technique("quantized")
class Quantized(Rounding):
    """Packed codes with their scales; the floats they were made of are gone.

    weight[i, o] = (code - zero) * scale of its cell, or table[code]. Nothing here is ever rounded anew: `weight()` is
    the same bits after every reload. It is unpacked in every forward pass; `fold` or an export is faster to run.

    Settings:
        low, levels: the codes are low, low + 1, ..., levels of them.
        per: what shares a scale; "table": no scales, but a value of its own for every code.
        affine: a zero per scale, one of the codes.
        half: scales are float16.
        activations: dynamic rounding of the inputs, as of "ternary". static: "symmetric" or "affine" int8 with one
            stored step (and zero) for all of them instead.
        norm, norm_eps: of the inputs, as of "ternary".

    Made by `edit` it rounds to nearest, the largest magnitude being the largest code; `quantize` puts in better ones.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        rngs: nnx.Rngs,
        low: int = -127,
        levels: int = 255,
        per: Per | Literal["table"] = "channel",
        affine: bool = False,
        half: bool = False,
        activations: str = "none",
        static: str = "",
        norm: str = "none",
        norm_eps: float = 1e-5,
    ):
        require(type(levels) is int and 2 <= levels <= 2**16, "levels", levels, "must be 2 to 65536")
        require(type(low) is int, "low", low, "must be a whole number")
        self.by_table = per == "table"
        signed = affine or self.by_table or low < 0 < low + levels - 1 or (low, levels) == (-1, 2)
        require(signed, "low", low, "symmetric codes need both signs, so a low below 0; or take affine=True")
        require(
            not (affine and (self.by_table or levels > 256)), "affine", affine, "needs scales and 256 levels at most"
        )
        require(not (activations != "none" and static), "static", static, 'needs activations="none"')
        super().__init__(
            inner, rngs=rngs, low=low, high=low + levels - 1, per="tensor" if per == "table" else per,
            activations=activations, norm=norm, norm_eps=norm_eps,
        )  # fmt: skip
        self.levels, self.affine, self.half, self.static = levels, affine, half, one_of("static", static, STATIC)
        w = self.matrix()
        self.shape = inputs, outputs = tuple(w.shape)
        self.packed = Stored(jnp.zeros(size(levels, w.size), jnp.uint8))
        group = grouped(self.per, inputs)
        of_scales = (1, 1) if self.per == "tensor" else (-(-inputs // group) if group else 1, outputs)
        kind = jnp.float16 if half else jnp.float32
        self.scale = None if self.by_table else Stored(jnp.ones(of_scales, kind))
        self.zero = Stored(jnp.zeros(of_scales, jnp.uint8)) if affine else None
        self.table = Stored(jnp.zeros(levels, jnp.float32)) if self.by_table else None
        self.step = Stored(jnp.ones(1)) if static else None
        self.offset = Stored(jnp.zeros(1)) if static == "affine" else None
        self.inner = shell(root(inner))
        if not isinstance(w, Tracer):
            self._fill(np.asarray(w, np.float32))

    def _fill(self, w: np.ndarray) -> None:
        """Round to nearest, so that the technique makes sense without `quantize` too. NumPy: JAX would compile it."""
        cells = cut(w, self.per)
        if self.by_table:
            table = np.linspace(w.min(), w.max(), self.levels, dtype=np.float32)
            self.put(np.searchsorted((table[1:] + table[:-1]) / 2, w) + self.low, table=table)
        elif self.affine:
            bottom, top = np.minimum(-cells.max(-cells.x), 0), np.maximum(cells.max(cells.x), 0)
            scale = self._kept(np.maximum((top - bottom) / (self.levels - 1), np.float32(EPS)))
            zero = np.clip(np.round(-bottom / scale), 0, self.levels - 1)
            codes = np.clip(np.round(cells.x / scale) + zero, 0, self.levels - 1)
            self.put(whole(codes, len(w)) + self.low, scale[:, 0], zero[:, 0])
        else:
            scale = self._kept(np.maximum(cells.max(np.abs(cells.x)) / max(self.high, 1), np.float32(EPS)))
            codes = np.clip(np.round(cells.x / scale), self.low, self.high)
            self.put(whole(codes, len(w)), scale[:, 0])

    def _kept(self, scale: np.ndarray) -> np.ndarray:
        """Scales as they can be stored."""
        return scale.astype(np.float16).astype(np.float32) if self.half else scale

    def put(self, codes: Any, scale: Any = None, zero: Any = None, *, table: Any = None) -> None:
        """Set the codes (inputs outputs), from `low` on, and what they stand for. Zeros are counted from `low` on too.

        Raises ValueError for codes out of range, and for a float32 scale that float16 cannot hold where `half` is set.
        """
        self.packed.set_value(jnp.asarray(pack(np.asarray(codes).astype(np.int64) - self.low, self.levels)))
        if self.table is not None:
            self.table.set_value(jnp.asarray(table, jnp.float32))
        if self.scale is not None:
            scale = np.asarray(scale, np.float32)
            kept = scale.astype(np.float16 if self.half else np.float32)
            if not np.array_equal(kept.astype(np.float32), scale):
                raise ValueError("scales that float16 cannot hold: round them before the codes are made")
            self.scale.set_value(jnp.asarray(kept).reshape(self.scale.shape))
        if self.zero is not None:
            self.zero.set_value(jnp.asarray(np.asarray(zero), jnp.uint8).reshape(self.zero.shape))

    def codes(self) -> Any:
        """(inputs, outputs) int32, 0 to levels - 1; NumPy's outside of a compiled function."""
        return unpack(concrete(self.packed), self.levels, self.shape[0] * self.shape[1]).reshape(self.shape)

    def rounded(self) -> Codes:
        if self.by_table:
            raise EditError("a table of values has no scale: export the folded model")
        kind = np.int8 if self.low >= -128 and self.high <= 127 else np.int16
        zero = None if self.zero is None else concrete(self.zero).astype(np.int32) + self.low
        codes, group = (self.codes() + self.low).astype(kind), grouped(self.per, self.shape[0])
        return Codes(codes, concrete(self.scale).astype(np.float32), zero, group)

    def matrix(self) -> jax.Array:
        if self.inner is None or getattr(self, "packed", None) is None:
            return super().matrix()
        return jnp.asarray(concrete(self.table)[self.codes()] if self.by_table else self.rounded().dense())

    def weight(self) -> jax.Array:
        found = self.matrix()
        return found.T if self.is_embedding else found

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_embedding:
            return self.weight()[x]
        x = x if self.norm is None else self.norm(x)
        if self._is_integer():
            codes = (self.codes() + self.low).astype(np.int8)
            scales = jnp.broadcast_to(self.scale[...][0], self.shape[1:])
            y = ops.int8_product(x, jnp.asarray(codes), scales).astype(x.dtype)
        else:
            x = rounded_inputs(x, self.inputs)[0] if self.step is None else self._static(x, self.step[...])
            (y,) = ops.linear(x, self.weight())
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def _is_integer(self) -> bool:
        """Whether inputs and weights are int8 with a scale per row and per output, for an exact product."""
        plain = not (self.by_table or self.affine) and grouped(self.per, self.shape[0]) == 0
        return plain and self.inputs == "int8" and self.low >= -128 and self.high <= 127

    def _static(self, x: jax.Array, step: jax.Array) -> jax.Array:
        z = x.astype(jnp.float32)
        if self.offset is None:
            rounded = jnp.clip(jnp.round(z / step), -127, 127) * step
        else:
            rounded = (jnp.clip(jnp.round(z / step) + self.offset[...], 0, 255) - self.offset[...]) * step
        return through(z, rounded).astype(x.dtype)

    def fold(self) -> nnx.Module:
        if self.norm is not None:
            raise EditError("Quantized with a norm inside is more than a matrix: no plain module is that")
        w = self.weight()
        if self.is_embedding:
            plain: Any = Embedding(*w.shape)
            plain.table.set_value(w)
            return plain
        plain = Linear(*w.shape, bias=self.bias is not None)
        plain.kernel.set_value(w)
        if self.bias is not None:
            plain.bias.set_value(self.bias[...])
        return plain


def concrete(variable: Any) -> Any:
    """The array of a variable: NumPy's, unless it is traced. Unpacking op by op would compile every operation."""
    value = variable[...]
    return value if isinstance(value, Tracer) else np.asarray(value)


def shell(plain: Any) -> nnx.Module:
    """A module of the kit without its matrix: what says its class, and holds the bias."""
    if isinstance(plain, Embedding):
        empty: Any = Embedding(0, 0)
        empty.table = None
        return empty
    empty = Linear(0, 0, bias=plain.bias is not None)
    empty.kernel = None
    if plain.bias is not None:
        empty.bias = plain.bias
    return empty
