"""Optimisers and schedules by name, and which parameters each of them moves.

The learning rate is kept out of the optimiser's state: the loop computes it on the host from the run's progress and
passes it in, so a wall-clock schedule needs no other machinery and a change of rate never compiles anything again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tinylm import ops
from tinylm.config import ConfigError, TrainConfig, path_rate


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that are compiled into a training step; two runs with equal recipes share the compiled step."""

    optimizer: str
    beta1: float | jax.Array  # arrays in a population whose members differ in it
    beta2: float | jax.Array
    eps: float | jax.Array
    weight_decay: float | jax.Array
    clip: float
    dtype: str
    accumulate: int
    z_loss: float = 0.0
    ema: float = 0.0
    rates: tuple[str, ...] = ()
    native: bool = True
    memory_decay: float = 1e-3

    @classmethod
    def of(cls, config: TrainConfig) -> Recipe:
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def rate(config: TrainConfig, step: int, progress: float) -> float:
    """Learning rate of a step.

    Args:
        config: `learning_rate`, `schedule`, `final`, `warmup`, `decay`, `stairs`.
        step: steps done before this one; the warm-up reaches its peak after `warmup` steps.
        progress: share of the run that is done, 0 to 1, by steps or by the clock.
    """
    progress = min(max(progress, 0.0), 1.0)
    if config.stairs and step:  # as at the first step of the stair
        progress, step = progress * (step - step % config.stairs) / step, step - step % config.stairs
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        # warm-up, stable, decay (MiniCPM, Hu et al. 2024)
        "wsd": min(1.0, (1.0 - progress) / config.decay) if config.decay else 1.0,
    }[config.schedule]
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.learning_rate * warm * (config.final + (1.0 - config.final) * shape)


class Group(NamedTuple):
    """How a parameter is moved: by which rule, at which multiple of the learning rate, decayed or not."""

    rule: str
    factor: float
    decayed: bool


def groups(params: Mapping[str, Any], recipe: Recipe) -> dict[str, Group]:
    """Parameter name -> its group; every parameter has one.

    Muon moves the matrices inside the blocks; embeddings and heads stay with AdamW, because their rows are independent
    of each other and Muon's orthogonal step would couple them (Jordan et al. 2024). Matrices and embeddings are
    decayed; norms, biases and codebooks are not. Memories (arrays of a `bank`, a block per row) are moved by
    `scale_by_lazy_adam`, whatever the optimiser. `recipe.rates` holds "PATTERN=FACTOR" for whole names; the last that
    matches counts.

    Raises:
        ConfigError: a pattern of `rates` matches no parameter, or a memory and an optimiser that moves every row.
    """
    factors = dict.fromkeys(params, 1.0)
    for pattern, factor in map(path_rate, recipe.rates):
        matched = [name for name in params if pattern.fullmatch(name)]
        if not matched:
            known = ", ".join(list(params)[:4])
            raise ConfigError(f"TrainConfig.rates: {pattern.pattern!r} matches no parameter; they are {known}, ...")
        factors |= dict.fromkeys(matched, factor)
    muon = lambda name, x: recipe.optimizer == "muon" and name.startswith("blocks.") and jnp.ndim(x) == 2  # noqa: E731
    other = "adamw" if recipe.optimizer == "muon" else recipe.optimizer
    found = {
        name: Group("muon" if muon(name, x) else other, factors[name], jnp.ndim(x) >= 2 and not name.endswith(".book"))
        for name, x in params.items()
    }
    lazy = [name for name in params if in_bank(name)]
    if lazy and recipe.optimizer == "schedule_free":
        raise ConfigError(f"schedule_free moves every row of {lazy[0]}, fetched or not: take another optimizer")
    return found | {name: Group("lazy", factors[name], False) for name in lazy}


def in_bank(name: str) -> bool:
    """Whether a parameter's name is that of memories, `<module>.bank.<level>`."""
    return name.split(".")[-2:-1] == ["bank"]


class Rule(NamedTuple):
    """An optimiser: `init(params) -> state`, and `update(grads, state, params, rate) -> (what to add, state)`.

    A state with a field `average` holds other weights to evaluate and to keep than the ones that are trained.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]


def evaluated(params: dict[str, Any], opt: Any) -> dict[str, Any]:
    """The weights to validate, hand out and load: an average of the trained ones, where the optimiser keeps one."""
    return {**params, **opt.average} if hasattr(opt, "average") else params


def build(recipe: Recipe) -> Rule:
    """The update rule of a recipe.

    AdamW (Loshchilov and Hutter 2019): decay is decoupled, on matrices and embeddings only. Muon (Jordan et al. 2024):
    momentum 0.95, Nesterov, five Newton-Schulz steps; its update is scaled to the root mean square an Adam step has,
    0.2 sqrt(larger side), so one learning rate serves both groups (Liu et al. 2025, section 2.2).
    """
    if recipe.optimizer == "schedule_free":
        rule = schedule_free(recipe)
    else:
        wanted = ("adamw", "lazy", recipe.optimizer)
        made: dict[Hashable, Any] = {name: make(recipe) for name, make in DIRECTIONS.items() if name in wanted}
        label = lambda params: {name: group.rule for name, group in groups(params, recipe).items()}  # noqa: E731
        decayed = lambda params: {name: group.decayed for name, group in groups(params, recipe).items()}  # noqa: E731
        chain: Any = optax.chain(optax.partition(made, label), optax.add_decayed_weights(recipe.weight_decay, decayed))

        def update(grads: Any, state: Any, params: Any, rate: jax.Array) -> tuple[Any, Any]:
            direction, state = chain.update(grads, state, params)
            return scaled(direction, -rate, groups(params, recipe)), state

        rule = Rule(chain.init, update)
    return averaged(rule, recipe.ema) if recipe.ema else rule


def scaled(direction: dict[str, Any], rate: jax.Array, by: Mapping[str, Group]) -> dict[str, Any]:
    """Every array times the rate and its group's factor; a factor of 1 costs nothing and changes no bit."""
    return {name: (rate if by[name].factor == 1 else rate * by[name].factor) * x for name, x in direction.items()}


DIRECTIONS: dict[str, Callable[[Recipe], optax.GradientTransformation]] = {
    "adamw": lambda r: optax.scale_by_adam(r.beta1, r.beta2, r.eps),
    "muon": lambda r: scale_by_muon(),
    "nadam": lambda r: optax.scale_by_adam(r.beta1, r.beta2, r.eps, nesterov=True),
    "radam": lambda r: optax.scale_by_radam(r.beta1, r.beta2, r.eps),
    "amsgrad": lambda r: optax.scale_by_amsgrad(r.beta1, r.beta2, r.eps),
    "adabelief": lambda r: optax.scale_by_belief(r.beta1, r.beta2, r.eps),
    "yogi": lambda r: optax.scale_by_yogi(r.beta1, r.beta2, r.eps),
    "lamb": lambda r: optax.chain(optax.scale_by_adam(r.beta1, r.beta2, r.eps), optax.scale_by_trust_ratio()),
    "lion": lambda r: optax.scale_by_lion(r.beta1, r.beta2),
    "adafactor": lambda r: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    "rmsprop": lambda r: optax.scale_by_rms(r.beta2, r.eps),
    "sgd": lambda r: optax.trace(r.beta1, nesterov=True),
    "lazy": lambda r: scale_by_lazy_adam(r.beta1, r.beta2, r.eps, r.memory_decay),
}
"""What an optimiser does to a gradient before the learning rate; all but Muon and lazy Adam are optax's, with its
defaults."""


class LazyState(NamedTuple):
    """Of every array of rows: in how many steps each row had a gradient, and both moments."""

    count: Any
    mean: Any
    square: Any


def scale_by_lazy_adam(b1: Any, b2: Any, eps: Any, decay: Any) -> optax.GradientTransformation:
    """AdamW row by row: a row whose gradient is exactly zero was not fetched, and keeps its value and moments.

    Its bias is corrected by the row's own count of steps. Dense Adam would go on moving rows by old momentum, and decay
    what no document asked for. The decay is decoupled, and acts in the steps that fetch a row.
    """

    def init(params: Any) -> LazyState:
        counts = jax.tree.map(lambda p: jnp.zeros(p.shape[:1], jnp.float32), params)
        return LazyState(counts, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: LazyState, params: Any) -> tuple[Any, LazyState]:
        def one(g: Array, p: Array, count: Array, mean: Array, square: Array) -> tuple[Array, Array, Array, Array]:
            fetched = (g != 0).any(axis=1)
            count = count + fetched
            new_mean, new_square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g * g
            age = jnp.maximum(count, 1)[:, None]
            step = new_mean / (1 - b1**age) / (jnp.sqrt(new_square / (1 - b2**age)) + eps) + decay * p
            keep = lambda new, old: jnp.where(fetched[:, None], new, old)  # noqa: E731
            return keep(step, jnp.zeros_like(p)), count, keep(new_mean, mean), keep(new_square, square)

        leaves, shape = jax.tree.flatten(grads)
        if not leaves:  # a model without memories
            return grads, state
        parts = [one(*of) for of in zip(leaves, *map(jax.tree.leaves, (params, *state)), strict=True)]
        direction, *rest = (jax.tree.unflatten(shape, part) for part in zip(*parts, strict=True))
        return direction, LazyState(*rest)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


class ScheduleFreeState(NamedTuple):
    """Defazio et al. 2024: the sequence `fast` (z there), its `average` (x), the second moments, and two counters."""

    fast: Any
    average: Any
    square: Any
    weight: jax.Array
    count: jax.Array


def schedule_free(recipe: Recipe) -> Rule:
    """Schedule-free AdamW (Defazio et al. 2024, algorithm 1): no schedule but a warm-up, and an average to evaluate.

    Gradients are taken at y = (1 - beta1) z + beta1 x, which are the trained weights; z moves as Adam without momentum;
    x averages z with weights rate^2. Decay acts at y.
    """
    b1, b2 = recipe.beta1, recipe.beta2

    def init(params: Any) -> ScheduleFreeState:
        copies = jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, params)  # three buffers, for donation
        return ScheduleFreeState(*copies, jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.int32(0))

    def update(grads: Any, state: ScheduleFreeState, params: Any, rate: jax.Array) -> tuple[Any, ScheduleFreeState]:
        by, count = groups(params, recipe), state.count + 1
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, grads)
        seen = 1 - b2**count
        direction = jax.tree.map(lambda g, v: g / (jnp.sqrt(v / seen) + recipe.eps), grads, square)
        decay = {name: recipe.weight_decay if group.decayed else 0.0 for name, group in by.items()}
        direction = {name: d + decay[name] * params[name] for name, d in direction.items()}
        fast = jax.tree.map(jnp.add, state.fast, scaled(direction, -rate, by))
        weight = state.weight + rate**2
        share = jnp.where(weight > 0, rate**2 / jnp.maximum(weight, 1e-30), 1.0)
        average = jax.tree.map(lambda x, z: (1 - share) * x + share * z, state.average, fast)
        change = jax.tree.map(lambda z, x, y: (1 - b1) * z + b1 * x - y, fast, average, params)
        return change, ScheduleFreeState(fast, average, square, weight, count)

    return Rule(init, update)


class Averaged(NamedTuple):
    """The state of a rule, and an exponential moving average of the weights."""

    inner: Any
    average: Any


def averaged(rule: Rule, decay: float) -> Rule:
    """`rule`, with an exponential moving average of the weights beside it, which starts at the initial weights."""

    def init(params: Any) -> Averaged:
        return Averaged(rule.init(params), jax.tree.map(jnp.copy, params))

    def update(grads: Any, state: Averaged, params: Any, rate: jax.Array) -> tuple[Any, Averaged]:
        change, inner = rule.update(grads, state.inner, params, rate)
        average = jax.tree.map(lambda a, p, u: decay * a + (1 - decay) * (p + u), state.average, params, change)
        return change, Averaged(inner, average)

    return Rule(init, update)


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
            done = ops.orthogonalize(jnp.stack([leaves[i] for i in members])) * (0.2 * max(size) ** 0.5)
            for k, i in enumerate(members):
                leaves[i] = done[k]
        return jax.tree.unflatten(shape, leaves), MuonState(momentum)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def clipped(grads: Any, norm: jax.Array, largest: float) -> Any:
    """Gradients scaled down to a global norm of at most `largest`; 0 leaves them."""
    if not largest:
        return grads
    factor = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor, grads)
