"""Whole models in few bits: what is stored is what is said, codes survive, inputs are seen, training is watched."""

import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest

import tinylm
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.data import Batch, Tokens
from tinylm.markup import number
from tinylm.quantization import QuantizationError, Spec, Watched, look, mixed, quantize, switch, traces, unpacked
from tinylm.quantization.balance import balance
from tinylm.quantization.calibration import batches_of, inputs_of
from tinylm.quantization.watching import heat
from tinylm.shards import write_tokens
from tinylm.techniques import edit, fold, modules
from tinylm.techniques.ternary import bitnet
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.weights import named, pure
from tinylm.world import World

SMALL = ModelConfig(vocab=40, context=16, width=32, layers=2, heads=2, bias=True)
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 16)).astype(np.int32)
ONE = SMALL.replace(layers=1)
BODY = r"blocks\.\d+\.(attn|mlp)\.\w+"


def counting(step):
    rng = np.random.default_rng(step)
    rows = (rng.integers(0, 40, (8, 1)) + np.arange(17)) % 40
    return Batch(rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32))


CONFIG = TrainConfig(steps=24, optimizer="adamw", learning_rate=1e-2, warmup=3, log_every=4, batch=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model that has learned something, and text it has not seen."""
    tokenizer = Tokenizer.train(World().texts(40), vocab=300)
    folder = tmp_path_factory.mktemp("shards")
    write_tokens(World().texts(30), tokenizer, folder)
    config = ModelConfig(vocab=300, context=64, width=48, layers=2, heads=2)
    model = tinylm.Transformer(config, tokenizer=tokenizer)
    list(train(model, Tokens.open(folder, "train"), CONFIG.replace(steps=120, learning_rate=6e-3, log_every=40)))
    return model, World(seed=9).texts(4)


def reloaded(model, folder):
    tinylm.save(model, folder)
    return tinylm.load(folder)


# --- quantize ---------------------------------------------------------------------------------------------------------


def test_eight_bits_cost_next_to_nothing(trained, tmp_path):
    model, texts = trained
    texts = list(texts)
    small, report = quantize(model, [Spec(bits=8), Spec(where="embed", bits=8)], text=texts)
    assert report.bits_before < 3.5  # it has learned: 300 tokens at random are more than 3 bits per byte
    assert abs(report.bits_after - report.bits_before) < 0.005 * report.bits_before
    back = reloaded(small, tmp_path / "m")
    assert tinylm.evaluate(back, texts).bits_per_byte == report.bits_after
    stored = sum(np.asarray(x).nbytes for x in named(back).values())
    assert report.bytes == stored
    assert stored <= (tmp_path / "m" / "model.safetensors").stat().st_size < stored + 10_000
    assert 0.25 < report.bytes / report.before < 0.3
    assert named(model)["embed.table"].dtype == np.float32  # the model itself is as it was


def test_codes_are_unpacked_once_to_evaluate(trained):
    """What is evaluated is a plain model again, so the program that evaluated the floats does for it too."""
    model, _ = trained
    small = quantize(model, [Spec(bits=4), Spec(where="embed", bits=8)]).model
    plain = unpacked(small)
    assert pure(plain)[0] == pure(model)[0]
    tokens = TOKENS % 300
    np.testing.assert_allclose(plain(tokens), small(tokens), rtol=1e-5, atol=1e-5)
    assert any("packed" in name for name in named(small))  # which is as it was
    rounding = quantize(model, [Spec(bits=4), Spec(where=r".*\.mlp\..*", bits=8, activations="int8")]).model
    kept = unpacked(rounding)
    assert {name.split(".")[2] for name in named(kept) if name.endswith("packed")} == {"mlp"}
    np.testing.assert_allclose(kept(tokens), rounding(tokens), rtol=1e-5, atol=1e-4)


def test_fewer_bits_lose_more_and_take_less(trained):
    model, _ = trained
    reports = [quantize(model, Spec(bits=bits, range="mse")).report for bits in (8, 6, 4, 3, 2, 1.58)]
    for more, less in itertools.pairwise(reports):
        assert less.bytes < more.bytes
        assert sum(r.error for r in less.rows) > sum(r.error for r in more.rows)
    assert 1.6 < reports[-1].bits_per_weight < 2.4  # a scale per output weighs much in so small a model
    assert reports[-1].rows[0].histogram.sum() == reports[-1].rows[0].weights
    assert "levels" in repr(reports[0])
    assert "<svg" in reports[0]._repr_html_() or "<table" in reports[0]._repr_html_()
    assert reports[-1].to_dict()["bytes"] == reports[-1].bytes


METHODS = {
    "gptq": {"bits": 3, "method": "gptq", "per": 16},
    "adaround": {"bits": 3, "method": "adaround", "affine": True, "where": r"blocks\.1\.mlp\..*"},
    "smoothquant": {"bits": 4, "balance": "smoothquant", "activations": "int8"},
    "awq": {"bits": 3, "balance": "awq"},
    "static": {"bits": 8, "static": "affine", "static_range": "percentile"},
    "kl": {"where": r".*\.mlp\..*", "per": "tensor", "range": "kl", "static": "symmetric", "static_range": "kl"},
    "split": {"bits": 2, "method": "split"},
    "kmeans": {"bits": 4, "method": "kmeans"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_model_that_reloads_bit_for_bit(name, trained, tmp_path):
    model, _ = trained
    data = np.random.default_rng(1).integers(0, 300, (6, 64)).astype(np.int32)
    small, report = quantize(model, calibration=data, **METHODS[name])
    assert [r.name for r in report.rows] == [p for p, m in modules(small) if type(m).__name__ == "Quantized"]
    assert all(r.output_error is not None and r.output_error < 0.6 for r in report.rows)
    back = reloaded(small, tmp_path / "m")
    np.testing.assert_array_equal(back(data), small(data))
    assert report.bytes == sum(np.asarray(x).nbytes for x in named(small).values())
    if name in ("gptq", "adaround"):
        spec = {**METHODS[name], "method": "nearest"}
        plain = quantize(model, calibration=data, **spec).report
        assert sum(r.output_error for r in report.rows) < sum(r.output_error for r in plain.rows)


def test_moving_scale_changes_nothing_before_rounding():
    model = tinylm.Transformer(SMALL)
    for i in range(2):  # a norm whose features differ by much
        model.blocks[i].attn_norm.scale.set_value(np.geomspace(0.05, 20, 32).astype(np.float32))
    before = np.asarray(model(TOKENS))
    at = dict(modules(model))
    for kind in ("smoothquant", "awq"):
        wanted = {path: Spec(balance=kind, bits=4) for path in at if path.count(".") == 3 and "norm" not in path}
        assert len(wanted) == 14
        inputs = inputs_of(model, [TOKENS], wanted)
        q, o = inputs["blocks.0.attn.q"].largest.copy(), np.asarray(model.blocks[0].attn.q.kernel[...])
        assert balance(model, at.__getitem__, wanted, inputs) == []
        np.testing.assert_allclose(model(TOKENS), before, rtol=2e-3, atol=1e-5)
        if kind == "smoothquant":
            assert q.max() / q.min() > 50 > 1.0
            seen = inputs_of(model, [TOKENS], ["blocks.0.attn.q"])["blocks.0.attn.q"].largest
            assert seen.max() / seen.min() < 0.3 * q.max() / q.min()
            assert np.abs(np.asarray(model.blocks[0].attn.q.kernel[...]) - o).max() > 0
    post = tinylm.Transformer(SMALL.replace(block="post", kv_heads=1))
    report = quantize(post, balance="awq", calibration=TOKENS).report
    assert sum("attn.q" in note for note in report.notes) == 2
    assert not any("mlp.down" in note for note in report.notes)


def test_the_inputs_are_those_of_the_forward_pass():
    model, seen = tinylm.Transformer(SMALL), {}
    model(TOKENS, tap=tinylm.recording(seen, r"blocks\.1\.(attn_norm|mlp\.hidden)"))
    found = inputs_of(model, [TOKENS[:4], TOKENS[4:]], ["blocks.1.attn.k", "blocks.1.mlp.down", "embed"])
    assert list(found) == ["blocks.1.attn.k", "blocks.1.mlp.down"]
    x = np.asarray(seen["blocks.1.mlp.hidden"]).reshape(128, -1)
    got = found["blocks.1.mlp.down"]
    np.testing.assert_allclose(got.hessian, 2 * x.T @ x / 128, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(got.largest, np.abs(x).max(0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(got.mean, np.abs(x).mean(0), rtol=1e-4, atol=1e-7)
    assert got.tokens == 128


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (("int3",), ConfigError, "no quantization is called 'int3'; did you mean 'int2'|'int4'|'int8'"),
    ((None,), QuantizationError, "no codes of its own"),
    ((Spec(where="blocks.7"),), QuantizationError, "no matrix matches 'blocks.7'"),
    ((Spec(method="gptq"),), QuantizationError, "give calibration="),
])  # fmt: skip
def test_what_cannot_be_quantized(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(tinylm.Transformer(SMALL), *arguments)
    with pytest.raises(QuantizationError, match="shape"):
        batches_of(np.zeros((2, 99), np.int32), tinylm.Transformer(SMALL))
    for bad, said in (({"bits": 9}, "bits"), ({"range": "kl"}, "per"), ({"bits": 1.58, "affine": True}, "affine")):
        with pytest.raises(ConfigError, match=said):
            Spec(**bad)


# --- codes of trained models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ternary", "groups", "lsq", "int4", "tables"])
def test_trained_codes_are_what_is_stored(how, tmp_path):
    model = tinylm.Transformer(ONE)
    if how == "tables":
        bitnet(model, tables="ternary", placement="inside")
    else:
        settings = {"ternary": {"scale": "median"}, "groups": {"per": 24, "half": True}, "lsq": {"bits": 3},
                    "int4": {"per": 24, "half": True, "scale": "mse"}}[how]  # fmt: skip
        edit(model, BODY, how if how in ("lsq", "int4") else "ternary", **settings)
    list(train(model, counting, CONFIG.replace(steps=4)))
    expected = look(model)
    small, report = quantize(model, text=None)
    np.testing.assert_array_equal(small(TOKENS), model(TOKENS))
    back = reloaded(small, tmp_path / "m")
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))
    for path, codes in look(back).items():
        np.testing.assert_array_equal(codes.codes, expected[path].codes)
        np.testing.assert_array_equal(np.asarray(codes.scale), expected[path].scale)
    assert all(row.error == 0 for row in report.rows)
    assert report.bits_per_weight < (5 if how in ("lsq", "int4") else 4)
    again = quantize(small).model  # what is codes already stays as it is
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    if how == "ternary":
        assert fold(small).config.edits == ()


# --- shares of bits ---------------------------------------------------------------------------------------------------


def test_a_budget_is_spent_where_it_matters():
    model = tinylm.Transformer(SMALL.replace(bias=False))
    list(train(model, counting, CONFIG))
    found = traces(model, TOKENS, probes=4)
    assert set(found) >= {"embed", "blocks.0.attn.q", "blocks.1.mlp.down"}
    lowest, highest = (quantize(model, Spec(bits=b)).report for b in (2, 8))
    budget = (sum(r.bytes for r in lowest.rows) + sum(r.bytes for r in highest.rows)) // 2
    specs = mixed(model, TOKENS, budget, sensitivity=found)
    report = quantize(model, specs).report
    assert sum(r.bytes for r in report.rows) <= budget
    assert len({r.levels for r in report.rows}) > 1


# --- watching and switching -------------------------------------------------------------------------------------------


def test_codes_are_watched_while_they_train():
    model = edit(tinylm.Transformer(ONE), BODY, "ternary")
    trainer = train(model, counting, CONFIG)
    seen = Watched(trainer)
    kept = look(model)
    for _ in trainer:
        seen.look()
    up = seen.history["blocks.0.mlp.up"]
    assert [entry.step for entry in up] == [0, 4, 8, 12, 16, 20, 24]
    assert up[0].changed == 0 == up[0].drift
    assert sum(entry.changed for entry in up) > 0.01
    now, first = look(model)["blocks.0.mlp.up"], kept["blocks.0.mlp.up"]
    assert up[-1].zeros == pytest.approx((now.codes == 0).mean())
    assert up[-1].drift == pytest.approx(abs(np.log(now.scale / first.scale)).mean(), rel=1e-4)
    assert "mlp.up" in repr(seen)
    assert seen._repr_html_().count("<svg") == 2  # codes, and scales
    factor = np.exp(
        np.average([own[-1].drift for own in seen.history.values()], weights=[c.size for c, *_ in kept.values()])
    )
    assert f"blocks.0 {number(factor)}" in seen._repr_html_()
    assert "sign flips" in repr(seen.flips("blocks.0.mlp.up"))
    with pytest.raises(QuantizationError, match="no codes at 'blocks.9'"):
        seen.flips("blocks.9")
    with pytest.raises(QuantizationError, match="no matrix of this model has codes"):
        Watched(tinylm.Transformer(ONE))


def test_sign_flips_go_through_zero_too():
    model = edit(tinylm.Transformer(ONE), r"blocks\.0\.mlp\.up", "ternary")
    seen, kernel = Watched(model), model.blocks[0].mlp.up.inner.kernel
    w = np.asarray(kernel[...]).copy()
    w[0, 0], w[1, 1] = 1.0, 1.0
    kernel.set_value(jnp.asarray(w))
    first = seen.look()["blocks.0.mlp.up"].flipped  # whatever these two were before
    before = {k: v.copy() for k, v in seen.flipped.items()}["blocks.0.mlp.up"]
    assert first == pytest.approx(before.mean())
    for value in (0.0, -1.0, -1.0, 0.0, 1.0):
        w[0, 0] = value
        kernel.set_value(jnp.asarray(w))
        seen.look()
    more = seen.flipped["blocks.0.mlp.up"] - before
    assert (more[0, 0], more.sum()) == (2, 2)


def test_a_heat_map_shows_where():
    values = np.zeros((100, 80))
    values[:50, :40] = 3
    values[50:, :40] = 1
    picture = heat(values, "flips")
    shades = re.findall(r'<path d="(.*?)".*?opacity="(.*?)"', picture.html)
    assert [(path.count("z"), float(opacity)) for path, opacity in shades] == [(400, 0.333), (400, 1.0)]
    assert "M0 0h" in shades[1][0]  # the upper left
    assert "most 3" in picture.text
    assert "<path" not in heat(np.zeros((3, 3)), "none").html
    assert len(heat(np.random.default_rng(0).random((200, 200)), "").html) < 40_000


def test_many_matrices_take_few_rows():
    """Those of one name in all blocks become one row, with their mean."""
    seen = Watched(edit(tinylm.Transformer(ONE.replace(layers=3)), BODY, "ternary"))
    assert len(seen.history) > 16
    zeros = np.mean([own[0].zeros for path, own in seen.history.items() if path.endswith("mlp.up")])
    assert f"blocks.*.mlp.up    {100 * zeros:.2f} %" in seen.picture().text
    assert "blocks.1" not in seen.picture().text


def test_the_curves_are_of_the_matrices_with_few_levels():
    """A table in int8 has hardly a zero, and would hide how many the ternary ones have."""
    model = edit(edit(tinylm.Transformer(ONE), r"blocks\.0\.mlp\.up", "ternary"), "embed", "int8")
    seen = Watched(model)
    size = {path: codes.codes.size for path, codes in look(model).items() if path != "embed"}
    zeros = sum(seen.history[path][0].zeros * n for path, n in size.items()) / sum(size.values())
    assert seen.history["embed"][0].zeros < 0.1
    assert f"% zero {number(100 * zeros)}" in seen._repr_html_()


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_goes_on_in_fewer_bits(keep, tmp_path):
    model = tinylm.Transformer(ONE)
    trainer = train(model, counting, CONFIG)
    for step in trainer:
        if step.step == 12:
            break
    assert trainer.step == 12
    before = trainer.tensors()
    trainer = switch(trainer, lambda m: bitnet(m, scale="mean"), keep_optimizer=keep, out=tmp_path / "run")
    assert trainer.step == 12
    after = trainer.tensors()
    name = "blocks.0.mlp.up.kernel"
    inner = name.replace(".kernel", ".inner.kernel")
    np.testing.assert_array_equal(after[f"params.{inner}"], before[f"params.{name}"])
    moments = [n for n in after if n.startswith("opt.") and n.endswith(inner)]
    assert moments
    for moment in moments:
        old = before[moment.replace(inner, name)]
        np.testing.assert_array_equal(after[moment], old if keep else np.zeros_like(old))
    losses = list(trainer.losses)
    list(trainer)
    assert trainer.step == 24
    assert trainer.losses[:12] == losses
    assert [s.step for s in trainer.history] == [4, 8, 12, 16, 20, 24]
    assert np.mean(trainer.losses[-3:]) < losses[-1] * 1.2
    np.testing.assert_array_equal(tinylm.load(tmp_path / "run")(TOKENS), trainer.model(TOKENS))


def test_a_second_stage_has_settings_of_its_own():
    """Halfway to another rate and no decay, with the optimiser's state: bit for bit what a run with those would do."""
    trainer = train(tinylm.Transformer(ONE), counting, CONFIG.replace(schedule="linear"))
    for step in trainer:
        if step.step == 12:
            break
    later = trainer.config.replace(learning_rate=3e-3, weight_decay=0.0)
    second = switch(trainer, config=later)
    other = train(tinylm.Transformer(ONE), counting, later)
    other.adopt(trainer.tensors())
    list(second)
    list(other)
    assert second.losses[12:] == other.losses
    rates = [s.learning_rate for s in second.history]
    assert rates[3] < 0.5 * rates[2]
