"""Can a linear map read it? Probes with the controls that tell what the probe itself could learn.

Every probe here is fitted for many feature sets at once (all layers, say) in one program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tinylm import show
from tinylm.data import DataError


def ridge(x: Float[Any, "*many n d"], y: Float[Any, "*many n k"], alpha: float = 1.0) -> tuple[Array, Array]:
    """Weights (*many, d, k) and intercepts (*many, k) of least squares with alpha |W|^2; the intercept is not shrunk.

    By the normal equations of centred features, in float32; `x` and `y` may each have leading axes, or neither. With
    alpha = 0 the features must be independent, and fewer than the items: there is no single answer otherwise.

    Raises DataError: shapes that do not fit, or a penalty below 0.
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    if x.ndim < 2 or y.ndim < 2 or x.shape[-2] != y.shape[-2]:
        raise DataError(f"x has shape {x.shape} and y {y.shape}: give (items, features) and (items, targets)")
    if not 0 <= alpha < np.inf:
        raise DataError(f"alpha = {alpha}: the penalty must be at least 0")
    mean_x, mean_y = x.mean(-2, keepdims=True), y.mean(-2, keepdims=True)
    dx, dy = x - mean_x, y - mean_y
    gram = jnp.einsum("...nd,...ne->...de", dx, dx, precision="highest") + alpha * jnp.eye(x.shape[-1])
    cross = jnp.einsum("...nd,...nk->...dk", dx, dy, precision="highest")
    lead = jnp.broadcast_shapes(gram.shape[:-2], cross.shape[:-2])
    weights = jnp.linalg.solve(jnp.broadcast_to(gram, (*lead, *gram.shape[-2:])),
                               jnp.broadcast_to(cross, (*lead, *cross.shape[-2:])))  # fmt: skip
    return weights, (mean_y - jnp.einsum("...nd,...dk->...nk", mean_x, weights, precision="highest"))[..., 0, :]


@dataclasses.dataclass(frozen=True)
class Probed:
    """How well a label can be read, for every feature set given.

    Attributes:
        accuracy: (sets,) share of held-out items right. control: (sets,) the same probe on random labels. selectivity:
            accuracy - control (Hewitt and Liang 2019).
        majority: share of the commonest training label among the held-out items. items: held out. labels: kinds.
    """

    accuracy: np.ndarray
    control: np.ndarray
    majority: float
    items: int
    labels: int

    @property
    def selectivity(self) -> np.ndarray:
        return self.accuracy - self.control

    def table(self, names: Any = ()) -> show.Picture:
        """One line per feature set."""
        rows = [
            [names[i] if len(names) else i, f"{a:.3f}", f"{c:.3f}", f"{a - c:+.3f}"]
            for i, (a, c) in enumerate(zip(self.accuracy, self.control, strict=True))
        ]
        title = f"{self.items:,} held-out items, {self.labels} labels; the commonest: {self.majority:.3f}"
        return show.table(rows, ["features", "accuracy", "random labels", "selectivity"], title)


def linear_probe(
    features: Float[Any, "sets n d"],
    labels: Any,
    *,
    kind: str = "logistic",
    alpha: float = 1.0,
    valid: float = 0.3,
    groups: Any = None,
    types: Any = None,
    steps: int = 300,
    seed: int = 0,
) -> Probed:
    """Fit a classifier on each feature set and on random labels.

    Args:
        features: (sets, n, d), or (n, d) for one. They are standardised by the training items.
        labels: (n,) of any sort.
        kind: "logistic" (multinomial, by Adam) or "ridge" (least squares on one-hot labels, closed form).
        alpha: weight of the penalty on squared weights. valid: share of items, or of groups, held out.
        groups: (n,) such as the document of each item; a group is held out whole.
        types: (n,) such as the token of each item: a control label is then drawn once per type (a control task, which a
            probe can learn by heart); None: once per item, by shuffling.
        steps: of the logistic fit.

    Raises DataError: shapes that do not fit, features that are not finite, or a single label among the training items.
    """
    x = np.asarray(features, np.float32)
    x = x[None] if x.ndim == 2 else x
    names, y = np.unique(np.asarray(labels), return_inverse=True)
    if x.ndim != 3 or x.shape[1] != len(y):
        raise DataError(f"features have shape {x.shape} and there are {len(y)} labels: give (sets, items, features)")
    for name, given in (("groups", groups), ("types", types)):
        if given is not None and np.shape(given) != y.shape:
            raise DataError(f"{name} has shape {np.shape(given)}: give one for each of the {len(y)} items")
    if not np.isfinite(x).all():
        raise DataError("a feature is not finite: leave such items out")
    if not 0 < valid < 1 or not alpha >= 0 or steps < 1:
        raise DataError(f"valid = {valid}, alpha = {alpha}, steps = {steps}: a share in (0, 1), at least 0, at least 1")
    if kind not in ("logistic", "ridge"):
        raise DataError(f"kind = {kind!r}: take logistic or ridge")
    rng = np.random.default_rng(seed)
    units, unit = np.unique(np.arange(len(y)) if groups is None else np.asarray(groups), return_inverse=True)
    held = rng.permutation(len(units))[: max(1, round(valid * len(units)))]
    test = np.isin(unit, held)
    if len(np.unique(y[~test])) < 2:
        raise DataError("the training items have a single label: there is nothing to tell apart")
    if types is None:
        false = rng.permutation(y)
    else:
        _, which = np.unique(np.asarray(types), return_inverse=True)
        false = rng.choice(y, which.max() + 1)[which]
    mean, std = x[:, ~test].mean(1, keepdims=True), x[:, ~test].std(1, keepdims=True)
    x = (x - mean) / np.where(std > 0, std, 1)
    both = np.stack([y, false])
    one_hot = jax.nn.one_hot(both, len(names))
    a, b = jnp.asarray(x[:, ~test]), jnp.asarray(x[:, test])
    if kind == "ridge":
        weights, bias = ridge(a[:, None], one_hot[None, :, ~test], alpha)
    else:
        weights, bias = _logistic(a, one_hot[:, ~test], jnp.float32(alpha), steps)
    said = jnp.einsum("snd,scdk->scnk", b, weights) + bias[:, :, None]
    right = np.asarray(said.argmax(-1) == both[None, :, test]).mean(-1)
    common = np.bincount(y[~test]).argmax()
    return Probed(right[:, 0], right[:, 1], float((y[test] == common).mean()), int(test.sum()), len(names))


def _logistic(x: Array, y: Array, alpha: Array, steps: int) -> tuple[Array, Array]:
    """Weights (sets, 2, d, k) and biases of the mean cross-entropy plus alpha |W|^2 / (2 n), by Adam at 0.05."""
    rule = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def fit(x, y):
        def loss(maps):
            nats = optax.softmax_cross_entropy(x @ maps[0] + maps[1], y).mean()
            return nats + alpha * (maps[0] ** 2).sum() / (2 * len(x))

        def step(carry, _):
            maps, state = carry
            change, state = rule.update(jax.grad(loss)(maps), state)
            return (optax.apply_updates(maps, change), state), None

        maps = jnp.zeros((x.shape[1], y.shape[1])), jnp.zeros(y.shape[1])
        return jax.lax.scan(step, (maps, rule.init(maps)), None, steps)[0][0]

    return jax.jit(jax.vmap(jax.vmap(fit, in_axes=(None, 0)), in_axes=(0, None)))(x, y)
