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
from jax.flatten_util import ravel_pytree

from tinylm import ops
from tinylm.quantization.calibration import batches_of
from tinylm.quantization.spec import QuantizationError, Spec
from tinylm.weights import bind, pure


def hutchinson(loss: Callable[[Any], jax.Array], params: Any, probes: int, key: jax.Array) -> Any:
    """Estimated trace of the Hessian of every leaf's own block: the mean of v' H v over random signs v.

    One product with the whole Hessian serves all leaves: what other leaves add has mean zero.
    """
    flat, shaped = ravel_pytree(params)

    def probe(key: jax.Array) -> Any:
        v = shaped(jax.random.rademacher(key, flat.shape, flat.dtype))  # one draw: each takes a second to compile
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
        calibration: as of `quantize`; batches count by their tokens. probes: random vectors per batch; the error
            falls with their square root.

    Raises:
        QuantizationError: a model that predicts no next token, or rows of a single token.
    """
    if model.config.kind != "decoder" or model.config.head not in ("tied", "untied"):
        raise QuantizationError("only a model that predicts next tokens has this loss: give mixed(..., sensitivity=)")
    if type(probes) is not int or probes < 1:
        raise QuantizationError(f"probes = {probes!r}: must be a whole number from 1 on")
    batches = batches_of(calibration, model)
    if any(batch.shape[1] < 2 for batch in batches):
        raise QuantizationError("calibration has rows of a single token, which has no next one")
    graph, params = pure(model)
    matrices = {n: p for n, p in params.items() if n.rpartition(".")[2] in ("kernel", "table")}
    rest = {n: p for n, p in params.items() if n not in matrices}

    @jax.jit
    def estimate(matrices: dict, tokens: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        def loss(matrices: dict) -> jax.Array:
            logits = bind(graph, {**rest, **matrices})(tokens[:, :-1], tap=_Plainly()).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        return hutchinson(loss, matrices, probes, key)

    keys = jax.random.split(jax.random.key(seed), len(batches))
    with ops.plain():  # native kernels have no second derivative
        found = [estimate(matrices, jnp.asarray(b), key) for b, key in zip(batches, keys, strict=True)]
    predicted = [b[:, 1:].size for b in batches]
    mean = {name: float(np.average([f[name] for f in found], weights=predicted)) for name in matrices}
    return {name.rpartition(".")[0]: trace for name, trace in mean.items()}


def allocate(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Which choice each item takes so that the costs add up to the least and the sizes to at most `budget`: exact.

    Dynamic programming over the pairs (size, cost) that nothing else beats in both; few sizes differ in a model, so
    those pairs stay few. Of equal costs the smaller size wins.

    Args:
        sizes: bytes of every choice of every item, whole numbers. costs: likewise, finite.

    Raises:
        QuantizationError: even the smallest choices do not fit, or there is no such table of sizes and costs.
    """
    if [len(s) for s in sizes] != [len(c) for c in costs] or not all(len(s) for s in sizes):
        raise QuantizationError("sizes and costs: every item needs as many of the one as of the other, one or more")
    if not all(np.isfinite(c).all() for c in costs):
        raise QuantizationError("costs that are not finite: are the sensitivities?")
    if not isinstance(budget, int | np.integer):
        raise QuantizationError(f"budget = {budget!r}: must be a whole number of bytes")
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
        One spec per number of bits that is used, for `quantize`.

    Raises:
        QuantizationError: a budget that is too small, no bits to choose from, or a matrix without a sensitivity.
    """
    from tinylm.quantization.codes import chosen_by, measured

    base = base or Spec()
    options = [base.replace(bits=float(b)) for b in bits]
    chosen = chosen_by(model, (base,))
    if not options:
        raise QuantizationError("bits is empty: give numbers of bits to choose from")
    found = sensitivity if sensitivity is not None else traces(model, calibration, probes=probes)
    if missing := [path for path in chosen if path not in found]:
        raise QuantizationError(f"sensitivity lacks {', '.join(missing)}: give what traces(model, ...) gives")
    paths, sizes, costs = [], [], []
    for path, (module, _) in chosen.items():
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
