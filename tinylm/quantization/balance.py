"""Moving scale from what a matrix reads into the matrix, and the other way round: SmoothQuant and AWQ.

Whatever comes before a matrix and only scales features (a norm, the value matrix, the up matrix of a gated MLP) is
divided by s, and the matrix's rows are multiplied by it: the model computes the same, and rounds better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tinylm.config import GATED
from tinylm.parts import Linear, RMSNorm
from tinylm.quantization.calibration import Inputs
from tinylm.quantization.codes import approximated
from tinylm.quantization.spec import Spec
from tinylm.techniques import modules

TRIES = np.linspace(0, 1, 21)


class Pair(NamedTuple):
    """What gives features, and the matrices that read them and nothing else does."""

    source: str
    readers: tuple[str, ...]


def pairs(model: Any, wanted: Mapping[str, Spec]) -> Iterator[Pair]:
    """Every place of a model where scale can move, all of whose readers are wanted."""
    config, found, plain = model.config, [], dict(modules(model))
    for i in range(config.layers if config.block != "embbert" else 0):  # whose convolution reads the norm too
        here = f"blocks.{i}"
        if config.block != "post":  # after a post-norm the stream itself goes on
            names = ("up", "gate") if config.mlp in GATED else ("up",)
            found.append(Pair(f"{here}.attn_norm", tuple(f"{here}.attn.{n}" for n in "qkv")))
            found.append(Pair(f"{here}.mlp_norm", tuple(f"{here}.mlp.{n}" for n in names)))
        if config.kv_heads == config.heads:  # else several heads share a value
            found.append(Pair(f"{here}.attn.v", (f"{here}.attn.o",)))
        if config.mlp in GATED:
            found.append(Pair(f"{here}.mlp.up", (f"{here}.mlp.down",)))
    for pair in found:
        if not isinstance(plain.get(pair.source), RMSNorm | Linear):
            continue  # a technique: codes of its own stay as they are
        kinds = {(wanted[r].balance, wanted[r].alpha) if r in wanted else None for r in pair.readers}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is not None and kind[0] != "none":
            yield pair


def move_scale(model: Any, at: Any, wanted: Mapping[str, Spec], inputs: Mapping[str, Inputs]) -> list[str]:
    """Move scale in place, wherever a spec asks for it and it can be done; the model computes the same as before.

    Args:
        at: path -> module. inputs: of the readers.

    Returns:
        The matrices that asked for it and could not have it.
    """
    done: set[str] = set()
    for pair in pairs(model, wanted):
        matrices = [np.asarray(at(r).kernel[...], np.float64) for r in pair.readers]
        seen, spec = inputs[pair.readers[0]], wanted[pair.readers[0]]
        factor = smooth(matrices, seen, spec) if spec.balance == "smoothquant" else aware(matrices, seen, spec)
        divide(at(pair.source), factor)
        for reader, w in zip(pair.readers, matrices, strict=True):
            at(reader).kernel.set_value(jnp.asarray(w * factor[:, None], jnp.float32))
        done |= set(pair.readers)
        scale_inputs(inputs, pair, factor)
    return [path for path, spec in wanted.items() if spec.balance != "none" and path not in done]


def scale_inputs(inputs: Mapping[str, Inputs], pair: Pair, factor: np.ndarray) -> None:
    """What the readers see from now on."""
    for reader in pair.readers:
        seen = inputs[reader]
        seen.hessian, seen.rows = seen.hessian / np.outer(factor, factor), seen.rows / factor.astype(np.float32)
        seen.low, seen.high, seen.mean = seen.low / factor, seen.high / factor, seen.mean / factor


def divide(source: Any, factor: np.ndarray) -> None:
    """What a module gives, divided by a factor per feature."""
    for name in ("scale", "kernel", "bias"):
        if (value := getattr(source, name, None)) is not None:
            value.set_value(jnp.asarray(np.asarray(value[...], np.float64) / factor, jnp.float32))


def smooth(matrices: list[np.ndarray], seen: Inputs, spec: Spec) -> np.ndarray:
    """SmoothQuant's s = max|x|^alpha / max|w|^(1 - alpha) per input (Xiao et al. 2022)."""
    weights = np.max([np.abs(w).max(1) for w in matrices], 0)
    return bounded(np.maximum(seen.largest, 1e-5) ** spec.alpha / np.maximum(weights, 1e-5) ** (1 - spec.alpha))


def aware(matrices: list[np.ndarray], seen: Inputs, spec: Spec) -> np.ndarray:
    """AWQ's s = mean|x|^a, a being the one of 21 with the smallest error of the outputs (Lin et al. 2023)."""
    best, found = np.inf, np.ones(len(seen.mean))
    for a in TRIES:
        factor = np.maximum(seen.mean, 1e-5) ** a
        factor = bounded(factor / np.sqrt(factor.max() * factor.min()))
        lost = 0.0
        for w in matrices:
            off = approximated(w * factor[:, None], spec) / factor[:, None] - w
            lost += float(np.sum(off * (seen.hessian @ off)))
        if lost < best:
            best, found = lost, factor
    return found


def bounded(factor: np.ndarray) -> np.ndarray:
    """Factors that neither blow up nor vanish, where a feature is always 0."""
    return np.clip(factor, 1e-4, 1e4)
