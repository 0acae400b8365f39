"""What a model's matrices read: their inputs on some text, seen from inside the forward pass."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.quantization.spec import QuantizationError
from tinylm.reading import documents
from tinylm.techniques import modules, put
from tinylm.weights import bind, pure

ROWS = 1024  # tokens that are kept as they are; everything else is a sum over all of them


@dataclasses.dataclass
class Inputs:
    """What one matrix read.

    Attributes:
        hessian: (inputs, inputs), 2 / tokens times the sum of x x', the second derivative of half the squared error of
            an output in the weights. tokens: how many.
        low, high: (inputs,) smallest and largest value. mean: (inputs,) of magnitudes.
        rows: (tokens, inputs), some `ROWS` at most of what was read, drawn from all positions.
    """

    hessian: np.ndarray
    tokens: int
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    rows: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """(inputs,) of magnitudes."""
        return np.maximum(-self.low, self.high)


class _Spy(nnx.Module):
    """Stands for a module while a forward pass is traced, and notes what it is given."""

    def __init__(self, inner: nnx.Module, note: Callable[[jax.Array], None]):
        self.inner, self.note = inner, note

    def __call__(self, x: jax.Array) -> jax.Array:
        self.note(x)
        return self.inner(x)


def batches_of(calibration: Any, model: Any) -> list[np.ndarray]:
    """Token batches (rows, length) from an array, several of them, texts, or a file of them (see `documents`).

    Raises QuantizationError for anything else, and for tokens that the model does not have.
    """
    wanted = "texts, a file of them, or token arrays (rows, length)"
    if calibration is None:
        raise QuantizationError(f"this needs to see inputs: give calibration=, {wanted}")
    if isinstance(calibration, str | os.PathLike):
        calibration = documents(calibration)
    elif hasattr(calibration, "ndim"):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise QuantizationError(f"calibration = {calibration!r}: give {wanted}")
    given = list(calibration)
    if given and all(isinstance(text, str) for text in given):
        given = list(_windows(given, model))
    if not given:
        raise QuantizationError(f"calibration is empty: give {wanted}")
    return [_tokens(batch, model.config) for batch in given]


def _tokens(batch: Any, config: Any) -> np.ndarray:
    try:
        tokens = np.asarray(batch)
    except ValueError as error:
        raise QuantizationError(f"calibration tokens are no array ({error})") from error
    if tokens.ndim != 2 or not tokens.size or tokens.shape[1] > config.context:
        raise QuantizationError(
            f"calibration tokens have shape {tokens.shape}: they must be (rows, at most {config.context})"
        )
    if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= config.vocab:
        span = "" if tokens.dtype.kind not in "iuf" else f" from {tokens.min()} to {tokens.max()}"
        raise QuantizationError(
            f"calibration tokens are {tokens.dtype}{span}: they must be whole numbers from 0 to {config.vocab - 1}"
        )
    return tokens.astype(np.int32)


def _windows(texts: Sequence[str], model: Any) -> Iterable[np.ndarray]:
    if model.tokenizer is None:
        raise QuantizationError("the model carries no tokenizer: give calibration as token arrays (rows, length)")
    ids = np.array([i for text in texts for i in model.tokenizer.encode(text)], np.int32)
    length = min(model.config.context, len(ids))
    if not length:
        return
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    size = max(1, 4096 // length)
    yield from (rows[i : i + size] for i in range(0, len(rows), size))


def inputs_of(model: Any, batches: Sequence[np.ndarray], paths: Iterable[str]) -> dict[str, Inputs]:
    """What the matrices at these paths read, over all batches; of an embedding, ids, nothing."""
    graph, params = pure(model)
    wanted = set(paths)

    @jax.jit
    def run(params: dict, tokens: jax.Array) -> dict[str, jax.Array]:
        traced, seen = bind(graph, params), {}
        for path, module in list(modules(traced)):
            if path in wanted:
                put(traced, path, _Spy(module, functools.partial(seen.__setitem__, path)))
        traced(tokens)
        return {path: x.reshape(-1, x.shape[-1]) for path, x in seen.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    wanted = {path for path in wanted if not hasattr(dict(modules(model))[path], "table")}
    keep = max(1, ROWS // len(batches))
    sums: dict[str, list[Any]] = {}
    for number, batch in enumerate(batches):
        for path, x in run(params, jnp.asarray(batch)).items():
            x = np.asarray(x, np.float32)
            # Drawn, since every so many tokens could be the same position of every row.
            drawn = np.sort(np.random.default_rng(number).permutation(len(x))[:keep])
            new = [x.T @ x, len(x), np.abs(x).sum(0), x.min(0), x.max(0), [x[drawn]]]
            if (old := sums.get(path)) is not None:
                added = [a + b for a, b in zip(old[:3], new[:3], strict=True)]
                new = [*added, np.minimum(old[3], new[3]), np.maximum(old[4], new[4]), old[5] + new[5]]
            sums[path] = new
    return {
        path: Inputs(2 * square / n, n, low, high, total / n, np.concatenate(kept))
        for path, (square, n, total, low, high, kept) in sums.items()
    }
