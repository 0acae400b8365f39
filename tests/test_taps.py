"""Taps: which sites there are, that looking changes nothing, that patching does what it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_model import NumpyModel, random_params

from tinylm import model as model_room
from tinylm.config import ModelConfig
from tinylm.model import Transformer, shapes, sites
from tinylm.taps import ablating, compose, patching, recording, steering, untouched, wants, within
from tinylm.weights import bind, pure

SMALL = {"vocab": 31, "context": 12, "width": 16, "layers": 2, "heads": 2}
CONFIG = ModelConfig(**SMALL, kv_heads=1)
PARAMS = {name: jnp.asarray(x) for name, x in random_params(shapes(CONFIG)).items()}
GRAPH = pure(Transformer(CONFIG))[0]
CLEAN, CORRUPT = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 2, 9)), jnp.int32)


@jax.jit
def recorded(params, tokens):
    seen = {}
    return bind(GRAPH, params)(tokens, tap=recording(seen)), seen


def patched(values, tokens):
    return jax.jit(lambda p, x, v: bind(GRAPH, p)(x, tap=patching(v)))(PARAMS, tokens, values)


PLAIN = jax.jit(lambda params, tokens: bind(GRAPH, params)(tokens))

INSIDE = ["attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.heads", "attn", "mlp.hidden", "mlp"]
INSIDE += ["mlp_norm", "resid"]
HAS = {"pre": ["attn_norm", "resid_mid"], "post": ["resid_mid"], "parallel": ["attn_norm"]}


@pytest.mark.parametrize("block", HAS)
def test_sites_are_the_documented_ones(block):
    config = ModelConfig(**SMALL, block=block, kv_heads=1, hidden=20, head_width=6)
    expected = {f"blocks.{i}.{site}" for i in range(2) for site in INSIDE + HAS[block]} | {"embed", "norm", "logits"}
    found = sites(Transformer(config))
    assert set(found) == expected
    text = model_room.__doc__.replace(" .", " blocks.0.attn.")  # "blocks.0.attn.q .k .v" names three
    documented = set(re.findall(r"(?:blocks\.0\.[\w.]+|^ {4}(?:embed|norm|logits)\b)", text, re.MULTILINE))
    assert {site.strip() for site in documented} >= {s for s in expected if not s.startswith("blocks.1")}
    letters = {"B": 1, "T": 2, "S": 2, "D": 16, "H": 2, "K": 1, "E": 6, "F": 20, "V": 31}
    for line in re.findall(r"^ {4}(\S+) .*?\(([A-Z |]+)\)", model_room.__doc__, re.MULTILINE):
        if line[0] in found and "|" not in line[1]:
            assert found[line[0]] == tuple(letters[x] for x in line[1].split()), line
    assert found["blocks.1.attn.q"] == (1, 2, 2, 6)
    assert found["blocks.1.attn.k"] == found["blocks.1.attn.v"] == (1, 2, 1, 6)
    assert found["blocks.0.attn.pattern"] == (1, 2, 2, 2)


def test_identity_tap_is_bitwise_equal():  # P24
    """A tap that looks at everything but the pattern keeps the same arithmetic; one that looks at it is near."""
    most = recording({}, r"(?!.*(pattern|scores)).*")
    looked = jax.jit(lambda p, x: bind(GRAPH, p)(x, tap=most))(PARAMS, CLEAN)
    assert np.array_equal(looked, PLAIN(PARAMS, CLEAN))
    everything = jax.jit(lambda p, x: bind(GRAPH, p)(x, tap=lambda site, x: x))(PARAMS, CLEAN)
    np.testing.assert_allclose(everything, PLAIN(PARAMS, CLEAN), atol=1e-5)


def test_an_error_in_a_tap_leaves_the_model_as_it_was():  # P24
    before, model = PLAIN(PARAMS, CLEAN), bind(GRAPH, PARAMS)
    for number in range(len(sites(model))):
        asked = []

        def tap(site, x, asked=asked, number=number):
            asked.append(site)
            if len(asked) > number:
                raise LookupError(site)
            return x

        with pytest.raises(LookupError):
            model(CLEAN, tap=tap)
    assert np.array_equal(PLAIN(pure(model)[1], CLEAN), before)


def test_recording_under_jit():
    logits, seen = recorded(PARAMS, CLEAN)
    assert set(seen) == set(sites(Transformer(CONFIG)))
    assert np.array_equal(seen["logits"], logits)
    twin = NumpyModel(CONFIG, PARAMS)
    twin(CLEAN[1])
    for layer, pattern in twin.pattern.items():
        np.testing.assert_allclose(seen[f"blocks.{layer}.attn.pattern"][1], pattern, atol=1e-5)
    r = seen
    np.testing.assert_allclose(r["blocks.1.resid_mid"], r["blocks.0.resid"] + r["blocks.1.attn"], atol=1e-6)
    np.testing.assert_allclose(r["blocks.1.resid"], r["blocks.1.resid_mid"] + r["blocks.1.mlp"], atol=1e-6)


def test_recording_only_what_the_regex_matches_whole():
    seen = {}
    bind(GRAPH, PARAMS)(CLEAN, tap=recording(seen, r"blocks\.\d+\.resid"))
    assert set(seen) == {"blocks.0.resid", "blocks.1.resid"}


@pytest.mark.parametrize("site", ["embed", "blocks.0.resid", "blocks.1.resid", "norm", "logits"])
def test_patching_the_stream_restores_the_clean_logits(site):
    clean, seen = recorded(PARAMS, CLEAN)
    assert np.abs(np.asarray(patched({}, CORRUPT)) - np.asarray(clean)).max() > 0.1
    restored = patched({site: seen[site]}, CORRUPT)
    np.testing.assert_allclose(restored, clean, atol=1e-5)
    assert np.array_equal(patched({site: seen[site]}, CLEAN), restored)  # exactly: nothing of the corrupt text is left


@pytest.mark.parametrize(
    "site", ["blocks.0.attn.pattern", "blocks.0.attn.heads", "blocks.1.mlp.hidden", "blocks.1.attn.q"]
)
def test_patching_inside(site):
    """A patched value counts: zeros change the logits, and it is what a later tap records."""
    _, seen = recorded(PARAMS, CLEAN)
    zeros = jnp.zeros_like(seen[site])
    after = {}
    logits = bind(GRAPH, PARAMS)(CLEAN, tap=compose(patching({site: zeros}), recording(after, re.escape(site))))
    assert np.abs(np.asarray(logits) - np.asarray(PLAIN(PARAMS, CLEAN))).max() > 1e-3
    assert list(after) == [site]
    assert not np.asarray(after[site]).any()


def test_patch_of_another_shape():
    with pytest.raises(
        ValueError, match=r"cannot patch blocks.0.resid: it has shape \(2, 9, 16\), the new value \(16,\)"
    ):
        bind(GRAPH, PARAMS)(CLEAN, tap=patching({"blocks.0.resid": jnp.zeros(16)}))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (recording({}, r"blocks\.\d+\.resd"), r"no site matches 'blocks\\.\\d+\\.resd'; did you mean 'blocks.1.resid'"),
        (patching({"blocks.0.mpl": 0}), "no site 'blocks.0.mpl' to patch; did you mean 'blocks.0.mlp'"),
        (compose(recording({}), patching({"blocks.7.resid": 0})), "no site 'blocks.7.resid' to patch; did you mean"),
        (compose(compose(recording({}, "qqq"))), "no site matches 'qqq'; known: blocks.0.attn, blocks.0.attn.heads"),
    ],
    ids=["recording", "patching", "composed", "nested"],
)
def test_misspelt_sites(tap, message):
    for forward in (lambda f: f(PARAMS), lambda f: jax.eval_shape(f, PARAMS)):
        with pytest.raises(ValueError, match=re.escape(message)):
            forward(lambda params: bind(GRAPH, params)(CLEAN, tap=tap))


@pytest.mark.parametrize("kind", ["written", "xla"])
def test_sites_offered_only_when_wanted_are_known(kind, monkeypatch):
    """Nothing is missed where a pattern is meant, one site of several exists, or the tap is a plain function."""
    monkeypatch.setattr(model_room, "attention_kind", lambda *_: kind)
    pattern = jnp.full((2, 2, 9, 9), 1 / 9)
    for tap in (
        recording({}, r".*\.scores"),
        recording({}, r"blocks\.(1|7)\.attn\.pattern"),
        patching({"blocks.0.attn.pattern": pattern}),
        compose(lambda site, x: x, compose(), patching({})),
        within("left", recording({}, "right.*")),
    ):
        jax.eval_shape(lambda p, tap=tap: bind(GRAPH, p)(CLEAN, tap=tap), PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recording({}, "blocks.("), "sites = 'blocks.(' is no regular expression"),
        (lambda: ablating("blocks.("), "is no regular expression"),
        (lambda: ablating(r"blocks\.0\.attn\.heads", at=np.s_[:, :, 9]), "does not index blocks.0.attn.heads"),
        (lambda: steering({"embed": np.ones(16)}, at=np.s_[:, 99]), "does not index embed"),
        (lambda: patching({"embed": [1, 2]}), "cannot patch embed: it has shape (2, 9, 16), the new value (2,)"),
        (lambda: ablating("embed", {"embed": np.ones(3)}), "the value to put there (3,)"),
    ],
)
def test_what_would_do_nothing_or_another_thing(make, message):
    """JAX drops what is written outside an array: an ablation of head 9 of 2 would seem to change nothing."""
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda p: bind(GRAPH, p)(CLEAN, tap=make()), PARAMS)


def test_an_index_may_be_traced():
    tap = lambda head: ablating(r"blocks\.0\.attn\.heads", at=(slice(None), slice(None), head))  # noqa: E731
    run = jax.jit(lambda p, head: bind(GRAPH, p)(CLEAN, tap=tap(head)))
    one = bind(GRAPH, PARAMS)(CLEAN, tap=tap(1))
    np.testing.assert_allclose(run(PARAMS, jnp.int32(1)), one, atol=1e-5)


def test_gradient_through_a_tap():
    """d logits / d patch, against a finite difference along one direction."""
    _, seen = recorded(PARAMS, CLEAN)
    site, direction = "blocks.0.mlp", np.random.default_rng(1).standard_normal((2, 9, 16)).astype(np.float32)

    @jax.jit
    def f(x):
        return jnp.sin(bind(GRAPH, PARAMS)(CLEAN, tap=patching({site: x}))).sum()

    slope = float((jax.grad(f)(seen[site]) * direction).sum())
    step = 1e-2
    finite = float(f(seen[site] + step * direction) - f(seen[site] - step * direction)) / (2 * step)
    assert abs(slope) > 0.1
    assert abs(slope - finite) < 0.02 * abs(slope) + 0.05


def test_taps_vmap_over_patches():
    _, seen = recorded(PARAMS, CLEAN)
    scales = jnp.array([0.0, 1.0])
    run = lambda s: bind(GRAPH, PARAMS)(CLEAN, tap=patching({"blocks.0.mlp": seen["blocks.0.mlp"] * s}))  # noqa: E731
    both = jax.jit(jax.vmap(run))(scales)
    np.testing.assert_allclose(both[1], PLAIN(PARAMS, CLEAN), atol=1e-5)
    np.testing.assert_allclose(both[0], run(0.0), atol=1e-5)


def test_only_a_tap_that_wants_the_pattern_gives_up_fused_attention(monkeypatch):
    calls = []
    monkeypatch.setattr(model_room, "attention_kind", lambda *_: "xla")
    slow = model_room.attend
    monkeypatch.setattr(model_room, "attend", lambda *args: calls.append(1) or slow(*args))
    forward = lambda tap: jax.eval_shape(lambda p: bind(GRAPH, p)(CLEAN, tap=tap), PARAMS)  # noqa: E731
    for tap in (untouched, recording({}, r".*resid"), patching({"embed": jnp.zeros((2, 9, 16))}), compose()):
        forward(tap)
        assert not calls
    forward(recording({}, r"blocks\.1\.attn\.pattern"))
    assert len(calls) == 1  # one layer only
    forward(lambda site, x: x)
    assert len(calls) == 3


def test_wants():
    inner = within("attn", within("blocks.0", recording({}, r"blocks\.0\.attn\.q")))
    assert wants(inner, "q")
    assert not wants(inner, "k")
    assert wants(lambda site, x: x, "anything")
    assert not wants(untouched, "anything")
    assert within("blocks.0", untouched) is untouched
    assert wants(compose(recording({}, "a"), recording({}, "b")), "b")
    assert not wants(compose(recording({}, "a")), "b")
    seen = {}
    compose(lambda site, x: x * 2, recording(seen))("s", jnp.ones(1))
    assert seen["s"] == 2
