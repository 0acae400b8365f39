"""The codebooks of a model: find them, watch or change the codes they choose, start them from data, wake dead codes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.config import suggest
from tinylm.shards import DataError, check_tokens
from tinylm.taps import Tap, recording, within
from tinylm.techniques.codebook import Codebook, nearest
from tinylm.weights import bind, pure

SEEN = ("codes", "states", "inputs")  # sites of a codebook's own


class CodebookError(ValueError):
    """What cannot be done with codes; the message names it and the remedy."""


def walk(module: nnx.Module, path: str = "") -> Iterator[tuple[str, Codebook]]:
    """Every codebook below a module with the path of its parameters, first computed first."""
    for key, child in sorted(nnx.iter_children(module), key=lambda pair: isinstance(pair[0], str) and pair[0] == "mlp"):
        if isinstance(child, nnx.Module):
            here = f"{path}.{key}" if path else str(key)
            yield from walk(child, here)
            if isinstance(child, Codebook):
                yield here, child


def site(path: str) -> str:
    """The name of a codebook: the path of what it wraps."""
    return path.replace(".inner", "")


def books(model: nnx.Module) -> dict[str, Codebook]:
    """Name -> codebook, in the order of the forward pass. Raises CodebookError for a model without any."""
    found = {site(path): book for path, book in walk(model)}
    if not found:
        raise CodebookError("this model has no codebooks: add some with techniques.codebook.discretize(model, ...)")
    return found


def named_book(model: nnx.Module, name: str) -> Codebook:
    """One of them. Raises CodebookError for a name it does not have."""
    known = books(model)
    if name not in known:
        raise CodebookError(f"no codebook is called {name!r}{suggest(name, known)}")
    return known[name]


def tapped(model: Any, tap: Tap, *, on: bool = True) -> Any:
    """A model that shares all arrays with this one, and whose codebooks report to `tap`.

    Sites are the codebooks' names and `.codes` (ids, (B, T, groups, k)), `.states` or `.inputs` (after and before the
    codebook's norm, (B, T, groups, width)); what the tap returns is gone on with, so `patching` puts other codes in.
    `on=False` lets states pass as they are.

    Raises CodebookError for a model without codebooks, ValueError for a `recording` or `patching` of other sites.
    """
    copy = bind(*pure(model))
    known = books(copy)
    if hasattr(tap, "missed"):
        tap.missed({f"{name}.{what}" for name in known for what in SEEN})
    for name, book in known.items():
        book.tap, book.on = within(name, tap), on
    return copy


@functools.lru_cache(maxsize=16)
def _reader(graph: Any, what: str, on: bool) -> Any:
    def read(params: dict, tokens: jax.Array, segments: Any, positions: Any) -> dict[str, jax.Array]:
        seen: dict[str, jax.Array] = {}
        copy = tapped(bind(graph, params), recording(seen, rf".*\.{what}"), on=on)
        copy.trunk(tokens, segments=segments, positions=positions)
        return {name.removesuffix(f".{what}"): value for name, value in seen.items()}

    return jax.jit(read)


def read(
    model: Any,
    tokens: np.ndarray,
    *,
    segments: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    what: str = "codes",
    on: bool = True,
) -> dict[str, jax.Array]:
    """Name -> chosen ids (B, T, groups, k) int32, best first, of a batch of tokens (B, T).

    Args:
        segments, positions: as in the model's call. what: "codes", or "states" or "inputs": what they were chosen for,
            (B, T, groups, width). on: as in `tapped`.

    Raises CodebookError: no codebooks, tokens that are no batch or not the model's, or another `what`.
    """
    if what not in SEEN:
        raise CodebookError(f"what = {what!r}{suggest(what, SEEN)}: take one of {', '.join(SEEN)}")
    books(model)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise CodebookError(
            f"tokens have shape {tokens.shape}: give a batch of texts, (B, T); tokens[None] is one text"
        )
    try:
        check_tokens(tokens, model.config.vocab)
    except DataError as error:
        raise CodebookError(str(error)) from None
    graph, params = pure(model)
    return _reader(graph, what, on)(params, tokens, segments, positions)


def parts(batch: Any) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """Tokens (B, T) of a batch or an array, what else `read` needs, and which positions are text and no padding."""
    if not hasattr(batch, "tokens"):
        return np.asarray(batch), {}, np.ones(np.shape(batch), bool)
    real = np.ones(batch.tokens.shape, bool) if batch.segments is None else np.asarray(batch.segments) > 0
    return batch.tokens, {"segments": batch.segments, "positions": batch.positions}, real


def gathered(
    model: Any, batches: Iterable[Any], what: str = "states", *, on: bool, most: int, seed: int
) -> dict[str, np.ndarray]:
    """Name -> states or inputs (n, groups, width), at most about `most` drawn evenly from all batches."""
    rng, kept = np.random.default_rng(seed), {}
    batches = list(batches)
    if not batches:
        raise CodebookError("no batches to take states from")
    each = -(-most // len(batches))
    for batch in batches:
        tokens, more, real = parts(batch)
        rows = rng.permutation(np.flatnonzero(real))[:each]
        for name, z in read(model, tokens, **more, what=what, on=on).items():
            kept.setdefault(name, []).append(np.asarray(z.reshape(-1, *z.shape[2:])[rows], np.float32))
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def start(
    model: Any, batches: Iterable[Any], how: str = "data", *, rounds: int = 10, most: int = 0, seed: int = 0
) -> Any:
    """Give every codebook first codes from states of the model without codebooks; the model changes in place.

    Args:
        model: usually trained before, with codebooks just put in.
        batches: of the training data, or arrays of tokens (B, T).
        how: "data" (states drawn at random) or "kmeans" (then Lloyd's rounds with the codebook's similarity).
            Each code is a k-th of a state where codes are summed, so that their sum has the right size; a norm's
            scale becomes that of the states.
        rounds: of Lloyd's. most: states to draw, default 4 per code and at least 4,096. seed: of the drawing.

    Raises CodebookError: no codebooks, no batches, another `how`, or states that are not finite (nothing is changed).
    """
    if how not in ("data", "kmeans"):
        raise CodebookError(f'how = {how!r}: take "data" or "kmeans"; `init_std` of the technique draws normal ones')
    known = books(model)
    most = most or max(4096, 4 * max(book.book.shape[1] for book in known.values()))
    inputs = gathered(model, batches, "inputs", on=False, most=most, seed=seed)
    for name, z in inputs.items():
        if not np.isfinite(z).all():
            raise CodebookError(f"states of {name} are not finite: this model has diverged; take an earlier checkpoint")
    for number, (name, book) in enumerate(known.items()):
        z = jnp.asarray(inputs[name])
        if book.norm is not None:  # so that what reads the codes finds the size that it was trained on
            spread = jnp.std(z, -1) if hasattr(book.norm, "bias") else jnp.sqrt(jnp.mean(z * z, -1))
            book.norm.scale.set_value(jnp.full(z.shape[-1], spread.mean()))
        states = np.asarray(z if book.norm is None else book.norm(z))
        groups, codes, _ = book.book.shape
        rng = np.random.default_rng([seed, number])
        drawn = np.stack([states[places(rng, len(states), codes), g] for g in range(groups)])
        if how == "kmeans":
            drawn = np.asarray(lloyd(jnp.asarray(states), jnp.asarray(drawn), rounds, book.similarity))
        book.book.set_value(jnp.asarray(drawn / (book.k * book.rule.share)))
    return model


def places(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """`count` of n rows, each at most once as long as there are enough."""
    return rng.permutation(n)[:count] if count <= n else rng.integers(0, n, count)


@functools.partial(jax.jit, static_argnums=(2, 3))
def lloyd(states: jax.Array, first: jax.Array, rounds: int, similarity: str) -> jax.Array:
    """k-means of (n, groups, width) states, group by group: centres (groups, codes, width); empty ones stay."""

    def one(centres: jax.Array, _: None) -> tuple[jax.Array, None]:
        own = nearest(states, centres, jnp.zeros(centres.shape[:2]), 1, similarity)[..., 0]
        group = jnp.arange(states.shape[1])
        total = jnp.zeros_like(centres).at[group, own].add(states)
        count = jnp.zeros(centres.shape[:2]).at[group, own].add(1.0)[..., None]
        return jnp.where(count > 0, total / jnp.maximum(count, 1), centres), None

    return jax.lax.scan(one, first, None, length=rounds)[0]


def usage(model: Any, batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """Name -> how often each code was chosen, (groups, codes) int64; say over how many positions.

    Few positions overstate how many codes are dead: a code used once in 10,000 tokens looks dead in 1,000.
    Raises CodebookError without codebooks or batches.
    """
    known, batches = books(model), list(batches)
    if not batches:
        raise CodebookError("no batches to count codes in")
    counts = {name: np.zeros(book.book.shape[:2], np.int64) for name, book in known.items()}
    for batch in batches:
        tokens, more, real = parts(batch)
        for name, ids in read(model, tokens, **more).items():
            ids = np.asarray(ids)[real]
            for g, own in enumerate(counts[name]):
                own += np.bincount(ids[:, g].ravel(), minlength=len(own))
    return counts


def dead(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Name -> share of codes that `usage` never saw."""
    return {name: float((own == 0).mean()) for name, own in counts.items()}


def wake(trained: Any, batches: Iterable[Any], *, noise: float = 1e-4, seed: int = 0) -> int:
    """Put codes that no position of `batches` chose where states are: each at a random state, a little beside it.

    Args:
        trained: a model, or a `Trainer` at a logged step: `for step in trainer: wake(trainer, [trainer.batches(0)])`.
        noise: how far beside, relative to the state's size (the released code's rho).

    Returns:
        How many codes were moved. Raises CodebookError for weights that an average replaces (ema, schedule_free).
    """
    batches = list(batches)
    training = hasattr(trained, "state") and hasattr(trained, "batches")
    if training and hasattr(trained.state.opt, "average"):
        raise CodebookError("the weights handed out are an average here, which a moved code would reach too late")
    model = bind(trained.graph, trained.state.params) if training else trained
    counts, moved, changed = usage(model, batches), 0, {}
    states = gathered(model, batches, on=True, most=8192, seed=seed)
    rng = np.random.default_rng(seed)
    for path, book in walk(model):
        name, values = site(path), np.array(book.book[...])
        for g, own in enumerate(counts[name]):
            still = np.flatnonzero(own == 0)
            drawn = states[name][places(rng, len(states[name]), len(still)), g]
            size = np.linalg.norm(drawn, axis=-1, keepdims=True) / drawn.shape[-1] ** 0.5
            values[g, still] = (drawn + noise * size * rng.standard_normal(drawn.shape)) / (book.k * book.rule.share)
            moved += len(still)
        changed[f"{path}.book"] = jnp.asarray(values)
        if not training:
            book.book.set_value(changed[f"{path}.book"])
    if training:
        trained.state = trained.state._replace(params={**trained.state.params, **changed})
        trained.sync()
    return moved
