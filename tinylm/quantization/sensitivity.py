"""How many bits each matrix should get: its sensitivity, and the best shares of a number of bytes.

    quantize(model, mixed(model, tokens, budget=200_000))

The cost of rounding a matrix is HAWQ-V2's (Dong et al. 2020): mean of the diagonal of its Hessian times the squared
error of its weights. The diagonal's sum is Hutchinson's estimate, and the shares are the exact optimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinylm import ops
from tinylm.quantization.calibration import batches_of
from tinylm.quantization.spec import QuantizationError, Spec
from tinylm.weights import bind, pure


def hutchinson(loss: Callable[[Any], jax.Array], params: Any, probes: int, key: jax.Array) -> Any:
    """Estimated trace of the Hessian of every leaf's own block: the mean of v' H v over random signs v.

    One product with the whole Hessian serves all leaves: what other leaves add has mean zero.
    """
    leaves, shape = jax.tree.flatten(params)

    def probe(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        v = jax.tree.unflatten(shape, signs)
        return jax.tree.map(jnp.vdot, v, jax.jvp(jax.grad(loss), (params,), (v,))[1])

    traces = jax.lax.map(probe, jax.random.split(key, probes))
    return jax.tree.map(lambda x: jnp.mean(x, 0), traces)


class _Plainly:
    """A tap that asks for attention patterns, since fused attention has no second derivative; it changes nothing."""

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        return x

    def wants(self, site: str) -> bool:
        return site.endswith(".pattern")


def traces(model: Any, calibration: Any, *, probes: int = 16, seed: int = 0) -> dict[str, float]:
    """Estimated trace of the Hessian of the mean cross-entropy (nats per next token) in every matrix of a decoder.

    Args:
        calibration: texts or token arrays (rows, length). probes: random vectors per batch; the error falls with their
            square root.
    """
    graph, params = pure(model)
    matrices = {n: p for n, p in params.items() if n.rpartition(".")[2] in ("kernel", "table")}
    rest = {n: p for n, p in params.items() if n not in matrices}

    @jax.jit
    def estimate(matrices: dict, tokens: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        def loss(matrices: dict) -> jax.Array:
            logits = bind(graph, {**rest, **matrices})(tokens[:, :-1], tap=_Plainly()).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        return hutchinson(loss, matrices, probes, key)

    batches = batches_of(calibration, model)
    with ops.plain():  # native kernels have no second derivative
        found = [estimate(matrices, jnp.asarray(b), jax.random.key(seed + i)) for i, b in enumerate(batches)]
    return {name.rpartition(".")[0]: float(np.mean([f[name] for f in found])) for name in matrices}


def allocate(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Which choice each item takes so that the costs add up to the least and the sizes to at most `budget`: exact.

    Dynamic programming over the pairs (size, cost) that nothing else beats in both; few sizes differ in a model, so
    those pairs stay few. Of equal costs the smaller size wins.

    Args:
        sizes: bytes of every choice of every item, whole numbers. costs: likewise, finite.

    Raises:
        QuantizationError: even the smallest choices do not fit.
    """
    least = sum(min(s) for s in sizes)
    if least > budget:
        raise QuantizationError(f"budget = {budget:,} bytes: these matrices take at least {least:,}")
    totals, lost = np.zeros(1, np.int64), np.zeros(1)
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    later = np.cumsum([min(s) for s in sizes][::-1])[::-1]
    for i, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        after = int(later[i + 1]) if i + 1 < len(sizes) else 0
        new_totals = (totals[:, None] + np.asarray(size, np.int64)).reshape(-1)
        new_lost = (lost[:, None] + np.asarray(cost, np.float64)).reshape(-1)
        order = np.lexsort((new_lost, new_totals))
        order = order[new_totals[order] + after <= budget]
        front = np.minimum.accumulate(new_lost[order])
        keep = order[np.concatenate([[True], front[1:] < front[:-1]])]
        totals, lost = new_totals[keep], new_lost[keep]
        taken.append((keep // len(size), keep % len(size)))
    at, chosen = len(totals) - 1, []  # the largest size on the front has the least cost
    for before, choice in reversed(taken):
        chosen.append(int(choice[at]))
        at = int(before[at])
    return chosen[::-1]


def mixed(
    model: Any,
    calibration: Any,
    budget: int,
    *,
    bits: Sequence[float] = (2, 4, 8),
    base: Spec | None = None,
    sensitivity: Mapping[str, float] | None = None,
    probes: int = 16,
) -> list[Spec]:
    """Bits for every matrix that `base` matches, so that they take at most `budget` bytes, codes and scales together.

    Args:
        calibration: as of `traces`. base: everything but the bits. sensitivity: what `traces` gave, if it is known.

    Returns:
        One spec per number of bits that is used, for `quantize`. Raises QuantizationError when the budget is too small.
    """
    from tinylm.quantization.codes import chosen_by, measured

    base = base or Spec()
    found = sensitivity if sensitivity is not None else traces(model, calibration, probes=probes)
    options = [base.replace(bits=float(b)) for b in bits]
    paths, sizes, costs = [], [], []
    for path, (module, _) in chosen_by(model, (base,)).items():
        tried = [measured(module, option) for option in options]
        weight = max(found[path], 0.0) / tried[0].weights
        paths.append(path)
        sizes.append([t.bytes for t in tried])
        costs.append([weight * t.squared for t in tried])
    picks = allocate(sizes, costs, budget)
    groups: dict[int, list[str]] = {}
    for path, pick in zip(paths, picks, strict=True):
        groups.setdefault(pick, []).append(path)
    return [dataclasses.replace(options[i], where=alternatives(names)) for i, names in sorted(groups.items())]


def alternatives(paths: Sequence[str]) -> str:
    """A regex that matches exactly these paths."""
    return "|".join(path.replace(".", r"\.") for path in paths)
