"""Whole numbers of a few bits: ranges, learned steps, packing, and matrices that are their codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tinylm
from tinylm import optim
from tinylm.config import ModelConfig, TrainConfig
from tinylm.parts import Linear
from tinylm.techniques import EditError, edit, find, fold
from tinylm.techniques.packing import pack, size, unpack
from tinylm.weights import bind, named, pure

SMALL = ModelConfig(vocab=40, context=16, width=16, layers=1, heads=2, bias=True)
TOKENS = np.arange(12, dtype=np.int32).reshape(1, 12)
BODY = r"blocks\.\d+\.(attn|mlp)\.\w+"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wrapped(name, kernel, **settings):
    plain = Linear(*kernel.shape)
    plain.kernel.set_value(jnp.asarray(kernel))
    return find(name)(plain, rngs=nnx.Rngs(0), **settings)


@pytest.mark.parametrize(("name", "low", "high"), [("int8", -127, 127), ("int4", -7, 7)])
@pytest.mark.parametrize("per", ["tensor", "channel", 10])
def test_the_largest_weight_is_the_largest_code(name, low, high, per):
    w = normal(32, 6)
    codes = wrapped(name, w, per=per).rounded()
    assert np.abs(np.asarray(codes.codes)).max() == high
    step = np.asarray(codes.scale) if codes.group == 0 else np.repeat(np.asarray(codes.scale), 10, 0)[:32]
    off = np.abs(np.asarray(codes.dense()) - w)
    assert (off <= np.broadcast_to(step, off.shape) / 2 * (1 + 1e-5)).all()
    assert off.max() > step.min() / 10  # there is something to round


def test_two_bits_use_all_four_codes_and_the_best_scale():
    w = normal(200, 50)
    best = wrapped("int2", w, per="tensor").rounded()
    assert set(np.unique(best.codes)) == {-2, -1, 0, 1}
    lost = lambda codes: np.square(np.asarray(codes.dense()) - w).sum()  # noqa: E731
    for scale in np.linspace(0.5, 2.0, 31) * float(best.scale[0, 0]):
        tried = np.clip(np.round(w / scale), -2, 1) * scale
        assert lost(best) <= np.square(tried - w).sum() * 1.001


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("law", ["uniform", "normal", "heavy"])
def test_the_scale_of_least_squared_error_is_that_of_a_fine_search(name, law):
    """Where the error has many minima, near the largest magnitude one is twice as large as the least."""
    rng = np.random.default_rng(0)
    draw = {"uniform": rng.uniform, "normal": rng.standard_normal, "heavy": lambda size: rng.standard_t(3, size)}[law]
    w = draw(size=(64, 32)).astype(np.float32)
    found, high = wrapped(name, w, per="tensor", scale="mse").rounded(), {"int4": 7, "int8": 127}[name]
    tried = np.abs(w).max() / high * np.geomspace(0.05, 1.2, 300)
    least = min(np.square(np.clip(np.round(w / s), -high, high) * s - w).sum() for s in tried)
    assert np.square(np.asarray(found.dense()) - w).sum() <= 1.03 * least


def test_gradients_of_a_learned_step_are_the_papers():
    """Esser et al. 2020, equations 3 and 5, and the gradient scale of section 2.2, weight by weight."""
    w, g = normal(12, 5) ** 3, normal(12, 5, seed=1)
    module = wrapped("lsq", w, bits=3, per="channel", activations="none")
    graph, params = pure(module)
    grads = jax.grad(lambda p: jnp.sum(bind(graph, p).weight() * g))(params)
    step = np.exp(np.asarray(params["log_step"]))
    np.testing.assert_allclose(step, 2 * np.abs(w).mean(0) / np.sqrt(3), rtol=1e-5)
    low, high = -4, 3
    v = w / step
    inside = (v > low) & (v < high)
    assert not inside.all()  # a few are clipped
    of_step = np.where(inside, np.round(v) - v, np.clip(v, low, high))
    expected = (g * of_step).sum(0) / np.sqrt(12 * high) * step  # towards its logarithm
    np.testing.assert_allclose(grads["log_step"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["inner.kernel"], np.where(inside, g, 0), atol=1e-6)
    np.testing.assert_allclose(module.weight(), np.clip(np.round(v), low, high) * step, rtol=1e-5)


def test_steps_are_neither_decayed_nor_made_orthogonal():
    model = edit(tinylm.Transformer(SMALL), BODY, "lsq", per=8)
    groups = optim.groups(named(model), optim.Recipe.of(TrainConfig(steps=1)))
    steps = [group for name, group in groups.items() if name.endswith("log_step")]
    assert steps
    assert all(group.rule == "adamw" and not group.decayed for group in steps)
    with pytest.raises(EditError, match="bits = 9: must be 2 to 8"):
        edit(tinylm.Transformer(SMALL), BODY, "lsq", bits=9)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 4, 10, 15, 16, 100, 255, 256, 700, 65536])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 243, 1001])
def test_codes_come_back_exactly(levels, count):
    codes = np.random.default_rng(count).integers(0, levels, count)
    packed = pack(codes, levels)
    assert packed.dtype == np.uint8
    assert packed.nbytes == size(levels, count)
    np.testing.assert_array_equal(unpack(packed, levels, count), codes)
    np.testing.assert_array_equal(jax.jit(lambda p: unpack(p, levels, count))(packed), codes)


def test_bits_per_code():
    assert [size(levels, 40_000) * 8 / 40_000 for levels in (3, 4, 15, 16, 255)] == [1.6, 2, 4, 4, 8]
    digits = np.stack(np.meshgrid(*[range(3)] * 5, indexing="ij"), -1).reshape(-1, 5)  # every byte of base 3
    assert sorted(pack(digits, 3)) == list(range(243))
    np.testing.assert_array_equal(np.asarray(unpack(pack(digits, 3), 3, 1215)).reshape(-1, 5), digits)
    with pytest.raises(ValueError, match="codes from 0 to 3: must be 0 to 2"):
        pack(np.arange(4), 3)
    with pytest.raises(ValueError, match="codes are float64: must be whole numbers"):
        pack(np.full(4, 0.5), 3)


# --- matrices that are their codes ------------------------------------------------------------------------------------

KINDS = {
    "int8": {},
    "ternary": {"low": -1, "levels": 3, "per": "tensor"},
    "groups": {"low": -7, "levels": 15, "per": 5, "half": True},
    "affine": {"low": 0, "levels": 16, "affine": True},
    "table": {"low": 0, "levels": 10, "per": "table"},
    "norm": {"norm": "rmsnorm", "activations": "int8"},
    "static": {"static": "affine"},
}


@pytest.mark.parametrize("name", KINDS)
def test_codes_are_stored_and_the_floats_are_gone(name, tmp_path):
    model = edit(tinylm.Transformer(SMALL), BODY + "|embed", "quantized", **KINDS[name])
    assert not any(n.endswith((".kernel", ".table")) and "inner" in n for n in named(model))
    tinylm.save(model, tmp_path / "m")
    back = tinylm.load(tmp_path / "m")
    assert back.config == model.config
    for path, value in named(model).items():
        np.testing.assert_array_equal(named(back)[path], value, strict=True)
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))
    if name == "norm":
        with pytest.raises(EditError, match=r"attn\.q: Quantized with a norm inside"):
            fold(model)
    elif name != "static":
        np.testing.assert_array_equal(fold(model)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("norm", "static")])
def test_unpacked_by_numpy_or_compiled_the_weights_are_the_same_bits(name):
    """Outside of a compiled function NumPy unpacks: JAX would compile every operation for every shape."""
    module = wrapped("quantized", normal(33, 7), **KINDS[name])
    graph, params = pure(module)
    compiled = jax.jit(lambda params: bind(graph, params).weight())(params)
    np.testing.assert_array_equal(compiled, module.weight())
    assert isinstance(module.codes(), np.ndarray)
    rows = np.array([[1, 32]])
    np.testing.assert_array_equal(jax.jit(lambda i: module.weight()[i])(rows), np.asarray(module.weight())[rows])


def test_zero_stays_zero_in_an_affine_range():
    w = np.abs(normal(16, 4)) + 1
    w[3] = 0
    codes = wrapped("quantized", w, low=0, levels=16, affine=True).rounded()
    assert not np.asarray(codes.dense())[3].any()
    assert np.abs(np.asarray(codes.dense()) - w).max() <= np.asarray(codes.scale).max() * 0.51
    with pytest.raises(EditError, match="affine = True: needs scales"):
        wrapped("quantized", w, per="table", affine=True)
    for wrong, message in (
        ({"levels": 1}, "levels = 1: must be 2"),
        ({"low": 0, "levels": 16}, "low = 0: symmetric codes need both signs"),
        ({"low": -1.5}, "low = -1.5: must be a whole number"),
    ):
        with pytest.raises(EditError, match=message):
            wrapped("quantized", w, **wrong)
