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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tinylm.parts import NORMS, Linear
from tinylm.taps import Tap, untouched, wants
from tinylm.techniques import EditError, Technique, all_or_none, edit, technique
from tinylm.techniques.rounding import Stored, one_of, require

ROOM = {"cpu": 1 << 19, "other": 1 << 26}  # scores that exist at once: on a CPU they stay in a core's cache


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
    """The sum of the chosen codes of every group, times `share`; summed in float32.

    One of the k after the other: a single look-up of all of them is taken apart by XLA into scalars, and where its
    gradient is near, done k times over (27 times as slow on a CPU at k = 32).
    """
    book, group = jnp.asarray(book), jnp.arange(book.shape[0])
    add = lambda total, at: (total + book[group, at], None)  # noqa: E731
    zero = jnp.zeros((*ids.shape[:-1], book.shape[-1]), jnp.float32)
    return (share * jax.lax.scan(add, zero, jnp.moveaxis(ids, -1, 0), unroll=8)[0]).astype(book.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def assembled(
    rule: Rule, z: Float[Array, "*batch G E"], book: Float[Array, "G C E"], ids: Int[Array, "*batch G k"]
) -> Float[Array, "*batch G E"]:
    """The states that the chosen codes make up; gradients as in the module's docstring.

    The reconstruction's gradient is added here, per token and undivided, because a training step divides the gradient
    of a sum over tokens by the sum of their weights: so it is that of a mean, whatever the batch, with no hook in the
    step. Only positions that the loss depends on count, which are those with a gradient: padding has none.
    """
    del z
    return decode(book, ids, rule.share)


def _forward(rule: Rule, z: Array, book: Array, ids: Array) -> tuple[Array, tuple]:
    out = decode(book, ids, rule.share)
    return out, (z, book, ids, out)


def _backward(rule: Rule, kept: tuple, g: Array) -> tuple[Array, Array, None]:
    z, book, ids, out = kept
    by, counted = rule.losses, jnp.any(g != 0, (-2, -1), keepdims=True)
    error = jnp.where(counted, 2 * (out - z), 0)
    pull = (rule.share * (by.model * g + by.reconstruction * error)).astype(jnp.float32)
    group = jnp.arange(book.shape[0])
    add = lambda moved, at: (moved.at[group, at].add(pull), None)  # noqa: E731
    moved = jax.lax.scan(add, jnp.zeros(book.shape, jnp.float32), jnp.moveaxis(ids, -1, 0), unroll=8)[0]
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


BLOCK = 16  # scores that are looked at as one: which of them are chosen fits a word
WORTHWHILE = 1 << 18  # scores below which `jax.lax.top_k` is as fast as all below, and compiled faster


def largest(scores: Float[Array, "*batch C"], k: int, *, ranked: bool = True) -> Int[Array, "*batch k"]:
    """Where the k largest are: what `jax.lax.top_k` says, for a CPU, whose top-k reads one value at a time.

    Largest first, of equal ones the first one first; not `ranked`: in an order of no meaning. 0 and -0 are equal, and
    NaN counts as -inf (`top_k` puts it first).
    """
    size = scores.shape[-1]
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    if scores.size < WORTHWHILE or size % BLOCK or k > 8 * BLOCK or scores.dtype != jnp.float32:
        return jax.lax.top_k(scores, k)[1]
    ids = _places(scores, k)
    if not ranked or k == 1:
        return ids
    value = jnp.take_along_axis(scores, ids, -1)  # a rank is how many come before: k^2 comparisons, but side by side
    mine, other, slot = value[..., :, None], value[..., None, :], jnp.arange(k)
    rank = ((other > mine) | ((other == mine) & (slot < slot[:, None]))).sum(-1)
    return jnp.where(rank[..., None, :] == slot[:, None], ids[..., None, :], 0).sum(-1)


def _places(scores: Array, k: int) -> Array:
    """Where the k largest are, ascending."""
    size = scores.shape[-1]
    if size >= 8 * k * BLOCK and not size % BLOCK**2:  # of many blocks only the k of largest maxima can hold them
        blocks = scores.reshape(*scores.shape[:-1], -1, BLOCK)
        best = _places(blocks.max(-1), k)
        kept = jnp.take_along_axis(blocks, best[..., None], -2)
        at = _places(kept.reshape(*best.shape[:-1], -1), k)
        return BLOCK * jnp.take_along_axis(best, at // BLOCK, -1) + at % BLOCK
    slow = lambda: jnp.sort(jax.lax.top_k(scores, k)[1], -1)  # noqa: E731
    if k <= 4:
        return slow() if k > 1 else jax.lax.top_k(scores, k)[1]
    least, found = _kth(scores, k)
    return jax.lax.cond(found, lambda: _true(scores >= least, k), slow)


def _kth(scores: Array, k: int) -> tuple[Array, Array]:
    """(*batch, 1) floats that k scores reach, and whether there are such in all rows (not where equal ones are both the
    kth): between two floats, three others at a time are tried.

    Floats are halved as the whole numbers that their bits are, so at most 16 rounds find any of them; usually six do.
    """
    cut = scores.reshape(*scores.shape[:-1], BLOCK, -1)
    most = cut.max(-2)
    low = most if most.shape[-1] >= k else scores  # as many scores are no smaller than the least of these
    low, high = _bits(low.min(-1)), _bits(most.max(-1)) + 1

    def going(state: tuple) -> Array:
        low, high, reach = state
        return jnp.any((reach != k) & (high > low + 1))

    def narrower(state: tuple) -> tuple:
        low, high, reach = state
        middle = _between(low, high)
        tried = _between(low, middle), middle, _between(middle, high)
        one, two, three = (_float(t)[..., None, None] for t in tried)
        # Three counts in one number, ten bits each: a block has 16 scores.
        found = ((cut >= one) + ((cut >= two) * (1 << 10)) + ((cut >= three) * (1 << 20))).sum(-2)
        for shift, at in zip((0, 10, 20), tried, strict=True):
            n = (found >> shift & 1023).sum(-1)
            enough = (n >= k) & (at > low)
            low, reach = jnp.where(enough, at, low), jnp.where(enough, n, reach)
            high = jnp.where(n < k, jnp.minimum(high, at), high)
        return low, high, reach

    low, _, reach = jax.lax.while_loop(going, narrower, (low, high, jnp.full(low.shape, -1, jnp.int32)))
    return _float(low)[..., None], jnp.all(reach == k)


def _true(mask: Array, k: int) -> Array:
    """Where the k true ones of every row are, ascending: the word that holds the jth, and which of its bits that is."""
    words = jnp.where(mask.reshape(*mask.shape[:-1], -1, BLOCK), 1 << jnp.arange(BLOCK), 0).sum(-1)
    count = jax.lax.population_count(words)
    total = jnp.cumsum(count, -1)
    slot = jnp.arange(k)
    word = (total[..., None, :] <= slot[:, None]).astype(jnp.int32).sum(-1)
    both = jnp.take_along_axis(words | (total - count) << BLOCK, word, -1)  # one look-up instead of two
    nth, bits, place = slot - (both >> BLOCK), both & (1 << BLOCK) - 1, word * BLOCK
    for half in (8, 4, 2, 1):
        low = jax.lax.population_count(bits & (1 << half) - 1)
        up = nth >= low
        nth, bits, place = jnp.where(up, nth - low, nth), jnp.where(up, bits >> half, bits), place + half * up
    return place


def _bits(x: Array) -> Array:
    """Whole numbers in the order of floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), jnp.float32)


def _between(a: Array, b: Array) -> Array:
    """The whole number halfway, without overflow."""
    return (a >> 1) + (b >> 1) + (a & b & 1)


def nearest(
    z: Float[Array, "n G E"],
    book: Float[Array, "G C E"],
    lean: Float[Array, "G C"],
    k: int,
    similarity: str = "cosine",
    *,
    room: int = 0,
    ranked: bool = True,
) -> Int[Array, "n G k"]:
    """The k codes of every state and group that score highest, `lean` added; at most `room` scores exist at once.

    Ordered as `largest` says. No gradient goes through a choice.
    """
    score = SIMILARITIES[similarity]

    def on(room: int, best: Callable, *arrays: Array) -> Array:
        z, book, lean = arrays
        n, groups, width = z.shape
        one = lambda part: best(score(part, book) + lean[:, None]).swapaxes(0, 1)  # noqa: E731
        rows = max(1, room // (groups * book.shape[1]))
        if rows >= n:
            return one(z)
        parts = -(-n // rows)
        rows = -(-n // parts)
        filled = jnp.pad(z, [(0, parts * rows - n), (0, 0), (0, 0)], mode="edge").reshape(parts, rows, groups, width)
        return jax.lax.map(one, filled).reshape(parts * rows, groups, k)[:n]

    cpu = functools.partial(on, room or ROOM["cpu"], functools.partial(largest, k=k, ranked=ranked))
    other = functools.partial(on, room or ROOM["other"], lambda scores: jax.lax.top_k(scores, k)[1])
    return jax.lax.platform_dependent(*map(jax.lax.stop_gradient, (z, book, lean)), cpu=cpu, default=other)


# --- the technique ----------------------------------------------------------------------------------------------------


def ends(module: Any) -> tuple[int, int]:
    """Features that a module reads and writes: a matrix, an MLP, attention or a block. Raises EditError for others."""
    if isinstance(module, Codebook):
        return ends(module.inner)
    if isinstance(module, Linear):
        return module.kernel[...].shape
    if isinstance(module, Technique) and (weight := getattr(module, "weight", None)) is not None:
        return weight().shape
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
            reconstruction. beta: of the commitment, in the last two. Both count for each position that the model's loss
            depends on (padding never) and are divided as that is: a language model's by the number of tokens. Where few
            positions have a target, they weigh more: for masked words (15 %) take `weight` 0.15, for classes one by the
            usual length of a text, for a loss of your own that is a mean, one by what it divides by.
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
        if isinstance(inner, Codebook):
            raise EditError("there is a codebook around it already: make the model anew to change it")
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

    def nearest(self, z: Float[Array, "*batch G E"], *, ranked: bool = True) -> Int[Array, "*batch G k"]:
        """Ids of the chosen codes, best first; in any order when not `ranked`."""
        flat, book, lean = z.reshape(-1, *z.shape[-2:]), self.book[...], self.lean[...]
        ids = nearest(flat, book, lean, self.k, self.similarity, ranked=ranked)
        return ids.reshape(*z.shape[:-1], self.k)

    def quantized(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The features made of codes. What is not finite stays so: codes would hide that a training diverged."""
        z = self.tap("states", self.states(x))
        ids = self.tap("codes", self.nearest(z, ranked=wants(self.tap, "codes")))
        if not self.on:
            return x
        out: Any = assembled(self.rule, z, self.book[...].astype(z.dtype), ids)
        return jnp.where(jnp.isfinite(z).all((-2, -1))[..., None], out.reshape(x.shape), jnp.nan)

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
    with all_or_none(model):
        for site, (inside, side) in SITES.items():
            if site in sites:
                groups = {"groups": model.config.heads} if site == "attn" else {}
                where = rf"blocks\.{numbers}" + (rf"\.{inside}" if inside else "")
                edit(model, where, "codebook", rngs=rngs, **{"side": side, **groups, **own})
    return model
