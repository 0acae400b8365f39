"""Class scores of one model or many: several of one shape are run as one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.classification.metrics import Classified, classified
from tinylm.classification.sets import Dataset, SetError, rows_of
from tinylm.data import padded
from tinylm.model import Transformer
from tinylm.parts import BatchNorm
from tinylm.taps import recording
from tinylm.techniques import modules
from tinylm.weights import bind, pure

__all__ = ["encoded", "evaluate_classes", "scores", "settle"]

BATCH = 64  # texts of a call
STEP = 16  # lengths are rounded up to it, so that few programs are compiled


def encoded(model: Transformer, texts: Sequence[str | Sequence[int]], length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, T) tokens and segments of texts, or of token ids as they are; T: `length`, or as long as the texts need.

    Raises SetError: a model without tokenizer, or ids it does not have.
    """
    if isinstance(texts, str):
        raise SetError("one text was given where several are needed: put it in a list")
    if not len(texts):
        raise SetError("no texts were given")
    words = [text for text in texts if isinstance(text, str)]
    if len(words) == len(texts):
        if model.tokenizer is None:
            raise SetError("the model has no tokenizer: give token ids instead of texts")
        rows = rows_of(words, model.tokenizer, model.config.kind)
    else:
        rows = [np.asarray(row, np.int32) for row in texts]
    longest = max(map(len, rows))
    if not min(map(len, rows)) or max(row.max() for row in rows) >= model.config.vocab or min(map(np.min, rows)) < 0:
        raise SetError(f"token ids must be from 0 to {model.config.vocab - 1}, at least one per text")
    return padded(rows, min(model.config.context, length or -(-longest // STEP) * STEP), filler(model))


def filler(model: Transformer) -> int:
    """The id that rows are filled up with; nothing sees it."""
    return 0 if model.tokenizer is None or model.tokenizer.pad is None else model.tokenizer.pad


@functools.lru_cache(maxsize=32)
def _program(graph: Any) -> Callable:
    """`(stacked params, tokens, segments) -> (M, B, C)` of M models of one shape."""

    def one(params: dict, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return bind(graph, params)(tokens, segments=segments).astype(jnp.float32)

    return jax.jit(jax.vmap(one, in_axes=(0, None, None)))


def run(graph: Any, stacked: dict, tokens: np.ndarray, segments: np.ndarray, batch: int = BATCH) -> np.ndarray:
    """(M, N, C) scores of stacked parameters on encoded texts."""
    program, found = _program(graph), []
    batch = min(batch, len(tokens))
    for at in range(0, len(tokens), batch):
        rows = np.arange(at, at + batch) % len(tokens)  # the last call is filled up with texts from the front
        found.append(np.asarray(program(stacked, tokens[rows], segments[rows])))
    return np.concatenate(found, axis=1)[:, : len(tokens)]


def scores(
    models: Transformer | Sequence[Transformer], texts: Sequence[str | Sequence[int]], *, batch: int = BATCH
) -> np.ndarray:
    """(M, N, C) class scores of M models on N texts (or token ids), without dropout; (N, C) of a single model.

    Models of one shape share a program. Raises SetError for models without classes or with different ones.
    """
    single = isinstance(models, Transformer)
    every = [models] if single else list(models)
    classes = {m.config.classes if m.config.head == "classes" else 0 for m in every}
    if len(classes) != 1 or not max(classes):
        raise SetError(f'models with heads {[m.config.head for m in every]} and classes {sorted(classes)}: all need a '
                       '"classes" head with as many classes; see classify')  # fmt: skip
    found: list[Any] = [None] * len(every)
    taken = [pure(model) for model in every]
    for i, (graph, _) in enumerate(taken):
        if found[i] is None:
            alike = [k for k in range(i, len(every)) if found[k] is None and taken[k][0] == graph]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *(taken[k][1] for k in alike))
            for k, rows in zip(alike, run(graph, stacked, *encoded(every[i], texts), batch), strict=True):
                found[k] = rows
    return found[0] if single else np.stack(found)


def evaluate_classes(model: Transformer, dataset: Dataset, *, seed: int = 0) -> Classified:
    """How well a classifier does on a set: accuracy, macro-F1, calibration, confusion. Raises SetError as `scores`."""
    require_classes(model.config.classes, dataset)
    return classified(scores(model, dataset.texts), dataset.labels, dataset.names, texts=dataset.texts, seed=seed)


def require_classes(classes: int, dataset: Dataset) -> None:
    """Raise SetError unless a set has as many classes as a classifier."""
    if classes != len(dataset.names):
        raise SetError(f"the classifier has {classes} classes and the set {len(dataset.names)}: {dataset}")


@functools.lru_cache(maxsize=32)
def _measured(graph: Any) -> Callable:
    """`(params, tokens, segments) -> {site: mean or variance of the batch}` of every batch norm."""

    def measured(params: dict, tokens: jax.Array, segments: jax.Array) -> dict:
        seen: dict[str, jax.Array] = {}
        still = bind(graph, params)
        still.config = still.config.replace(dropout=0.0)
        still.trunk(tokens, segments=segments, tap=recording(seen, r"front\..*\.(mean|var)"), key=jax.random.key(0))
        return seen

    return jax.jit(measured)


def settle(model: Transformer, tokens: np.ndarray, segments: np.ndarray, *, batch: int = BATCH, calls: int = 8) -> None:
    """Measure the population's statistics of every batch norm: means over batches of their own (Wu and Johnson 2021).

    Training ends with this, in place of a running average; models without batch norms are left alone. The batches are
    drawn from all the texts: sets often come sorted by class, and the first rows would be one class.
    """
    norms = {path: module for path, module in modules(model) if isinstance(module, BatchNorm)}
    if not norms:
        return
    graph, params = pure(model)
    sums: list[dict] = []
    order = np.random.default_rng(0).permutation(len(tokens))
    for at in range(0, min(len(tokens), calls * batch), batch):
        rows = order[np.arange(at, at + min(batch, len(tokens))) % len(tokens)]
        sums.append(jax.device_get(_measured(graph)(params, tokens[rows], segments[rows])))
    for path, norm in norms.items():
        norm.mean.set_value(jnp.asarray(np.mean([s[f"{path}.mean"] for s in sums], axis=0)))
        norm.var.set_value(jnp.asarray(np.mean([s[f"{path}.var"] for s in sums], axis=0)))
