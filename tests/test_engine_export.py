"""Exporting: what becomes of every matrix, what is refused and why, and what the report and the file say."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import test_model as grid
from flax import nnx
from numpy_model import random_params

from tinylm.config import ModelConfig
from tinylm.engine import file, layout, rounding
from tinylm.engine.export import about, export
from tinylm.engine.layout import Kind
from tinylm.engine.twin import Twin
from tinylm.formats import FormatError
from tinylm.model import Transformer, shapes
from tinylm.techniques import edit
from tinylm.tokenizer import Tokenizer
from tinylm.weights import assign, named

SMALL = ModelConfig(vocab=300, context=32, width=32, layers=2, heads=2)
BYTES = Tokenizer.train([], kind="byte")


def model_of(config=SMALL, tokenizer=None):
    model = Transformer(config, tokenizer=tokenizer)
    assign(model, random_params(shapes(config)))
    return model


def kinds(path):
    return {name: tensor.kind for name, tensor in file.read(path).tensors.items() if tensor.kind >= Kind.panel_float}


# --- everything gets there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grid.GRID)
def test_every_architecture(name, tmp_path):
    """The constants and the vectors are the model's, and every matrix is, to half a step of its rows."""
    config = grid.config_of(name)
    model = model_of(config)
    report = export(model, tmp_path / "m.tlm")
    found = file.read(report.path)
    assert about(report.path) == config
    c = found.constants
    assert (c.vocab, c.context, c.width, c.layers) == (config.vocab, config.context, config.width, config.layers)
    assert (c.heads, c.kv_heads, c.head_width, c.hidden) == (
        config.heads,
        config.kv_heads,
        config.head_width,
        config.hidden,
    )
    assert (layout.MLPS[c.mlp], layout.NORMS[c.norm], layout.BLOCKS[c.block]) == (config.mlp, config.norm, config.block)
    assert (layout.HEADS[c.head], layout.KINDS[c.kind]) == (config.head, config.kind)
    assert c.attention_scale == np.float32(config.attention_scale or config.head_width**-0.5)
    assert (c.norm_eps, c.theta, c.softcap) == tuple(
        np.float32([config.norm_eps, config.theta, config.softcap]).tolist()
    )
    assert found.tensors["windows"].values[0].tolist() == [config.at("window", i) for i in range(config.layers)]
    rotates = [config.at("positions", i) == "rope" for i in range(config.layers)]
    assert found.tensors["rotates"].values[0].tolist() == rotates
    assert c.rotary == ((config.rotary or config.head_width) if any(rotates) else 0)
    left = set(found.tensors) - {"windows", "rotates", "provenance"}
    for name, value in named(model).items():
        stem = name.removesuffix(".kernel").removesuffix(".table")
        left.remove(stem)
        tensor, value = found.tensors[stem], np.asarray(value)
        if tensor.kind == Kind.panel_int8:
            value = value.T if name.endswith("kernel") else value
            step = np.abs(value).max(1, keepdims=True) / 127
            assert (np.abs(rounding.unpack(tensor).dense() - value) <= 0.501 * step).all()
        else:
            np.testing.assert_array_equal(tensor.values, np.atleast_2d(value))
    assert not left
    assert {row.name for row in report.rows} == set(kinds(report.path))


def test_the_tokenizer_goes_along(tmp_path):
    path = export(model_of(tokenizer=BYTES), tmp_path / "m.tlm").path
    found = file.read(path)
    text = found.tensors["tokenizer"].data.tobytes()
    assert Tokenizer.from_json(text.decode()) == BYTES
    assert hashlib.sha256(text).hexdigest() == BYTES.sha256
    assert layout.pieces_of(found.tensors["pieces"].data, BYTES.vocab) == list(BYTES.token_bytes)
    assert (found.constants.known, found.constants.begin, found.constants.ends) == (BYTES.vocab, 0, (0,))
    story = json.loads(found.tensors["provenance"].data.tobytes())
    assert story["tokenizer"] == BYTES.sha256
    assert story["model"] == json.loads(SMALL.to_json())
    assert story["export"]["bits"] == "int8"
    bare = file.read(export(model_of(), tmp_path / "bare.tlm").path).constants
    assert (bare.known, bare.begin, bare.ends) == (300, -1, ())


def test_the_same_model_gives_the_same_bytes(tmp_path):  # P29
    model = model_of(ModelConfig(vocab=2100, context=32, width=32, layers=1, heads=2), BYTES)
    one, two = (export(model, tmp_path / name).path.read_bytes() for name in ("one.tlm", "two.tlm"))
    assert one == two


# --- which bits where -------------------------------------------------------------------------------------------------


def test_bits_of_the_parts(tmp_path):
    path = tmp_path / "m.tlm"
    model = model_of()
    found = kinds(export(model, path, "int4", group=16).path)
    assert found["embed"] == Kind.panel_int8
    assert found["blocks.1.mlp.up"] == Kind.panel_int4
    assert "head.out" not in found
    found = kinds(
        export(
            model, path, "ternary", absmean=True, embed="int4", only={r".*\.o": "int8", ".*0.attn.o": "ternary2"}
        ).path
    )
    assert found["embed"] == Kind.panel_int4
    assert found["blocks.0.attn.q"] == Kind.packed_ternary
    assert found["blocks.0.attn.o"] == Kind.panel_ternary
    assert found["blocks.1.attn.o"] == Kind.panel_int8
    found = kinds(export(model, path, "float32", head="int8").path)  # a tied head in other bits is a second copy
    assert (found["embed"], found["head.out"]) == (Kind.panel_float, Kind.panel_int8)
    assert file.read(path).constants.activations == 8
    assert set(kinds(export(model, path, "float32").path).values()) == {Kind.panel_float}
    assert (file.read(path).constants.activations, file.read(path).constants.cache) == (32, 1)
    assert file.read(export(model, path, "float32", cache="int8").path).constants.cache == 2
    found = kinds(export(model_of(SMALL.replace(head="untied")), path, head="int4").path)
    assert (found["embed"], found["head.out"]) == (Kind.panel_int8, Kind.panel_int4)


@pytest.mark.parametrize(
    ("changes", "how", "top"),
    [
        ({}, {}, ("embed", Kind.panel_planes)),
        ({"vocab": 2047}, {}, ("embed", Kind.panel_int8)),
        ({"head": "untied"}, {}, ("head.out", Kind.panel_planes)),
        ({}, {"group": 16}, ("embed", Kind.panel_planes)),
        ({}, {"bits": "int4"}, ("embed", Kind.panel_planes)),
        ({}, {"embed": "float32", "head": "int8"}, ("head.out", Kind.panel_planes)),
        ({}, {"head": "int4"}, ("head.out", Kind.panel_int4)),
        ({"kind": "encoder", "head": "mlm"}, {}, ("embed", Kind.panel_int8)),
        ({"kind": "encoder", "head": "none"}, {}, ("embed", Kind.panel_int8)),
    ],
)
def test_a_large_head_can_be_screened(changes, how, top, tmp_path):
    config = ModelConfig.from_dict({"vocab": 2048, "context": 8, "width": 16, "layers": 1, "heads": 1, **changes})
    found = kinds(export(model_of(config), tmp_path / "m.tlm", **how).path)
    assert found[top[0]] == top[1]
    assert Kind.panel_planes not in {kind for name, kind in found.items() if name != top[0]}


def test_a_ternary_model_keeps_its_integers(tmp_path):
    model = model_of()
    rng = np.random.default_rng(3)
    values = {}
    for name, value in named(model).items():
        if name.startswith("blocks.") and name.endswith("kernel"):
            codes = rng.integers(-1, 2, value.shape)
            values[name] = (codes * np.float32(0.0317)).astype(np.float32)
    assign(model, {**named(model), **values})
    for bits in ("ternary", "ternary2"):
        report = export(model, tmp_path / "m.tlm", bits)
        found = file.read(report.path)
        for name, value in values.items():
            tensor = found.tensors[name.removesuffix(".kernel")]
            np.testing.assert_array_equal(rounding.unpack(tensor).dense(), value.T)
        assert {row.error for row in report.rows if row.name != "embed"} == {0.0}


@pytest.mark.parametrize("scale", ["mean", "median"])
def test_a_trained_technique_keeps_its_integers(scale, tmp_path):
    """Weights and inputs rounded while training; the engine computes the same codes, and so nearly the same logits."""
    plain = model_of(SMALL.replace(bias=True))
    where = r"blocks\.\d+\.(attn|mlp)\.\w+"
    model = edit(plain, where, "ternary", scale=scale)
    path = export(model, tmp_path / "m.tlm", "ternary", embed="float32", cache="float32").path
    found = file.read(path)
    for i, block in enumerate(model.blocks):
        tensor = found.tensors[f"blocks.{i}.mlp.up"]
        np.testing.assert_array_equal(rounding.unpack(tensor).dense(), np.asarray(block.mlp.up.weight()).T)
        assert len(np.unique(np.asarray(block.mlp.up.weight()))) == 3
    assert json.loads(found.tensors["provenance"].data.tobytes())["edits"][0]["technique"] == "ternary"
    assert about(path) == SMALL.replace(bias=True)
    tokens = np.arange(20)
    theirs = np.asarray(model(tokens[None]))[0]
    off = np.abs(Twin(path).logits(tokens) - theirs).max(-1) / np.abs(theirs).max()
    assert np.median(off) < 2e-4
    assert off.max() < 5e-2


# --- what is refused --------------------------------------------------------------------------------------------------


class Doubled(nnx.Module):
    """Twice the matrix: offers what a technique offers."""

    def __init__(self, inner, says=2.0):
        self.inner, self.says, self.bias = inner, says, inner.bias

    def weight(self):
        return self.says * self.inner.weight()

    def __call__(self, x):
        y = 2 * (x @ self.inner.weight())
        return y if self.bias is None else y + self.bias[...]


class Squared(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) ** 2


@pytest.mark.parametrize("bias", [False, True])
def test_what_offers_a_matrix_is_folded(bias, tmp_path):
    model = model_of(SMALL.replace(bias=bias))
    model.blocks[0].attn.o = Doubled(model.blocks[0].attn.o)
    model.blocks[1].mlp.down = Doubled(model.blocks[1].mlp.down)
    tokens = np.arange(20)
    ours = Twin(export(model, tmp_path / "m.tlm", "float32").path).logits(tokens)
    grid.near(ours, np.asarray(model(tokens[None]))[0])


def test_other_modules_are_refused_by_path(tmp_path):
    model = model_of()
    model.blocks[0].attn.v = Squared(model.blocks[0].attn.v)
    model.blocks[1].mlp = Squared(model.blocks[1].mlp)
    with pytest.raises(FormatError) as refused:
        export(model, tmp_path / "m.tlm")
    text = str(refused.value)
    assert "blocks.0.attn.v is a Squared, which offers no weight()" in text
    assert "blocks.1.mlp is a Squared, which the engine does not know" in text
    model = model_of()
    model.blocks[0].attn.v = Doubled(model.blocks[0].attn.v, says=1.0)
    with pytest.raises(
        FormatError, match=r"blocks\.0\.attn\.v is a Doubled, whose output is not x @ weight\(\) \+ bias"
    ):
        export(model, tmp_path / "m.tlm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"bits": "int3"}, r"blocks\.0\.attn\.q: bits = 'int3': must be one of float32, int8"),
        ({"embed": "int5"}, r"embed: bits = 'int5'"),
        ({"only": {"nothing": "int8"}}, "only: 'nothing' matches no matrix; they are embed, blocks"),
        ({"bits": "ternary"}, r"blocks\.0\.attn\.q: 32 of 32 rows are not ternary; .*; and 4 more"),
        ({"group": 24}, "group = 24: must be a multiple of 16"),
        ({"cache": "int4"}, "cache = 'int4': must be one of auto, float32, int8"),
        ({"activations": "float32"}, "they are float32 if and only if"),
        ({"bits": "float32", "activations": "int8"}, "they are float32 if and only if"),
        ({"calibration": []}, "calibration: no tokens"),
        ({"calibration": [[300]]}, "calibration row 0"),
    ],
)
def test_refused(how, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(model_of(), tmp_path / "m.tlm", **how)
    assert not list(tmp_path.iterdir())


def test_an_int8_cache_needs_wide_heads(tmp_path):
    model = model_of(SMALL.replace(heads=4))
    with pytest.raises(FormatError, match="an int8 cache needs a head width that is a multiple of 16, not 8"):
        export(model, tmp_path / "m.tlm", cache="int8")


def test_weights_that_are_not_finite(tmp_path):
    model = model_of()
    model.blocks[0].mlp.up.kernel.set_value(jnp.full_like(model.blocks[0].mlp.up.kernel[...], jnp.nan))
    model.norm.scale.set_value(jnp.full_like(model.norm.scale[...], jnp.inf))
    with pytest.raises(FormatError, match=r"blocks\.0\.mlp\.up: holds values that are not finite"):
        export(model, tmp_path / "m.tlm")


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = export(model_of(), tmp_path / "m.tlm").path
    before = path.read_bytes()
    with pytest.raises(FormatError, match="not ternary"):
        export(model_of(), path, "ternary")
    assert path.read_bytes() == before


# --- what is reported -------------------------------------------------------------------------------------------------


def test_report(tmp_path):
    model = model_of()
    report = export(model, tmp_path / "m.tlm", "int4")
    assert report.bytes == report.path.stat().st_size
    row = {row.name: row for row in report.rows}["blocks.1.mlp.down"]
    assert (row.rows, row.columns, row.bits) == (32, SMALL.hidden, "int4")
    assert row.bytes == 32 * SMALL.hidden // 2 + 4 * 32
    kernel = np.asarray(model.blocks[1].mlp.down.weight()).T
    off = rounding.unpack(file.read(report.path).tensors[row.name]).dense() - kernel
    assert abs(row.error - np.linalg.norm(off) / np.linalg.norm(kernel)) < 1e-6
    assert report.weights == sum(value.size for name, value in named(model).items() if "norm" not in name)
    text = repr(report)
    assert f"{report.weights:,} weights in {report.bits_per_weight:.2f} bits each" in text
    lines = text.splitlines()
    assert len(lines) == 2 + 8  # a line per kind of matrix
    assert any(line.startswith("blocks.*.mlp.down") and "int4" in line for line in lines)
    assert all(len(line) <= 100 for line in lines[1:])


def test_about_finds_two_stories(tmp_path):
    found = file.read(export(model_of(), tmp_path / "m.tlm").path)
    tensors = dict(found.tensors)
    story = json.loads(tensors["provenance"].data.tobytes())
    story["model"]["softcap"] = 3.0
    for text, message in (
        (json.dumps(story), "says two things of its model: softcap differ"),
        ("{", "does not say"),
        ("[1]", "does not say"),
    ):
        tensors["provenance"] = layout.raw(text.encode())
        path = file.write(tmp_path / "other.tlm", found.constants, tensors)
        with pytest.raises(FormatError, match=message):
            about(path)
