"""Ternary training: what the papers say of scales and gradients, recipes, and every step of a model's life."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import AS_USERS
from flax import nnx

import tinylm
from tinylm import ops
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Batch
from tinylm.engine.rounding import quantize
from tinylm.parts import Linear
from tinylm.population import train_many
from tinylm.techniques import EditError, edit, find, fold, ticked
from tinylm.techniques.rounding import INPUTS, cut, median, rounded_inputs
from tinylm.techniques.ternary import Ternary, bitnet
from tinylm.training import train
from tinylm.weights import bind, named, pure

SMALL = ModelConfig(vocab=40, context=16, width=32, layers=2, heads=2)
ONE = SMALL.replace(layers=1)
TOKENS = np.arange(12, dtype=np.int32).reshape(1, 12)
BODY = r"blocks\.\d+\.(attn|mlp)\.\w+"


def wrapped(kernel, bias=None, **settings):
    plain = Linear(*kernel.shape, bias=bias is not None)
    plain.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    if bias is not None:
        plain.bias.set_value(jnp.asarray(bias, jnp.float32))
    return Ternary(plain, rngs=nnx.Rngs(0), **settings)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def counting(step):
    """Rows that count on from a random id: easy to learn."""
    rng = np.random.default_rng(step)
    rows = (rng.integers(0, 40, (8, 1)) + np.arange(17)) % 40
    return Batch(rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32))


CONFIG = TrainConfig(steps=30, optimizer="adamw", learning_rate=1e-2, warmup=3, log_every=10, batch=8)


# --- scales and codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "zeros", "error"), [("mean", 0.310, 0.263), ("median", 0.264, 0.318)])
def test_zeros_and_error_of_normal_weights(scale, zeros, error):
    """The figures of papers/ternary, section 1.2: a million normal weights."""
    w = normal(1000, 1000)
    found = wrapped(w, scale=scale).rounded()
    assert (np.asarray(found.codes) == 0).mean() == pytest.approx(zeros, abs=0.002)
    assert np.square(np.asarray(found.dense()) - w).sum() / np.square(w).sum() == pytest.approx(error, abs=0.002)


def test_the_optimal_scale_is_twn_s():
    w = normal(1000, 1000)
    found = wrapped(w, scale="mse").rounded()
    threshold = float(found.scale[0, 0]) / 2
    assert threshold / np.abs(w).mean() == pytest.approx(0.773, abs=0.02)
    assert np.square(np.asarray(found.dense()) - w).sum() / np.square(w).sum() == pytest.approx(0.190, abs=0.002)
    kept = np.abs(w)[np.abs(w) > threshold]
    assert float(found.scale[0, 0]) == pytest.approx(kept.mean(), rel=0.01)  # the least-squares scale of those kept


def test_rounding_again_shrinks_the_mean_and_not_the_median():
    for scale, factor in (("mean", 0.690), ("median", 1.0), ("mse", 1.0)):
        once = wrapped(normal(400, 500), scale=scale).rounded()
        twice = wrapped(np.asarray(once.dense()), scale=scale).rounded()
        np.testing.assert_array_equal(once.codes, twice.codes)
        assert float(twice.scale[0, 0] / once.scale[0, 0]) == pytest.approx(factor, abs=0.002 if factor < 1 else 1e-6)
    assert float(wrapped(np.asarray(once.dense()), scale="median").rounded().scale[0, 0]) == float(once.scale[0, 0])


@pytest.mark.parametrize("per", ["tensor", "channel", 5, 64])
@pytest.mark.parametrize("law", ["normal", "laplace", "heavy"])
def test_the_median_by_bisection(per, law):
    rng = np.random.default_rng(1)
    w = {"normal": rng.standard_normal, "laplace": rng.laplace, "heavy": lambda size: rng.standard_t(2, size)}[law](
        size=(33, 7)
    ).astype(np.float32)
    if per == "tensor":
        cells = [np.abs(w).reshape(-1)]
    elif per == "channel" or per >= 33:
        cells = list(np.abs(w).T)
    else:
        cells = [np.abs(w[i : i + per, o]) for i in range(0, 33, per) for o in range(7)]
    expected = [np.sort(c)[(len(c) - 1) // 2] for c in cells]  # the lower one of two in the middle
    found = median(cut(jnp.asarray(w), per)).reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    if per == "tensor":
        assert float(found[0]) == pytest.approx(float(np.median(np.abs(w))), rel=1e-3)  # an odd number of weights


@pytest.mark.parametrize("scale", ["mean", "median"])
@pytest.mark.parametrize("per", ["channel", 12])
def test_scales_of_channels_and_groups(scale, per):
    w = normal(32, 6)  # groups of 12, 12 and 8
    found = wrapped(w, scale=scale, per=per).rounded()
    size = 32 if per == "channel" else per
    assert found.group == (0 if per == "channel" else 12)
    for g, start in enumerate(range(0, 32, size)):
        part = np.abs(w[start : start + size])
        expected = part.mean(0) if scale == "mean" else np.sort(part, 0)[(len(part) - 1) // 2]
        np.testing.assert_allclose(found.scale[g], expected, rtol=1e-4)
        codes = np.clip(np.round(w[start : start + size] / np.asarray(found.scale[g])), -1, 1)
        np.testing.assert_array_equal(found.codes[start : start + size], codes)
    np.testing.assert_array_equal(found.dense(), wrapped(w, scale=scale, per=per).weight())


def test_a_matrix_of_zeros_stays_one():
    for scale in ("mean", "median", "mse"):
        assert not np.asarray(wrapped(np.zeros((8, 4)), scale=scale).weight()).any()


def test_stochastic_rounding_is_right_on_average_and_the_same_for_the_same_weights():
    w = np.linspace(-1.4, 1.4, 29).astype(np.float32)
    w = np.repeat(w[None], 4000, 0)
    module = wrapped(w, stochastic=True)
    codes, scale = np.asarray(module.rounded().codes), float(module.rounded().scale[0, 0])
    np.testing.assert_array_equal(codes, wrapped(w, stochastic=True).rounded().codes)
    np.testing.assert_allclose(codes.mean(0), np.clip(w[0] / scale, -1, 1), atol=0.04)
    moved = np.asarray(wrapped(w * np.float32(1 + 1e-6), stochastic=True).rounded().codes)
    assert (moved != codes).mean() > 0.1  # a weight that moved draws anew
    np.testing.assert_allclose(moved.mean(0), np.clip(w[0] / scale, -1, 1), atol=0.04)
    groups = np.tile(normal(50, 20), (2, 1))  # the same weights twice, at different places
    first, second = np.split(np.asarray(wrapped(groups, per=50, stochastic=True).rounded().codes), 2)
    assert (first != second).mean() > 0.1


@pytest.mark.parametrize("settings", [{}, {"per": "channel", "scale": "median"}, {"per": 16, "half": True}])
def test_the_engines_file_holds_the_trained_codes(settings):
    """It is given the folded matrix, and finds codes and scales in it: the very same."""
    module = wrapped(normal(48, 20), **settings)
    own = module.rounded()
    found = quantize(np.asarray(module.fold().kernel[...]).T, "ternary", group=own.group)
    np.testing.assert_array_equal(found.codes, np.asarray(own.codes).T)
    np.testing.assert_array_equal(found.scales, np.broadcast_to(np.asarray(own.scale).T, found.scales.shape))


# --- inputs and gradients ---------------------------------------------------------------------------------------------


def test_inputs_are_rounded_token_by_token():
    x = normal(5, 16)
    x[2] = 0
    int8, step = rounded_inputs(jnp.asarray(x), "int8")
    s = 127 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    np.testing.assert_allclose(int8, np.round(x * s) / s, atol=1e-6)
    np.testing.assert_allclose(step, 1 / s, rtol=1e-6)
    clipped, _ = rounded_inputs(jnp.asarray(np.abs(x)), "int8_128")
    assert (np.asarray(clipped).max(-1) == pytest.approx(np.abs(x).max(-1) * 127 / 128, rel=1e-5)) is True
    beta = np.abs(x).mean(-1, keepdims=True) + 1e-5
    int4, _ = rounded_inputs(jnp.asarray(x), "int4")
    np.testing.assert_allclose(int4, np.round(np.clip(x / beta * 7**0.5, -8, 7)) * beta / 7**0.5, atol=1e-5)
    half, _ = rounded_inputs(jnp.asarray(x), "int8_half")
    assert (np.count_nonzero(np.asarray(half)[[0, 1, 3, 4]], axis=-1) <= 8).all()
    largest = np.abs(x) > np.median(np.abs(x), -1, keepdims=True)
    np.testing.assert_allclose(half, np.where(largest, int8, 0), atol=1e-6)
    for kind in INPUTS:
        grad = jax.grad(lambda x, kind=kind: jnp.sum(rounded_inputs(x, kind)[0] * 3))(jnp.asarray(x))
        np.testing.assert_array_equal(grad, np.full_like(x, 3))


@pytest.mark.parametrize("scale", ["mean", "median", "mse"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_gradients_are_those_of_the_straight_through_estimator(scale, stochastic):
    """dL/dx = g (scale codes), dL/dW = g' (x_q / s_x)."""
    w, x, g = normal(16, 8), normal(5, 16, seed=1), normal(5, 8, seed=2)
    graph, params = pure(wrapped(w, scale=scale, stochastic=stochastic))

    def loss(params, x):
        return jnp.sum(bind(graph, params)(x) * g)

    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(x))
    module = bind(graph, params)
    np.testing.assert_allclose(of_x, g @ np.asarray(module.rounded().dense()).T, atol=1e-5)
    rounded = np.asarray(rounded_inputs(jnp.asarray(x), "int8")[0])
    np.testing.assert_allclose(of_params["inner.kernel"], rounded.T @ g, atol=1e-5)
    np.testing.assert_allclose(module(x), rounded @ np.asarray(module.rounded().dense()), atol=1e-5)


def test_whole_numbers_all_the_way():
    """Products of codes are exact in int32, and both scales come last: what the engine computes."""
    x, module = normal(5, 64), wrapped(normal(64, 8), scale="median")
    codes = module.rounded()
    step = np.abs(x).max(-1, keepdims=True) / 127
    whole = np.round(x / step).astype(np.int32) @ np.asarray(codes.codes, np.int32)
    np.testing.assert_allclose(module(x), whole * step * np.asarray(codes.scale), rtol=1e-5, atol=1e-5)


def test_the_bias_comes_last_but_not_in_the_authors_package():
    w, b, x = normal(16, 4), normal(4, seed=3), normal(5, 16, seed=1)
    plain, right = wrapped(w, scale="median")(x), wrapped(w, b, scale="median")(x)
    np.testing.assert_allclose(right - plain, np.broadcast_to(b, (5, 4)), atol=1e-5)
    wrong = wrapped(w, b, scale="median", authors=True)
    step = np.abs(x).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(wrong(x) - plain, b * step * np.asarray(wrong.rounded().scale), atol=1e-5)


def test_the_ramp_mixes_and_its_clock_ticks():
    w = normal(16, 8)
    module = wrapped(w, ramp=4, activations="none")
    full = np.asarray(module.rounded().dense())
    graph, params = pure(module)
    for step in range(6):
        share = min(1.0, step / 4)
        np.testing.assert_allclose(bind(graph, params).weight(), w + share * (full - w), atol=1e-6)
        grads = jax.grad(lambda p: bind(graph, p).weight().sum())(params)
        assert float(grads["clock"]) == 0
        np.testing.assert_array_equal(grads["inner.kernel"], np.ones_like(w))
        params = ticked(params)


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_two_presets():
    faithful, fixed = (bitnet(tinylm.Transformer(SMALL), preset) for preset in ("faithful", "fixed"))
    assert not any("norm" in n.split(".attn.")[-1] and ".attn." in n for n in named(faithful))  # no parameters
    extra = {n for n in named(fixed) if n not in named(faithful)}
    assert extra == {f"blocks.{i}.{n}.norm.scale" for i in (0, 1) for n in ("attn.o", "mlp.down")}
    kinds = {type(b).__name__ for b in (faithful.blocks[0].attn.q.norm, fixed.blocks[0].attn.o.norm)}
    assert kinds == {"CenteredNorm", "RMSNorm"}
    assert faithful.blocks[0].attn.q.authors
    assert not fixed.blocks[0].attn.q.authors
    assert faithful.blocks[0].mlp.up.inputs == "int8_128"
    for model in (faithful, fixed):
        assert set(np.unique(model.blocks[0].mlp.up.rounded().codes)) == {-1, 0, 1}
        assert np.isfinite(model(TOKENS)).all()


def test_norms_inside_take_the_place_of_the_blocks_own():
    model = bitnet(tinylm.Transformer(SMALL), placement="inside", scale="mean")
    assert not any(n.endswith(("attn_norm.scale", "mlp_norm.scale")) for n in named(model))
    assert sum(n.endswith("norm.scale") for n in named(model)) == 2 * 7 + 1
    again = tinylm.Transformer(model.config)
    assert list(named(again)) == list(named(model))
    stream = normal(1, 4, 32)
    np.testing.assert_array_equal(model.blocks[0].attn_norm(stream), stream)
    with pytest.raises(EditError, match=r"attn\.q: Ternary with a norm inside.*attn_norm: its norm is gone"):
        fold(model)
    before, kept = model.config, list(named(model))
    with pytest.raises(EditError, match="identity wraps RMSNorm"):
        bitnet(model, placement="inside")  # a second time: its matrices were wrapped again before the norms failed
    assert model.config == before
    assert list(named(model)) == kept
    with pytest.raises(EditError, match="post-norm block has no norm in front"):
        bitnet(tinylm.Transformer(SMALL.replace(block="post")), placement="inside")


def test_tables_and_four_bit_activations():
    model = bitnet(tinylm.Transformer(SMALL), tables="ternary", activations="a4.8", placement="none")
    assert model.blocks[0].attn.q.inputs == "int4"
    assert model.blocks[1].mlp.down.inputs == "int8_half"
    table = np.asarray(model.embed.weight())
    assert table.shape == (40, 32)
    assert all(len(np.unique(np.abs(row))) <= 2 for row in table)  # of each id: 0 and one magnitude
    np.testing.assert_array_equal(model.embed(TOKENS), table[TOKENS])
    np.testing.assert_allclose(model.embed.rounded().dense(), table.T, rtol=1e-6)
    ramped = bitnet(tinylm.Transformer(ONE), tables="ternary", ramp=9, half=True)
    assert ramped.embed.ramp == ramped.blocks[0].mlp.up.ramp == 9
    assert ramped.embed.half
    untied = bitnet(tinylm.Transformer(SMALL.replace(head="untied")), tables="int8")
    assert type(untied.head.out).__name__ == type(untied.embed).__name__ == "Int8"


@pytest.mark.parametrize(("settings", "message"), [
    ({"scale": "mode"}, "scale = 'mode': no such thing"),
    ({"per": "row"}, "per = 'row': must be"),
    ({"per": 0}, "per = 0: must be"),
    ({"activations": "int5"}, "activations = 'int5'"),
    ({"norm": "batch"}, "norm = 'batch'"),
    ({"norm": "rmsnorm", "norm_eps": "a"}, "norm_eps = 'a': must be a number"),
    ({"ramp": -1}, "ramp = -1"),
    ({"per": "channel", "authors": True}, "authors=True means"),
    ({"scales": "mean"}, "ternary at blocks.0.attn.*scales"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    model = tinylm.Transformer(SMALL)
    with pytest.raises(EditError, match=message):
        edit(model, BODY, "ternary", **settings)
    assert model.config.edits == ()
    with pytest.raises(EditError, match="preset = 'exact'"):
        bitnet(model, "exact")


# --- the authors' toy -------------------------------------------------------------------------------------------------


def xor(scale, hidden, rates, seeds=16):
    """(rates, seeds) accuracies of two ternary layers on XOR of two of four signs, after 1,000 steps of Adam."""
    bits = np.stack(np.meshgrid(*[(0, 1)] * 4), -1).reshape(-1, 4)  # all there are
    x, y = jnp.asarray(2.0 * bits - 1), jnp.asarray(bits[:, 0] ^ bits[:, 1])
    settings = {"scale": scale, "activations": "int8"}
    one, two = (pure(wrapped(np.zeros(s), np.zeros(s[1]), **settings))[0] for s in ((4, hidden), (hidden, 2)))

    def net(p, x):
        return bind(two, p[1])(jax.nn.relu(bind(one, p[0])(x)))

    rng = np.random.default_rng(0)  # of NumPy, since JAX's draws take seconds to compile
    draws = lambda n, *shape: rng.uniform(-(n**-0.5), n**-0.5, (seeds, *shape)).astype(np.float32)  # noqa: E731
    starts = tuple({"inner.kernel": draws(n, n, m), "inner.bias": draws(n, m)} for n, m in ((4, hidden), (hidden, 2)))

    def learned(params, rate):
        adam = optax.adam(rate)

        def step(carry, _):
            params, state = carry
            nats = lambda p: optax.softmax_cross_entropy_with_integer_labels(net(p, x), y).mean()  # noqa: E731
            change, state = adam.update(jax.grad(nats)(params), state)
            return (optax.apply_updates(params, change), state), None

        (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), None, length=1000)
        return (net(params, x).argmax(-1) == y).mean()

    every = jax.vmap(jax.vmap(learned, (0, None)), (None, 0))
    return np.asarray(jax.jit(every, compiler_options=AS_USERS)(starts, jnp.asarray(rates, jnp.float32)))


def test_xor_with_two_inputs_of_noise():
    """The toy of the package of b1.58 Reloaded: the mean solves it with 8 hidden units; the median often stalls there
    (the authors' run at 86.8 percent), less often with twice the width, and not at ten times the rate."""
    assert xor("mean", 8, [0.01]).min() == 1.0
    slow, fast = (xor("median", 8, [0.01, 0.1]) == 1.0).mean(1)
    assert slow < 0.8
    assert fast == 1.0
    assert xor("median", 16, [0.01]).min() == 1.0


# --- a model's life ---------------------------------------------------------------------------------------------------

LIVES = {
    "ternary": ("ternary", {"scale": "median"}),
    "groups": ("ternary", {"per": 24, "half": True, "stochastic": True, "activations": "none"}),
    "int8": ("int8", {}),
    "int4": ("int4", {"per": 16}),
    "int2": ("int2", {"activations": "int4"}),
    "lsq": ("lsq", {"bits": 2}),
}


@pytest.mark.parametrize("name", LIVES)
def test_a_matrix_learns_through_its_rounding(name):
    """Towards a matrix that it can be, from another one: the error of its outputs falls."""
    technique, settings = LIVES[name]
    x, inner = jnp.asarray(normal(64, 16)), Linear(16, 8)
    inner.kernel.set_value(jnp.asarray(normal(16, 8)))
    aim = x @ find(technique)(inner, rngs=nnx.Rngs(0), **settings).weight()
    inner.kernel.set_value(jnp.asarray(normal(16, 8, seed=1)))
    graph, params = pure(find(technique)(inner, rngs=nnx.Rngs(0), **settings))
    adam = optax.adam(0.03)

    @jax.jit
    def learned(params):
        def step(carry, _):
            lost, grads = jax.value_and_grad(lambda p: jnp.square(bind(graph, p)(x) - aim).mean())(carry[0])
            change, state = adam.update(grads, carry[1])
            return (optax.apply_updates(carry[0], change), state), lost

        return jax.lax.scan(step, (params, adam.init(params)), None, length=150)[1]

    losses = np.asarray(learned(params))
    assert losses[-20:].mean() < 0.3 * losses[0]


def test_a_model_trains_with_learned_steps():
    model = edit(tinylm.Transformer(ONE), BODY, "lsq", bits=2)
    before = np.asarray(model.blocks[0].mlp.up.log_step[...])
    trainer = train(model, counting, CONFIG)
    list(trainer)
    assert trainer.losses[-1] < 0.6 * trainer.losses[0]
    assert np.abs(np.asarray(model.blocks[0].mlp.up.log_step[...]) - before).max() > 0.01


@pytest.mark.parametrize("name", LIVES)
def test_it_saves_and_folds(name, tmp_path):
    technique, settings = LIVES[name]
    model = edit(tinylm.Transformer(ONE), BODY, technique, **settings)
    assert find(technique).__name__ == type(model.blocks[0].attn.q).__name__
    tinylm.save(model, tmp_path / "m")
    back = tinylm.load(tmp_path / "m")
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))
    plain = fold(model)
    up = model.blocks[0].mlp.up
    np.testing.assert_array_equal(plain.blocks[0].mlp.up.kernel[...], up.rounded().dense())
    exact = settings.get("activations") == "none"
    assert np.abs(np.asarray(plain(TOKENS) - model(TOKENS))).max() < (1e-5 if exact else 3.0)


def test_members_of_a_population_are_what_they_would_be_alone():
    model = ONE.replace(edits=({"where": BODY, "technique": "ternary", "settings": {"scale": "median"}},))
    configs = CONFIG.replace(steps=6).grid(seed=[0, 1])
    together = train_many(model, counting, configs)
    list(together)
    for config, member in zip(configs, together.members, strict=True):
        alone = train(tinylm.Transformer(model, rngs=config.seed), counting, config)
        list(alone)
        np.testing.assert_allclose(member.losses, alone.losses, rtol=1e-3)


@pytest.mark.parametrize("how", ["ternary", "int4", "lsq"])
def test_rounded_matrices_still_go_through_the_native_products(how):
    """Forwards, to the inputs and to the weights: thrown back on plain products a step would take a multiple."""
    if not ops.native(jnp.zeros(1)):
        pytest.skip("the native kernels are not in use here")
    plain = Linear(64, 128)
    plain.kernel.set_value(jnp.asarray(normal(64, 128)))
    module = find(how)(plain, rngs=nnx.Rngs(0))
    graph, params = pure(module)
    x = np.zeros((256, 64), np.float32)
    loss = lambda params, x: jnp.square(bind(graph, params)(x)).sum()  # noqa: E731
    program = jax.jit(jax.grad(loss, argnums=(0, 1)))
    text = program.lower(params, x).as_text()
    assert set(re.findall(r"@tinylm_(\w+)", text)) == {"linear", "linear_dx", "linear_dw"}
