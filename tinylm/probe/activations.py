"""Activations of many texts: any sites, in memory or on disk."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinylm.data import DataError, check_tokens
from tinylm.model import Transformer
from tinylm.taps import Tap, compose, recording, untouched
from tinylm.techniques import Technique
from tinylm.weights import bind, pure


@functools.lru_cache(maxsize=32)
def _recorder(graph: Any, sites: str, tap: Tap) -> Callable:
    def run(params, tokens):
        seen: dict[str, jax.Array] = {}
        bind(graph, params)(tokens, tap=compose(tap, recording(seen, sites)))
        return seen

    return jax.jit(run)


def unwrapped(module: Any) -> Any:
    """A block's attention or MLP itself, without the techniques around it."""
    while isinstance(module, Technique):
        module = module.inner
    return module


def matrix_of(linear: Any) -> Any:
    """The matrix of a linear layer, without techniques that add to its output and so are no matrix themselves."""
    while not hasattr(linear, "weight"):
        linear = linear.inner
    return linear.weight()


def seen(model: Transformer, tokens: Any, sites: str, tap: Tap = untouched) -> dict[str, jax.Array]:
    """The values of all sites whose name matches, in one compiled pass over (B, T) ids."""
    check_tokens(tokens, model.config.vocab)
    if np.ndim(tokens) != 2:
        raise DataError(f"tokens must be rows of ids, (B, T); got shape {np.shape(tokens)}")
    graph, params = pure(model)
    try:
        run = _recorder(graph, sites, tap)
    except TypeError:  # a tap that holds arrays cannot be a key: its program is made anew
        run = _recorder.__wrapped__(graph, sites, tap)
    return run(params, np.asarray(tokens))


def record(
    model: Transformer,
    tokens: np.ndarray,
    sites: str = r"blocks\.\d+\.resid",
    *,
    batch: int = 16,
    out: str | os.PathLike | None = None,
    tap: Tap = untouched,
) -> dict[str, np.ndarray]:
    """Site -> its values for every row of `tokens` (rows, T), read in batches.

    Args:
        sites: regex for whole names, see `model`. batch: rows at a time; the last one is filled up and cut.
        out: a new folder: every site becomes `<site>.npy` there, mapped into memory, so that it may be larger than it.
        tap: acts before the recording.

    Raises:
        ValueError: no such site. DataError: ids out of range. FileExistsError: `out` holds files already.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise DataError(f"tokens must be rows of ids, (rows, length); got shape {tokens.shape}")
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.npy")):
            raise FileExistsError(f"{folder} holds recordings already: name another folder")
    found: dict[str, np.ndarray] = {}
    if batch < 1:
        raise DataError(f"batch = {batch}: read at least 1 row at a time")
    batch = min(batch, len(tokens))
    for at in range(0, len(tokens), batch):
        rows = tokens[at : at + batch]
        filled = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
        for site, value in seen(model, filled, sites, tap).items():
            value = np.asarray(value)
            if site not in found:
                shape = (len(tokens), *value.shape[1:])
                found[site] = (
                    np.empty(shape, value.dtype)
                    if folder is None
                    else np.lib.format.open_memmap(folder / f"{site}.npy", "w+", value.dtype, shape)
                )
            found[site][at : at + len(rows)] = value[: len(rows)]
    for values in found.values():
        if isinstance(values, np.memmap):
            values.flush()
    return found
