"""Codes read and used: the index against brute force, labels, scores, steering, the explorer."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinylm
from tinylm import codebooks
from tinylm.codebooks import CodebookError, reading, sae, steering
from tinylm.config import ModelConfig
from tinylm.taps import untouched
from tinylm.techniques.codebook import discretize
from tinylm.weights import bind, named, pure

WORLD = tinylm.World(seed=3)


@functools.cache
def compiled(graph, sites):
    def run(params, tokens):
        seen = {}
        logits = bind(graph, params)(tokens, tap=tinylm.recording(seen, sites))
        return logits, seen

    return jax.jit(run)


def run(model, tokens, sites="logits"):
    """Logits, and the values at sites; eager calls would compile every operation."""
    graph, params = pure(model)
    return compiled(graph, sites)(params, tokens)


DOWN = "blocks.0.mlp.down"


@pytest.fixture(scope="module")
def stories():
    return list(WORLD.stories(12))


@pytest.fixture(scope="module")
def tokenizer(stories):
    return tinylm.Tokenizer.train([s.text for s in stories], vocab=300)


@pytest.fixture(scope="module")
def tokens(stories, tokenizer, tmp_path_factory):
    return tinylm.write_tokens([s.text for s in stories], tokenizer, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def model(tokenizer, tokens):
    config = ModelConfig(vocab=300, context=64, width=16, layers=1, heads=2)
    model = discretize(tinylm.Transformer(config, tokenizer=tokenizer), ["attn", "mlp"], "paper", codes=24, k=2)
    return codebooks.start(model, [tokens[:256].reshape(4, 64)])


@pytest.fixture(scope="module")
def index(model, tokens, tmp_path_factory):
    return codebooks.build(model, tokens, tmp_path_factory.mktemp("index") / "i", batch=16)


def brute(index):
    """{(site, group, code): positions} from the codes at every position."""
    found = {}
    for name, group in index.columns:
        ids = np.asarray(index.chosen(name, group))
        for code in range(index.codes[name]):
            found[name, group, code] = np.flatnonzero((ids == code).any(1))
    return found


# --- books ------------------------------------------------------------------------------------------------------------


def test_books_are_named_by_what_they_wrap(model):
    assert list(codebooks.books(model)) == ["blocks.0.attn.o", DOWN]
    both = discretize(
        tinylm.Transformer(ModelConfig(vocab=9, width=8, layers=2, heads=2)), ["resid", "attn"], codes=4, k=1
    )
    assert list(codebooks.books(both)) == ["blocks.0.attn.o", "blocks.0", "blocks.1.attn.o", "blocks.1"]
    with pytest.raises(CodebookError, match="no codebooks"):
        codebooks.books(tinylm.Transformer(ModelConfig(vocab=9, width=8, layers=1, heads=1)))


def test_read_gives_what_the_forward_pass_chose(model, tokens):
    batch = tokens[:20][None]
    _, seen = run(model, batch, r"blocks\.0\.(attn\.heads|mlp\.hidden)")
    ids = codebooks.read(model, batch)
    book = model.blocks[0].attn.o
    np.testing.assert_array_equal(ids["blocks.0.attn.o"], book.nearest(seen["blocks.0.attn.heads"]))
    down = model.blocks[0].mlp.down
    z = down.inner(seen["blocks.0.mlp.hidden"])[:, :, None]
    np.testing.assert_array_equal(ids[DOWN], down.nearest(z))


def test_taps_on_codes_leave_the_model_alone(model, tokens):
    batch = tokens[:20][None]
    before, _ = run(model, batch)
    graph, params = pure(model)

    @jax.jit
    def zero(params):
        put = lambda site, x: jnp.zeros_like(x) if site == f"{DOWN}.codes" else x  # noqa: E731
        seen = {}
        codebooks.tapped(bind(graph, params), put)(batch, tap=tinylm.recording(seen, r"blocks\.0\.mlp"))
        return seen

    seen = zero(params)
    np.testing.assert_allclose(seen["blocks.0.mlp"][0, 3], 2 * model.blocks[0].mlp.down.book[0, 0], rtol=1e-5)
    np.testing.assert_array_equal(run(model, batch)[0], before)


def test_codes_off_is_the_model_before(tokenizer, tokens):
    config = ModelConfig(vocab=300, context=64, width=16, layers=1, heads=2)
    plain, _ = run(tinylm.Transformer(config), tokens[:20][None])
    model = discretize(tinylm.Transformer(config), ["attn", "mlp"], codes=4, k=1)
    graph, params = pure(model)
    off = jax.jit(lambda p, t: codebooks.tapped(bind(graph, p), untouched, on=False)(t))
    np.testing.assert_allclose(off(params, tokens[:20][None]), plain, atol=1e-6)


def test_an_index_of_states_that_pass(model, tokens, tmp_path):
    """on=False: the codes nearest to the states of the model without codebooks."""
    index = codebooks.build(model, tokens, tmp_path / "i", batch=16, on=False)
    z = codebooks.read(model, tokens[:64][None], what="states", on=False)[DOWN]
    np.testing.assert_array_equal(index.chosen(DOWN)[:64], model.blocks[0].mlp.down.nearest(z)[0, :, 0])


@pytest.mark.parametrize("how", ["data", "kmeans"])
def test_start_from_states(model, tokens, how):
    """Data: every code is half of a state (two are summed). k-means fits states better than states do."""
    model, batches = bind(*pure(model)), [tokens[:256].reshape(4, 64)]
    codebooks.start(model, batches, how, rounds=4)
    book = model.blocks[0].mlp.down
    states = np.asarray(codebooks.read(model, batches[0], what="states", on=False)[DOWN]).reshape(-1, 16)
    far = np.abs(2 * np.asarray(book.book[0])[:, None] - states[None]).max(-1).min(1)
    if how == "data":
        assert far.max() < 1e-5
        return
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    fit = lambda centres: (unit(states) @ unit(centres).T).max(1).mean()  # noqa: E731
    assert fit(np.asarray(book.book[0])) > fit(states[:24])


def test_a_norm_starts_at_the_states_size(tokens):
    """Codes of LayerNorm's space: their first scale is the mean spread of the states, so their reader sees its own."""
    plain = tinylm.Transformer(ModelConfig(vocab=300, context=64, width=16, layers=1, heads=2))
    model = discretize(plain, "mlp", codes=200, k=1)
    batches = [tokens[:256].reshape(4, 64)]
    codebooks.start(model, batches)
    inputs = np.asarray(codebooks.read(model, batches[0], what="inputs", on=False)[DOWN])
    book = model.blocks[0].mlp.down
    np.testing.assert_allclose(book.norm.scale[...], inputs.std(-1).mean(), rtol=1e-4)
    states = np.asarray(codebooks.read(model, batches[0], what="states", on=False)[DOWN]).reshape(-1, 16)
    assert np.abs(np.asarray(book.book[0])[:, None] - states[None]).max(-1).min(1).max() < 1e-5


def test_dead_codes_wake_where_states_are(model, tokens):
    model, batches = bind(*pure(model)), [tokens[:256].reshape(4, 64)]
    book = model.blocks[0].mlp.down
    book.lean.set_value(book.lean[...].at[0, 5].set(-jnp.inf))  # banned: surely dead
    counts = codebooks.usage(model, batches)
    assert {name: c.sum() for name, c in counts.items()} == {"blocks.0.attn.o": 256 * 2 * 2, DOWN: 256 * 2}
    was_dead = counts[DOWN] == 0
    assert was_dead[0, 5]
    assert codebooks.dead(counts)[DOWN] == was_dead.mean()
    kept = np.array(book.book[...])
    moved = codebooks.wake(model, batches)
    assert moved == sum(int((c == 0).sum()) for c in counts.values())
    np.testing.assert_array_equal(np.asarray(book.book[...])[~was_dead], kept[~was_dead])
    book.lean.set_value(jnp.zeros((1, 24)))
    assert codebooks.usage(model, batches)[DOWN][was_dead].sum() > 0


def test_waking_while_training(model, tokens):
    copy = tinylm.Transformer(model.config, tokenizer=model.tokenizer)
    trainer = tinylm.train(
        copy, tokens, tinylm.TrainConfig(steps=4, batch=2, length=64, log_every=2, optimizer="adamw")
    )
    for step in trainer:
        if step.step == 2:
            moved = codebooks.wake(trainer, [tokens[:256].reshape(4, 64)])
            mine, its = named(copy), trainer.state.params
            assert all(np.array_equal(mine[n], its[n]) for n in mine)
    assert moved > 0
    assert trainer.outcome == "done"


def test_what_cannot_be_read(model, tokens):
    with pytest.raises(CodebookError, match="'code'; did you mean 'codes'"):
        codebooks.read(model, tokens[:20][None], what="code")
    with pytest.raises(CodebookError, match=r"shape \(20,\): give a batch"):
        codebooks.read(model, tokens[:20])
    with pytest.raises(CodebookError, match="id 999 at position 0"):
        codebooks.read(model, np.array([[999]]))
    with pytest.raises(ValueError, match=r"no site 'blocks.0.mlp.dwn.codes'.*did you mean"):
        codebooks.tapped(model, tinylm.patching({"blocks.0.mlp.dwn.codes": jnp.zeros((1, 20, 1, 2), int)}))
    with pytest.raises(CodebookError, match="no batches"):
        codebooks.usage(model, [])
    lost, state = bind(*pure(model)), np.array(model.blocks[0].mlp.down.book[...])
    lost.embed.table.set_value(jnp.full_like(model.embed.table[...], jnp.nan))
    with pytest.raises(CodebookError, match="not finite: this model has diverged"):
        codebooks.start(lost, [tokens[:256].reshape(4, 64)])
    np.testing.assert_array_equal(lost.blocks[0].mlp.down.book[...], state)


def test_packed_texts_are_read_at_their_own_positions():
    """Learned positions begin anew with each text of a row: codes of the second are those it has alone."""
    config = ModelConfig(vocab=30, context=16, width=16, layers=1, heads=2, positions="learned")
    model = discretize(tinylm.Transformer(config), "mlp", codes=64, k=1)
    text = np.arange(8)[None]
    row = tinylm.data.Batch(
        np.tile(text, (1, 2)), np.tile(text, (1, 2)), None, np.tile(text, (1, 2)), np.repeat([[1, 2]], 8, 1)
    )
    (one,) = codebooks.usage(model, [text]).values()
    (two,) = codebooks.usage(model, [row]).values()
    np.testing.assert_array_equal(two, 2 * one)


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_is_what_brute_force_finds(index, tokens):
    assert len(index) == len(tokens)
    np.testing.assert_array_equal(index.tokens, tokens[:])
    for (name, group, code), places in brute(index).items():
        np.testing.assert_array_equal(index.postings(name, group, code), places)
        assert index.counts(name, group)[code] == len(places)


def test_blocks_are_the_whole(model, tokens, index, tmp_path, monkeypatch):
    monkeypatch.setattr("tinylm.codebooks.index.BLOCK", 37)
    other = codebooks.build(model, tokens, tmp_path / "i", batch=16)
    for name, group in index.columns:
        for code in range(24):
            np.testing.assert_array_equal(other.postings(name, group, code), index.postings(name, group, code))


def test_documents_and_windows(index, tokens, model):
    starts = np.flatnonzero(tokens[:] == (tokens.end if tokens.begin is None else tokens.begin))
    np.testing.assert_array_equal(index.starts, starts)
    document, place = index.where(np.array([starts[2], starts[2] + 5]))
    assert document.tolist() == [2, 2]
    assert place.tolist() == [0, 5]
    # Position 40 of a document is read in its first window; 70 in the second, which begins 32 later.
    for at, begin in ((40, 0), (70, 32)):
        ids = codebooks.read(model, tokens[starts[2] + begin : starts[2] + begin + 64][None])[DOWN]
        np.testing.assert_array_equal(index.chosen(DOWN)[starts[2] + at], ids[0, at - begin, 0])


@pytest.mark.parametrize("kind", ["cut", "flipped", "missing", "json", "fields", "format"])
def test_a_damaged_index_is_one_clear_error(index, tmp_path, kind):
    import shutil

    folder = tmp_path / "i"
    shutil.copytree(index.folder, folder)
    victim, said = folder / f"{DOWN}.0.postings", folder / "index.json"
    raw = bytearray(victim.read_bytes())
    if kind == "cut":
        victim.write_bytes(raw[:-1])
    elif kind == "flipped":
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(raw)
    elif kind == "missing":
        victim.unlink()
    elif kind == "json":
        said.write_text(said.read_text()[:50])
    else:
        about = json.loads(said.read_text())
        about["files" if kind == "fields" else "format"] = {}
        said.write_text(json.dumps(about))
    with pytest.raises(CodebookError, match="build"):
        codebooks.Index(folder)


def test_what_cannot_be_indexed(model, tokens, index, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").write_text("mine")
    with pytest.raises(CodebookError, match="something else than an index"):
        codebooks.build(model, tokens, tmp_path / "own")
    with pytest.raises(CodebookError, match="not this model's corpus"):
        codebooks.build(model, tinylm.Tokens.from_array(np.arange(9), vocab=999), tmp_path / "i")
    for wrong in ({"stride": 0}, {"stride": 65}, {"batch": 0}):
        with pytest.raises(CodebookError, match=f"{next(iter(wrong))} = "):
            codebooks.build(model, tokens, tmp_path / "i", **wrong)
    with pytest.raises(CodebookError, match="tokens are ndarray: give Tokens"):
        codebooks.build(model, tokens[:], tmp_path / "i")
    (tmp_path / "own" / "index.json").write_text('{"name": "a package"}')  # not ours to replace
    with pytest.raises(CodebookError, match="something else than an index"):
        codebooks.build(model, tokens, tmp_path / "own")
    assert (tmp_path / "own" / "file").exists()
    with pytest.raises(CodebookError, match="no group 3"):
        index.postings(DOWN, 3, 0)
    with pytest.raises(CodebookError, match="no code 24"):
        index.postings(DOWN, 0, 24)
    with pytest.raises(CodebookError, match="no index"):
        codebooks.Index(tmp_path / "nothing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_of_tokens(index, tokenizer):
    now, before = codebooks.token_labels(index, tokenizer), codebooks.token_labels(index, tokenizer, back=1)
    after = codebooks.token_labels(index, tokenizer, back=-1)
    a, b = reading.spans(index)[1]
    np.testing.assert_array_equal(now.values, index.tokens)
    np.testing.assert_array_equal(before.values[a + 1 : b], index.tokens[a : b - 1])
    np.testing.assert_array_equal(after.values[a : b - 1], index.tokens[a + 1 : b])
    assert before.values[a] == after.values[b - 1] == -1
    pairs = codebooks.pair_labels(index, tokenizer, most=5)
    assert len(pairs.names) == 5
    for i in np.flatnonzero(pairs.values >= 0)[:50]:
        assert pairs.names[pairs.values[i]] == tokenizer.decode(np.asarray(index.tokens[i - 1 : i + 1], np.int64))


def test_labels_of_patterns(index, tokenizer, stories):
    one, whole = (codebooks.regex_labels(index, tokenizer, {"the": r"\bthe (\w+)"}, whole=w)[0] for w in (False, True))
    count = sum(len(re.findall(r"\bthe (\w+)", s.text)) for s in stories)
    assert (one.values == 0).sum() == count
    assert (whole.values == 0).sum() >= count
    a, b = reading.spans(index)[0]
    text, begins = reading.text_of(index, tokenizer, a, b)
    first = re.search(r"\bthe (\w+)", text).start(1)
    token = np.flatnonzero(one.values[a:b] == 0)[0]
    assert begins[token] <= len(text[:first].encode()) < begins[token + 1]
    with pytest.raises(CodebookError, match="no regular expression"):
        codebooks.regex_labels(index, tokenizer, {"x": "("})


def test_labels_of_the_world(index, tokenizer, stories):
    topic = codebooks.world_labels(index, tokenizer, stories, "topic")
    for story, (a, b) in zip(stories, reading.spans(index), strict=False):
        values = topic.values[a:b]
        assert {topic.names[v] for v in values[values >= 0]} == {story.labels["topic"]}
        assert (values >= 0).mean() > 0.9
    feature = codebooks.world_labels(index, tokenizer, stories, "feature")
    spoken = [s.text for s in stories[0].sentences if s.labels["feature"] == "dialogue"]
    a, b = reading.spans(index)[0]
    if spoken:
        held = feature.values[a:b] == feature.names.index("dialogue")
        assert spoken[0][:12].encode() in tokenizer.decode_bytes(np.asarray(index.tokens[a:b], np.int64)[held])
    with pytest.raises(CodebookError, match="is not story 0"):
        codebooks.world_labels(index, tokenizer, stories[::-1], "topic")


# --- scores -----------------------------------------------------------------------------------------------------------


def toy(n=400, seed=0):
    """Labels 0, 1, 2; code 5 of group 1 fires exactly on class 2, code 3 on half of class 1; 4 documents."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, n).astype(np.int32)
    ids = np.full((n, 2, 1), -1)
    ids[values == 2, 1, 0] = 5
    ids[(values == 1) & (np.arange(n) % 2 == 0), 1, 0] = 3
    ids[:, 0, 0] = rng.integers(0, 8, n)
    fires = codebooks.Fired({"a": ids}, {"a": 8}, np.arange(4) * (n // 4))
    return fires, codebooks.Labels("kind", values, ("zero", "one", "two"))


def test_the_best_codes_and_their_figures():
    fires, labels = toy()
    best = {m.label: m for m in codebooks.best_codes(fires, labels)}
    assert (best["two"].group, best["two"].code) == (1, 5)
    assert (best["two"].precision, best["two"].recall, best["two"].f1) == (1, 1, 1)
    scored = ~reading.halves(fires)
    one = labels.values[scored] == 1
    hit = (fires.chosen("a", 1)[scored, 0] == 3) & one
    assert best["one"].code == 3
    assert best["one"].recall == pytest.approx(hit.sum() / one.sum())
    assert best["one"].f1 == pytest.approx(2 * hit.sum() / (hit.sum() + one.sum()))
    assert best["zero"].f1 < 0.5  # a random code, scored where it was not chosen
    named_codes = codebooks.named_codes(fires, [labels])
    assert named_codes["a", 1][5].label == "two"
    assert named_codes["a", 1][0] is None


def test_neurons_at_the_codes_recall():
    """A neuron that is the class plus noise is found, with its sign, and reaches the recall."""
    fires, labels = toy(4000)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4000, 6))
    x[:, 4] = -1.0 * (labels.values == 2) + 0.3 * rng.standard_normal(4000)
    (match,) = codebooks.best_neurons({"site": x}, fires, labels, {"two": 0.8})
    assert (match.code, match.group) == (4, -1)
    assert match.recall == pytest.approx(0.8, abs=0.05)
    assert match.precision > 0.9


def test_the_autoencoder_learns_its_features():
    """Sparse sums of 12 directions: TopK finds them, and explains nearly all."""
    rng = np.random.default_rng(0)
    d = np.linalg.qr(rng.standard_normal((16, 12)))[0].T
    on = np.array([rng.permutation(12)[:2] for _ in range(3000)])
    x = sum(rng.uniform(1, 2, (3000, 1)) * d[on[:, i]] for i in (0, 1))[:, None].astype(np.float32)
    found, error = sae.train_sae(x, 24, 2, steps=800, batch=256, rate=4e-3)
    assert error < 0.25
    assert (np.abs(np.asarray(found.decoder[0]) @ d.T).max(0) > 0.9).mean() > 0.7
    ids = sae.sae_ids(found, x, 2)
    assert ids.shape == (3000, 1, 2)
    book = np.asarray(jnp.asarray(sae.random_ids(x, 24, 2)))
    assert book.shape == (3000, 1, 2)


def test_contexts_are_places_where_the_code_fires(index, tokenizer):
    code = int(np.argmax(index.counts(DOWN)))
    found = codebooks.contexts(index, tokenizer, DOWN, 0, code, n=5)
    assert len(found) == 5
    for c in found:
        at = int(index.starts[c.document]) + c.position
        assert code in index.chosen(DOWN)[at]
        assert c.token == tokenizer.decode(np.asarray(index.tokens[at : at + 1], np.int64))


def test_half_of_one_document_is_none():
    fires, labels = toy()
    fires.starts = fires.starts[:1]
    with pytest.raises(CodebookError, match="1 document"):
        codebooks.best_codes(fires, labels)


# --- steering ---------------------------------------------------------------------------------------------------------


def test_one_forced_code_is_the_output(tokenizer, tokens):
    """k = 1: whatever comes in, the site's output is the activated code."""
    config = ModelConfig(vocab=300, context=64, width=16, layers=1, heads=2)
    model = discretize(tinylm.Transformer(config, tokenizer=tokenizer), "mlp", codes=8, k=1)
    changed = codebooks.steered(model, activate=[(DOWN, 0, 6)])
    _, seen = run(changed, tokens[:20][None], r"blocks\.0\.mlp")
    np.testing.assert_array_equal(
        seen["blocks.0.mlp"], np.broadcast_to(model.blocks[0].mlp.down.book[0, 6], (1, 20, 16))
    )
    assert (np.asarray(model.blocks[0].mlp.down.lean[...]) == 0).all()  # the model itself is as it was


def test_activated_and_banned(model, tokens):
    batch = tokens[:30][None]
    plain = np.asarray(codebooks.read(model, batch)[DOWN])
    common = int(np.bincount(plain.ravel()).argmax())
    on = np.asarray(codebooks.read(codebooks.steered(model, activate=[(DOWN, 0, 7)]), batch)[DOWN])
    off = np.asarray(codebooks.read(codebooks.steered(model, ban=[(DOWN, 0, common)]), batch)[DOWN])
    assert (on[..., 0] == 7).all()
    assert on.shape == plain.shape  # one of the k gives way, none is added
    assert (off != common).all()


def test_steering_is_the_steered_model_s_own_writing(model):
    """The loop that switches codes by position is the slow twin of a full forward pass per token (greedy)."""
    codes, prompts = [(DOWN, 0, 7), ("blocks.0.attn.o", 1, 3)], [[1, 5, 9], [1, 4, 4, 8, 2]]
    sampling = tinylm.Sampling(temperature=0.0)
    made = steering.steer_tokens(model, prompts, activate=codes, tokens=5, sampling=sampling)
    changed = codebooks.steered(model, activate=codes)
    for prompt, new in zip(prompts, made, strict=True):
        ids = list(prompt)
        for _ in range(5):
            logits = np.asarray(run(changed, np.array([ids + [0] * (16 - len(ids))], np.int32))[0])[0, len(ids) - 1]
            ids.append(int(logits[: model.tokenizer.vocab].argmax()))
        assert ids[len(prompt) :] == new


def test_positions_outside_the_window_are_not_steered(model):
    prompts, settings = [[1, 5, 9]], {"tokens": 6, "sampling": tinylm.Sampling(temperature=1.0), "seed": 3}
    plain = steering.steer_tokens(model, prompts, **settings)
    never = steering.steer_tokens(model, prompts, activate=[(DOWN, 0, 7)], positions=(60, 64), **settings)
    late = steering.steer_tokens(model, prompts, activate=[(DOWN, 0, 7)], positions=(5, 64), **settings)
    assert never == plain
    assert late[0][:3] == plain[0][:3]  # positions 3, 4 and 5 hold what the unsteered states 2, 3 and 4 predict


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"activate": [(DOWN, 0, 24)]}, "no code 24"),
        ({"activate": [("blocks.0.mlp.dwn", 0, 1)]}, "did you mean 'blocks.0.mlp.down'"),
        ({"activate": [(DOWN, 0, 1), (DOWN, 0, 2), (DOWN, 0, 3)]}, "chooses 2 codes per group, 3 are activated"),
        ({"ban": [(DOWN, 0, c) for c in range(23)]}, "1 are not banned"),
        ({"activate": [(DOWN, 0, 1)], "ban": [(DOWN, 0, 1)]}, "both activated and banned"),
        ({"tokens": 63}, "do not fit the context of 64"),
        ({"tokens": 0}, "tokens = 0"),
        ({"activate": (DOWN, 0, 1)}, "'blocks.0.mlp.down' is no code: give a list"),
        ({"ban": [(DOWN, 0, 1.5)]}, "is no code"),
        ({"positions": (9, 3)}, r"positions = \(9, 3\)"),
        ({"positions": (9,)}, "positions"),
    ],
)
def test_what_cannot_be_steered(model, codes, message):
    with pytest.raises(CodebookError, match=message):
        steering.steer_tokens(model, [[1, 2]], **{"tokens": 4, **codes})


def test_a_trial_has_its_controls(model, index, tokenizer, stories):
    topics = [s.labels["topic"] for s in stories]
    labels = codebooks.world_labels(index, tokenizer, stories, "topic")
    topic = topics[0]
    handles = codebooks.codes_for(index, labels, topic, least=1)
    assert {(m.site, m.group) for m in handles} <= set(index.columns)
    classify = codebooks.Bayes([s.text for s in stories], topics)
    assert classify.accuracy([s.text for s in stories], topics) == 1.0
    judge = tinylm.Transformer(ModelConfig(vocab=300, context=64, width=16, layers=1, heads=2), tokenizer=tokenizer)
    rows = codebooks.trial(model, {topic: handles}, ["One day,"], classify, judge, index=index, repeats=2, tokens=8)
    assert [r.treatment for r in rows] == ["none", "random", "codes"]
    assert all(0 <= r.success.value <= 1 and r.bits_per_byte > 0 and len(r.texts) == 2 for r in rows)
    assert topic in steering.table(rows).text
    chosen = {steering.handle(h) for h in handles}
    random = codebooks.like(index, handles)
    assert not chosen & set(random)
    assert [(n, g) for n, g, _ in random] == [(m.site, m.group) for m in handles]


def test_the_lower_end_of_an_interval():
    """Wilson's interval, a value from its formula by hand: 8 of 10 gives 0.4902."""
    assert steering.wilson(np.array([8.0]), np.array([10]))[0] == pytest.approx(0.4902, abs=1e-4)


def test_effects_are_differences_of_predictions(model, tokens):
    texts = tokens[:40].reshape(4, 10)
    (effect,) = codebooks.effects(model, texts, [(DOWN, 0, 7)])

    def logp(m):
        x = np.asarray(run(m, texts)[0])[:, -1].astype(np.float64)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    expected = (logp(codebooks.steered(model, activate=[(DOWN, 0, 7)])) - logp(model)).mean(0)
    np.testing.assert_allclose(effect, expected, atol=1e-4)


# --- the explorer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def look(model, index, tokenizer):
    labels = codebooks.token_labels(index, tokenizer)
    hostile = codebooks.Labels("x", labels.values, tuple(f"</script><script>alert({i})</script>" for i in range(300)))
    return codebooks.Explorer(model, index, labels=[hostile])


def test_the_explorer_wants_the_model_s_own_index(model, index):
    other = discretize(tinylm.Transformer(model.config.replace(edits=()), tokenizer=model.tokenizer), codes=8, k=1)
    with pytest.raises(CodebookError, match="is not of this model"):
        codebooks.Explorer(other, index)


def test_the_explorer_finds_and_shows(look):
    first = look.ranked()[0]
    assert look.found("mlp.down") == [c for c in look.ranked() if c[0] == DOWN]
    assert look.found("no such words") == []
    card = look.card(first)
    assert card.fires == look.index.counts(*first[:2])[first[2]]
    assert [x for _, x in card.raised] == sorted([x for _, x in card.raised], reverse=True)
    for shown in (look, look.code(first), look.search("mlp")):
        assert "<script" not in shown._repr_html_()
        assert repr(shown)


def test_the_page_is_whole_and_inert(look, tmp_path):
    path = look.save(tmp_path / "codes.html", most=3, stories=1, tokens=5, prompt="One")
    page = path.read_text()
    assert page.count("<script") == 2
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=|innerHTML|https?:", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert len(data["entries"]) == 3
    assert data["entries"][0]["story"].startswith("One")
    assert "alert" in data["entries"][0]["means"]
    assert data["entries"][1]["story"] == ""


def test_the_picture_of_use(index):
    shown = codebooks.usage_picture(index)
    assert "<svg" in shown.html
    counts = np.sort(index.counts(DOWN))[::-1]
    half = int(np.argmax(np.cumsum(counts) >= counts.sum() / 2)) + 1
    assert re.search(rf"{re.escape(DOWN)} +24 +{(counts == 0).sum()} +{half}$", shown.text, re.M)


def test_the_widget_searches_and_steers(look):
    widgets = pytest.importorskip("ipywidgets")
    left, right = look.widget().children
    query, listed = left.children
    query.value = "mlp.down"
    assert {code[0] for _, code in listed.options} == {DOWN}
    listed.value = listed.options[1][1]
    assert steering.handle(listed.value)[0] in right.children[0].value
    button = next(w for w in right.children[1].children if isinstance(w, widgets.Button))
    button.click()
    assert "with blocks.0.mlp.down" in right.children[2].value
