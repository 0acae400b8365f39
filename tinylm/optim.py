"""Optimisers and schedules by name, and which parameters each of them moves.

The learning rate is kept out of the optimiser's state: the loop computes it on the host from the run's progress and
passes it in, so a wall-clock schedule needs no other machinery and a change of rate never compiles anything again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tinylm.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that are compiled into a training step; two runs with equal recipes share the compiled step."""

    optimizer: str
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    dtype: str
    accumulate: int

    @classmethod
    def of(cls, config: TrainConfig) -> Recipe:
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def rate(config: TrainConfig, step: int, progress: float) -> float:
    """Learning rate of a step.

    Args:
        config: `learning_rate`, `schedule`, `final`, `warmup`, `decay`.
        step: steps done before this one; the warm-up reaches its peak after `warmup` steps.
        progress: share of the run that is done, 0 to 1, by steps or by the clock.
    """
    progress = min(max(progress, 0.0), 1.0)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        # warm-up, stable, decay (MiniCPM, Hu et al. 2024)
        "wsd": min(1.0, (1.0 - progress) / config.decay) if config.decay else 1.0,
    }[config.schedule]
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.learning_rate * warm * (config.final + (1.0 - config.final) * shape)


def groups(params: Mapping[str, Any], optimizer: str) -> dict[str, str]:
    """Parameter name -> the rule that moves it: "muon" for the matrices inside the blocks, "adamw" for all else.

    Embeddings and heads stay with AdamW because their rows are independent of each other, and Muon's orthogonal step
    would couple them (Jordan et al. 2024).
    """
    inside = lambda name, x: name.startswith("blocks.") and jnp.ndim(x) == 2  # noqa: E731
    return {name: "muon" if optimizer == "muon" and inside(name, x) else "adamw" for name, x in params.items()}


def build(recipe: Recipe) -> optax.GradientTransformation:
    """The update rule, without the learning rate: `params - rate * update`.

    AdamW (Loshchilov and Hutter 2019): decay is decoupled, on matrices and embeddings only. Muon (Jordan et al. 2024):
    momentum 0.95, Nesterov, five Newton-Schulz steps; its update is scaled to the root mean square an Adam step has,
    0.2 sqrt(larger side), so one learning rate serves both groups (Liu et al. 2025, section 2.2).
    """
    adam = optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.eps)
    rules = optax.partition({"adamw": adam, "muon": scale_by_muon()}, lambda params: groups(params, recipe.optimizer))
    decayed = lambda params: {name: jnp.ndim(x) >= 2 for name, x in params.items()}  # noqa: E731
    return optax.chain(rules, optax.add_decayed_weights(recipe.weight_decay, decayed))


class MuonState(NamedTuple):
    """Momentum of every matrix."""

    momentum: Any


def scale_by_muon(beta: float = 0.95) -> optax.GradientTransformation:
    """Muon's update for a tree of matrices, scaled to an Adam step's size: 0.2 sqrt(larger side) * orthogonalised.

    optax has the same rule, which fails inside `optax.partition` and iterates matrix by matrix; here matrices of one
    shape go through Newton-Schulz stacked. A test holds the two together.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)
        leaves, shape = jax.tree.flatten(nesterov)
        stacks: dict[tuple[int, ...], list[int]] = {}
        for i, leaf in enumerate(leaves):
            stacks.setdefault(leaf.shape, []).append(i)
        for size, members in stacks.items():
            done = orthogonalize(jnp.stack([leaves[i] for i in members])) * (0.2 * max(size) ** 0.5)
            for k, i in enumerate(members):
                leaves[i] = done[k]
        return jax.tree.unflatten(shape, leaves), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: Float[Array, "n rows cols"]) -> Float[Array, "n rows cols"]:
    """Every singular value pushed towards 1 by five quintic Newton-Schulz steps (Jordan et al. 2024)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def clipped(grads: Any, norm: jax.Array, largest: float) -> Any:
    """Gradients scaled down to a global norm of at most `largest`; 0 leaves them."""
    if not largest:
        return grads
    factor = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor, grads)
