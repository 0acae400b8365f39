"""Quick probes of theory: how signals and gradients grow with depth, and how steep an MLP can be near a point.

Sources: Roberts, Yaida and Hanin, The Principles of Deep Learning Theory (2022), on criticality; interval bound
propagation through the Clarke Jacobian, Shi et al., Efficiently Computing Local Lipschitz Constants (2022), of which
this is the interval version.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import ops, show
from tinylm.data import DataError, check_tokens
from tinylm.model import MLP, GatedMLP, Transformer
from tinylm.probe.activations import unwrapped
from tinylm.taps import compose, recording
from tinylm.techniques import Technique
from tinylm.techniques.mask import Mask
from tinylm.weights import bind, pure

# --- criticality ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Signal:
    """Variances down the stream.

    Attributes:
        names: "embed", "blocks.0.resid", ... .
        activation: (layers + 1,) mean square of the stream's features. gradient: the same of d loss / d stream, per row
            of the batch, relative to the last layer's.
        growth, decay: slopes of their natural logarithms per layer; both are 0 at criticality.
    """

    names: tuple[str, ...]
    activation: np.ndarray
    gradient: np.ndarray

    @property
    def growth(self) -> float:
        return _slope(self.activation)

    @property
    def decay(self) -> float:
        return _slope(self.gradient)

    def table(self) -> show.Picture:
        """One line per layer."""
        rows = [[n, f"{a:.4g}", f"{g:.4g}"] for n, a, g in zip(self.names, self.activation, self.gradient, strict=True)]
        title = f"log growth per layer: activations {self.growth:+.3f}, gradients {self.decay:+.3f}"
        return show.table(rows, ["stream", "activation variance", "gradient variance"], title)


def _slope(x: np.ndarray) -> float:
    return float(np.polyfit(np.arange(len(x)), np.log(np.maximum(x, 1e-300)), 1)[0]) if len(x) > 1 else 0.0


def signal(model: Transformer, tokens: np.ndarray) -> Signal:
    """Activation and gradient variance of the stream against depth, on (B, T) ids; the loss is the next token's.

    Raises DataError: texts of fewer than 2 tokens, ids out of range, or a head that predicts no tokens.
    """
    tokens = np.asarray(tokens)
    check_tokens(tokens, model.config.vocab)
    if model.config.head in ("classes", "none"):
        raise DataError(f'a "{model.config.head}" head predicts no tokens: there is no loss to differentiate')
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise DataError(f"tokens must be rows of at least 2 ids, (B, T); got shape {tokens.shape}")
    graph, params = pure(model)
    names = ("embed", *(f"blocks.{layer}.resid" for layer in range(model.config.layers)))
    activation, gradient = _signal(graph, names)(params, tokens)
    return Signal(names, np.asarray(activation, np.float64), np.asarray(gradient, np.float64))


@functools.lru_cache(maxsize=16)
def _signal(graph: Any, names: tuple[str, ...]) -> Callable:
    def run(params, tokens):
        def loss(shifts):
            seen: dict[str, Any] = {}
            shift = lambda site, x: x + shifts[site] if site in shifts else x  # noqa: E731
            tap = compose(shift, recording(seen, "|".join(n.replace(".", r"\.") for n in names)))
            logp = jax.nn.log_softmax(bind(graph, params)(tokens, tap=tap).astype(jnp.float32))
            nats = -jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1).mean()
            return nats, jnp.stack([jnp.mean(seen[n].astype(jnp.float32) ** 2) for n in names])

        width = bind(graph, params).config.width
        zeros = {n: jnp.zeros((*tokens.shape, width)) for n in names}
        slopes, activation = jax.grad(loss, has_aux=True)(zeros)
        squares = jnp.stack([jnp.mean(slopes[n] ** 2) for n in names])
        return activation, squares / squares[-1]

    return jax.jit(run)


# --- local Lipschitz bounds -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lipschitz:
    """How steep an MLP can be within `eps` (largest coordinate) of a point, in the largest-coordinate norm.

    Attributes:
        sampled: steepest Jacobian (largest absolute row sum) at points drawn from the ball: at most the truth.
        bound: by intervals: at least the truth. naive: the product of the matrices' norms and slopes.
    """

    sampled: float
    bound: float
    naive: float
    eps: float


class _Curve:
    """Bounds of an activation and of its slope over intervals: end points and the places where either turns."""

    def __init__(self, f: Callable):
        self.f, self.slope = f, jax.vmap(jax.grad(f))
        grid = jnp.linspace(-12, 12, 2401)
        steps = (jnp.diff(f(grid)), jnp.diff(self.slope(grid)))
        turns = (
            np.asarray(grid[1:-1][(d[:-1] * d[1:] < 0) & (jnp.maximum(abs(d[:-1]), abs(d[1:])) > 1e-6)]) for d in steps
        )
        self.value_turns, self.slope_turns = turns
        self.slack = 1e-4  # a grid of 0.01 misses the height of a smooth turn by an eighth of its curvature times 1e-4

    def over(self, low: np.ndarray, high: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest "value" or "slope" over each interval."""
        f = self.f if what == "value" else lambda x: self.slope(x.reshape(-1)).reshape(x.shape)
        turns = self.value_turns if what == "value" else self.slope_turns
        ends = [np.asarray(f(jnp.asarray(x, jnp.float32)), np.float64) for x in (low, high)]
        least, most = np.minimum(*ends), np.maximum(*ends)
        for turn in turns:
            inside = (low <= turn) & (turn <= high)
            value = float(np.asarray(f(jnp.asarray([turn], jnp.float32)))[0])
            least = np.where(inside, np.minimum(least, value), least)
            most = np.where(inside, np.maximum(most, value), most)
        return least - self.slack, most + self.slack


def lipschitz(
    model: Transformer, layer: int, points: np.ndarray, eps: float, *, samples: int = 64, seed: int = 0
) -> list[Lipschitz]:
    """Local Lipschitz constants of one block's MLP around what it reads, by sampling and by bound propagation.

    Args:
        points: (n, D) inputs of the MLP, such as values of "blocks.0.mlp_norm". eps: radius of the ball.
        samples: points drawn per ball, half of them at its corners.

    Returns one result per point; `sampled` is never above `bound`. Raises DataError: no such layer, an MLP that is not
    the kit's own or has techniques but masks on it (a rounded input has no slope), points that are not finite or of
    another width, or a radius that is not above 0.
    """
    c = model.config
    if not 0 <= layer < c.layers:
        raise DataError(f"layer = {layer}: the model has layers 0 to {c.layers - 1}")
    block, points = unwrapped(model.blocks[layer]), np.atleast_2d(np.asarray(points, np.float64))
    mlp = getattr(block, "mlp", block)  # an embbert block has none
    if type(mlp) not in (MLP, GatedMLP):
        raise DataError(
            f"the MLP of layer {layer} is a {type(mlp).__name__}: bounds are known for plain and gated ones"
        )
    for name in ("up", "gate", "down"):
        if isinstance(found := getattr(mlp, name, None), Technique) and not isinstance(found, Mask):
            raise DataError(
                f"{name} of layer {layer} is a {type(found).__name__}, which may do more than multiply: fold the model"
            )
    if points.shape[1] != c.width or not 0 < eps < np.inf:
        raise DataError(f"points have shape {points.shape} and eps = {eps}: need (n, {c.width}) and a radius above 0")
    if not np.isfinite(points).all() or samples < 0:
        raise DataError(f"samples = {samples}, points from {points.min()} to {points.max()}: need finite points")
    curve = _Curve(mlp.activation)
    rng = np.random.default_rng(seed)
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda x: mlp(x[None, None])[0, 0])))
    out = []
    for point in points:
        shift = rng.uniform(-eps, eps, (samples, c.width))
        shift[: samples // 2] = eps * np.sign(shift[: samples // 2])
        with ops.plain():
            found = np.asarray(jacobian(jnp.asarray(np.concatenate([point[None], point + shift]), jnp.float32)))
        out.append(Lipschitz(float(np.abs(found).sum(-1).max()), *_bounds(mlp, curve, point, eps), eps))
    return out


def _affine(linear: Any, point: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interval of a linear map's outputs over the ball, and its matrix (outputs, inputs)."""
    w = np.asarray(linear.weight(), np.float64).T
    middle = w @ point + (0 if linear.bias is None else np.asarray(linear.bias[...], np.float64))
    reach = eps * np.abs(w).sum(1)
    return middle - reach, middle + reach, w


def _bounds(mlp: Any, curve: _Curve, point: np.ndarray, eps: float) -> tuple[float, float]:
    down = np.asarray(mlp.down.weight(), np.float64).T
    norm = lambda m: float(np.abs(m).sum(1).max())  # noqa: E731
    low, high, up = _affine(mlp.up, point, eps)
    if not isinstance(mlp, GatedMLP):
        slopes = curve.over(low, high, "slope")
        naive = norm(down) * norm(up) * float(np.abs(slopes).max())
        return _rows(down, [(slopes, up)]), naive
    gate_low, gate_high, gate = _affine(mlp.gate, point, eps)
    slope, value = (curve.over(gate_low, gate_high, what) for what in ("slope", "value"))
    ends = np.stack([s * u for s in slope for u in (low, high)])
    by_gate = ends.min(0), ends.max(0)  # of activation'(gate) * up
    naive = norm(down) * (norm(gate) * float(np.abs(by_gate).max()) + norm(up) * float(np.abs(value).max()))
    return _rows(down, [(by_gate, gate), (value, up)]), naive


def _rows(down: np.ndarray, terms: list) -> float:
    """Largest absolute row sum of down @ sum(diag(s) @ w) with each s anywhere in its interval, centre and radius."""
    centre = sum(down @ ((low + high)[:, None] / 2 * w) for (low, high), w in terms)
    radius = sum(np.abs(down) @ ((high - low)[:, None] / 2 * np.abs(w)) for (low, high), w in terms)
    return float((np.abs(centre) + radius).sum(1).max())
