"""Activation patching and path patching: put a value of one run into another and see what becomes of the answer.

    metric = logit_difference(right, wrong)
    sweep(model, clean, corrupt, metric, "heads")                     # (layers, heads, positions), in one program
    paths(model, clean, corrupt, metric, ["blocks.3.attn.q"])         # (layers, heads): through these queries only

Every sweep is `jax.vmap` over its patches inside one compiled program. A patch in layer l leaves everything before it
as it was, and under vmap what does not depend on the patch is computed once for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylm import ops
from tinylm.config import suggest
from tinylm.data import DataError, check_tokens
from tinylm.model import Transformer
from tinylm.taps import compose, patching, recording
from tinylm.weights import bind, pure

Metric = Callable[[Array], Array]
"""(B, n, V) logits at the positions read -> one number; (B, 1, C) scores with a "classes" head."""

PARTS = {  # name -> the site in a block, the axis of its positions, the axis of its heads (None: it has none)
    "resid_pre": ("", 1, None),
    "resid_mid": ("resid_mid", 1, None),
    "resid": ("resid", 1, None),
    "attn": ("attn", 1, None),
    "mlp": ("mlp", 1, None),
    "heads": ("attn.heads", 1, 2),
    "q": ("attn.q", 1, 2),
    "k": ("attn.k", 1, 2),
    "v": ("attn.v", 1, 2),
    "pattern": ("attn.pattern", 2, 1),
}


class logit_difference:
    """Metric: logit of the right token minus that of the wrong one, at the last position read, mean over rows.

    Two metrics of the same tokens are equal, so that a sweep is compiled once.

    Args:
        right, wrong: (B,) ids, or one for all rows.

    Raises DataError: not a pair for every row, or ids that are no token's.
    """

    def __init__(self, right: Any, wrong: Any):
        self.right = tuple(np.atleast_1d(np.asarray(right)).tolist())
        self.wrong = tuple(np.atleast_1d(np.asarray(wrong)).tolist())
        if len(self.right) != len(self.wrong) or not self.right:
            raise DataError(f"{len(self.right)} right tokens and {len(self.wrong)} wrong ones: give one pair per row")
        for name, ids in (("right", self.right), ("wrong", self.wrong)):
            check_tokens(np.asarray(ids), 2**31, name)

    def __call__(self, logits: Float[Array, "B n V"]) -> Array:
        rows, vocab = logits.shape[0], logits.shape[-1]
        if len(self.right) not in (1, rows):
            raise DataError(f"{len(self.right)} pairs of tokens for {rows} rows: give one pair per row, or one for all")
        check_tokens(np.asarray(self.right), vocab, "right")
        check_tokens(np.asarray(self.wrong), vocab, "wrong")
        pick = lambda ids: jnp.take_along_axis(logits[:, -1], jnp.asarray(ids)[:, None], axis=-1)  # noqa: E731
        return jnp.mean(pick(self.right) - pick(self.wrong))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, logit_difference) and (self.right, self.wrong) == (other.right, other.wrong)

    def __hash__(self) -> int:
        return hash((self.right, self.wrong))


def answers(model: Any, tokens: Any, metric: Metric, last: int, tap: Any) -> Array:
    """The metric of one pass, the head computed for the last positions only (a "classes" head pools them all)."""
    check_last(last, tokens.shape[1])
    x, _ = model.trunk(tokens, tap=tap)
    logits = model.unembed(x)[:, None] if model.config.head == "classes" else model.unembed(x[:, -last:])
    found = metric(logits.astype(jnp.float32))
    if jnp.shape(found) != ():
        raise DataError(f"the metric gave shape {jnp.shape(found)}: it must make one number of logits {logits.shape}")
    return found


def check_last(last: Any, length: int) -> None:
    """Raise DataError unless `last` positions can be read of texts of this length."""
    if isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= length:
        raise DataError(f"last = {last!r}: read 1 to {length} of the last positions")


def sweep(
    model: Transformer,
    clean: np.ndarray,
    corrupt: np.ndarray,
    metric: Metric,
    part: str = "resid",
    *,
    positions: bool = True,
    last: int = 1,
    chunk: int = 256,
) -> np.ndarray:
    """The metric of the corrupt run with one value of the clean run in it, for all layers, heads and positions.

    Args:
        clean, corrupt: (B, T) ids of one shape, B pairs of texts.
        metric: of the logits at the last `last` positions, see `Metric`.
        part: which value: "resid_pre", "resid_mid", "resid", "attn", "mlp"; per head "heads", "q", "k", "v", "pattern".
        positions: patch each position by itself; else all at once.
        chunk: patches computed together, of one layer; fewer need less memory.

    Returns:
        (layers, heads, positions) float32, without the axis of heads where the part has none (key heads for "k" and
        "v"), without that of positions if they are not told apart. For scale: `baseline`.

    Raises:
        DataError: ids of unequal shapes or out of range, an unknown part, or `last` beyond the texts.
    """
    clean, corrupt = _pair(model, clean, corrupt)
    block = model.config.block
    lacks = {"parallel": ("resid_mid",), "embbert": ("resid_mid", "mlp", "k", "v")}.get(block, ())
    known = [name for name in PARTS if name not in lacks]
    if part not in known:
        raise DataError(f"part = {part!r}: no such value in a {block} block{suggest(str(part), known)}")
    if chunk < 1:
        raise DataError(f"chunk = {chunk}: compute at least 1 patch at a time")
    graph, params = pure(model)
    with ops.plain():  # the native kernels would copy their weights for every patch
        found = _sweep(graph, metric, part, positions, last, chunk)(params, clean, corrupt)
    return np.asarray(found)


def baseline(model: Transformer, tokens: np.ndarray, metric: Metric, *, last: int = 1) -> float:
    """The metric of a run with nothing patched, on (B, T) ids. Raises DataError as `sweep`."""
    tokens, _ = _pair(model, tokens, tokens)
    graph, params = pure(model)
    return float(_plain(graph, metric, last)(params, tokens))


@functools.lru_cache(maxsize=32)
def _plain(graph: Any, metric: Metric, last: int) -> Callable:
    return jax.jit(lambda params, tokens: answers(bind(graph, params), tokens, metric, last, lambda site, x: x))


def _pair(model: Transformer, clean: Any, corrupt: Any) -> tuple[np.ndarray, np.ndarray]:
    clean, corrupt = np.asarray(clean), np.asarray(corrupt)
    if clean.shape != corrupt.shape or clean.ndim != 2:
        raise DataError(f"clean and corrupt must be rows of equal shape, not {clean.shape} and {corrupt.shape}")
    for name, tokens in (("clean", clean), ("corrupt", corrupt)):
        check_tokens(tokens, model.config.vocab, name)
    return clean, corrupt


def _site(part: str, layer: int, first: str) -> str:
    if part == "resid_pre":
        return f"blocks.{layer - 1}.resid" if layer else first
    return f"blocks.{layer}.{PARTS[part][0]}"


@functools.lru_cache(maxsize=32)
def _sweep(graph: Any, metric: Metric, part: str, positions: bool, last: int, chunk: int) -> Callable:
    _, at_position, at_head = PARTS[part]

    def run(params, clean, corrupt):
        model = bind(graph, params)
        first = "embed" if model.front is None else "front"  # what the first block reads
        sites = [_site(part, layer, first) for layer in range(model.config.layers)]
        source: dict[str, Array] = {}
        model(clean, tap=recording(source, "|".join(site.replace(".", r"\.") for site in sites)))
        rows = []
        for site in sites:
            value = source[site]
            heads = value.shape[at_head] if at_head is not None else 1
            places = value.shape[at_position] if positions else 1
            head, place = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(heads), jnp.arange(places), indexing="ij"))

            def one(which, site=site, value=value):
                mask = jnp.bool_(True)
                if at_head is not None:
                    mask = mask & _along(jnp.arange(value.shape[at_head]) == which[0], at_head, value.ndim)
                if positions:
                    mask = mask & _along(jnp.arange(value.shape[at_position]) == which[1], at_position, value.ndim)
                tap = swapping(site, value, mask)
                return answers(model, corrupt, metric, last, tap)

            size = min(chunk, len(head))
            found = jax.vmap(one)((head, place)) if size == len(head) else jax.lax.map(
                one, (head, place), batch_size=size
            )  # fmt: skip
            shape = (() if at_head is None else (heads,)) + ((places,) if positions else ())
            rows.append(found.reshape(shape))
        return jnp.stack(rows)

    return jax.jit(run)


def _along(flags: Array, axis: int, ndim: int) -> Array:
    return flags.reshape([-1 if i == axis else 1 for i in range(ndim)])


class swapping:
    """Tap that takes `value` instead of what is there, where `mask` is true."""

    def __init__(self, site: str, value: Array, mask: Array):
        self.site, self.value, self.mask = site, value, mask

    def __call__(self, site: str, x: Array) -> Array:
        return jnp.where(self.mask, self.value.astype(x.dtype), x) if site == self.site else x

    def wants(self, site: str) -> bool:
        return site == self.site


class freezing:
    """Tap that holds sites at the values of another run, but for one head, which gets those of a third."""

    def __init__(self, held: dict[str, Array], sent: dict[str, Array], layer: Array, head: Array):
        self.held, self.sent, self.layer, self.head = held, sent, layer, head

    def __call__(self, site: str, x: Array) -> Array:
        if site not in self.held:
            return x
        if site not in self.sent:
            return self.held[site].astype(x.dtype)
        own = (int(site.split(".")[1]) == self.layer) & (jnp.arange(x.shape[2]) == self.head)
        return jnp.where(own[None, None, :, None], self.sent[site], self.held[site]).astype(x.dtype)

    def wants(self, site: str) -> bool:
        return site in self.held


def paths(
    model: Transformer,
    clean: np.ndarray,
    corrupt: np.ndarray,
    metric: Metric,
    receivers: Sequence[str] | None = None,
    *,
    freeze_mlps: bool = False,
    last: int = 1,
    chunk: int = 64,
) -> np.ndarray:
    """Path patching (Wang et al. 2022, Interpretability in the Wild, section 3.1), every head a sender in turn.

    The corrupt run, where the sender's output is the clean one and all other heads stay as in the corrupt run, gives
    the receivers' values; the corrupt run with those values in it gives the metric.

    Args:
        receivers: sites that read the stream, such as "blocks.3.attn.q" or "blocks.2.mlp"; None: the logits, which is
            the direct effect.
        freeze_mlps: hold the MLPs too, so that only straight connections count; else they pass on what they read.

    Returns:
        (layers, heads) float32. A head at or after all receivers changes nothing: it has the corrupt run's value.

    Raises:
        DataError: as `sweep`, or no receivers. ValueError: a receiver that is no site.
    """
    clean, corrupt = _pair(model, clean, corrupt)
    if receivers is not None and (isinstance(receivers, str) or not len(receivers) or "logits" in receivers):
        raise DataError(f"receivers = {receivers!r}: give a list of sites; None stands for the logits")
    graph, params = pure(model)
    named = None if receivers is None else tuple(receivers)
    with ops.plain():
        return np.asarray(_paths(graph, metric, named, freeze_mlps, last, chunk)(params, clean, corrupt))


@functools.lru_cache(maxsize=32)
def _paths(graph, metric: Metric, receivers: tuple[str, ...] | None, freeze_mlps: bool, last: int, chunk: int):
    heads_of = r"blocks\.\d+\.attn\.heads"

    def run(params, clean, corrupt):
        model = bind(graph, params)
        sent: dict[str, Array] = {}
        held: dict[str, Array] = {}
        model(clean, tap=recording(sent, heads_of))
        model(corrupt, tap=recording(held, rf"{heads_of}|blocks\.\d+\.mlp" if freeze_mlps else heads_of))
        layers, heads = model.config.layers, model.config.heads
        layer, head = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(layers), jnp.arange(heads), indexing="ij"))

        def one(which):
            frozen = freezing(held, sent, *which)
            if receivers is None:
                return answers(model, corrupt, metric, last, frozen)
            got: dict[str, Array] = {}
            names = "|".join(site.replace(".", r"\.") for site in receivers)
            # What a receiver reads is recorded before it is frozen itself, where it is a head's output or an MLP.
            model(corrupt, tap=compose(recording(got, names), frozen))
            missing = [site for site in receivers if site not in got]
            if missing:
                raise ValueError(f"no site {missing[0]!r} to receive anything; see tinylm.sites(model)")
            return answers(model, corrupt, metric, last, patching(got))

        return jax.lax.map(one, (layer, head), batch_size=min(chunk, layers * heads)).reshape(layers, heads)

    return jax.jit(run)
