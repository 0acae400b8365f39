"""Native operations against float64 NumPy and against their plain JAX twins, under every transformation."""

import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS
from numpy_model import random_params

from tinylm import ops
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Batch
from tinylm.model import Transformer, shapes
from tinylm.optim import Recipe, build
from tinylm.quantization import quantize
from tinylm.step import State, compiled_update, compiled_updates
from tinylm.weights import assign, pure

pytestmark = pytest.mark.skipif(not ops.kernels(), reason="the extension is not built, or has no kernels for this CPU")

PRECISION = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest value; a bfloat16 has 8 bits


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(ops, "WORTHWHILE", 0)
    monkeypatch.setattr(ops, "FEWEST", 0)


def drawn(shape, dtype="float32", seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(x):
    return np.asarray(x, np.float64)


def near(found, expected, dtype):
    assert found.shape == expected.shape
    largest = max(float(np.abs(expected).max(initial=0)), 0.1)
    assert float(np.abs(exact(found) - expected).max(initial=0)) <= PRECISION[dtype] * largest


def with_slopes(f, *arrays, towards):
    """f's value and its gradients, compiled, for the cotangents `towards`."""
    value, back = jax.jit(lambda *a: jax.vjp(f, *a))(*arrays)
    return value, back(towards)


def is_native(f, *arrays):
    return "tinylm_" in jax.jit(f).lower(*arrays).as_text()


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 1, [1]),
        (37, 65, [1, 17, 33]),
        (100, 7, [50]),
        (130, 512, [96, 40]),
        (300, 48, [200]),
        (0, 5, [3]),
        (1101, 40, [70, 5]),
    ],
)
@pytest.mark.parametrize("stored", PRECISION)
def test_linear_in_float64(rows, inputs, outputs, dtype, stored):
    x = drawn((rows, inputs), dtype)
    weights = [drawn((inputs, n), stored, n) for n in outputs]
    dy = tuple(drawn((rows, n), dtype, n + 1) for n in outputs)
    f = lambda x, *w: ops.linear(x, *w)  # noqa: E731
    y, (dx, *dw) = with_slopes(f, x, *weights, towards=dy)
    assert is_native(f, x, *weights)
    rounded = [exact(w.astype(dtype)) for w in weights]
    near(dx, sum((exact(d) @ w.T for d, w in zip(dy, rounded, strict=True)), np.zeros(x.shape)), dtype)
    for found, w, slope, d in zip(y, rounded, dw, dy, strict=True):
        near(found, exact(x) @ w, dtype)
        near(slope, exact(x).T @ exact(d), stored)
        assert (found.dtype, slope.dtype) == (dtype, stored)


def test_linear_of_any_rank():
    x, w = drawn((2, 3, 5, 16)), drawn((16, 8), seed=1)
    np.testing.assert_allclose(ops.linear(x, w)[0], np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-5)


def test_numbers_that_are_none_stay_where_they_are():
    x = drawn((40, 20)).at[3, 4].set(jnp.nan).at[7, 1].set(jnp.inf)
    y = np.asarray(ops.linear(x, drawn((20, 30), seed=1))[0])
    assert np.isnan(y[3]).all()
    assert np.isinf(y[7]).all()
    assert np.isfinite(np.delete(y, [3, 7], 0)).all()


# --- rotary positions, and SwiGLU ---


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(
    ("shape", "turned", "tables"), [((2, 5, 3, 12), 12, 1), ((3, 40, 2, 70), 68, 3), ((1, 1, 1, 4), 2, 1)]
)
def test_rotate_in_float64(shape, turned, tables, dtype):
    x, dy = drawn(shape, dtype), drawn(shape, dtype, seed=1)
    angle = np.random.default_rng(2).standard_normal((tables, shape[1], turned // 2))
    turn = lambda x: ops.rotate(x, np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32))  # noqa: E731
    assert is_native(turn, x)
    y, (dx,) = with_slopes(turn, x, towards=dy)

    def expected(x, angle):
        a, b = exact(x)[..., : turned // 2], exact(x)[..., turned // 2 : turned]
        z = (a + 1j * b) * np.exp(1j * angle[:, :, None])
        return np.concatenate([z.real, z.imag, exact(x)[..., turned:]], axis=-1)

    near(y, expected(x, angle), dtype)
    near(dx, expected(dy, -angle), dtype)
    members = jax.vmap(turn)(jnp.stack([x, dy]))
    np.testing.assert_array_equal(members[1], turn(dy))


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("shape", [(3, 7), (2, 130, 300), (1, 1)])
def test_swiglu_in_float64(shape, dtype):
    gate, up, dy = (drawn(shape, dtype, seed, 3.0) for seed in range(3))
    assert is_native(ops.swiglu, gate, up)
    y, (dgate, dup) = with_slopes(ops.swiglu, gate, up, towards=dy)
    g, u, d = map(exact, (gate, up, dy))
    s = 1 / (1 + np.exp(-g))
    near(y, g * s * u, dtype)
    near(dgate, d * u * s * (1 + g * (1 - s)), dtype)
    near(dup, d * g * s, dtype)


def test_swiglu_of_large_numbers_and_of_none():
    gate = jnp.array([[-1e38, -100.0, 100.0, 1e30, jnp.nan, jnp.inf]])
    y, (dgate, dup) = with_slopes(ops.swiglu, gate, jnp.ones_like(gate), towards=jnp.ones_like(gate))
    np.testing.assert_allclose(y[0, 1:4], [0, 100, 1e30], atol=1e-30)
    assert abs(float(y[0, 0])) < 1e-6
    np.testing.assert_allclose(dgate[0, :4], [0, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(dup[0, 1:4], [0, 100, 1e30], atol=1e-30)
    assert not np.isfinite(np.asarray([y[0, 4], y[0, 5], dgate[0, 4]])).any()


# --- Muon's step ---


def orthogonalized(x):
    """The published iteration on one matrix in float64, factors of products rounded to bfloat16."""
    product = lambda a, b: exact(jnp.asarray(a, "bfloat16")) @ exact(jnp.asarray(b, "bfloat16"))  # noqa: E731
    if x.shape[0] > x.shape[1]:
        return orthogonalized(x.T).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = product(x, x.T)
        x = 3.4445 * x + product(-4.7750 * square + 2.0315 * product(square, square), x)
    return x


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 16, 40), (4, 40, 16), (1, 1, 8), (1, 96, 250), (5, 131, 97)])
def test_orthogonalize_in_float64(shape):
    stack = drawn(shape)
    expected = np.stack([orthogonalized(exact(x)) for x in stack])
    assert is_native(ops.orthogonalize, stack)
    with ops.plain():
        plain = jax.jit(ops.orthogonalize)(stack)
    most = 1e-3 if min(shape[1:]) < 8 else 0.02  # a sum that ends beside a step of bfloat16 may round either way
    for found in (jax.jit(ops.orthogonalize)(stack), plain):
        assert np.linalg.norm(exact(found) - expected) < most * np.linalg.norm(expected)
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(ops.orthogonalize))(stack[None])[0], jax.jit(ops.orthogonalize)(stack)
    )


def test_orthogonalize_without_numbers():
    assert not np.isfinite(ops.orthogonalize(jnp.full((1, 4, 4), jnp.nan))).any()
    np.testing.assert_array_equal(ops.orthogonalize(jnp.zeros((2, 4, 6))), np.zeros((2, 4, 6)))


# --- int8 ---


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 7, 3), (40, 100, 130), (3, 64, 64), (17, 33, 80)])
def test_int8_product_is_exact_and_as_the_twin(shape):
    rows, inputs, outputs = shape
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (inputs, outputs)).astype(np.int8)
    scales = rng.uniform(0.01, 0.1, outputs).astype(np.float32)
    x = np.array(drawn((2, rows, inputs)))
    x[0, 0] = 0  # a row without a largest magnitude
    most = np.abs(x).max(-1, keepdims=True)
    rounded = np.rint(np.divide(127 * x, most, where=most > 0, out=np.zeros_like(x)))
    expected = (rounded.astype(np.int64) @ codes.astype(np.int64)) * (most / 127.0) * scales
    assert is_native(ops.int8_product, x, codes, scales)
    found = jax.jit(ops.int8_product)(x, codes, scales)
    with ops.plain():
        twin = jax.jit(ops.int8_product)(x, codes, scales)
    # One value that rounds the other way, where 127 x / most ends in a half, would be off by a step.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(twin, expected, rtol=2e-6, atol=1e-6)
    members = jax.jit(jax.vmap(ops.int8_product))(x, np.stack([codes] * 2), np.stack([scales] * 2))
    np.testing.assert_array_equal(members, found)


def test_int8_product_passes_gradients_straight_through():
    codes, scales = np.array([[3, -4], [100, 1], [0, -128]], np.int8), np.float32([0.5, 0.25])
    slope = jax.jit(jax.grad(lambda x: ops.int8_product(x, codes, scales).sum()))(np.ones((2, 3), np.float32))
    np.testing.assert_allclose(slope, np.tile((codes * scales).sum(1), (2, 1)))


def test_a_quantized_model_runs_on_integers():
    """Equal to rounding floats, and to the exported file in the engine."""
    model, batch = model_and_batch()
    rounded = quantize(model, bits=8, activations="int8").model
    with ops.plain():
        plain = np.asarray(rounded(batch.tokens))
    text = str(jax.make_jaxpr(lambda t: rounded(t))(batch.tokens))
    assert "tinylm_int8_product" in text
    np.testing.assert_allclose(rounded(batch.tokens), plain, rtol=1e-4, atol=1e-4)


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_in_float64(x, table, targets, weights, z_loss):
    logits = x @ table.T
    lse = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    plain = lse - logits[np.arange(len(x)), targets]
    slopes = np.exp(logits - lse[:, None]) * (weights * (1 + 2 * z_loss * lse))[:, None]
    slopes[np.arange(len(x)), targets] -= weights
    return ((plain + z_loss * lse**2) * weights).sum(), (plain * weights).sum(), slopes @ table, slopes.T @ x


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "z_loss"), [(37, 65, 301, 1e-2), (1, 16, 2, 0.0), (530, 24, 67, 0.0)]
)
def test_nats_in_float64(rows, width, vocab, z_loss, tied, dtype):
    x, table = drawn((rows, width), dtype), drawn((vocab, width), dtype, 1, 0.3)
    rng = np.random.default_rng(2)
    targets = jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)
    weights = jnp.asarray(rng.random(rows) * (rng.random(rows) < 0.8), jnp.float32)
    f = lambda x, table: ops.nats(x, table, targets, weights, z_loss, tied)  # noqa: E731
    given = table if tied else table.T
    (total, plain), (dx, dtable) = with_slopes(f, x, given, towards=(jnp.float32(2), jnp.float32(0)))
    expected = loss_in_float64(exact(x), exact(table), np.asarray(targets), exact(weights), z_loss)
    assert is_native(f, x, given)
    assert float(total) == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    assert float(plain) == pytest.approx(expected[1], rel=1e-6, abs=1e-6)
    assert [float(y) for y in f(x, given)] == [float(total), float(plain)]
    near(dx, 2 * expected[2], dtype)
    near(dtable, 2 * (expected[3] if tied else expected[3].T), dtype)
    with ops.plain():
        np.testing.assert_allclose(f(x, given), expected[:2], rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-6)


def test_targets_that_are_none():
    x, table, weights = drawn((3, 8)), drawn((5, 8), seed=1), jnp.ones(3)
    at = lambda *targets: float(ops.nats(x, table, jnp.array(targets), weights)[0])  # noqa: E731
    assert at(0, -1, 2) == at(0, 4, 2)  # as indices of jax.numpy
    assert np.isnan(at(0, 5, 2))
    assert np.isnan(at(-6, 0, 2))


# --- attention --------------------------------------------------------------------------------------------------------


def attention_in_float64(q, k, v, dout, segments, sight):
    b, t, heads, e = q.shape
    group = heads // k.shape[2]
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    far = np.arange(t)[:, None] - np.arange(t)[None]
    seen = ((far >= 0) | (not sight.causal)) & ((abs(far) < sight.window) | (not sight.window))
    seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = np.where(seen, np.einsum("bthe,bshe->bhts", q, keys) * sight.scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = np.einsum("bthe,bshe->bhts", dout, values)
    slopes = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * sight.scale
    fold = lambda x: x.reshape(b, t, -1, group, e).sum(3)  # noqa: E731
    dk, dv = np.einsum("bhts,bthe->bshe", slopes, q), np.einsum("bhts,bthe->bshe", weights, dout)
    return (
        np.einsum("bhts,bshe->bthe", weights, values),
        (np.einsum("bhts,bshe->bthe", slopes, keys), fold(dk), fold(dv)),
    )


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(
    ("shape", "kv_heads", "sight", "segmented"),
    [
        ((2, 100, 4, 32), 2, (True, 0), True),
        ((2, 77, 4, 17), 1, (False, 0), False),
        ((1, 300, 2, 64), 2, (True, 33), False),
        ((1, 130, 2, 128), 2, (False, 40), True),
        ((2, 57, 1, 80), 1, (True, 5), True),
        ((3, 1, 2, 16), 2, (True, 0), False),
        ((1, 15, 2, 8), 2, (True, 1), False),
        ((1, 257, 3, 48), 3, (True, 0), False),
    ],
)
def test_attention_in_float64(shape, kv_heads, sight, segmented, dtype):
    b, t, _, e = shape
    q, dout = drawn(shape, dtype), drawn(shape, dtype, 1)
    k, v = (drawn((b, t, kv_heads, e), dtype, seed) for seed in (2, 3))
    segments = np.random.default_rng(4).integers(0, 2, (b, t)).astype(np.int32) if segmented else None
    sight = ops.Sight(*sight, 0.7 * e**-0.5)
    f = lambda q, k, v: ops.attention(q, k, v, segments, sight)  # noqa: E731
    ruled = np.zeros((b, t), np.int32) if segments is None else segments
    out, slopes = attention_in_float64(*map(exact, (q, k, v, dout)), ruled, sight)
    found, found_slopes = with_slopes(f, q, k, v, towards=dout)
    assert is_native(f, q, k, v)
    near(found, out, dtype)
    for a, expected in zip(found_slopes, slopes, strict=True):
        near(a, expected, dtype)
    with ops.plain():
        assert not is_native(f, q, k, v)
        near(f(q, k, v), out, dtype)


def test_large_scores_and_numbers_that_are_none():
    q = drawn((1, 40, 1, 16), scale=60)
    out = ops.attention(q, q, q, None, ops.Sight(True, 0, 1.0))  # every position sees itself alone
    np.testing.assert_allclose(out, q, rtol=1e-5)
    v = q.at[0, 20, 0, 0].set(jnp.nan)
    out = np.asarray(ops.attention(q, q, v, None, ops.Sight(True, 0, 1.0)))
    assert np.isnan(out[0, 20:, 0, 0]).all()  # and perhaps before: nothing times NaN is NaN, in plain JAX too
    assert np.isfinite(out[..., 1:]).all()


# --- transformations --------------------------------------------------------------------------------------------------


def model_and_batch(dtype="float32", **settings):
    settings = {"vocab": 203, "width": 48, "layers": 2, "heads": 3, "context": 40} | settings
    model = Transformer(ModelConfig(**settings))
    assign(model, random_params(shapes(model.config)))
    tokens = np.random.default_rng(0).integers(0, 203, (4, 41)).astype(np.int32)
    return model, Batch(tokens[:, :-1], tokens[:, 1:])


def trained(model, batch, steps=3, **settings):
    """Losses of a few steps, and the weights after them."""
    graph, params = pure(model)
    recipe = Recipe.of(TrainConfig(**{"steps": 1, "optimizer": "sgd", "batch": 4} | settings))
    params = jax.tree.map(jnp.copy, params)
    state = State(params, build(recipe).init(params), jnp.int32(0), jnp.bool_(False))
    update = compiled_update(graph, recipe, False)
    rates = np.full(steps, 0.1, np.float32)
    assert ("tinylm_" in update.lower(state, [batch] * steps, rates, np.uint32(0)).as_text()) == recipe.native
    state, figures = update(state, [batch] * steps, rates, np.uint32(0))
    return np.asarray(figures["loss"]), state.params


MODELS = [{}, {"kv_heads": 1, "window": (0, 8)}, {"head": "untied", "bias": True, "mlp": "gelu"}, {"softcap": 5.0}]


@pytest.mark.parametrize("settings", MODELS, ids=str)
def test_training_is_plain_training(settings):
    model, batch = model_and_batch(**settings)
    (fast, fast_params), (slow, slow_params) = (trained(model, batch, native=native) for native in (True, False))
    np.testing.assert_allclose(fast, slow, rtol=1e-5)
    for name, x in slow_params.items():
        np.testing.assert_allclose(fast_params[name], x, atol=1e-5 * max(1.0, float(jnp.abs(x).max())))


def test_training_with_muon():
    """Plain where it is asked to be; and nearly the same, since both round factors to bfloat16."""
    model, batch = model_and_batch()
    (fast, after), (slow, plainly) = (trained(model, batch, 1, native=n, optimizer="muon") for n in (True, False))
    np.testing.assert_allclose(fast, slow, rtol=2e-3)
    for name, x in pure(model)[1].items():
        moved = np.linalg.norm(exact(plainly[name]) - exact(x))
        assert np.linalg.norm(exact(after[name]) - exact(plainly[name])) < 0.05 * moved


@pytest.mark.parametrize("settings", MODELS[:3], ids=str)
def test_training_in_bfloat16(settings):
    model, batch = model_and_batch(**settings)
    exactly, _ = trained(model, batch, native=False)
    fast, _ = trained(model, batch, dtype="bfloat16")
    slow, _ = trained(model, batch, dtype="bfloat16", native=False)
    assert np.abs(fast - exactly).max() <= 1.5 * np.abs(slow - exactly).max() + 2e-3


def test_members_of_a_population_are_models_alone():
    model, batch = model_and_batch()
    graph, params = pure(model)
    recipe = Recipe.of(TrainConfig(steps=1, optimizer="sgd", batch=4))
    stacked = {name: jnp.stack([x, 1.5 * x, 0.5 * x]) for name, x in params.items()}
    state = State(stacked, jax.vmap(build(recipe).init)(stacked), jnp.zeros(3, jnp.int32), jnp.zeros(3, bool))
    batches = [Batch(np.stack([batch.tokens] * 3), np.stack([batch.targets] * 3))]
    rates, seeds = np.full((1, 3), 0.1, np.float32), np.zeros(3, np.uint32)
    after, figures = compiled_updates(graph, recipe, False)(state, batches, rates, seeds, {})
    for i, factor in enumerate((1.0, 1.5, 0.5)):
        assign(model, {name: factor * x for name, x in params.items()})
        loss, alone = trained(model, batch, steps=1)
        assert float(figures["loss"][0, i]) == pytest.approx(float(loss[0]), rel=1e-6)
        for name, x in alone.items():
            np.testing.assert_allclose(after.params[name][i], x, atol=2e-6)


def test_checkpoint_and_scan():
    x, w = drawn((30, 16)), drawn((4, 16, 16), seed=1, scale=0.3)
    step = lambda x, w: (jnp.tanh(ops.linear(x, w)[0]), None)  # noqa: E731
    run = lambda f: jax.jit(jax.grad(lambda w: jax.lax.scan(f, x, w)[0].sum()), compiler_options=AS_USERS)(w)  # noqa: E731
    with ops.plain():
        expected = run(step)
    np.testing.assert_allclose(run(step), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(jax.checkpoint(step)), run(step))


def test_plain_is_seen_by_compiled_functions():
    x, w = drawn((30, 16)), drawn((16, 16), seed=1)
    f = jax.jit(lambda x: ops.linear(x, w)[0].sum())
    assert "tinylm_linear" in f.lower(x).as_text()
    with ops.plain():
        assert "tinylm_linear" not in f.lower(x).as_text()
        assert jax.hessian(f)(x).shape == (30, 16, 30, 16)
    with pytest.raises(NotImplementedError, match=r"first derivatives only.*ops.plain\(\)"):
        jax.grad(lambda x: jax.grad(lambda x: (ops.linear(x, w)[0] ** 2).sum())(x).sum())(x)


def test_no_other_platform_sees_them():
    x, w = drawn((30, 16)), drawn((16, 16), seed=1)
    f = jax.jit(jax.grad(lambda x: ops.linear(x, w)[0].sum()))
    assert "tinylm_" in jax.export.export(f, disabled_checks=ALLOWED)(x).mlir_module()
    assert "tinylm_" not in jax.export.export(f, platforms=["cuda"])(x).mlir_module()


ALLOWED = [jax.export.DisabledSafetyCheck.custom_call(f"tinylm_{name}") for name in ops.TARGETS]


def test_other_types_and_small_arrays_stay_plain(monkeypatch):
    native = lambda *a: is_native(lambda x, w: ops.linear(x, w)[0], *a)  # noqa: E731
    assert not native(drawn((30, 16), "float16"), drawn((16, 16), "float16"))
    monkeypatch.setattr(ops, "WORTHWHILE", 30 * 16 * 16 + 1)
    assert not native(drawn((30, 16)), drawn((16, 16)))
    monkeypatch.setattr(ops, "WORTHWHILE", 30 * 16 * 16)
    assert native(drawn((30, 16)), drawn((16, 16)))
    monkeypatch.setattr(ops, "FEWEST", 31)
    assert not native(drawn((30, 16)), drawn((16, 16)))
    monkeypatch.setattr(ops, "FEWEST", 30)
    monkeypatch.setenv("TINYLM_PLAIN", "1")
    assert not native(drawn((30, 16)), drawn((16, 16)))


BITS = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax, numpy as np, test_ops
from tinylm import ops
digest = hashlib.sha256()
for dtype in ("float32", "bfloat16"):
    x, w = test_ops.drawn((700, 96), dtype), test_ops.drawn((500, 96), dtype, 1)
    targets, ones = np.arange(700) % 500, np.ones(700, np.float32)
    y, back = jax.vjp(lambda x, w: ops.linear(x, w.T)[0], x, w)
    loss = jax.value_and_grad(lambda x, w: ops.nats(x, w, targets, ones)[0], (0, 1))(x, w)
    q = x.reshape(7, 100, 3, 32)
    out, behind = jax.vjp(lambda q: ops.attention(q, q, q, None, ops.Sight(True, 0, 0.2)), q)
    turn = jax.vjp(lambda q: ops.rotate(q, np.ones((1, 100, 8), "f"), np.ones((1, 100, 8), "f")), q)
    gated = jax.vjp(ops.swiglu, x, x)
    moved = turn[0], turn[1](q), gated[0], gated[1](x)
    moved += tuple(ops.orthogonalize(np.float32(x).reshape(n, 96, -1)) for n in (1, 7))
    for array in jax.tree.leaves((y, back(y), loss, out, behind(out), moved)):
        digest.update(np.asarray(array).tobytes())
print(ops.kernels(), digest.hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot choose cores on this system")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_threads_change_no_bit():  # P11, P29
    folder = os.path.dirname(__file__)
    found = {
        subprocess.run(
            [sys.executable, "-c", BITS, cores], check=True, capture_output=True, text=True, cwd=folder, timeout=300
        ).stdout
        for cores in ("1", "2")
    }
    assert len(found) == 1, found
