"""Whole models in few bits: what is stored is what is said, codes survive, inputs are seen, training is watched."""

import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tinylm
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.data import Batch, Tokens
from tinylm.markup import number
from tinylm.quantization import (
    QuantizationError,
    Spec,
    Watched,
    calibration,
    look,
    mixed,
    quantize,
    switch,
    traces,
    unpacked,
)
from tinylm.quantization.balance import move_scale, pairs
from tinylm.quantization.calibration import Inputs, batches_of, inputs_of
from tinylm.quantization.codes import measured, rounded, stored_bytes
from tinylm.quantization.switching import carry
from tinylm.quantization.watching import heat
from tinylm.shards import write_tokens
from tinylm.techniques import EditError, edit, fold, modules
from tinylm.techniques.ternary import bitnet
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.weights import named, pure
from tinylm.world import World

SMALL = ModelConfig(vocab=40, context=16, width=32, layers=2, heads=2, bias=True)
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 16)).astype(np.int32)
ONE = SMALL.replace(layers=1)
BODY = r"blocks\.\d+\.(attn|mlp)\.\w+"
BODY_OF_ONE = [*(f"blocks.0.attn.{n}" for n in "qkvo"), *(f"blocks.0.mlp.{n}" for n in ("gate", "up", "down"))]


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


def moved(model, seed=0):
    """Every parameter a little elsewhere, as after training, and learned steps no longer where they start."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        change = rng.normal(0, 0.1 if path[-1] == "log_step" else 0.02, value.shape)
        variable.set_value(jnp.asarray(value + change, value.dtype))
    return model


def reloaded(model, folder):
    tinylm.save(model, folder)
    return tinylm.load(folder)


# --- quantize ---------------------------------------------------------------------------------------------------------


def test_eight_bits_cost_next_to_nothing(trained, tmp_path):
    model, texts = trained
    texts = list(texts)
    small, report = quantize(model, [Spec(bits=8), Spec(where="embed", bits=8)], text=iter(texts))
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
    assert list(named(tinylm.Transformer(kept.config))) == list(named(kept))  # so that it can be saved and loaded


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
    "gptq": {"bits": 3, "method": "gptq", "per": 16, "where": r"blocks\.\d\.mlp\..*"},
    "adaround": {"bits": 3, "method": "adaround", "affine": True, "where": r"blocks\.1\.mlp\..*"},
    "smoothquant": {"bits": 4, "balance": "smoothquant", "activations": "int8"},
    "awq": {"bits": 3, "balance": "awq"},
    "static": {"bits": 8, "static": "affine", "static_range": "percentile"},
    "kl": {"where": r".*\.1\.mlp\.up", "per": "tensor", "range": "kl", "static": "symmetric", "static_range": "kl"},
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
    model = tinylm.Transformer(ONE)
    model.blocks[0].attn_norm.scale.set_value(np.geomspace(0.05, 20, 32).astype(np.float32))  # features differ by much
    before = np.asarray(model(TOKENS))
    at = dict(modules(model))
    for kind in ("smoothquant", "awq"):
        wanted = {path: Spec(balance=kind, bits=4) for path in at if path.count(".") == 3 and "norm" not in path}
        assert len(wanted) == 7
        inputs = inputs_of(model, [TOKENS], wanted)
        q, o = inputs["blocks.0.attn.q"].largest.copy(), np.asarray(model.blocks[0].attn.q.kernel[...])
        assert move_scale(model, at.__getitem__, wanted, inputs) == []
        np.testing.assert_allclose(model(TOKENS), before, rtol=2e-3, atol=1e-5)
        if kind == "smoothquant":
            assert q.max() / q.min() > 50 > 1.0
            seen = inputs_of(model, [TOKENS], ["blocks.0.attn.q"])["blocks.0.attn.q"].largest
            assert seen.max() / seen.min() < 0.3 * q.max() / q.min()
            assert np.abs(np.asarray(model.blocks[0].attn.q.kernel[...]) - o).max() > 0
    post = tinylm.Transformer(ONE.replace(block="post", kv_heads=1))
    report = quantize(post, balance="awq", calibration=TOKENS).report
    assert sum("attn.q" in note for note in report.notes) == 1
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
    ((8,), QuantizationError, "spec = 8: give int8"),
    (({"bits": 4},), QuantizationError, "spec = {'bits': 4}: give int8"),
    ((["int8", "int5"],), ConfigError, "no quantization is called 'int5'"),
])  # fmt: skip
def test_what_cannot_be_quantized(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(tinylm.Transformer(SMALL), *arguments)
    with pytest.raises(QuantizationError, match="shape"):
        batches_of(np.zeros((2, 99), np.int32), tinylm.Transformer(SMALL))
    with pytest.raises(ConfigError, match="no setting 'bit'; did you mean 'bits'"):
        quantize(tinylm.Transformer(ONE), bit=4)
    with pytest.raises(QuantizationError, match="give a Transformer"):
        quantize("runs/first", "int8")
    for bad, said in (
        ({"bits": 9}, "bits"),
        ({"where": "("}, "no regular expression"),
        ({"range": "kl"}, "per"),
        ({"bits": 1.58, "affine": True}, "affine"),
    ):
        with pytest.raises(ConfigError, match=said):
            Spec(**bad)


@pytest.mark.parametrize(("tokens", "message"), [
    (TOKENS + 0.5, "are float64 from 0.5 to 39.5"),
    (TOKENS + 40, "from 40 to 79: they must be whole numbers from 0 to 39"),
    (-TOKENS, "from -39 to 0"),
    (np.full((2, 3), np.nan), "from nan to nan"),
    ([[1, 2], [3]], "shape"),
    ([[[1, 2], [3]]], "no array"),
    ([TOKENS, "a"], "shape"),
    (5, "calibration = 5: give texts"),
    ([], "calibration is empty"),
])  # fmt: skip
def test_tokens_that_a_model_does_not_have(tokens, message):
    with pytest.raises(QuantizationError, match=message):
        batches_of(tokens, tinylm.Transformer(ONE))


def test_calibration_texts_come_from_a_file_too(trained, tmp_path):
    """As those to evaluate do: a path is never taken for a text."""
    model, _ = trained
    (tmp_path / "texts.txt").write_text("One day, a fox met a bear.")
    for given in (tmp_path / "texts.txt", str(tmp_path / "texts.txt")):
        np.testing.assert_array_equal(batches_of(given, model), batches_of(["One day, a fox met a bear."], model))
    with pytest.raises(FileNotFoundError, match="nofile"):
        batches_of("nofile.txt", model)


def test_weights_that_are_not_finite():
    model = tinylm.Transformer(ONE)
    kernel = model.blocks[0].mlp.up.kernel
    kernel.set_value(kernel[...].at[3, 4].set(np.nan))
    with pytest.raises(QuantizationError, match=r"not finite: blocks\.0\.mlp\.up;"):
        quantize(model, "int8")
    with pytest.raises(EditError, match=r"blocks\.0\.mlp\.up: weights that are not finite"):
        quantize(edit(model, r"blocks\.0\.mlp\.up", "ternary"))


def test_kept_rows_are_from_all_positions(monkeypatch):
    """Every so many tokens would be the first of each row here, which sees nothing but itself."""
    monkeypatch.setattr(calibration, "ROWS", 16)
    tokens = TOKENS.copy()
    tokens[:, 0] = 7
    seen = inputs_of(tinylm.Transformer(ONE), [tokens, tokens], ["blocks.0.attn.q"])["blocks.0.attn.q"]
    assert seen.rows.shape == (16, 32)
    assert len(np.unique(seen.rows, axis=0)) > 4


def test_scale_moves_only_where_everything_that_reads_is_there_and_plain():
    """Out of a norm that a convolution reads too, or out of codes, it cannot."""
    both = Spec(balance="awq")
    encoder = ModelConfig(vocab=40, context=16, width=32, layers=1, heads=1, hidden=64, kind="encoder", block="embbert",
                          positions="none", head="mlm")  # fmt: skip
    assert list(pairs(tinylm.Transformer(encoder), {f"blocks.0.attn.{n}": both for n in "qo"})) == []
    model, wanted = tinylm.Transformer(ONE), {"blocks.0.attn.o": both}
    assert [pair.source for pair in pairs(model, wanted)] == ["blocks.0.attn.v"]
    assert list(pairs(edit(model, r"blocks\.0\.attn\.v", "ternary"), wanted)) == []


# --- codes of trained models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ternary", "groups", "lsq", "int4", "tables"])
def test_trained_codes_are_what_is_stored(how, tmp_path):
    model = tinylm.Transformer(ONE)
    if how == "tables":
        bitnet(model, tables="ternary", placement="inside")
    else:
        settings = {"ternary": {"scale": "median"}, "groups": {"per": 24, "half": True}, "lsq": {"bits": 3},
                    "int4": {"per": 24, "half": True}}[how]  # fmt: skip
        edit(model, BODY, how if how in ("lsq", "int4") else "ternary", **settings)
    moved(model)
    expected = look(model)
    small, report = quantize(model, text=None)
    # Trained models sum floats; stored ones, where inputs are int8 too, whole numbers.
    np.testing.assert_allclose(small(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    back = reloaded(small, tmp_path / "m")
    np.testing.assert_array_equal(back(TOKENS), small(TOKENS))
    for path, codes in look(back).items():
        np.testing.assert_array_equal(codes.codes, expected[path].codes)
        np.testing.assert_array_equal(np.asarray(codes.scale), expected[path].scale)
    assert all(row.error == 0 for row in report.rows)
    steps = sum(value.size for name, value in named(model).items() if name.endswith("log_step"))
    assert report.before == 4 * (sum(value.size for value in named(model).values()) - steps)  # norms inside count too
    assert report.bits_per_weight < (5 if how in ("lsq", "int4") else 4)
    again = quantize(small).model  # what is codes already stays as it is
    np.testing.assert_array_equal(again(TOKENS), small(TOKENS))
    if how == "ternary":
        assert fold(small).config.edits == ()


# --- shares of bits ---------------------------------------------------------------------------------------------------


def test_a_budget_is_spent_where_it_matters():
    model = moved(tinylm.Transformer(ONE.replace(mlp="relu2", positions="none", qk_norm=False)))  # soon compiled
    found = traces(model, TOKENS, probes=4)
    assert set(found) >= {"embed", "blocks.0.attn.q", "blocks.0.mlp.down"}
    lowest, highest = (quantize(model, Spec(bits=b)).report for b in (2, 8))
    least, most = (sum(r.bytes for r in report.rows) for report in (lowest, highest))
    budget = least + (most - least) // 4  # too little for 4 bits everywhere
    specs = mixed(model, TOKENS, budget, sensitivity=found)
    report = quantize(model, specs).report
    assert sum(r.bytes for r in report.rows) <= budget
    assert len({r.levels for r in report.rows}) > 1


@pytest.mark.parametrize("static", ["", "symmetric", "affine"])
def test_shares_count_the_bytes_that_are_stored(static):
    """Without inputs, the step and zero of which take bytes all the same."""
    module, spec = tinylm.Transformer(ONE).blocks[0].mlp.up, Spec(bits=4, static=static)
    x = np.ones((4, 32), np.float32)
    made = rounded(module, spec, Inputs(np.eye(32), 4, x[0], x[0], x[0], x))
    assert measured(module, spec).bytes == stored_bytes(made)


@pytest.mark.parametrize(("settings", "message"), [
    ({"probes": 0}, "probes = 0"),
    ({"calibration": TOKENS[:, :1]}, "single token"),
    ({"sensitivity": {}}, "sensitivity lacks blocks.0.attn.k, "),
    ({"bits": ()}, "bits is empty"),
    ({"budget": float("nan"), "sensitivity": dict.fromkeys(BODY_OF_ONE, 1.0)}, "budget = nan"),
    ({"sensitivity": dict.fromkeys(BODY_OF_ONE, float("inf"))}, "costs that are not finite"),
])  # fmt: skip
def test_shares_that_cannot_be(settings, message):
    with pytest.raises(QuantizationError, match=message):
        mixed(tinylm.Transformer(ONE), **{"calibration": TOKENS, "budget": 20_000, **settings})
    with pytest.raises(QuantizationError, match="predicts next tokens"):
        traces(tinylm.Transformer(ONE.replace(kind="encoder", head="mlm")), TOKENS)


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
    plain = edit(tinylm.Transformer(ONE), r"blocks\.0\.mlp\.up", "ternary")
    other = Watched(plain)
    edit(plain, r"blocks\.0\.mlp\.down", "ternary")
    with pytest.raises(QuantizationError, match=r"\(blocks\.0\.mlp\.down\): make another"):
        other.look()
    assert len(other.history["blocks.0.mlp.up"]) == 1


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


def test_a_run_goes_on_in_fewer_bits(tmp_path):
    model = tinylm.Transformer(ONE)
    trainer = train(model, counting, CONFIG)
    for step in trainer:
        if step.step == 12:
            break
    assert trainer.step == 12
    before = trainer.tensors()
    trainer = switch(trainer, lambda m: bitnet(m, scale="mean"), out=tmp_path / "run")
    assert trainer.step == 12
    after = trainer.tensors()
    name = "blocks.0.mlp.up.kernel"
    inner = name.replace(".kernel", ".inner.kernel")
    np.testing.assert_array_equal(after[f"params.{inner}"], before[f"params.{name}"])
    moments = [n for n in after if n.startswith("opt.") and n.endswith(inner)]
    assert moments
    for moment in moments:
        old = before[moment.replace(inner, name)]
        np.testing.assert_array_equal(after[moment], old)
        assert np.abs(old).max() > 0
    fresh = {name: np.zeros_like(value) for name, value in after.items()}
    reset = carry(before, fresh, keep_optimizer=False)
    np.testing.assert_array_equal(reset[f"params.{inner}"], before[f"params.{name}"])
    assert not any(np.any(reset[moment]) for moment in moments)
    losses = list(trainer.losses)
    list(trainer)
    assert trainer.step == 24
    assert trainer.losses[:12] == losses
    assert [s.step for s in trainer.history] == [4, 8, 12, 16, 20, 24]
    assert np.mean(trainer.losses[-3:]) < losses[-1] * 1.2
    np.testing.assert_array_equal(tinylm.load(tmp_path / "run")(TOKENS), trainer.model(TOKENS))


def test_a_switch_that_fails_changes_nothing(tmp_path):
    (tmp_path / "kept.txt").write_text("")
    model = tinylm.Transformer(ONE)
    trainer = train(model, counting, CONFIG)
    with pytest.raises(FileExistsError, match=r"kept\.txt"):
        switch(trainer, bitnet, out=tmp_path)
    assert model.config == ONE
    assert list(named(model)) == list(named(tinylm.Transformer(ONE)))
    with pytest.raises(QuantizationError, match="change gave another model"):
        switch(trainer, lambda model: fold(model))


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
