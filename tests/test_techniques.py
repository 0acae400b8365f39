"""Techniques: wrapped modules are recorded, made again, stacked, folded, and nothing half-done is left behind."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tinylm
from tinylm.config import ConfigError, Edit, ModelConfig
from tinylm.parts import Linear
from tinylm.techniques import ELSEWHERE, FILES, EditError, Technique, built_in, edit, find, fold, modules, technique
from tinylm.weights import named

SMALL = ModelConfig(vocab=40, context=16, width=16, layers=2, heads=2, bias=True)
LLAMA = SMALL.replace(bias=False)
TOKENS = np.arange(12, dtype=np.int32).reshape(1, 12)


@technique("doubled")
class Doubled(Technique):
    """The matrix times a factor, plus a matrix of its own."""

    def __init__(self, inner, *, rngs, factor: float = 2.0):
        super().__init__(inner, rngs=rngs)
        self.factor = factor
        self.extra = nnx.Param(rngs.params.normal(inner.weight().shape))

    def weight(self):
        return self.factor * self.inner.weight() + self.extra[...]

    def __call__(self, x):
        return x @ self.weight() + (0 if self.bias is None else self.bias[...])


@technique("noted")
class Noted(Technique):
    """Anything, with a tap-free side effect of none: no matrix, so it cannot be folded."""

    accepts = (nnx.Module,)

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_edit_wraps_what_matches_and_records_it():
    model = tinylm.Transformer(SMALL, rngs=3)
    plain = np.asarray(model(TOKENS))
    kernel = np.asarray(model.blocks[1].mlp.up.kernel[...])
    assert edit(model, r"blocks\.1\.mlp\.up", "doubled", factor=3, rngs=5) is model
    assert isinstance(model.blocks[1].mlp.up, Doubled)
    assert isinstance(model.blocks[0].mlp.up, Linear)
    extra = np.asarray(model.blocks[1].mlp.up.extra[...])
    np.testing.assert_allclose(model.blocks[1].mlp.up.weight(), 3 * kernel + extra, rtol=1e-6)
    assert np.abs(np.asarray(model(TOKENS)) - plain).max() > 1e-3
    assert model.config.edits == (Edit(where=r"blocks\.1\.mlp\.up", technique="doubled", settings={"factor": 3}),)
    assert {n for n in named(model) if "mlp.up" in n and n.startswith("blocks.1")} == {
        "blocks.1.mlp.up.extra",
        "blocks.1.mlp.up.inner.bias",
        "blocks.1.mlp.up.inner.kernel",
    }


def test_a_model_is_built_again_from_its_config():
    config = ModelConfig.from_dict({**SMALL.to_dict(), "edits": [{"where": ".*mlp.*", "technique": "doubled"}]})
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert hash(config) != hash(SMALL)
    one, two = tinylm.Transformer(config, rngs=1), tinylm.Transformer(config, rngs=1)
    np.testing.assert_array_equal(one(TOKENS), two(TOKENS))
    base = tinylm.Transformer(SMALL, rngs=1)
    np.testing.assert_array_equal(one.blocks[0].mlp.up.inner.kernel[...], base.blocks[0].mlp.up.kernel[...])
    a, b = (one.blocks[i].mlp.up.extra[...] for i in (0, 1))
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 0.1  # each place has its own random numbers


def test_saved_and_loaded(tmp_path):
    model = edit(tinylm.Transformer(SMALL), r".*\.attn\.[qk]", "doubled", factor=0.5)
    edit(model, r"blocks\.0\.attn\.q", "doubled")  # one on top of the other
    tinylm.save(model, tmp_path / "m")
    back = tinylm.load(tmp_path / "m")
    assert back.config == model.config
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))


def test_fold_is_the_same_function():
    model = edit(tinylm.Transformer(SMALL), r".*\.attn\.[qk]", "doubled", factor=0.5)
    edit(model, r"blocks\.0\.attn\.q", "doubled")
    plain = fold(model)
    assert plain.config == SMALL
    assert not any(isinstance(m, Technique) for _, m in modules(plain))
    assert isinstance(model.blocks[0].attn.q, Doubled)
    np.testing.assert_allclose(plain(TOKENS), model(TOKENS), atol=1e-5)


def test_what_cannot_be_folded_is_named():
    model = edit(tinylm.Transformer(SMALL), r"blocks\.\d+\.mlp", "noted")
    np.testing.assert_array_equal(model(TOKENS), tinylm.Transformer(SMALL)(TOKENS))
    with pytest.raises(EditError, match=r"blocks\.0\.mlp: Noted is more than a matrix.*blocks\.1\.mlp"):
        fold(model)


def test_formats_fold_by_themselves(tmp_path):
    model = tinylm.Transformer(LLAMA)
    model.blocks[0].attn.q.kernel.set_value(jnp.eye(16))
    edit(model, r".*attn\.q", "doubled", factor=0.5)
    tinylm.save(model, tmp_path / "m.gguf")
    np.testing.assert_allclose(tinylm.load(tmp_path / "m.gguf")(TOKENS), model(TOKENS), atol=1e-4)
    edit(model, ".*mlp", "noted")
    with pytest.raises(tinylm.FormatError, match="more than a matrix.*tinylm.save into a folder"):
        tinylm.save(model, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize(
    ("where", "name", "settings", "message"),
    [
        (r"blocks\.\d+\.mlp\.upp", "doubled", {}, r"no module matches .*did you mean 'blocks\.\d\.mlp\.up'"),
        (r"blocks\.0\.mlp", "doubled", {}, r"doubled wraps Linear, and .* matches blocks\.0\.mlp \(GatedMLP\)"),
        (r".*", "dobled", {}, "no technique is called 'dobled'; did you mean 'doubled'"),
        (r".*", "doubled", {"fctor": 1}, "doubled at blocks.*fctor"),
    ],
)
def test_what_cannot_be_done_leaves_the_model_alone(where, name, settings, message):
    model = tinylm.Transformer(SMALL)
    with pytest.raises(EditError, match=message):
        edit(model, where, name, **settings)
    assert model.config == SMALL
    assert not any(isinstance(m, Technique) for _, m in modules(model))


@pytest.mark.parametrize("settings", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
def test_settings_that_no_file_can_hold(settings):
    with pytest.raises(ConfigError, match=r"Edit\.settings"):
        edit(tinylm.Transformer(SMALL), ".*", "doubled", **settings)


def test_a_pattern_that_is_none():
    with pytest.raises(ConfigError, match=r"Edit\.where = '\(': is no regular expression"):
        edit(tinylm.Transformer(SMALL), "(", "doubled")


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="the technique 'doubled' is Doubled already"):

        @technique("doubled")
        class Other(Technique):
            pass

    assert find("doubled") is Doubled


def test_built_in_techniques_are_where_their_names_say():
    ours = {name: kind.__module__ for name in built_in() if (kind := find(name)).__module__.startswith("tinylm.")}
    assert {"ternary", "int8", "codebook", "memory", "mask", "lora", "quantized"} <= ours.keys()
    assert ours == {name: f"tinylm.techniques.{ELSEWHERE.get(name, name)}" for name in ours}
    assert set(ELSEWHERE.values()) <= FILES
