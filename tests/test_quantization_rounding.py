"""Post-training rounding against independent oracles: ranges, GPTQ, AdaRound, tables, and shares of a budget."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.parts import Linear
from tinylm.quantization.adaptive import adaround, gptq, nearest
from tinylm.quantization.balance import aware
from tinylm.quantization.calibration import Inputs
from tinylm.quantization.codes import rounded, static_of
from tinylm.quantization.ranges import RATIOS, affine, entropy, of_cells, rows, scales, spread
from tinylm.quantization.sensitivity import allocate, hutchinson
from tinylm.quantization.spec import QuantizationError, Spec
from tinylm.quantization.splitting import kmeans, kmeans_table, members, split, split_table


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outliers(*shape, seed=0):
    """Normal weights, one in a thousand ten times as large."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    return np.where(rng.random(shape) < 1e-3, 10 * w, w).astype(np.float32)


def lost(w, per, low, high, **settings):
    scale = spread(of_cells(scales(rows(w, per), low, high, **settings), per, w.shape), per, len(w))
    return float(np.square(nearest(w, scale, 0, low, high) * scale - w).sum() / np.square(w).sum())


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_finer_scales_lose_less():
    w = outliers(100, 60)
    errors = [lost(w, per, -7, 7) for per in ("tensor", "channel", 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2]


def test_ranges_under_outliers():
    """Clipping a few outliers serves all the others."""
    w = outliers(1000, 300)
    most, cut, best = (lost(w, "tensor", -7, 7, kind=kind) for kind in ("max", "percentile", "mse"))
    assert best < cut < most
    tried = np.abs(w).max() / 7 * RATIOS  # the best of 81, by hand
    by_hand = [np.square(np.clip(np.round(w / s), -7, 7) * s - w).sum() / np.square(w).sum() for s in tried]
    assert best == pytest.approx(min(by_hand), rel=1e-5)


def test_four_levels_of_normal_weights():
    """The table of papers/splitquant, 4.3: relative squared error of plain, clipped, split and clustered codes."""
    w = normal(1000, 300)

    def error(table, codes):
        return np.square(table[codes] - w).sum() / np.square(w).sum()

    scale, zero = affine(rows(w, "tensor"), 4)
    codes = np.clip(np.round(w / scale) + zero, 0, 3)
    plain = np.square((codes - zero) * scale - w).sum() / np.square(w).sum()
    assert plain > 0.5
    scale, zero = affine(rows(w, "tensor"), 4, kind="mse")
    clipped = np.square((np.clip(np.round(w / scale) + zero, 0, 3) - zero) * scale - w).sum() / np.square(w).sum()
    assert clipped == pytest.approx(0.150, abs=0.04)
    assert error(*split_table(w, 2)) == pytest.approx(0.153, abs=0.03)
    assert error(*kmeans_table(w, 2)) == pytest.approx(0.118, abs=0.002)
    assert len(split_table(w, 2)[0]) <= 10


def test_affine_ranges_hold_zero_exactly():
    for shift in (-3.0, 0.0, 3.0):
        cells = rows(normal(40, 8) + np.float32(shift), "channel")
        scale, zero = affine(cells, 16)
        assert ((zero >= 0) & (zero <= 15) & (zero == np.round(zero))).all()
        codes = np.clip(np.round(cells / scale[:, None]) + zero[:, None], 0, 15)
        assert np.abs((codes - zero[:, None]) * scale[:, None] - cells).max() <= scale.max() * (0.5 + 0.5)


def test_half_scales_clip_nothing_and_groups_may_be_ragged():
    w = normal(50, 6)
    scale = scales(rows(w, 16), -7, 7, half=True)
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    assert scale.shape == (4 * 6,)
    grid = of_cells(scale, 16, w.shape)
    for g in range(4):
        top = np.abs(w[16 * g : 16 * g + 16]).max(0) / 7
        assert ((grid[g] >= top) & (grid[g] <= top * 1.002)).all()


def test_the_entropy_picks_a_known_cut():
    """All the mass in the first 256 of 2,048 bins, evenly, and one value at the end: 128 levels want to end there."""
    inside = np.linspace(1e-4, 1.0, 100_000)
    assert entropy(np.concatenate([inside, [8.0]])) == pytest.approx(1.0, abs=0.02)
    assert entropy(inside) == pytest.approx(1.0, abs=0.02)  # and nothing is cut where there is no tail
    assert entropy(np.zeros(10)) > 0


# --- rounding that looks at the inputs --------------------------------------------------------------------------------


def correlated(count, inputs, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, inputs // 3)) @ rng.standard_normal((inputs // 3, inputs))).astype(
        np.float32
    ) + 0.1 * rng.standard_normal((count, inputs)).astype(np.float32)


def naive_gptq(w, scale, low, high, hessian, damp):
    """Optimal brain quantization with a fixed order: the inverse Hessian is found anew for what is left each time."""
    left, codes = w.astype(np.float64).copy(), np.empty(w.shape)
    h = hessian.astype(np.float64) + damp * np.mean(np.diag(hessian)) * np.eye(len(w))
    for i in range(len(w)):
        inverse = np.linalg.inv(h[i:, i:])
        codes[i] = np.clip(np.round(left[i] / scale[0]), low, high)
        error = (left[i] - codes[i] * scale[0]) / inverse[0, 0]
        left[i:] -= np.outer(inverse[:, 0], error)
    return codes


def test_gptq_is_optimal_brain_quantization_and_better_than_nearest():
    x, w = correlated(200, 24), normal(24, 10)
    hessian = 2 * x.T @ x / len(x)
    scale = of_cells(scales(rows(w, "channel"), -3, 3), "channel", w.shape)
    found = gptq(w, scale, 0.0, -3, 3, hessian)
    np.testing.assert_array_equal(found, naive_gptq(w, scale, -3, 3, hessian, 0.01))
    off = lambda codes: np.linalg.norm(x @ (codes * scale - w))  # noqa: E731
    assert off(found) < 0.7 * off(nearest(w, scale, 0, -3, 3))
    dead = hessian.copy()
    dead[5], dead[:, 5] = 0, 0
    assert np.isfinite(gptq(w, scale, 0.0, -3, 3, dead)).all()


def test_adaround_is_better_than_nearest_and_only_goes_up_or_down():
    x, w = correlated(200, 24), normal(24, 10)
    scale = of_cells(scales(rows(w, "channel"), -7, 7), "channel", w.shape)
    found = adaround(w, scale, 0.0, -7, 7, x, steps=600)
    off = lambda codes: np.linalg.norm(x @ (codes * scale - w))  # noqa: E731
    assert off(found) < 0.7 * off(nearest(w, scale, 0, -7, 7))
    floor = np.floor(w / scale)
    assert ((found == np.clip(floor, -7, 7)) | (found == np.clip(floor + 1, -7, 7))).all()


# --- tables -----------------------------------------------------------------------------------------------------------


def test_splitting_is_the_same_matrix_written_as_a_sum():
    w = outliers(60, 50)
    parts = split(w)
    np.testing.assert_array_equal(parts.sum(0), w)
    assert ((parts != 0).sum(0) <= 1).all()
    x = normal(5, 60)
    np.testing.assert_allclose(sum(x @ part for part in parts), x @ w, atol=1e-5)
    centres = kmeans(w, 3)
    low, high = (centres[1:] + centres[:-1]) / 2
    np.testing.assert_array_equal(members(w), np.where(w <= low, 0, np.where(w >= high, 2, 1)))
    np.testing.assert_array_equal(members(np.array([low, (low + high) / 2, high, *w.reshape(-1)]))[3:].shape, (3000,))


def test_split_codes_are_the_sum_of_three_rounded_layers():
    w = outliers(60, 50)
    table, codes = split_table(w, 2)
    total = np.zeros_like(w)
    for part in split(w):
        low, high = min(part.min(), 0), max(part.max(), 0)
        scale = np.float32((high - low) / 3)
        zero = np.round(-low / scale)
        total += (np.clip(np.round(part / scale) + zero, 0, 3) - zero) * scale
    np.testing.assert_allclose(table[codes], total, atol=1e-6)


def test_kmeans_of_obvious_clusters():
    values = np.concatenate([normal(500) * 0.01 + c for c in (-3, 0, 5)])
    np.testing.assert_allclose(kmeans(values, 3), [-3, 0, 5], atol=0.01)
    table, codes = kmeans_table(values[:, None], 2)
    assert np.abs(table[codes] - values[:, None]).max() < 0.1


@pytest.mark.parametrize("value", [0.0, -0.7])
def test_a_table_of_equal_weights_has_two_values(value):
    w = np.full((4, 3), value, np.float32)
    for found in (kmeans_table, split_table):
        table, codes = found(w, 2)
        assert len(table) == 2
        assert table[0] < table[1]
        np.testing.assert_array_equal(table[codes], w)


# --- scale moved, and inputs ---


@pytest.mark.parametrize("settings", [{"affine": True}, {"affine": True, "per": 8}, {}])
def test_awq_takes_the_power_that_is_best_for_the_codes_to_come(settings):
    x, w = np.abs(normal(200, 24)) * np.geomspace(0.1, 10, 24), normal(24, 6) - 1
    spec, hessian = Spec(bits=3, balance="awq", **settings), 2 * x.T @ x / len(x)
    seen = Inputs(hessian, len(x), x.min(0), x.max(0), np.abs(x).mean(0), x)

    def off(factor):
        plain = Linear(24, 6)
        plain.kernel.set_value(jnp.asarray(w * factor[:, None], jnp.float32))
        return np.linalg.norm(x @ (np.asarray(rounded(plain, spec).weight()) / factor[:, None] - w))

    tried = [seen.mean**a for a in np.linspace(0, 1, 21)]
    best = min(off(s / np.sqrt(s.max() * s.min())) for s in tried)
    assert off(aware([w], seen, spec)) == pytest.approx(best, rel=1e-4)
    assert best < 0.9 * off(np.ones(24))


def test_a_static_range_of_extremes_is_of_all_that_was_read():
    """Not only of the rows that are kept."""
    rows_kept = normal(10, 4)
    seen = Inputs(np.eye(4), 99, np.full(4, -9.0), np.full(4, 30.0), np.ones(4), rows_kept)
    assert static_of(seen, Spec(static="symmetric")) == (pytest.approx(30 / 127), 0)
    assert static_of(seen, Spec(static="affine")) == (pytest.approx(39 / 255), round(9 / 39 * 255))
    step, _ = static_of(seen, Spec(static="symmetric", static_range="percentile", percentile=100))
    assert step == pytest.approx(np.abs(rows_kept).max() / 127)


# --- shares of a budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_shares_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    items = int(rng.integers(1, 7))
    sizes = [[int(s) for s in rng.integers(1, 40, 3)] for _ in range(items)]
    costs = [[float(c) for c in rng.random(3)] for _ in range(items)]
    least = sum(map(min, sizes))
    budget = least + int(rng.integers(0, 60))
    picks = allocate(sizes, costs, budget)
    total = lambda table, p: sum(t[i] for t, i in zip(table, p, strict=True))  # noqa: E731
    assert total(sizes, picks) <= budget
    fitting = [p for p in itertools.product(range(3), repeat=items) if total(sizes, p) <= budget]
    assert total(costs, picks) == pytest.approx(min(total(costs, p) for p in fitting))
    with pytest.raises(QuantizationError, match=f"take at least {least:,}"):
        allocate(sizes, costs, least - 1)
    for wrong in (costs[:-1], [c[:-1] for c in costs], []):
        with pytest.raises(QuantizationError, match="as many of the one as of the other"):
            allocate(sizes, wrong, budget)


def test_many_layers_take_a_moment():
    """96 matrices of three shapes and four choices: the front stays short, where all combinations would be 4^96."""
    rng = np.random.default_rng(0)
    sizes = [[n, 2 * n, 4 * n, 8 * n] for n in rng.choice([1024, 4096, 11008], 96)]
    costs = [sorted(rng.random(4), reverse=True) for _ in range(96)]
    budget = int(sum(s[2] for s in sizes))
    picks = allocate(sizes, costs, budget)
    assert sum(s[i] for s, i in zip(sizes, picks, strict=True)) <= budget


def test_hutchinson_finds_the_trace_of_every_block():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200, 200))
    a = jnp.asarray(a @ a.T / 200, jnp.float32)
    cut = {"one": 120, "two": 80}

    def loss(params):
        x = jnp.concatenate([params["one"], params["two"]])
        return 0.5 * x @ a @ x

    params = {name: jnp.asarray(rng.standard_normal(n), jnp.float32) for name, n in cut.items()}
    found = jax.jit(lambda params: hutchinson(loss, params, 200, jax.random.key(0)))(params)
    assert float(found["one"]) == pytest.approx(float(jnp.trace(a[:120, :120])), rel=0.05)
    assert float(found["two"]) == pytest.approx(float(jnp.trace(a[120:, 120:])), rel=0.05)


def test_hutchinson_on_a_small_network():
    """Against the whole Hessian of a net of 200 parameters."""
    params = {"a": jnp.asarray(normal(8, 16)) / 3, "b": jnp.asarray(normal(16, 4, seed=1)) / 4}
    x, y = jnp.asarray(normal(64, 8, seed=2)), jnp.asarray(np.arange(64) % 4)

    def loss(params):
        logits = jnp.tanh(x @ params["a"]) @ params["b"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    hessian = jax.jit(jax.hessian(loss))(params)
    found = jax.jit(lambda params: hutchinson(loss, params, 4000, jax.random.key(1)))(params)
    for name, p in params.items():
        exact = float(jnp.trace(hessian[name][name].reshape(p.size, p.size)))
        assert float(found[name]) == pytest.approx(exact, rel=0.05)
