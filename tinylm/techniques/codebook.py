r"""Codebook features: a hidden state becomes the k nearest of many codes, and nothing else of it passes on.

    discretize(model, ["attn", "mlp"], codes=1024, k=8)                            # every layer, by a recipe
    edit(model, r"blocks\.0\.mlp\.down", "codebook", side="output", codes=512)     # one site

For a state a and codes c_1 .. c_C, cut into groups of features with codes of their own: the k codes of largest cosine
to a are summed, or averaged. Gradients: the state gets that of the output (straight through), a code that of the loss
wherever it was chosen, plus that of lambda |output - a|^2, summed over features and averaged over tokens.
(Tamkin, Taufeeque and Goodman 2023, arXiv 2310.17230, section 2; the released code's variants are settings.)

What reads or steers codes is in `tinylm.codebooks`. The chosen codes pass through a tap of the module's own, `codes`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tinylm.parts import NORMS
from tinylm.taps import Tap, untouched
from tinylm.techniques import EditError, Technique, edit, technique
from tinylm.techniques.rounding import Stored, one_of, require

ROOM = 1 << 21  # scores that exist at once: 8 MB of float32, so that they stay near the core


class Losses(NamedTuple):
    """What moves codes and states: the model's own loss on codes, reconstruction on codes, commitment on states."""

    model: float
    reconstruction: float
    commitment: float


# The released code's names. "aeloss" is the paper's.
LOSSES = {"base": Losses(1, 0, 0), "aeloss": Losses(1, 1, 0), "vqvae": Losses(0, 1, 1), "fullaeloss": Losses(1, 1, 1)}


class Rule(NamedTuple):
    """How chosen codes become a state: each times `share`; and the weights of the gradients."""

    share: float
    losses: Losses


def decode(
    book: Float[Array, "G C E"], ids: Int[Array, "*batch G k"], share: float = 1.0
) -> Float[Array, "*batch G E"]:
    """The sum of the chosen codes of every group, times `share`."""
    group = jnp.arange(book.shape[0])[:, None]
    return share * book[group, ids].sum(-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def assembled(
    rule: Rule, z: Float[Array, "*batch G E"], book: Float[Array, "G C E"], ids: Int[Array, "*batch G k"]
) -> Float[Array, "*batch G E"]:
    """The states that the chosen codes make up; gradients as in the module's docstring.

    The reconstruction's gradient is added here, per token and undivided, because a training step divides the gradient
    of a sum over tokens by their number: so it is that of a mean, whatever the batch, with no hook in the step.
    """
    del z
    return decode(book, ids, rule.share)


def _forward(rule: Rule, z: Array, book: Array, ids: Array) -> tuple[Array, tuple]:
    out = decode(book, ids, rule.share)
    return out, (z, book, ids, out)


def _backward(rule: Rule, kept: tuple, g: Array) -> tuple[Array, Array, None]:
    z, book, ids, out = kept
    by, error = rule.losses, 2 * (out - z)
    pull = rule.share * (by.model * g + by.reconstruction * error)
    group = jnp.broadcast_to(jnp.arange(book.shape[0])[:, None], ids.shape)
    moved = jnp.zeros(book.shape, jnp.float32).at[group, ids].add(pull[..., None, :].astype(jnp.float32))
    return (g - by.commitment * error if by.commitment else g), moved.astype(book.dtype), None


assembled.defvjp(_forward, _backward)

# --- the nearest codes ------------------------------------------------------------------------------------------------


def cosines(z: Float[Array, "n G E"], book: Float[Array, "G C E"]) -> Float[Array, "G n C"]:
    """Cosine of every state with every code, float32; groups first, because products come so and are not turned."""
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-20))  # noqa: E731
    return jnp.einsum("nge,gce->gnc", unit(z.astype(jnp.float32)), unit(book.astype(jnp.float32)))


def nearness(z: Float[Array, "n G E"], book: Float[Array, "G C E"]) -> Float[Array, "G n C"]:
    """Grows as the Euclidean distance falls: z c - |c|^2 / 2, float32."""
    book = book.astype(jnp.float32)
    return jnp.einsum("nge,gce->gnc", z.astype(jnp.float32), book) - 0.5 * jnp.sum(book * book, -1)[:, None]


SIMILARITIES = {"cosine": cosines, "euclidean": nearness}


def largest(scores: Float[Array, "*batch C"], k: int) -> Int[Array, "*batch k"]:
    """Where the k largest are, largest first.

    A CPU's top-k reads one value at a time. For small k the largest of interleaved strips are found first, and only
    those k strips are searched: the same answer but for the order of exact ties, in a third of the time for k = 1 and
    about three quarters for k = 8.
    """
    size, high = scores.shape[-1], 32 if k <= 4 else 16
    if k > 8 or size % high or size // high < 2 * k:
        return jax.lax.top_k(scores, k)[1]
    strips = size // high
    _, best = jax.lax.top_k(scores.reshape(*scores.shape[:-1], high, strips).max(-2), k)
    places = (best[..., None, :] + strips * jnp.arange(high)[:, None]).reshape(*best.shape[:-1], high * k)
    _, at = jax.lax.top_k(jnp.take_along_axis(scores, places, -1), k)
    return jnp.take_along_axis(places, at, -1)


def nearest(
    z: Float[Array, "n G E"],
    book: Float[Array, "G C E"],
    lean: Float[Array, "G C"],
    k: int,
    similarity: str = "cosine",
    room: int = ROOM,
) -> Int[Array, "n G k"]:
    """The k codes of every state and group that score highest, `lean` added; at most `room` scores exist at once."""
    n, groups, width = z.shape
    score = SIMILARITIES[similarity]
    one = lambda part: largest(score(part, book) + lean[:, None], k).swapaxes(0, 1)  # noqa: E731
    rows = max(1, room // (groups * book.shape[1]))
    if rows >= n:
        return one(z)
    parts = -(-n // rows)
    rows = -(-n // parts)
    filled = jnp.pad(z, [(0, parts * rows - n), (0, 0), (0, 0)]).reshape(parts, rows, groups, width)
    return jax.lax.map(one, filled).reshape(parts * rows, groups, k)[:n]


# --- the technique ----------------------------------------------------------------------------------------------------


def ends(module: Any) -> tuple[int, int]:
    """Features that a module reads and writes: a matrix, an MLP, attention or a block. Raises EditError for others."""
    if isinstance(module, Codebook):
        return ends(module.inner)
    if hasattr(module, "kernel"):
        return module.kernel.shape
    if isinstance(module, Technique) and hasattr(module, "weight"):
        return module.weight().shape
    for first, last in (("up", "down"), ("q", "o"), ("mlp", "mlp")):
        if hasattr(module, first) and hasattr(module, last):
            return ends(getattr(module, first))[0], ends(getattr(module, last))[1]
    what = type(module).__name__
    raise EditError(f"codebook wraps a Linear, an MLP, attention or a block, not {what}: narrow the pattern down")


@technique("codebook")
class Codebook(Technique):
    """A module whose input or output is replaced by codes.

    Settings:
        side: "input" or "output" of the wrapped module. groups: equal cuts of its features, codes of their own each
            (the heads in front of an attention's output matrix).
        codes: per group. k: of them that are chosen, 1 to codes.
        combine: "sum" (paper) or "mean" (released code) of the chosen ones.
        norm: of a state, per group, before all else: "none", "layernorm" (released code) or "rmsnorm".
        similarity: "cosine" or "euclidean".
        loss: "aeloss" (paper), "base" (the model's alone), "vqvae" or "fullaeloss". weight: lambda, of the
            reconstruction. beta: of the commitment, in the last two.
        init_std: standard deviation of the first codes; `codebooks.start` takes better ones from data.

    Attributes:
        book: the codes, (groups, codes, width).
        lean: (groups, codes), added to the scores before the choice: inf activates a code, -inf bans it; see
            `codebooks.steered`. It is 0 and no optimiser moves it.
        tap: sees the features, (B, T, groups, width), at the site "inputs", normed ones at "states", and the chosen
            ids, (B, T, groups, k) int32, at "codes". on: False lets everything pass. `codebooks.tapped` sets both, on
            copies only.
    """

    accepts = (nnx.Module,)

    def __init__(
        self,
        inner: nnx.Module,
        *,
        rngs: nnx.Rngs,
        side: str = "input",
        groups: int = 1,
        codes: int = 1024,
        k: int = 8,
        combine: str = "sum",
        norm: str = "none",
        similarity: str = "cosine",
        loss: str = "aeloss",
        weight: float = 1.0,
        beta: float = 0.25,
        init_std: float = 1.0,
    ):
        super().__init__(inner, rngs=rngs)
        self.side = one_of("side", side, ("input", "output"))
        self.combine = one_of("combine", combine, ("sum", "mean"))
        self.similarity = one_of("similarity", similarity, SIMILARITIES)
        one_of("norm", norm, ("none", *NORMS))
        by = LOSSES[one_of("loss", loss, LOSSES)]
        width = ends(inner)[side == "output"]
        require(type(groups) is int and groups > 0 and width % groups == 0, "groups", groups, f"must divide {width}")
        require(type(codes) is int and codes >= 1, "codes", codes, "must be at least 1")
        require(type(k) is int and 1 <= k <= codes, "k", k, f"must be from 1 to codes = {codes}")
        for name, value in (("weight", weight), ("beta", beta), ("init_std", init_std)):
            require(isinstance(value, int | float) and 0 <= value < math.inf, name, value, "must not be negative")
        self.groups, self.k = groups, k
        losses = Losses(by.model, weight * by.reconstruction, beta * by.commitment)
        self.rule = Rule(1.0 if combine == "sum" else 1.0 / k, losses)
        self.norm = None if norm == "none" else NORMS[norm](width // groups, 1e-5)
        self.book = nnx.Param(init_std * rngs.params.normal((groups, codes, width // groups)))
        self.lean = Stored(jnp.zeros((groups, codes)))
        self.tap: Tap = untouched
        self.on = True

    def states(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch G E"]:
        """What is compared with the codes: the features by group, normed."""
        z = self.tap("inputs", x.reshape(*x.shape[:-1], self.groups, -1))
        return z if self.norm is None else self.norm(z)

    def nearest(self, z: Float[Array, "*batch G E"]) -> Int[Array, "*batch G k"]:
        """Ids of the chosen codes, best first."""
        z = jax.lax.stop_gradient(z)
        ids = nearest(z.reshape(-1, *z.shape[-2:]), self.book[...], self.lean[...], self.k, self.similarity)
        return ids.reshape(*z.shape[:-1], self.k)

    def quantized(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The features made of codes. What is not finite stays so: codes would hide that a training diverged."""
        z = self.tap("states", self.states(x))
        ids = self.tap("codes", self.nearest(z))
        if not self.on:
            return x
        out = assembled(self.rule, z, self.book[...].astype(z.dtype), ids).reshape(x.shape)
        return jnp.where(jnp.isfinite(z).all((-2, -1))[..., None], out, jnp.nan)

    def __call__(self, x: Float[Array, "*batch D"], *rest: Any, **more: Any) -> Any:
        if self.side == "input":
            return self.inner(self.quantized(x), *rest, **more)
        y = self.inner(x, *rest, **more)
        return (self.quantized(y[0]), *y[1:]) if isinstance(y, tuple) else self.quantized(y)

    def fold(self) -> nnx.Module:
        raise EditError("codebook is more than a matrix: no plain module, and no other program's file, can hold it")


# --- a whole model ----------------------------------------------------------------------------------------------------

SITES = {  # innermost first: what is wrapped hides what is inside
    "attn": (r"attn\.o", "input"),
    "mlp": (r"mlp\.down", "output"),
    "resid": ("", "output"),
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"combine": "sum", "norm": "none"},
    "released": {"combine": "mean", "norm": "layernorm"},
}


def discretize(
    model: Any,
    sites: str | Sequence[str] = ("attn", "mlp"),
    preset: str = "released",
    *,
    layers: Sequence[int] | None = None,
    rngs: Any = 0,
    **settings: Any,
) -> Any:
    """Put codebooks into a model, at the same sites of every layer.

                        released                                paper
        chosen codes    averaged                                summed
        states          in LayerNorm's space, with learned      as they are: the states can grow without end, since no
                        scale and bias                          code's gradient holds them back, and with k = 1 behind
                                                                MLPs they do (notebooks/LAB.md, 2026-11-21)
        both            cosine, "aeloss" with weight 1; AdamW without decay on codes, whose first values are random:
                        take `codebooks.start` for codes from data

    Args:
        model: changed in place.
        sites: "attn" (each head in front of attention's output matrix), "mlp" (the MLP's output), "resid" (the
            residual stream after a block, which neither the paper nor its code replaces).
        preset: "released" or "paper". layers: default all. settings: those of `Codebook` on top.

    Returns:
        The model.

    Raises:
        EditError: an unknown site, preset, layer or setting.
    """
    own = {**PRESETS[one_of("preset", preset, PRESETS)], **settings}
    sites = [sites] if isinstance(sites, str) else list(sites)
    require(bool(sites), "sites", sites, f"name one of {', '.join(SITES)}")
    for site in sites:
        one_of("sites", site, SITES)
    count = model.config.layers
    which = range(count) if layers is None else layers
    require(len(which) > 0 and set(which) <= set(range(count)), "layers", layers, f"must be among 0 to {count - 1}")
    numbers = r"\d+" if layers is None else f"({'|'.join(map(str, layers))})"
    for site, (inside, side) in SITES.items():
        if site in sites:
            groups = {"groups": model.config.heads} if site == "attn" else {}
            where = rf"blocks\.{numbers}" + (rf"\.{inside}" if inside else "")
            edit(model, where, "codebook", rngs=rngs, **{"side": side, **groups, **own})
    return model
