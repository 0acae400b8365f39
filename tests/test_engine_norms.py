"""Models whose matrices have norms of their own, as BitNet's do: the same integers in every engine as in training."""

import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_model import random_params

from tinylm import native
from tinylm.config import ModelConfig
from tinylm.engine import Engine, file, layout, rounding
from tinylm.engine.export import export
from tinylm.engine.twin import Twin
from tinylm.formats import FormatError
from tinylm.model import Transformer, shapes
from tinylm.techniques import edit
from tinylm.techniques.ternary import bitnet
from tinylm.tokenizer import Tokenizer
from tinylm.weights import assign, named

SMALL = {"vocab": 300, "context": 32, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 40}
MODELS = {
    "llama": {},
    "parallel": {"block": "parallel", "norm": "layernorm", "mlp": "gelu", "bias": True},
    "post": {"block": "post", "norm": "layernorm", "mlp": "relu2"},
    "odd": {"width": 20, "hidden": 23, "head_width": 6, "mlp": "geglu"},
    "encoder": {"kind": "encoder", "head": "mlm", "norm": "layernorm"},
}
PLACEMENTS = ("none", "inside", "sub", "layernorm")
CASES = [(name, placement) for name in MODELS for placement in PLACEMENTS if (name, placement) != ("post", "inside")]
TOKENS = np.random.default_rng(1).integers(0, 300, 24)
INPUTS = {"q": "attn_norm", "up": "mlp_norm"}


def model_of(name: str, placement: str, **more) -> Transformer:
    """Random everywhere: no norm, bias or scale is 1 or 0."""
    config = ModelConfig(**(SMALL | MODELS[name]))
    model = Transformer(config)
    assign(model, random_params(shapes(config)))
    model = bitnet(model, placement=placement, **more)
    noise = np.random.default_rng(2)
    values = {path: np.asarray(value) for path, value in named(model).items()}
    vary = {n: v + noise.normal(0, 0.2, v.shape).astype(np.float32) for n, v in values.items() if ".norm." in n}
    assign(model, values | vary)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model's name, placement) -> the model and its file; made once."""
    folder, made = tmp_path_factory.mktemp("norms"), {}

    def of(name: str, placement: str):
        if (name, placement) not in made:
            model, path = model_of(name, placement), folder / f"{len(made)}.tlm"
            export(model, path, "ternary", embed="float32", cache="float32")
            made[name, placement] = model, path
        return made[name, placement]

    return of


@pytest.mark.parametrize(("name", "placement"), CASES)
def test_the_file_holds_what_was_trained(exported, name, placement):
    model, path = exported(name, placement)
    tensors = file.read(path).tensors
    for i, block in enumerate(model.blocks):
        for part, own in (("attn", "q"), ("attn", "o"), ("mlp", "up"), ("mlp", "down")):
            module, full = getattr(getattr(block, part), own), f"blocks.{i}.{part}.{own}"
            codes, found = module.rounded(), rounding.unpack(tensors[full])
            np.testing.assert_array_equal(found.codes, np.asarray(codes.codes).T)
            assert set(found.scales.reshape(-1).tolist()) == {float(codes.scale[0, 0])}
            reads = own in ("q", "up")
            kinds = {"none": "", "inside": "scale", "sub": "" if reads else "scale", "layernorm": "scale bias"}
            assert {n for n in ("scale", "bias") if f"{full}.norm.{n}" in tensors} == set(kinds[placement].split())
            if kinds[placement] == "scale":
                np.testing.assert_array_equal(tensors[f"{full}.norm.scale"].values[0], module.norm.scale[...])
        assert (f"blocks.{i}.attn_norm.scale" in tensors) == (placement != "inside")
        assert (f"blocks.{i}.mlp_norm.bias" in tensors) == (placement != "inside" and model.config.norm == "layernorm")


@pytest.mark.parametrize(("name", "placement"), CASES)
def test_the_twin_computes_what_was_trained(exported, name, placement):
    """The codes of what the first block reads, their exact sums, and nearly the same logits."""
    model, path = exported(name, placement)
    twin, block = Twin(path), model.blocks[0]
    seen = dict(twin.integers(TOKENS))
    x = model.embed(jnp.asarray(TOKENS))
    x = x if model.config.block == "post" else block.attn_norm(x)
    for own in "qkv":
        module = getattr(block.attn, own)
        y = np.asarray(x if module.norm is None else module.norm(x))
        codes = np.rint(y * (127 / np.abs(y).max(-1, keepdims=True))).astype(int)
        ours = seen[f"blocks.0.attn.{own}.codes"].astype(int)
        assert np.abs(ours - codes).max() <= 1
        assert (ours != codes).mean() < 2e-3
        same = (ours == codes).all(1)
        sums = codes @ np.asarray(module.rounded().codes, int)
        np.testing.assert_array_equal(seen[f"blocks.0.attn.{own}.sums"][0][same], sums[same])
    theirs = np.asarray(model(TOKENS[None]))[0]
    off = np.abs(twin.logits(TOKENS) - theirs).max(-1) / np.abs(theirs).max()
    assert np.median(off) < 2e-3
    assert off.max() < 0.1


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
@pytest.mark.parametrize(("name", "placement"), CASES)
@pytest.mark.parametrize("bits", ["ternary", "float32"])
def test_native_code_computes_what_the_twin_does(exported, name, placement, bits, tmp_path):
    model, path = exported(name, placement)
    if bits != "ternary":
        path = export(model, tmp_path / "m.tlm", bits).path
    for tokens in (TOKENS[:2].tolist(), TOKENS.tolist()):
        expected = Twin(path).logits(tokens)
        for threads, kernels in ((1, None), (2, None), (1, "scalar")):
            np.testing.assert_array_equal(Engine(path, threads=threads, kernels=kernels).logits(tokens), expected)
    if model.config.kind == "decoder":
        texts = [list(Engine(path, threads=n, speculate=7 * n - 7).ids([1, 2], tokens=40, seed=3)) for n in (1, 2)]
        assert texts[0] == texts[1] == list(Twin(path).generate([1, 2], 40, temperature=0.8, seed=3))


def test_norms_that_differ_are_not_shared(exported, tmp_path):
    """q, k and v read one input: what one norm made of it serves the others only where they have the same norm."""
    _, path = exported("llama", "inside")
    tensors = dict(file.read(path).tensors)
    scales = [tensors[f"blocks.0.attn.{own}.norm.scale"].values for own in "qkv"]
    assert all((scales[i] != scales[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    for alike in (("q", "k"), ("q", "v"), ("k", "v"), ("q", "k", "v")):
        changed = tensors | {
            f"blocks.0.attn.{own}.norm.scale": tensors[f"blocks.0.attn.{alike[0]}.norm.scale"] for own in alike
        }
        new = file.write(tmp_path / "m.tlm", file.read(path).constants, changed)
        np.testing.assert_array_equal(Engine(new).logits(TOKENS), Twin(new).logits(TOKENS))


# ---- tables and other techniques


def test_tables_keep_their_codes(tmp_path):
    """An int8 table of a large vocabulary would be planes, which hold less: its codes come first."""
    config = ModelConfig(**(SMALL | {"vocab": 2100}))
    model = Transformer(config)
    assign(model, random_params(shapes(config)))
    model = bitnet(model, tables="int8")
    tensors = file.read(export(model, tmp_path / "m.tlm", "ternary").path).tensors
    assert tensors["embed"].kind == layout.Kind.panel_int8
    np.testing.assert_array_equal(rounding.unpack(tensors["embed"]).dense(), np.asarray(model.embed.weight()))
    kept = export(bitnet(model_of("llama", "none"), tables="ternary"), tmp_path / "t.tlm", "ternary", embed="ternary")
    assert {row.error for row in kept.rows} == {0.0}


@pytest.mark.parametrize("settings", [{"per": 16, "half": True}, {"per": "channel"}, {"per": "tensor"}])
@pytest.mark.parametrize("bits", ["ternary", "int4", "int8"])
def test_codes_fit_into_more_bits(settings, bits, tmp_path):
    """Without searching for a scale anew: the group is the technique's, whatever the export's."""
    config = ModelConfig(**SMALL)
    model = Transformer(config)
    assign(model, random_params(shapes(config)))
    model = edit(model, r"blocks\.\d+\.(attn|mlp)\.\w+", "ternary", **settings)
    for group in (0, 32):
        report = export(model, tmp_path / "m.tlm", bits, group=group, embed="float32")
        assert {row.error for row in report.rows} == {0.0}
        assert report.rows[1].group == (16 if settings["per"] == 16 else 0)
    found = rounding.unpack(file.read(report.path).tensors["blocks.0.mlp.up"])
    np.testing.assert_array_equal(found.codes, np.asarray(model.blocks[0].mlp.up.rounded().codes).T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "sub", "norm_eps": 1e-3}, "takes no|norm_eps"),
        ({"per": 16}, "blocks.0.attn.q: its scales, one per 16 inputs, are no float16 numbers.*half=True"),
        ({"ramp": 10}, "whose output is not what its codes and scales give .a ramp that is not finished"),
        ({"activations": "int4"}, "was trained with inputs rounded as 'int4'.*activations=\"int8\""),
    ],
)
def test_what_cannot_be_exact_is_refused(settings, message, tmp_path):
    model = Transformer(ModelConfig(**SMALL))
    assign(model, random_params(shapes(model.config)))
    own = {"norm": "rmsnorm", "norm_eps": settings["norm_eps"]} if "norm_eps" in settings else settings
    model = edit(model, r"blocks\.\d+\.(attn|mlp)\.\w+", "ternary", **own)
    with pytest.raises(FormatError, match=message):
        export(model, tmp_path / "m.tlm", "ternary")
    assert not list(tmp_path.iterdir())


def test_inputs_of_another_kind_are_taken_when_asked_for(tmp_path):
    model = model_of("llama", "layernorm", preset="faithful")
    with pytest.raises(FormatError, match="int8_128"):
        export(model, tmp_path / "m.tlm", "ternary")
    path = export(model, tmp_path / "m.tlm", "ternary", activations="int8").path
    theirs = np.asarray(model(TOKENS[None]))[0]
    assert np.median(np.abs(Twin(path).logits(TOKENS) - theirs).max(-1)) < 0.1 * np.abs(theirs).max()


def test_a_norm_taken_away_needs_others(tmp_path):
    model = Transformer(ModelConfig(**SMALL), tokenizer=Tokenizer.train([], kind="byte"))
    model = edit(model, r"blocks\.1\.mlp_norm", "identity")
    with pytest.raises(FormatError, match=r"blocks\.1\.mlp_norm is a Identity, and what reads it has no norm"):
        export(model, tmp_path / "m.tlm")
    with pytest.raises(FormatError, match="calibration: not for matrices with norms"):
        export(model_of("llama", "sub"), tmp_path / "m.tlm", "ternary", calibration=[TOKENS])


def test_static_inputs_are_taken_along(tmp_path):
    model = Transformer(ModelConfig(**SMALL))
    assign(model, random_params(shapes(model.config)))
    model = edit(model, r"blocks\.\d+\.mlp\.up", "quantized", static="symmetric")
    for block in model.blocks:
        block.mlp.up.step.set_value(jnp.full(1, 0.02))
    path = export(model, tmp_path / "m.tlm", "int8", embed="float32").path
    assert file.read(path).tensors["blocks.1.mlp.up.input"].values[0, 0] == np.float32(0.02)
    affine = edit(model, r"blocks\.\d+\.mlp\.down", "quantized", static="affine")
    with pytest.raises(FormatError, match=r"blocks\.0\.mlp\.down was trained with inputs rounded as 'affine'"):
        export(affine, tmp_path / "n.tlm")
    assert export(affine, tmp_path / "n.tlm", activations="int8").rows


def test_a_table_of_values_is_folded(tmp_path):
    model = Transformer(ModelConfig(**SMALL))
    assign(model, random_params(shapes(model.config)))
    model = edit(model, r"blocks\.\d+\.mlp\.up", "quantized", per="table", low=0, levels=4)
    path = export(model, tmp_path / "m.tlm", "float32").path
    np.testing.assert_allclose(Twin(path).logits(TOKENS), np.asarray(model(TOKENS[None]))[0], atol=1e-4, rtol=1e-4)


# ---- what a file must hold


@pytest.mark.parametrize(
    ("name", "placement", "gone", "message"),
    [
        ("llama", "sub", "blocks.0.attn_norm.scale", r"blocks\.0\.attn_norm\.scale"),
        ("llama", "sub", "blocks.1.mlp_norm.scale", r"blocks\.1\.mlp_norm\.scale"),
        ("llama", "inside", "blocks.0.attn.v.norm.scale", r"blocks\.0\.attn_norm\.scale"),
        ("llama", "inside", "blocks.0.mlp.gate.norm.scale", r"blocks\.0\.mlp_norm\.scale"),
        ("llama", "layernorm", "blocks.0.attn.o.norm.scale", r"blocks\.0\.attn\.o\.norm\.bias"),
        ("parallel", "layernorm", "blocks.0.attn_norm.bias", r"blocks\.0\.attn_norm\.bias"),
        ("parallel", "layernorm", "blocks.0.attn_norm.scale", r"blocks\.0\.attn_norm\.bias"),
        ("post", "layernorm", "blocks.0.attn_norm.scale", r"blocks\.0\.attn_norm\.scale"),
    ],
)
def test_both_readers_want_the_norms_that_must_be_there(exported, name, placement, gone, message, tmp_path):
    _, path = exported(name, placement)
    found = file.read(path)
    tensors = {n: t for n, t in found.tensors.items() if n != gone}
    with pytest.raises(FormatError, match=message):
        file.write(tmp_path / "m.tlm", found.constants, tensors)
    if not native.available():
        return
    raw = bytearray(Path(path).read_bytes())  # the native reader: a tensor by another name is not there
    entry = next(at for at in range(320, len(raw), 112) if raw[at:].startswith(gone.encode() + b"\0"))
    raw[entry : entry + 72] = b"grams\0".ljust(72, b"\0")
    struct.pack_into("<I", raw, 24, native.library().tlm_crc32c(bytes(raw[32:]), len(raw) - 32))
    (tmp_path / "m.tlm").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        Engine(tmp_path / "m.tlm")


def test_a_norm_can_be_put_before_any_matrix(exported, tmp_path):
    """And its block's norm then be left out, or stay."""
    _, path = exported("llama", "none")
    found = file.read(path)
    rng = np.random.default_rng(0)
    new = {f"blocks.0.mlp.{n}.norm.scale": layout.floats(rng.uniform(0.5, 1.5, 32)) for n in ("gate", "up")}
    for tensors in (found.tensors, {n: t for n, t in found.tensors.items() if n != "blocks.0.mlp_norm.scale"}):
        made = file.write(tmp_path / "m.tlm", found.constants, {**tensors, **new})
        np.testing.assert_array_equal(Engine(made).logits(TOKENS), Twin(made).logits(TOKENS))
