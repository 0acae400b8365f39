"""What the techniques of few bits share: codes and scales, straight-through gradients, rounded inputs, norms inside.

A matrix is always looked at as (inputs, outputs) here, an embedding too: there the width comes in and ids go out, as in
a tied head. `per` says what shares a scale: "tensor", "channel" (one output), or a number: so many inputs of an output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tinylm import ops
from tinylm.config import suggest
from tinylm.parts import Embedding, Linear, RMSNorm
from tinylm.techniques import EditError, Technique

EPS = 1e-5  # smallest scale of weights and largest input of a token that is told from zero (BitNet b1.58's)
BISECTIONS = 16
LLOYD = 8
# Of the largest magnitude, where a clipped range may end.
SHARES = np.concatenate([np.geomspace(0.05, 0.7, 20, endpoint=False), np.linspace(0.7, 1, 21)])

Per = Literal["tensor", "channel"] | int


class Stored(nnx.Variable):
    """An array that is part of the model and of its file, but that no optimiser should move."""


class Codes(NamedTuple):
    """A matrix as whole numbers: weight[i, o] = (codes[i, o] - zero) * scale, scale and zero being those of its cell.

    Exporters take these, so that what was trained is what is written: a scale is never found anew.
    """

    codes: Int[Array | np.ndarray, "inputs outputs"]
    """int8 (int16 where they need more)."""
    scale: Float[Array | np.ndarray, "groups outputs_or_1"]
    """float32: (1, 1) per tensor, (1, outputs) per channel, (groups, outputs) for groups of inputs."""
    zero: Int[Array | np.ndarray, "groups outputs_or_1"] | None = None
    """The code that means 0, where that is not 0."""
    group: int = 0
    """Inputs that share a scale, the last group having what is left; 0: all of them."""

    def dense(self) -> Float[Array | np.ndarray, "inputs outputs"]:
        """The weights that the codes stand for, float32."""
        spread = lambda x: x if not self.group else x.repeat(self.group, 0)[: len(self.codes)]  # noqa: E731
        codes = self.codes.astype(np.float32)
        codes = codes if self.zero is None else codes - spread(self.zero).astype(np.float32)
        return codes * spread(self.scale)


def through(x: Array, rounded: Array, strength: Array | float = 1.0) -> Array:
    """`rounded`, with the gradient of `x`: the straight-through estimator (Bengio et al. 2013).

    A strength below 1 mixes the two (0: x itself); it changes the value and not the gradient.
    """
    return _through(x, rounded if isinstance(strength, float) and strength == 1.0 else x + strength * (rounded - x))


@jax.custom_jvp
def _through(x: Array, rounded: Array) -> Array:
    return rounded  # x + stop_gradient(rounded - x), the usual way to write it, is off by a rounding error


_through.defjvp(lambda primals, tangents: (primals[1], tangents[0]))

# --- cells: what shares a scale ---------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """A matrix cut into cells that share a scale: `x` is (groups, inputs, outputs), zeros filling the last group.

    The arrays are JAX's or NumPy's, as the matrix was.
    """

    x: Any
    axes: tuple[int, ...]
    """That a cell runs over."""
    sizes: Any
    """Weights in a cell: a number, or (groups, 1, 1) where the last group is smaller."""
    fill: Any
    """Zeros that were added to it, likewise."""

    def sum(self, x: Any) -> Any:
        """Of every cell, kept as 3 axes."""
        return x.sum(self.axes, keepdims=True)

    def max(self, x: Any) -> Any:
        return x.max(self.axes, keepdims=True)


def cut(w: Float[Array | np.ndarray, "inputs outputs"], per: Per) -> Cells:
    """A matrix in cells; one of NumPy stays of NumPy."""
    inputs, outputs = w.shape
    if per == "tensor":
        return Cells(w[None], (0, 1, 2), inputs * outputs, 0)
    if per == "channel" or per >= inputs:  # type: ignore[operator]
        return Cells(w[None], (1,), inputs, 0)
    groups = -(-inputs // per)
    pad = np.pad if isinstance(w, np.ndarray) else jnp.pad
    filled = pad(w, [(0, groups * per - inputs), (0, 0)]).reshape(groups, per, outputs)
    sizes = np.minimum(per, inputs - per * np.arange(groups))[:, None, None]
    return Cells(filled, (1,), sizes, per - sizes)


def whole(x: Any, inputs: int) -> Any:
    """Cells put together again: (groups, size, outputs) to (inputs, outputs)."""
    return x.reshape(-1, x.shape[-1])[:inputs]


# --- scales -----------------------------------------------------------------------------------------------------------


def mean(cells: Cells, low: int, high: int) -> Array:
    """Mean magnitude (BitNet b1.58, Ma et al. 2024)."""
    del low, high
    return cells.sum(jnp.abs(cells.x)) / cells.sizes


def median(cells: Cells, low: int = -1, high: int = 1) -> Array:
    """Median magnitude (b1.58 Reloaded, Nielsen and Schneider-Kamp 2024), of an even number the lower one.

    Found by bisection: a sort takes thousands of times as long as a mean on a CPU. Half of the magnitudes are at most
    twice their mean, so that is where to begin; the largest magnitude left below the bracket's end is the answer:
    exact where one value is left there, as of a matrix that is ternary already, and within mean / 2^15 elsewhere.
    """
    end = 2 * mean(cells, low, high)
    return _middle(jnp.abs(cells.x), cells.axes, (cells.sizes + 1) // 2 + cells.fill, end)


# Loops outside of a compiled function would be compiled again in every call: so these two are functions of their own.
@functools.partial(jax.jit, static_argnums=1)
def _middle(x: Array, axes: tuple[int, ...], rank: Any, end: Array) -> Array:
    """The value of x (not negative) in place `rank`, counted from 1, in order of size along the axes; at most `end`."""

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bracket
        middle = (below + above) / 2
        enough = jnp.sum(x <= middle, axes, keepdims=True, dtype=jnp.int32) >= rank
        return jnp.where(enough, below, middle), jnp.where(enough, middle, above)

    _, above = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(end), end))
    return jnp.max(jnp.where(x <= above, x, 0), axes, keepdims=True)


def optimal(cells: Cells, low: int, high: int) -> Array:
    """The scale of least squared error, to which Lloyd's two steps come: round to the nearest codes, fit their scale.

    For ternary codes that is TWN's (Li et al. 2016) without its guess of the threshold. Of more codes than four the
    error has many minima, next to each other: so the best of `SHARES` of the range is where to begin, and the error
    is within a few percent of the least.
    """
    if high < 3:  # near the answer for normal weights
        start = mean(cells, low, high) * 3 / (1 + max(-low, high))
    else:
        start = _clipped(cells.x, cells.axes, low, high, largest(cells, low, high))
    return _lloyd(cells.x, cells.axes, low, high, start)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _clipped(x: Array, axes: tuple[int, ...], low: int, high: int, most: Array) -> Array:
    shares = jnp.asarray(SHARES, jnp.float32)

    def attempt(i: int, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale = jnp.maximum(shares[i] * most, 1e-12)
        lost = jnp.sum(jnp.square(nearest(x, scale, low, high) * scale - x), axes, keepdims=True)
        return jnp.where(lost < best[1], scale, best[0]), jnp.minimum(lost, best[1])

    return jax.lax.fori_loop(0, len(SHARES), attempt, (most, jnp.full_like(most, jnp.inf)))[0]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _lloyd(x: Array, axes: tuple[int, ...], low: int, high: int, start: Array) -> Array:
    def fit(_: int, scale: Array) -> Array:
        codes = nearest(x, jnp.maximum(scale, 1e-12), low, high)
        squares = jnp.sum(codes * codes, axes, keepdims=True)
        found = jnp.abs(jnp.sum(codes * x, axes, keepdims=True)) / jnp.maximum(squares, 1)
        return jnp.where(squares > 0, found, scale)

    return jax.lax.fori_loop(0, LLOYD, fit, start)


def largest(cells: Cells, low: int, high: int) -> Array:
    """The largest magnitude becomes the largest code, so nothing is clipped."""
    del low
    return cells.max(jnp.abs(cells.x)) / high


SCALES: dict[str, Callable[[Cells, int, int], Array]] = {
    "mean": mean, "median": median, "mse": optimal, "max": largest,
}  # fmt: skip


def kept(scale: Array, half: bool) -> Array:
    """Scales as they can be stored: `half` ones are float16 numbers, but none is 0."""
    if not half:
        return scale
    return jnp.maximum(scale, jnp.float32(2.0**-24)).astype(jnp.float16).astype(jnp.float32)


def nearest(x: Array, scale: Array, low: int, high: int) -> Array:
    """x / scale as the nearest whole numbers from low to high, halves to even; floats."""
    return jnp.clip(jnp.round(x / scale), low, high)


@functools.partial(jax.jit, static_argnums=(2, 3))
def stochastic(x: Array, scale: Array, low: int, high: int) -> Array:
    """x / scale as one of its two neighbours, the nearer ones more often, so that the mean is x / scale.

    The draw is a hash of the weight's own bits and its place. A weight that moved, however little, draws anew, and no
    key is needed: training, evaluation and export see the same codes.
    """
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    h = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # murmur3's finaliser
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    draw = (h >> 8).astype(jnp.float32) * 2.0**-24
    return jnp.clip(jnp.floor(x / scale + draw), low, high)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _int8(x: Array, most: float = 127.0) -> tuple[Array, Array]:
    step = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), EPS) / most
    return jnp.clip(jnp.round(x / step), -128, 127) * step, step


def _int4(x: Array) -> tuple[Array, Array]:
    step = (jnp.mean(jnp.abs(x), -1, keepdims=True) + EPS) / 7**0.5
    return jnp.clip(jnp.round(x / step), -8, 7) * step, step


def _sparse(x: Array) -> tuple[Array, Array]:
    rows = x.reshape(-1, x.shape[-1]).T  # a token's features are a column here, of which `median` finds the middle
    middle = median(cut(rows, "channel"))[0, 0].reshape(*x.shape[:-1], 1)
    return _int8(jnp.where(jnp.abs(x) > middle, x, 0))


INPUTS: dict[str, Callable[[Array], tuple[Array, Array]] | None] = {
    "none": None,
    "int8": _int8,
    "int8_128": functools.partial(_int8, most=128.0),
    "int4": _int4,
    "int8_half": _sparse,
}
"""How a token's features are rounded, (..., features) float32 -> the same, and the step of each token.

    int8        the largest magnitude becomes 127 (BitNet b1.58)
    int8_128    it becomes 128, which is then clipped to 127, as the package of b1.58 Reloaded does
    int4        absmean: codes -8..7 (BitNet a4.8, Wang et al. 2024, of what q, k, v, gate and up read)
    int8_half   int8 of the half with the largest magnitudes, zero elsewhere (BitNet a4.8, of what o and down read)
"""


def rounded_inputs(x: Array, kind: str, strength: Array | float = 1.0) -> tuple[Array, Array | float]:
    """Features rounded token by token, gradients straight through; and the step of each token, in float32."""
    if (function := INPUTS[kind]) is None:
        return x, 1.0
    z = x.astype(jnp.float32)
    rounded, step = function(jax.lax.stop_gradient(z))
    return through(z, rounded, strength).astype(x.dtype), step


# --- the module -------------------------------------------------------------------------------------------------------


class CenteredNorm(nnx.Module):
    """(x - mean) / std over the last axis, without parameters: the norm in every linear layer of b1.58 Reloaded."""

    def __init__(self, eps: float):
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        z = x.astype(jnp.float32)
        z = z - jnp.mean(z, -1, keepdims=True)
        return (z * jax.lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + self.eps)).astype(x.dtype)


NORMS: dict[str, Callable[[int, float], nnx.Module] | None] = {
    "none": None,
    "rmsnorm": RMSNorm,
    "layernorm": lambda width, eps: CenteredNorm(eps),
}


def require(ok: bool, setting: str, value: object, what: str) -> None:
    """Raise EditError for a setting that cannot be."""
    if not ok:
        raise EditError(f"{setting} = {value!r}: {what}")


def one_of(setting: str, value: str, known: Any) -> str:
    """`value`, if it is known. Raises EditError."""
    require(value in known, setting, value, f"no such thing{suggest(str(value), list(known))}")
    return value


class Rounding(Technique):
    """A matrix of few bits that is trained: floats underneath, codes and scales made of them in every forward pass.

    Attributes:
        low, high: smallest and largest code.
        per: what shares a scale.
        inputs: how the inputs are rounded, a key of `INPUTS`; those of an embedding are ids and stay.
        norm: of the inputs, before that; None: none.
    """

    accepts = (Linear, Embedding)

    def __init__(
        self,
        inner: nnx.Module,
        *,
        rngs: nnx.Rngs,
        low: int,
        high: int,
        per: Per = "tensor",
        activations: str = "none",
        norm: str = "none",
        norm_eps: float = 1e-5,
    ):
        super().__init__(inner, rngs=rngs)
        good = per in ("tensor", "channel") or (type(per) is int and per > 0)
        require(good, "per", per, 'must be "tensor", "channel", or how many inputs share a scale')
        real = type(norm_eps) in (int, float) and 0 <= norm_eps < 1
        require(real, "norm_eps", norm_eps, "must be a number from 0 to 1")
        self.low, self.high = low, high
        self.per: Per = per
        self.inputs = one_of("activations", activations, INPUTS)
        made = NORMS[one_of("norm", norm, NORMS)]
        self.is_embedding = isinstance(root(inner), Embedding)
        self.norm: Any = None if made is None or self.is_embedding else made(self.inner.weight().shape[0], norm_eps)

    def matrix(self) -> Float[Array, "inputs outputs"]:
        """The floats underneath, always inputs by outputs."""
        w = self.inner.weight()
        return w.T if self.is_embedding else w

    def strength(self) -> Array | float:
        """How much of the rounding acts, 0 to 1."""
        return 1.0

    def code(self, cells: Cells) -> tuple[Array, Array]:
        """Codes (floats that are whole) and scales of the cells; a subclass says how."""
        raise NotImplementedError

    def rounded(self) -> Codes:
        """The matrix as it is to be exported, whatever the strength is now; of an embedding too inputs by outputs."""
        w = self.matrix().astype(jnp.float32)
        cells = cut(w, self.per)
        codes, scale = self.code(cells)
        return Codes(whole(codes, len(w)).astype(jnp.int8), scale[:, 0], None, grouped(self.per, len(w)))

    def weight(self) -> Float[Array, ...]:
        """The effective dense matrix, float32, laid out as what is wrapped; its gradient goes straight through."""
        w = self.matrix().astype(jnp.float32)
        codes, scale = self.code(cut(jax.lax.stop_gradient(w), self.per))
        found = through(w, whole(codes * scale, len(w)), self.strength())
        return found.T if self.is_embedding else found

    def __call__(self, x: Array) -> Array:
        if self.is_embedding:
            return self.weight()[x]
        x, step = rounded_inputs(x if self.norm is None else self.norm(x), self.inputs, self.strength())
        (y,) = ops.linear(x, self.weight())
        return y if self.bias is None else y + self.shift(step).astype(x.dtype)

    def shift(self, step: Array | float) -> Array:
        """The bias that is added."""
        del step
        return self.bias[...]

    def fold(self) -> nnx.Module:
        """A plain module with the rounded weights; it does not round its inputs. EditError for one with a norm."""
        if self.norm is not None:
            raise EditError(f"{type(self).__name__} with a norm inside is more than a matrix: no plain module is that")
        return super().fold()


def root(module: Any) -> Any:
    """The module of the kit under whatever is wrapped around it."""
    while isinstance(module, Technique):
        module = module.inner
    return module


def grouped(per: Per, inputs: int) -> int:
    """`Codes.group` of a matrix."""
    return 0 if per in ("tensor", "channel") or per >= inputs else per  # type: ignore[operator, return-value]
