"""Rounding that looks at the inputs: GPTQ and AdaRound. Codes come back as floats that are whole."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def nearest(w: np.ndarray, scale: np.ndarray, zero: np.ndarray | float, low: int, high: int) -> np.ndarray:
    """Codes (inputs, outputs) next to w; `scale` and `zero` multiply and add to a matrix."""
    return np.clip(np.round(w / scale) + zero, low, high)


def gptq(
    w: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | float,
    low: int,
    high: int,
    hessian: np.ndarray,
    damp: float = 0.01,
) -> np.ndarray:
    """Codes by GPTQ (Frantar et al. 2022): input after input, its error made up for by the inputs still to come.

    Args:
        w: (inputs, outputs). scale, zero: as of `nearest`, found before.
        hessian: (inputs, inputs) of what is read. damp: share of its mean diagonal that is added to it.
    """
    left, inputs = w.astype(np.float64), len(w)
    h = hessian.astype(np.float64) + 0.0
    dead = np.diag(h) == 0  # inputs that are always 0: any code will do
    h[dead, dead] = 1.0
    h[np.diag_indices(inputs)] += damp * np.mean(np.diag(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T  # its row i is what rounding input i does to the later ones
    of = lambda x, i: x[i if len(x) > 1 else 0] if np.ndim(x) else x  # noqa: E731
    codes = np.empty_like(left)
    for i in range(inputs):
        own, middle = of(scale, i), of(zero, i)
        codes[i] = np.clip(np.round(left[i] / own) + middle, low, high)
        error = (left[i] - (codes[i] - middle) * own) / upper[i, i]
        left[i + 1 :] -= np.outer(upper[i, i + 1 :], error)
    return codes


def adaround(
    w: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | float,
    low: int,
    high: int,
    x: np.ndarray,
    *,
    target: np.ndarray | None = None,
    steps: int = 1000,
    rate: float = 1e-2,
    weight: float = 0.01,
) -> np.ndarray:
    """Codes by AdaRound (Nagel et al. 2020): every weight goes up or down, whichever serves the outputs.

    Args:
        w, scale, zero, low, high: as of `nearest`.
        x: (rows, inputs) that are read. target: (rows, outputs) to come near; default x @ w.
        steps, rate: of Adam. weight: of the regulariser that drives each choice to 0 or 1, annealed as in the paper.
    """
    given = [jnp.asarray(value, jnp.float32) for value in (w, scale, zero, x)]
    aim = given[3] @ given[0] if target is None else jnp.asarray(target, jnp.float32)
    return np.asarray(_adaround(*given, aim, rate, weight, (low, high, steps)))


@functools.partial(jax.jit, static_argnames="fixed")
def _adaround(w, scale, zero, x, target, rate, weight, fixed):
    low, high, steps = fixed
    floor = jnp.floor(w / scale)
    rest = jnp.clip(w / scale - floor, 0.01, 0.99)
    start = -jnp.log(1.2 / (rest + 0.1) - 1)  # the stretched sigmoid gives the rest back
    soft = lambda v: jnp.clip(jax.nn.sigmoid(v) * 1.2 - 0.1, 0, 1)  # noqa: E731
    size = jnp.mean(jnp.square(target)) + 1e-12  # so that one weight of the regulariser suits every layer

    def loss(v, share):
        kept = (jnp.clip(floor + soft(v) + zero, low, high) - zero) * scale
        beta = 2 + 18 * 0.5 * (1 + jnp.cos(jnp.pi * jnp.maximum(share - 0.2, 0) / 0.8))
        push = jnp.where(share < 0.2, 0.0, weight)
        return jnp.mean(jnp.square(x @ kept - target)) / size + push * jnp.mean(1 - jnp.abs(2 * soft(v) - 1) ** beta)

    def step(carry, i):
        v, mean, square = carry
        g = jax.grad(loss)(v, i / steps)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        move = (mean / (1 - 0.9 ** (i + 1))) / (jnp.sqrt(square / (1 - 0.999 ** (i + 1))) + 1e-8)
        return (v - rate * move, mean, square), None

    zeros = jnp.zeros_like(w)
    (v, _, _), _ = jax.lax.scan(step, (start, zeros, zeros), jnp.arange(steps, dtype=jnp.float32))
    return jnp.clip(floor + (soft(v) >= 0.5) + zero, low, high)
