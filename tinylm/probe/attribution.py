"""Who made this logit: direct logit attribution, which adds up, and gradients.

direct(model, tokens).table()                    # what embedding, every head and every MLP wrote into the logits
gradient(model, tokens, metric)                  # gradient x input, per position
integrated(model, tokens, metric, steps=32)      # integrated gradients, and how much of the change they miss
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinylm import show
from tinylm.data import DataError, check_tokens
from tinylm.model import Transformer, same
from tinylm.parts import LayerNorm
from tinylm.probe.activations import matrix_of, seen, unwrapped
from tinylm.probe.patching import Metric, answers, check_last
from tinylm.taps import patching
from tinylm.weights import bind, pure


@dataclasses.dataclass(frozen=True)
class Contributions:
    """What every part wrote into the logits.

    Attributes:
        names: "embed" (the token), "positions", "types" (or "front" for them all), "blocks.0.attn.head.1",
            "blocks.0.attn.rest" (the output bias, and what a technique's rounding adds), "blocks.0.mlp", "norm.bias".
        values: (parts, B, n, ids) float32; they sum to the logits over the parts.
        logits: (B, n, ids) of the model itself, before any soft cap.
    """

    names: tuple[str, ...]
    values: np.ndarray
    logits: np.ndarray

    @property
    def error(self) -> float:
        """Largest difference between the sum of the parts and the logits."""
        return float(np.abs(self.values.astype(np.float64).sum(0) - self.logits).max())

    def of(self, pattern: str) -> np.ndarray:
        """(B, n, ids) sum of the parts whose whole name matches a regex. Raises DataError when none does."""
        chosen = [i for i, name in enumerate(self.names) if re.fullmatch(pattern, name)]
        if not chosen:
            raise DataError(f"no part matches {pattern!r}; there are {', '.join(self.names)}")
        return self.values[chosen].sum(0)

    def table(self, *, row: int = 0, position: int = -1, id: int = 0, most: int = 20) -> show.Picture:
        """The largest parts of one logit; `id` is its place among the ids asked for. Raises DataError beyond them."""
        for name, place, size in zip(("row", "position", "id"), (row, position, id), self.logits.shape, strict=True):
            if not -size <= place < size:
                raise DataError(f"{name} = {place}: there are {size} here, counted from 0")
        own = self.values[:, row, position, id]
        order = np.argsort(-np.abs(own))[:most]
        rows = [[self.names[i], f"{own[i]:+.3f}"] for i in order]
        left = own.sum() - own[order].sum()
        rows += [["all others", f"{left:+.3f}"]] if len(own) > most else []
        return show.table([*rows, ["logit", f"{self.logits[row, position, id]:+.3f}"]], ["part", "contribution"])


def direct(model: Transformer, tokens: np.ndarray, ids: Any = None, *, last: int = 1) -> Contributions:
    """Direct logit attribution: the stream is a sum, and the last norm, its scale held, is linear.

    Of a difference of two tokens take the difference of two `ids`. Contributions of unequal sign cancel, and say
    nothing about what a part does by way of later ones.

    Args:
        tokens: (B, T) ids. ids: which logits, one id or several; None for all. last: at how many of the last positions.

    Raises DataError: a model whose stream is no sum (post-norm or "embbert" blocks, or a technique around whole blocks
    or the embedding norm), a head that is more than a matrix, or ids out of range.
    """
    c = model.config
    if c.block in ("post", "embbert") or not all(hasattr(block, "attn") for block in model.blocks):
        what = {"post": "a post-norm model", "embbert": "an embbert model"}.get(c.block, "this edited model")
        raise DataError(f"{what}'s stream is no sum of its parts: direct attribution is not defined")
    if c.head not in ("tied", "untied"):
        raise DataError(f'a "{c.head}" head is more than a matrix: direct attribution needs "tied" or "untied"')
    tokens = np.asarray(tokens)
    check_tokens(tokens, c.vocab)
    if tokens.ndim != 2:
        raise DataError(f"tokens must be rows of ids, (B, T); got shape {tokens.shape}")
    check_last(last, tokens.shape[1])
    if ids is not None:
        ids = np.atleast_1d(np.asarray(ids))
        check_tokens(ids, c.vocab, "ids")
    values = seen(model, tokens, r"embed|front|blocks\.\d+\.(attn|attn\.heads|mlp)|blocks\.\d+\.resid")
    cut = lambda x: jnp.asarray(x, jnp.float32)[:, -last:]  # noqa: E731
    end = cut(values[f"blocks.{c.layers - 1}.resid"])
    parts: dict[str, Array] = {}
    if model.front is not None:
        parts["front"] = cut(values["front"])
    elif model.embed_norm is same and model.embed_positions is not None:
        parts["embed"] = cut(model.embed(tokens))
        parts["positions"] = cut(
            jnp.broadcast_to(model.embed_positions(np.arange(tokens.shape[1])), values["embed"].shape)
        )
        if model.embed_types is not None:
            parts["types"] = cut(values["embed"]) - parts["embed"] - parts["positions"]
    else:
        parts["embed"] = cut(values["embed"])
    for layer, block in enumerate(model.blocks):
        heads = cut(values[f"blocks.{layer}.attn.heads"])
        out = matrix_of(unwrapped(block.attn).o).reshape(heads.shape[2], heads.shape[3], -1)
        written = jnp.einsum("bthe,hed->hbtd", heads, out.astype(jnp.float32), precision="highest")
        parts |= {f"blocks.{layer}.attn.head.{h}": x for h, x in enumerate(written)}
        parts[f"blocks.{layer}.attn.rest"] = cut(values[f"blocks.{layer}.attn"]) - written.sum(0)
        parts[f"blocks.{layer}.mlp"] = cut(values[f"blocks.{layer}.mlp"])
    stream = jnp.stack(list(parts.values()))
    centred = isinstance(model.norm, LayerNorm)
    spread = end - end.mean(-1, keepdims=True) if centred else end
    scale = model.norm.scale[...] * jax.lax.rsqrt(jnp.mean(spread**2, -1, keepdims=True) + model.norm.eps)
    stream = (stream - stream.mean(-1, keepdims=True) if centred else stream) * scale
    names = list(parts)
    if centred:
        stream = jnp.concatenate([stream, jnp.broadcast_to(model.norm.bias[...], stream.shape[1:])[None]])
        names.append("norm.bias")
    read = model.embed.weight().T if c.head == "tied" else model.head.out.weight()
    bias = None if c.head == "tied" else model.head.out.bias
    chosen = slice(None) if ids is None else np.asarray(ids)
    matrix = read[:, chosen].astype(jnp.float32)
    found = jnp.einsum("pbtd,dv->pbtv", stream, matrix, precision="highest")
    logits = jnp.einsum("btd,dv->btv", model.norm(end), matrix, precision="highest")
    if bias is not None:
        names.append("head.bias")
        found = jnp.concatenate([found, jnp.broadcast_to(bias[...][chosen], found.shape[1:])[None]])
        logits = logits + bias[...][chosen]
    return Contributions(tuple(names), np.asarray(found), np.asarray(logits))


def gradient(
    model: Transformer, tokens: np.ndarray, metric: Metric, site: str = "embed", *, last: int = 1
) -> np.ndarray:
    """Gradient of the metric by the value at `site`, times that value: an array of its shape, such as (B, T, D).

    Sum the last axis for one number per position.
    """
    value, run = _along(model, tokens, metric, site, last)
    return np.asarray(jax.jit(jax.grad(run))(value) * value)


class Integrated(NamedTuple):
    """`values`: of the site's shape. `change`: of the metric from the baseline. `missed`: change minus their sum."""

    values: np.ndarray
    change: float
    missed: float


def integrated(
    model: Transformer,
    tokens: np.ndarray,
    metric: Metric,
    site: str = "embed",
    *,
    baseline: Any = 0.0,
    steps: int = 32,
    last: int = 1,
) -> Integrated:
    """Integrated gradients (Sundararajan et al. 2017) from `baseline` to the value at `site`, by Gauss-Legendre nodes.

    They sum to the metric's change (completeness); `missed` says how nearly the steps get there. A baseline of zeros
    makes the first norm jump: prefer a mean, or the value of another text.

    Raises DataError for fewer than 1 step.
    """
    if steps < 1:
        raise DataError(f"steps = {steps}: need at least 1")
    value, run = _along(model, tokens, metric, site, last)
    start = jnp.broadcast_to(jnp.asarray(baseline, value.dtype), value.shape)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    along = jnp.asarray((nodes + 1) / 2, value.dtype), jnp.asarray(weights / 2, value.dtype)

    @jax.jit
    def total(start, value):
        add = lambda sum_, node: (sum_ + node[1] * jax.grad(run)(start + node[0] * (value - start)), None)  # noqa: E731
        mean, _ = jax.lax.scan(add, jnp.zeros_like(value), along)
        return mean * (value - start), run(value) - run(start)

    found, change = total(start, value)
    return Integrated(np.asarray(found), float(change), float(change - found.sum()))


def _along(model, tokens, metric: Metric, site: str, last: int) -> tuple[Array, Callable[[Array], Array]]:
    """The value at a site, and the metric as a function of it."""
    tokens = np.asarray(tokens)
    if site == "logits":
        raise DataError("the metric reads the logits themselves: take a site before them, such as 'norm'")
    value = seen(model, tokens, re.escape(site))[site].astype(jnp.float32)
    graph, params = pure(model)
    return value, lambda x: answers(bind(graph, params), tokens, metric, last, patching({site: x}))
