"""What a model's matrices read: their inputs on some text, seen from inside the forward pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.quantization.spec import QuantizationError
from tinylm.techniques import modules, put
from tinylm.weights import bind, pure

ROWS = 1024  # tokens that are kept as they are; everything else is a sum over all of them


@dataclasses.dataclass
class Inputs:
    """What one matrix read.

    Attributes:
        hessian: (inputs, inputs), 2 / tokens times the sum of x x', the second derivative of half the squared error of
            an output in the weights. tokens: how many.
        largest, mean: (inputs,) of magnitudes.
        rows: (at most `ROWS`, inputs) of them.
    """

    hessian: np.ndarray
    tokens: int
    largest: np.ndarray
    mean: np.ndarray
    rows: np.ndarray


class _Spy(nnx.Module):
    """Stands for a module while a forward pass is traced, and notes what it is given."""

    def __init__(self, inner: nnx.Module, note: Callable[[jax.Array], None]):
        self.inner, self.note = inner, note

    def __call__(self, x: jax.Array) -> jax.Array:
        self.note(x)
        return self.inner(x)


def batches_of(calibration: Any, model: Any) -> list[np.ndarray]:
    """Token batches (rows, length) from an array, several of them, or texts. Raises QuantizationError."""
    if calibration is None:
        raise QuantizationError("this needs to see inputs: give calibration=, texts or token arrays (rows, length)")
    if isinstance(calibration, str):
        calibration = [calibration]
    if hasattr(calibration, "ndim"):
        calibration = [calibration]
    given = list(calibration)
    if given and all(isinstance(text, str) for text in given):
        given = list(_windows(given, model))
    found = [np.asarray(batch, np.int32) for batch in given]
    for batch in found:
        if batch.ndim != 2 or not batch.size or batch.shape[1] > model.config.context:
            raise QuantizationError(
                f"calibration tokens have shape {batch.shape}: they must be (rows, at most {model.config.context})"
            )
    if not found:
        raise QuantizationError("calibration is empty: give texts or token arrays (rows, length)")
    return found


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
    for batch in batches:
        for path, x in run(params, jnp.asarray(batch)).items():
            x = np.asarray(x, np.float32)
            magnitude = np.abs(x)
            new = [x.T @ x, len(x), magnitude.max(0), magnitude.sum(0), [x[:: max(1, len(x) // keep)][:keep]]]
            if path not in sums:
                sums[path] = new
            else:
                old = sums[path]
                sums[path] = [old[0] + new[0], old[1] + new[1], np.maximum(old[2], new[2]), old[3] + new[3]]
                sums[path].append(old[4] + new[4])
    return {
        path: Inputs(2 * square / n, n, top, total / n, np.concatenate(kept))
        for path, (square, n, top, total, kept) in sums.items()
    }
