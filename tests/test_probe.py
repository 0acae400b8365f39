"""Looking inside: sweeps against one patch at a time, attribution against closed forms, heads built by hand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import probe, sites
from tinylm.config import ModelConfig
from tinylm.data import DataError, Tokens
from tinylm.model import Transformer
from tinylm.probe.activations import record, seen
from tinylm.probe.attention import attention_browser, scores_of
from tinylm.probe.patching import baseline
from tinylm.probe.rotation import rotations, turn
from tinylm.probe.units import neuron_browser, neurons
from tinylm.taps import ablating, patching, steering
from tinylm.techniques import EditError, edit
from tinylm.weights import assign, bind, named, pure

SMALL = {"vocab": 23, "context": 12, "width": 16, "layers": 2, "heads": 2, "init_std": 0.3}
RNG = np.random.default_rng(0)
CLEAN = RNG.integers(0, 23, (2, 7), dtype=np.int32)
CORRUPT = np.where(np.arange(7) == 3, (CLEAN + 5) % 23, CLEAN).astype(np.int32)
TOKENS = Tokens.from_array(RNG.integers(0, 23, 300), vocab=23)
METRIC = probe.logit_difference([3, 4], [5, 6])
MODEL = Transformer(ModelConfig(**SMALL))
OTHERS = {
    "gpt2": {"norm": "layernorm", "mlp": "gelu_tanh", "positions": "learned", "bias": True},
    "neox": {"norm": "layernorm", "mlp": "gelu", "block": "parallel", "bias": True, "head": "untied"},
    "grouped": {"kv_heads": 1},
    "encoder": {"kind": "encoder", "norm": "layernorm", "positions": "learned", "token_types": 2},
}

# --- taps -------------------------------------------------------------------------------------------------------------


def run(tap, tokens=CLEAN):
    return np.asarray(MODEL(tokens, tap=tap))


@pytest.mark.parametrize("by", ["zero", "mean", "resample", "given"])
def test_ablating(by):
    values = np.asarray(seen(MODEL, CLEAN, r"blocks\.1\.attn\.heads")["blocks.1.attn.heads"])
    given = {"blocks.1.attn.heads": values.mean((0, 1)) * 2}
    new = values.copy()
    other = {"zero": 0 * values, "mean": np.broadcast_to(values.mean((0, 1)), values.shape)}
    other |= {"resample": values[[1, 0]], "given": np.broadcast_to(given["blocks.1.attn.heads"], values.shape)}
    new[:, :, 1] = other[by][:, :, 1]
    found = run(ablating(r"blocks\.1\.attn\.heads", given if by == "given" else by, np.s_[:, :, 1]))
    np.testing.assert_allclose(found, run(patching({"blocks.1.attn.heads": jnp.asarray(new)})), atol=1e-5)
    assert np.abs(found - run(patching({}))).max() > 1e-3


def test_steering():
    values = seen(MODEL, CLEAN, r"blocks\.0\.resid")["blocks.0.resid"]
    arrow = RNG.standard_normal(16).astype(np.float32)
    found = run(steering({"blocks.0.resid": arrow}, 2.0, np.s_[:, 3:]))
    by_hand = np.array(values)
    by_hand[:, 3:] += 2 * arrow
    np.testing.assert_allclose(found, run(patching({"blocks.0.resid": jnp.asarray(by_hand)})), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: run(ablating("blocks.9.mlp")), "no site matches"),
        (lambda: ablating("x", "median"), "by = 'median'"),
        (lambda: run(ablating("blocks.0.mlp", {"other": 0})), "no value to put at 'blocks.0.mlp'"),
        (lambda: run(steering({"blocks.9.mlp": np.zeros(16)})), "no site 'blocks.9.mlp' to steer"),
        (lambda: run(steering({"blocks.0.mlp": np.zeros(3)})), "cannot steer blocks.0.mlp"),
    ],
)
def test_taps_refuse(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_recording_to_disk_is_recording(tmp_path):
    tokens = RNG.integers(0, 23, (5, 6), dtype=np.int32)
    here, there = record(MODEL, tokens, batch=2), record(MODEL, tokens, batch=2, out=tmp_path)
    assert set(here) == set(there) == {"blocks.0.resid", "blocks.1.resid"}
    assert np.array_equal(np.load(tmp_path / "blocks.1.resid.npy"), here["blocks.1.resid"])
    np.testing.assert_allclose(
        here["blocks.0.resid"], seen(MODEL, tokens, r"blocks\.0\.resid")["blocks.0.resid"], atol=1e-6
    )
    calm = record(MODEL, tokens, batch=5, tap=ablating(r"blocks\.\d+\.(attn|mlp)"))
    np.testing.assert_allclose(calm["blocks.1.resid"], np.asarray(MODEL.embed.weight())[tokens], atol=1e-6)
    with pytest.raises(FileExistsError, match="holds recordings"):
        record(MODEL, tokens, out=tmp_path)


# --- patching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "site"),
    [("heads", "blocks.1.attn.heads"), ("resid_pre", "blocks.0.resid"), ("pattern", "blocks.1.attn.pattern")],
)
def test_a_sweep_is_one_patch_at_a_time(part, site):
    """The slow twin: put one value of the clean run into the corrupt one by hand."""
    found = probe.sweep(MODEL, CLEAN, CORRUPT, METRIC, part, chunk=5)
    clean, corrupt = (seen(MODEL, x, re.escape(site))[site] for x in (CLEAN, CORRUPT))
    graph, params = pure(MODEL)
    forward = jax.jit(lambda p, v: METRIC(bind(graph, p)(CORRUPT, tap=patching({site: v}))))
    for place in (3, 6):
        for head in range(2) if part != "resid_pre" else [None]:
            new = np.array(corrupt)
            at = {"heads": np.s_[:, place, head], "pattern": np.s_[:, head, place], "resid_pre": np.s_[:, place]}[part]
            new[at] = np.asarray(clean)[at]
            own = found[1, place] if head is None else found[1, head, place]
            assert own == pytest.approx(float(forward(params, jnp.asarray(new))), abs=1e-4)


@pytest.mark.parametrize("name", ["neox", "encoder"])
def test_sweeps_on_other_architectures(name):
    model = Transformer(ModelConfig(**SMALL, **OTHERS[name]))
    everything = probe.sweep(model, CLEAN, CORRUPT, METRIC, "resid", positions=False)
    clean, corrupt = (baseline(model, x, METRIC) for x in (CLEAN, CORRUPT))
    np.testing.assert_allclose(everything, clean, atol=1e-4)  # the whole stream of a layer is all there is
    assert abs(clean - corrupt) > 1e-3


def test_paths():
    """To the logits with MLPs held, a head's straight effect is its direct one: the last norm must be told the rest."""
    found = probe.paths(MODEL, CLEAN, CORRUPT, METRIC, freeze_mlps=True)
    graph, params = pure(MODEL)
    kept = r"blocks\.\d+\.(attn\.heads|mlp)"
    clean, corrupt = (seen(MODEL, x, kept) for x in (CLEAN, CORRUPT))
    values = {name: np.array(x) for name, x in corrupt.items()}
    values["blocks.0.attn.heads"][:, :, 1] = np.asarray(clean["blocks.0.attn.heads"])[:, :, 1]
    by_hand = METRIC(bind(graph, params)(CORRUPT, tap=patching({k: jnp.asarray(v) for k, v in values.items()})))
    assert found[0, 1] == pytest.approx(float(by_hand), abs=1e-4)
    through = probe.paths(MODEL, CLEAN, CORRUPT, METRIC, ["blocks.1.attn.q"])
    np.testing.assert_allclose(through[1], baseline(MODEL, CORRUPT, METRIC), atol=1e-4)  # heads after the receiver


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probe.sweep(MODEL, CLEAN, CLEAN[:, :3], METRIC), "equal shape"),
        (lambda: probe.sweep(MODEL, CLEAN, CORRUPT + 99, METRIC), "corrupt"),
        (lambda: probe.sweep(MODEL, CLEAN, CORRUPT, METRIC, "haeds"), "did you mean 'heads'"),
        (lambda: probe.paths(MODEL, CLEAN, CORRUPT, METRIC, ["blocks.7.mlp"]), "no site matches"),
        (lambda: probe.logit_difference([1], [1, 2]), "one pair per row"),
        (lambda: probe.logit_difference([], []), "one pair per row"),
        (lambda: probe.logit_difference([-1], [2]), "right: id -1"),
        (lambda: probe.baseline(MODEL, CLEAN, probe.logit_difference([3, 99], [5, 5])), "right: id 99"),
        (lambda: probe.baseline(MODEL, CLEAN[:1], METRIC), "2 pairs of tokens for 1 rows"),
        (lambda: probe.baseline(MODEL, CLEAN + 99, METRIC), "outside 0..22"),
        (lambda: probe.baseline(MODEL, CLEAN[0], METRIC), "rows of equal shape"),
        (lambda: probe.baseline(MODEL, CLEAN, lambda logits: logits[0, -1]), "must make one number"),
        (lambda: probe.sweep(MODEL, CLEAN, CORRUPT, METRIC, last=0), "last = 0"),
        (lambda: probe.sweep(MODEL, CLEAN, CORRUPT, METRIC, chunk=0), "chunk = 0"),
        (lambda: probe.paths(MODEL, CLEAN, CORRUPT, METRIC, ["logits"]), "None stands for the logits"),
        (lambda: probe.paths(MODEL, CLEAN, CORRUPT, METRIC, "blocks.1.mlp"), "give a list of sites"),
        (lambda: probe.gradient(MODEL, CLEAN, METRIC, "logits"), "a site before them"),
        (lambda: probe.direct(MODEL, CLEAN, last=-2), "last = -2"),
        (lambda: probe.direct(MODEL, CLEAN, [99]), "ids: id 99"),
        (lambda: probe.direct(MODEL, CLEAN[0]), "rows of ids"),
        (lambda: probe.direct(MODEL, CLEAN).table(row=9), "row = 9: there are"),
        (lambda: probe.patterns(MODEL, CLEAN[0]), "rows of ids"),
        (lambda: record(MODEL, CLEAN, batch=0), "batch = 0"),
    ],
)
def test_sweeps_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- attribution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "gpt2", "neox", "encoder", "ternary"])
def test_direct_attribution_adds_up(name):
    model = MODEL if name == "plain" else Transformer(ModelConfig(**SMALL, **OTHERS.get(name, {})))
    if name == "ternary":
        edit(model, r"blocks\.\d+\.(attn|mlp)\.\w+", "ternary")
    found = probe.direct(model, CLEAN, last=2)
    assert found.error < 1e-4
    near = 0.05 if name == "ternary" else 1e-4  # inputs in int8 may round the other way in another program
    np.testing.assert_allclose(found.logits, np.asarray(model(CLEAN))[:, -2:], atol=near)
    assert len([n for n in found.names if ".head." in n]) == 4
    few = probe.direct(model, CLEAN, [4, 2], last=2)
    np.testing.assert_allclose(few.values, found.values[..., [4, 2]], atol=1e-5)
    if name in ("plain", "neox", "grouped"):  # only a bias, or rounding, is left beside the heads
        rest = np.abs(found.of(r"blocks\.\d+\.attn\.rest")).max()
        assert (rest < 1e-4) == (name != "neox" or not named(model)["blocks.0.attn.o.bias"].any())
    assert "logit" in found.table().text


def test_direct_attribution_needs_a_sum():
    for more, message in (({"block": "post"}, "post-norm"), ({"head": "none"}, "more than a matrix")):
        with pytest.raises(DataError, match=message):
            probe.direct(Transformer(ModelConfig(**{**SMALL, **more})), CLEAN)


@pytest.mark.parametrize("front", [False, True])
def test_attribution_and_sweeps_behind_a_front_end_and_a_codebook(front):
    """What the first block reads, and attention in a wrapper: both parts of a sum that must stay whole."""
    more = {"kind": "encoder", "convs": 2, "channels": 4, "kernel": 3, "positions": "learned"} if front else {}
    model = Transformer(ModelConfig(**SMALL, **more))
    if not front:
        edit(model, r"blocks\.\d+\.attn", "codebook")
    found = probe.direct(model, CLEAN, 3)
    assert found.error < 1e-4
    np.testing.assert_allclose(found.logits[..., 0], np.asarray(model(CLEAN))[:, -1:, 3], atol=1e-4)
    everything = probe.sweep(model, CLEAN, CORRUPT, METRIC, "resid_pre", positions=False)
    np.testing.assert_allclose(everything, baseline(model, CLEAN, METRIC), atol=1e-4)
    edit(model, r".*\.(o|down)", "memory_lora")
    assert probe.direct(model, CLEAN, 3).error < 1e-4
    assert neurons(model, CLEAN).top.shape == (64, 2)
    with pytest.raises(EditError, match="LoRAMemory is more than a matrix"):
        edit(model, r".*\.down", "mask")


def test_a_classifier_is_patched_by_its_classes():
    """The head pools all positions, whatever `last` says."""
    more = {"kind": "encoder", "head": "classes", "classes": 3, "positions": "learned", "norm": "layernorm"}
    model = Transformer(ModelConfig(**SMALL, **more))
    metric = probe.logit_difference(2, 0)
    scores = np.asarray(model(CLEAN))
    assert baseline(model, CLEAN, metric) == pytest.approx((scores[:, 2] - scores[:, 0]).mean(), abs=1e-5)
    found = probe.sweep(model, CLEAN, CORRUPT, metric, "resid_pre")
    assert found[0, 3] == pytest.approx(baseline(model, CLEAN, metric), abs=1e-4)
    assert found[0, 0] == pytest.approx(baseline(model, CORRUPT, metric), abs=1e-4)
    for call in (lambda: probe.signal(model, CLEAN), lambda: probe.tuned_lens(model, TOKENS)):
        with pytest.raises(DataError, match='"classes" head predicts no tokens'):
            call()


def test_gradients():
    """By a finite difference, and the closed form: integrated gradients add up to the change of the metric."""
    value = seen(MODEL, CLEAN, "embed")["embed"]
    times = probe.gradient(MODEL, CLEAN, METRIC)
    shift = lambda e: float(METRIC(MODEL(CLEAN, tap=patching({"embed": value * (1 + e)}))))  # noqa: E731
    assert times.sum() == pytest.approx((shift(0.01) - shift(-0.01)) / 0.02, abs=0.02)
    other = seen(MODEL, CORRUPT, "embed")["embed"]
    found = probe.integrated(MODEL, CLEAN, METRIC, baseline=other, steps=24)
    assert found.change == pytest.approx(baseline(MODEL, CLEAN, METRIC) - baseline(MODEL, CORRUPT, METRIC), abs=1e-4)
    assert abs(found.missed) < 1e-3
    assert found.values.shape == value.shape
    assert not found.values[:, 4:].any()  # the same tokens in both texts
    with pytest.raises(DataError, match="at least 1"):
        probe.integrated(MODEL, CLEAN, METRIC, steps=0)


# --- lenses -----------------------------------------------------------------------------------------------------------


def test_lenses():
    lens = probe.logit_lens(MODEL, CLEAN)
    np.testing.assert_allclose(lens.logits[-1], MODEL(CLEAN), atol=1e-5)
    assert lens.divergence()[-1] == 0
    assert lens.surprisal(CLEAN).shape == (3,)
    with pytest.raises(DataError, match="tokens have shape"):
        lens.surprisal(CLEAN[:, 1:])
    tokens = Tokens.from_array(RNG.integers(0, 23, 600), vocab=23)
    tuned = probe.tuned_lens(MODEL, tokens, steps=40, batch=4, length=8, learning_rate=0.01)
    after = tuned(MODEL, CLEAN)
    assert (after.divergence()[:-1] < lens.divergence()[:-1]).all()
    np.testing.assert_allclose(after.logits[-1], lens.logits[-1], atol=1e-5)


# --- attention --------------------------------------------------------------------------------------------------------


def induction_model(vocab=10, context=20):
    """Two layers built by hand: head 0.0 looks one back and copies what it sees, head 1.0 looks for that."""
    token, place, before = slice(0, vocab), slice(vocab, vocab + context), slice(vocab + context, 2 * vocab + context)
    width = 2 * vocab + context
    config = ModelConfig(
        vocab=vocab,
        context=context,
        width=width,
        layers=2,
        heads=1,
        head_width=context,
        positions="learned",
        mlp="relu2",
    )
    model = Transformer(config)
    values = {
        name: np.zeros(x.shape, np.float32) if "scale" not in name else np.array(x) for name, x in named(model).items()
    }
    values["embed.table"][:, token] = np.eye(vocab)
    values["embed_positions.table"][:, place] = np.eye(context)
    q, k = values["blocks.0.attn.q.kernel"], values["blocks.0.attn.k.kernel"]
    q[place, :] = 30 * np.eye(context, k=-1)  # position t asks for t - 1
    k[place, :] = np.eye(context)
    values["blocks.0.attn.v.kernel"][token, :vocab] = np.eye(vocab)
    values["blocks.0.attn.o.kernel"][:vocab, before] = np.eye(vocab)
    values["blocks.1.attn.q.kernel"][token, :vocab] = 30 * np.eye(vocab)
    values["blocks.1.attn.k.kernel"][before, :vocab] = np.eye(vocab)
    assign(model, values)
    return model


def test_a_hand_built_induction_head_scores_one():
    scores = probe.head_scores(induction_model(), half=8, rows=3, begin=9)
    assert scores["previous"][0, 0] == pytest.approx(1, abs=1e-3)
    assert scores["induction"][1, 0] == pytest.approx(1, abs=1e-3)
    assert scores["induction"][0, 0] < 0.1
    with pytest.raises(DataError, match="must fit the context of 20"):
        probe.head_scores(induction_model(), half=11)
    for wrong in ({"half": 4.5}, {"rows": 0}, {"begin": 999}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            probe.head_scores(induction_model(), **{"half": 4, **wrong})


def test_scores_of_patterns_written_down():
    pattern = np.zeros((8, 8))
    for t in range(8):
        pattern[t, {0: 0}.get(t, t - 1 if t % 2 else 0)] = 1
    found = scores_of(pattern, 4)
    assert found["previous"] == pytest.approx(4 / 7)  # 1, 3, 5, 7 of 1..7
    assert found["current"] == pytest.approx(1 / 8)
    assert found["first"] == pytest.approx(4 / 7)  # 1, 2, 4, 6
    assert found["duplicate"] == pytest.approx(1 / 4)  # 4
    assert found["induction"] == 0


def test_browsers_are_small_and_inert():
    ids = CLEAN[0]
    views = [
        attention_browser(MODEL, ids),
        probe.heat_map(RNG.standard_normal((3, 4)), rows=["<b>", "b", "c"], title="t"),
    ]
    found = neurons(MODEL, CLEAN, layer=1, most=2)
    views.append(neuron_browser(found, which=[0, 3]))
    for view in views:
        assert "<svg" in view.html or "neuron 3" in view.html
        assert "<b>" not in view.html.replace("<b>t</b>", "").replace("<b>layer", "")
        assert len(view.html) < 60_000
        assert view.text
    with pytest.raises(DataError, match="no tokenizer"):
        attention_browser(MODEL, "text")
    for wrong in ({"layers": [7]}, {"layers": []}, {"head": (0, 9)}, {"head": (-1, 0)}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            attention_browser(MODEL, ids, **wrong)
    some = probe.heat_map([[1, np.nan], [np.inf, 2]], title="t")
    assert "from 1.00 to 2.00; largest at 1, 1" in some.text
    for values, labels in ((np.full((2, 2), np.nan), []), (np.zeros((2, 2, 2)), []), (np.eye(2), ["a"])):
        with pytest.raises(DataError, match="heat map|labels for 2 rows"):
            probe.heat_map(values, rows=labels)


# --- neurons, linear maps, theory -------------------------------------------------------------------------------------


def test_neurons_keep_the_strongest_contexts():
    tokens = RNG.integers(0, 23, (7, 6), dtype=np.int32)
    found = neurons(MODEL, tokens, layer=1, most=3, batch=2)
    hidden = np.asarray(seen(MODEL, tokens, r"blocks\.1\.mlp\.hidden")["blocks.1.mlp.hidden"])
    peaks = hidden.max(1)
    order = np.argsort(-peaks, axis=0)[:3].T
    assert np.array_equal(found.row, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(peaks.T, order, 1), rtol=1e-5)
    np.testing.assert_allclose(found.mean, hidden.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(found.active, (hidden > 0).mean((0, 1)), atol=1e-6)
    assert hidden[found.row[5, 0], found.position[5, 0], 5] == pytest.approx(found.top[5, 0])


def test_ridge_solves_the_normal_equations():
    x, y = RNG.standard_normal((2, 50, 4)), RNG.standard_normal((2, 50, 3))
    w, b = probe.ridge(x, y, 0.7)
    for i in range(2):
        dx, dy = x[i] - x[i].mean(0), y[i] - y[i].mean(0)
        by_hand = np.linalg.solve(dx.T @ dx + 0.7 * np.eye(4), dx.T @ dy)
        np.testing.assert_allclose(w[i], by_hand, atol=1e-4)
        np.testing.assert_allclose(b[i], y[i].mean(0) - x[i].mean(0) @ by_hand, atol=1e-4)


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_a_probe_reads_what_is_there_and_its_control_does_not(kind):
    labels = RNG.integers(0, 3, 400)
    clear = np.eye(3)[labels] @ RNG.standard_normal((3, 8)) * 3 + RNG.standard_normal((400, 8))
    found = probe.linear_probe(np.stack([clear, RNG.standard_normal((400, 8))]), labels, kind=kind, steps=100)
    assert found.accuracy[0] > 0.9
    assert (found.control < 0.5).all()
    assert found.accuracy[1] < 0.5
    assert found.selectivity[0] > 0.4
    grouped = probe.linear_probe(clear, labels, kind="ridge", types=labels, groups=np.repeat(np.arange(40), 10))
    assert grouped.control[0] > 0.9  # a control label per type can be learned by heart
    for more in ({"groups": [1, 2]}, {"types": [1]}, {"valid": -1}, {"alpha": -1}, {"steps": 0}):
        with pytest.raises(DataError, match=next(iter(more))):
            probe.linear_probe(clear, labels, **more)
    with pytest.raises(DataError, match="not finite"):
        probe.linear_probe(clear * np.nan, labels)
    with pytest.raises(DataError, match="alpha = -1"):
        probe.ridge(clear, clear, -1)
    with pytest.raises(DataError, match=r"y \(400,\)"):
        probe.ridge(clear, labels)
    with pytest.raises(DataError, match="single label"):
        probe.linear_probe(clear, np.zeros(400))


def test_rotation_of_known_maps():
    angle = np.deg2rad(37)
    spin = np.kron(np.eye(3), [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert turn(2 * spin) == pytest.approx((37, 2))
    assert turn(np.eye(4)) == pytest.approx((0, 1))
    found = rotations(MODEL, RNG.integers(0, 23, (30, 12), dtype=np.int32), "last")
    assert found.angle[-1] == pytest.approx(0, abs=0.1)  # from the last stream to itself
    assert found.fit[-1] > 0.99


def test_signal_of_a_wide_network_at_its_start():
    """Mean squares add up: an attention-free block adds hidden * E[relu(z)^4] * std^2, z of variance width * std^2."""
    width, std = 256, 0.05
    sizes = {"vocab": 50, "context": 32, "width": width, "layers": 2, "heads": 4, "hidden": 1024}
    model = Transformer(ModelConfig(**sizes, mlp="relu2", init_std=std, head="untied"))
    values = {n: np.asarray(x) * (0.0 if ".attn.o." in n else 1.0) for n, x in named(model).items()}
    assign(model, values)
    found = probe.signal(model, RNG.integers(0, 50, (4, 32), dtype=np.int32))
    added = 1024 * 1.5 * (width * std**2) ** 2 * std**2
    np.testing.assert_allclose(np.diff(found.activation), added, rtol=0.15)
    assert found.gradient[-1] == 1
    assert found.growth > 0


@pytest.mark.parametrize("mlp", ["relu2", "gelu", "swiglu", "reglu"])
def test_sampled_steepness_is_never_above_the_bound(mlp):
    model = Transformer(ModelConfig(**SMALL, mlp=mlp))
    points = np.asarray(seen(model, CLEAN, r"blocks\.0\.mlp_norm")["blocks.0.mlp_norm"])[0, :2]
    for eps in (1e-3, 0.3):
        for found in probe.lipschitz(model, 0, points, eps, samples=16):
            assert found.sampled <= found.bound
            assert found.bound <= found.naive * 1.001
            if eps == 1e-3 and mlp != "reglu":
                assert found.bound < 1.1 * found.sampled + 0.05
    with pytest.raises(DataError, match="a radius above 0"):
        probe.lipschitz(model, 0, points, np.nan)
    with pytest.raises(DataError, match="finite points"):
        probe.lipschitz(model, 0, points * np.nan, 0.1)
    with pytest.raises(DataError, match="up of layer 0 is a Ternary"):
        probe.lipschitz(edit(model, r"blocks\.0\.mlp\.up", "ternary"), 0, points, 0.1)


def test_the_room_names_what_it_has():
    assert all(getattr(probe, name).__doc__ for name in probe.PUBLIC)
    with pytest.raises(AttributeError, match="has no attribute 'sweeep'"):
        probe.sweeep
    files = {path.stem for path in Path(probe.__file__).parent.glob("*.py")}
    assert not files & set(probe.PUBLIC)  # importing the file would put the module in the function's place
    assert "blocks.0.attn.pattern" in sites(MODEL)
