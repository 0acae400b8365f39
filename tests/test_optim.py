"""Optimisers, schedules and the training step against optax, NumPy and each other."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_model import random_params
from optax.contrib._muon import orthogonalize_via_newton_schulz

from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.data import Batch
from tinylm.model import Transformer, shapes
from tinylm.ops import orthogonalize
from tinylm.optim import Recipe, build, clipped, evaluated, groups, rate, scale_by_muon
from tinylm.presets import PRESETS, preset
from tinylm.step import State, compiled_loss, compiled_update
from tinylm.weights import bind, pure

CONFIG = ModelConfig(vocab=29, context=8, width=16, layers=2, heads=2, bias=True)
GRAPH = pure(Transformer(CONFIG))[0]
RECIPE = Recipe.of(TrainConfig(steps=1, optimizer="adamw", clip=0.5, eps=1e-6))


def fresh(seed=0):
    return {name: jnp.asarray(value) for name, value in random_params(shapes(CONFIG), seed).items()}


def state_of(recipe=RECIPE, seed=0):
    params = fresh(seed)
    return State(params, build(recipe).init(params), jnp.int32(0), jnp.bool_(False))


def batch_of(seed=0, rows=4, **changes):
    tokens = np.random.default_rng(seed).integers(0, 29, (rows, 9)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:])._replace(**changes)


def step(state, batch, recipe=RECIPE, learning_rate=0.01, graph=GRAPH, drops=False, seed=0):
    state, figures = compiled_update(graph, recipe, drops)(
        state, [batch], np.array([learning_rate], np.float32), np.uint32(seed)
    )
    return state, {name: values[0] for name, values in figures.items()}


def frozen(tree):
    """A copy of every leaf: the step reuses the old state's memory."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def furthest(a, b):
    return max(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max() for name in a)


# --- optimisers -------------------------------------------------------------------------------------------------------


def test_adamw_is_optax_adamw():
    params = fresh()
    recipe = dataclasses.replace(RECIPE, weight_decay=0.1)
    ours, theirs = (
        build(recipe),
        optax.adamw(
            0.02, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1, mask=jax.tree.map(lambda x: x.ndim >= 2, params)
        ),
    )
    a = b = params
    sa, sb = ours.init(a), theirs.init(b)

    @jax.jit
    def both(a, sa, b, sb, key):
        grads = {n: jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, (n, x) in enumerate(a.items())}
        ua, sa = ours.update(grads, sa, a, jnp.float32(0.02))
        ub, sb = theirs.update(grads, sb, b)
        return optax.apply_updates(a, ua), sa, optax.apply_updates(b, ub), sb

    for i in range(20):
        a, sa, b, sb = both(a, sa, b, sb, jax.random.key(i))
    assert furthest(a, b) < 1e-6
    assert furthest(a, params) > 0.1


def descend(rule, rate, steps=30):
    """Minimise sum((x - c)^2 * k) by a rule; the parameters and the state it ends in."""
    target = {"w": jnp.arange(12.0).reshape(3, 4) / 6, "b": jnp.array([1.0, -2.0])}
    params = {name: jnp.ones_like(x) for name, x in target.items()}
    state = rule.init(params)

    @jax.jit
    def one(params, state):
        grads = jax.tree.map(lambda p, t: 2 * (p - t) * (1 + t * t), params, target)
        change, state = rule.update(grads, state, params, jnp.float32(rate))
        return optax.apply_updates(params, change), state

    for _ in range(steps):
        params, state = one(params, state)
    return params, state


THEIRS = {
    "nadam": lambda lr: optax.nadamw(lr, 0.9, 0.95, 1e-6, weight_decay=0.1, mask=DECAYED),
    "radam": lambda lr: optax.chain(optax.scale_by_radam(0.9, 0.95, 1e-6), DECAY, optax.scale(-lr)),
    "amsgrad": lambda lr: optax.chain(optax.scale_by_amsgrad(0.9, 0.95, 1e-6), DECAY, optax.scale(-lr)),
    "adabelief": lambda lr: optax.chain(optax.scale_by_belief(0.9, 0.95, 1e-6), DECAY, optax.scale(-lr)),
    "yogi": lambda lr: optax.chain(optax.scale_by_yogi(0.9, 0.95, 1e-6), DECAY, optax.scale(-lr)),
    "lamb": lambda lr: optax.chain(
        optax.scale_by_adam(0.9, 0.95, 1e-6), optax.scale_by_trust_ratio(), DECAY, optax.scale(-lr)
    ),
    "lion": lambda lr: optax.lion(lr, 0.9, 0.95, weight_decay=0.1, mask=DECAYED),
    "adafactor": lambda lr: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), DECAY, optax.scale(-lr)
    ),
    "rmsprop": lambda lr: optax.chain(optax.rmsprop(1.0, 0.95, 1e-6), optax.scale(-1), DECAY, optax.scale(-lr)),
    "sgd": lambda lr: optax.chain(optax.sgd(1.0, 0.9, nesterov=True), optax.scale(-1), DECAY, optax.scale(-lr)),
}
DECAYED = {"w": True, "b": False}
DECAY = optax.add_decayed_weights(0.1, DECAYED)


@pytest.mark.parametrize("name", THEIRS)
def test_the_other_optimisers_are_optax(name):
    rate = 0.002 if name == "sgd" else 0.02
    theirs = optax.with_extra_args_support(THEIRS[name](rate))
    ours, _ = descend(build(dataclasses.replace(RECIPE, optimizer=name)), rate)
    expected, _ = descend(optax.GradientTransformation(theirs.init, lambda g, s, p, rate: theirs.update(g, s, p)), rate)
    assert furthest(ours, expected) < 1e-5
    assert furthest(ours, {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}) > 0.01


def test_schedule_free_is_optax():
    """Against optax.contrib's wrapper of Adam without momentum; its average is reached by another formula."""
    recipe = dataclasses.replace(RECIPE, optimizer="schedule_free", weight_decay=0.0)
    params, state = descend(build(recipe), 0.05)
    base = optax.chain(optax.scale_by_adam(0.0, 0.95, 1e-6), optax.scale(-0.05))
    theirs = optax.contrib.schedule_free(base, 0.05, b1=0.9)
    expected, their_state = descend(
        optax.GradientTransformation(theirs.init, lambda g, s, p, rate: theirs.update(g, s, p)), 0.05
    )
    assert furthest(params, expected) < 1e-5
    average = evaluated(params, state)
    assert furthest(average, optax.contrib.schedule_free_eval_params(their_state, expected)) < 1e-4
    assert furthest(average, params) > 1e-4


def test_schedule_free_without_a_rate_moves_nothing_and_decays_matrices_only():
    still, _ = descend(build(dataclasses.replace(RECIPE, optimizer="schedule_free")), 0.0, steps=3)
    assert furthest(still, {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}) == 0
    some, none = (
        descend(build(dataclasses.replace(RECIPE, optimizer="schedule_free", weight_decay=decay)), 0.05)[0]
        for decay in (0.1, 0.0)
    )
    assert furthest({"b": some["b"]}, {"b": none["b"]}) == 0
    assert furthest({"w": some["w"]}, {"w": none["w"]}) > 1e-3


def test_the_moving_average_in_closed_form():
    rule, plain = build(dataclasses.replace(RECIPE, ema=0.8)), build(RECIPE)
    average = {"w": np.ones((3, 4)), "b": np.ones(2)}
    for n in range(1, 6):
        params, _ = descend(plain, 0.05, n)
        average = {name: 0.8 * old + 0.2 * np.asarray(params[name]) for name, old in average.items()}
    trained, state = descend(rule, 0.05, 5)
    assert furthest(trained, params) == 0
    assert furthest(evaluated(trained, state), average) < 1e-6
    assert evaluated(params, plain.init(params)) is params


def test_rates_by_path():
    """The factor multiplies the step; 0 freezes; the last pattern that matches counts; a wrong one is refused."""
    base, _ = descend(build(RECIPE), 0.05, 1)
    half, _ = descend(build(dataclasses.replace(RECIPE, rates=(".*=0", "w=0.5"))), 0.05, 1)
    assert furthest({"b": half["b"]}, {"b": jnp.ones(2)}) == 0
    np.testing.assert_allclose(half["w"] - 1, 0.5 * (base["w"] - 1), rtol=1e-5)
    with pytest.raises(ConfigError, match="'embd' matches no parameter"):
        build(dataclasses.replace(RECIPE, rates=("embd=1",))).init({"w": jnp.ones((2, 2))})


MATRICES = [(6, 6), (16, 40), (40, 16), (1, 8)]


@pytest.mark.parametrize("shape", MATRICES)
def test_orthogonalize_is_nearly_optax_and_nearly_the_polar_factor(shape):
    stack = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    ours = np.asarray(orthogonalize(jnp.asarray(stack)))
    theirs = [orthogonalize_via_newton_schulz(jnp.asarray(x), jnp.array([3.4445, -4.7750, 2.0315])) for x in stack]
    assert np.linalg.norm(ours - np.stack(theirs)) < 0.05 * np.linalg.norm(ours)  # optax's factors are float32
    for x, y in zip(stack, ours, strict=True):
        u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        inner = u.T @ y @ vt.T  # in the basis of the singular vectors: nearly the identity
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.05
        pushed = np.diag(inner)[s / np.linalg.norm(s) > 0.01]  # smaller ones need more than five iterations
        assert pushed.min() > 0.6
        assert pushed.max() < 1.3


def test_muon_step_by_step():
    """Momentum, Nesterov and size in NumPy, five steps, matrices of two shapes among others of the same shape."""
    rng = np.random.default_rng(1)
    params = {name: jnp.zeros(s) for name, s in {"a": (8, 24), "b": (8, 24), "c": (24, 8), "d": (12, 12)}.items()}
    rule = scale_by_muon()
    state, momentum = rule.init(params), {name: np.zeros(x.shape) for name, x in params.items()}
    update = jax.jit(rule.update)
    for _ in range(5):
        grads = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in params.items()}
        ours, state = update(grads, state)
        for name, g in grads.items():
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            x = 0.95 * momentum[name] + 0.05 * g
            x = x / np.linalg.norm(x)
            x = x.T if x.shape[0] > x.shape[1] else x
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
            x = (x if x.shape == g.shape else x.T) * 0.2 * math.sqrt(max(g.shape))
            assert np.linalg.norm(ours[name] - x) < 0.08 * np.linalg.norm(x)  # ours rounds factors to bfloat16
            rms = np.sqrt(np.mean(np.asarray(ours[name]) ** 2))
            assert 0.2 * 0.7 < rms < 0.2 * 1.2  # an Adam step has about 0.2 to 0.4 (Liu et al. 2025)


@pytest.mark.parametrize("name", ["stories260K", "tinystories-1M", "bert-tiny"])
def test_groups_cover_every_parameter_once(name):
    params = shapes(preset(name))
    split = groups(params, dataclasses.replace(RECIPE, optimizer="muon"))
    assert split.keys() == params.keys()
    muon = {n for n, group in split.items() if group.rule == "muon"}
    assert {n for n, group in split.items() if not group.decayed} == {n for n, x in params.items() if len(x.shape) < 2}
    inside = {n for n in params if n.startswith("blocks.") and n.endswith("kernel")}
    assert muon == inside
    assert {group.rule for group in groups(params, RECIPE).values()} == {"adamw"}
    assert not any("embed" in n or "head" in n for n in muon)
    state = jax.eval_shape(build(dataclasses.replace(RECIPE, optimizer="muon")).init, params)
    held = sum(math.prod(x.shape) for x in jax.tree.leaves(state) if x.ndim)
    assert held == sum(math.prod(s.shape) * (1 if n in muon else 2) for n, s in params.items())
    assert name in PRESETS


def test_clip():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    norm = optax.tree.norm(grads)
    ours, theirs = clipped(grads, norm, 2.0), optax.clip_by_global_norm(2.0).update(grads, optax.EmptyState())[0]
    assert furthest(ours, theirs) < 1e-6
    assert clipped(grads, norm, 0.0) is grads
    assert furthest(clipped(grads, norm, 9.0), grads) == 0


# --- schedules --------------------------------------------------------------------------------------------------------


def scheduled(schedule, **settings):
    config = TrainConfig(steps=100, learning_rate=2.0, schedule=schedule, **{"warmup": 0, "final": 0.25, **settings})
    return lambda progress, step=1000: rate(config, step, progress)


def test_schedules_in_closed_form():
    for p in np.linspace(0, 1, 11):
        assert scheduled("constant")(p) == 2.0
        assert scheduled("linear")(p) == pytest.approx(2.0 - 1.5 * p)
        assert scheduled("cosine")(p) == pytest.approx(0.5 + 1.5 * math.cos(math.pi * p / 2) ** 2)
        assert scheduled("wsd", decay=0.2)(p) == pytest.approx(2.0 if p < 0.8 else 2.0 - 1.5 * (p - 0.8) / 0.2)
    assert scheduled("wsd", decay=0.0)(1.0) == 2.0
    assert scheduled("wsd", decay=1.0)(0.5) == pytest.approx(1.25)
    assert scheduled("cosine")(7.0) == scheduled("cosine")(1.0) == pytest.approx(0.5)
    assert scheduled("cosine")(-1.0) == 2.0
    theirs = optax.cosine_decay_schedule(2.0, 50, alpha=0.25)
    assert all(scheduled("cosine")(i / 50) == pytest.approx(float(theirs(i)), rel=1e-5) for i in range(0, 51, 5))


def test_warm_up_rises_linearly_to_the_peak():
    warm = scheduled("constant", warmup=4)
    assert [warm(0.0, i) for i in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@settings(deadline=None)
@given(
    st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 50),
    st.integers(2, 200),
)
def test_rate_rises_in_the_warm_up_and_never_after(schedule, final, decay, warmup, steps):
    config = TrainConfig(steps=steps, schedule=schedule, final=final, decay=decay, warmup=warmup)
    rates = [rate(config, i, i / steps) for i in range(steps + 1)]
    assert all(0 <= r <= config.learning_rate * (1 + 1e-12) for r in rates)
    after = rates[warmup:]
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(after))
    assert rates[0] > 0 or final == 0
    if warmup <= steps and decay:
        floor = config.learning_rate * (1 if schedule == "constant" else final)
        assert rates[-1] == pytest.approx(floor, abs=1e-12)


# --- the step ---------------------------------------------------------------------------------------------------------


def plain_steps(batches, learning_rate=0.01):
    """The step in plain optax, with none of the kit's code but the model."""
    params = fresh()
    rule = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(learning_rate, 0.9, 0.95, 1e-6, weight_decay=0.1, mask={n: x.ndim > 1 for n, x in params.items()}),
    )
    state, losses = rule.init(params), []

    @jax.jit
    def one(params, state, tokens, targets):
        def loss(p):
            logp = jax.nn.log_softmax(bind(GRAPH, p)(tokens))
            return -jnp.mean(jnp.take_along_axis(logp, targets[..., None], -1))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, optax.tree.norm(grads)

    for batch in batches:
        params, state, value, norm = one(params, state, batch.tokens, batch.targets)
        losses.append((float(value), float(norm)))
    return params, losses


@functools.cache
def reference(n=8):
    return plain_steps([batch_of(i) for i in range(n)])


def test_step_is_plain_optax():
    params, losses = reference()
    state = state_of()
    for i, (loss, norm) in enumerate(losses):
        state, figures = step(state, batch_of(i))
        assert float(figures["loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(figures["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert furthest(state.params, params) < 2e-5
    assert int(state.step) == 8
    assert not state.halted


def test_accumulation_is_one_batch():
    split = dataclasses.replace(RECIPE, accumulate=4)
    weights = np.random.default_rng(0).random((4, 8)).astype(np.float32)
    for changes in ({}, {"weights": weights}):
        one, first = step(state_of(), batch_of(**changes))
        four, second = step(state_of(split), batch_of(**changes), split)
        assert float(first["loss"]) == pytest.approx(float(second["loss"]), rel=1e-5)
        assert float(first["grad_norm"]) == pytest.approx(float(second["grad_norm"]), rel=1e-5)
        assert furthest(one.params, four.params) < 1e-5


def test_weights():
    """None is all ones; a position of weight 0 does not count, whatever its target; a double weight counts double."""
    loss = compiled_loss(GRAPH)
    ones = np.ones((4, 8), np.float32)
    plain, n = loss(fresh(), batch_of())
    assert float(loss(fresh(), batch_of(weights=ones))[0]) == pytest.approx(float(plain), rel=1e-6)
    assert float(n) == 32
    hidden = ones.copy()
    hidden[:, 3:] = 0
    batch = batch_of(weights=hidden)
    other = batch._replace(targets=np.where(hidden > 0, batch.targets, 0).astype(np.int32))
    assert float(loss(fresh(), batch)[0]) == float(loss(fresh(), other)[0])
    a, b = step(state_of(), batch)[0], step(state_of(), other)[0]
    assert same(frozen(a), frozen(b))
    short = batch_of()._replace(tokens=batch.tokens[:, :3], targets=batch.targets[:, :3])
    assert float(loss(fresh(), batch)[0]) == pytest.approx(float(loss(fresh(), short)[0]), rel=1e-5)
    assert float(loss(fresh(), batch_of(weights=2 * hidden))[1]) == 24
    state, figures = step(state_of(), batch_of(weights=0 * ones))  # an MLM batch that hides nothing
    assert float(figures["loss"]) == 0
    assert not state.halted


def test_bfloat16_step_is_near():
    recipe = dataclasses.replace(RECIPE, dtype="bfloat16")
    exact, half = state_of(), state_of(recipe)
    for i in range(4):
        exact, a = step(exact, batch_of(i))
        half, b = step(half, batch_of(i), recipe)
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=0.02)
        assert float(a["loss"]) != float(b["loss"])
    assert {x.dtype for x in jax.tree.leaves((half.params, half.opt))} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    moved = furthest(exact.params, fresh())
    assert furthest(exact.params, half.params) < 1.5 * moved


def test_muon_trains():
    recipe = dataclasses.replace(RECIPE, optimizer="muon")
    state, losses = state_of(recipe), []
    for _ in range(12):
        state, figures = step(state, batch_of(0), recipe)
        losses.append(float(figures["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_follows_seed_and_step():
    config = CONFIG.replace(dropout=0.2)
    graph = pure(Transformer(config))[0]
    go = lambda seed, start=0: float(  # noqa: E731
        step(state_of()._replace(step=jnp.int32(start)), batch_of(), graph=graph, drops=True, seed=seed)[1]["loss"]
    )
    assert go(0) == go(0)
    assert len({go(0), go(1), go(0, 1)}) == 3
    off = float(step(state_of(), batch_of(), graph=graph, drops=False)[1]["loss"])
    assert off == pytest.approx(float(step(state_of(), batch_of())[1]["loss"]), rel=1e-6)


@pytest.mark.parametrize("where", ["weights", "params"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("parts", [1, 4])
def test_not_finite_changes_nothing_then_or_later(where, value, parts):
    recipe = dataclasses.replace(RECIPE, accumulate=parts)
    state, at = state_of(recipe), 2
    for i in range(at):
        state, figures = step(state, batch_of(i), recipe)
        assert not figures["halted"]
    batch = batch_of(at, weights=np.ones((4, 8), np.float32))
    if where == "weights":
        batch.weights[2, 3] = value
    else:
        state.params["blocks.1.mlp.down.kernel"] = state.params["blocks.1.mlp.down.kernel"].at[0, 0].set(value)
    before = frozen((state.params, state.opt, state.step))
    for later in (batch, batch_of(5), batch_of(6)):
        state, figures = step(state, later, recipe)
        assert bool(figures["halted"])
        assert same(before, frozen((state.params, state.opt, state.step)))
    assert int(state.step) == at


def test_not_finite_at_random_steps():
    rng = np.random.default_rng(0)
    ones = np.ones((4, 8), np.float32)
    for at in rng.integers(0, 6, 4):
        state = state_of()
        for i in range(7):
            weights = ones * np.where(i == at, rng.choice([np.nan, -np.inf, 1e38]), 1.0).astype(np.float32)
            state, _ = step(state, batch_of(i, weights=weights))
        assert int(state.step) == at
        assert np.isfinite(np.concatenate([x.ravel() for x in frozen((state.params, state.opt))])).all()


def test_equal_recipes_share_the_compiled_step():
    again = pure(Transformer(CONFIG, rngs=9))[0]
    assert compiled_update(
        again, Recipe.of(TrainConfig(budget=9.0, optimizer="adamw", clip=0.5, eps=1e-6, learning_rate=1.0)), False
    ) is (compiled_update(GRAPH, RECIPE, False))
    update = compiled_update(GRAPH, RECIPE, False)
    before = update._cache_size()
    for i, speed in enumerate((0.1, 0.01)):
        step(state_of(seed=i), batch_of(i), learning_rate=speed, seed=i)
    assert update._cache_size() <= max(before, 1)
