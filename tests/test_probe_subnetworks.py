"""Bigram counts, masks, and subnetworks: against counting by hand, closed forms, and a model built to be found out."""

import math
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx
from planted import planted

from tinylm import World, probe
from tinylm.checkpoint import load, save
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import DataError, Tokens, write_tokens
from tinylm.model import Transformer
from tinylm.probe.subnetworks import Subnetwork, is_stable, overlap
from tinylm.probe.surprisals import correlation, measure
from tinylm.techniques import EditError, edit, fold
from tinylm.techniques.mask import NEVER, hard_concrete, open_chance, top
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.weights import assign, named

SMALL = {"vocab": 12, "context": 16, "width": 8, "layers": 1, "heads": 2}

# --- bigrams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_counts_are_exact_in_pieces_of_any_size(piece):
    ids = np.random.default_rng(0).integers(0, 9, 50)
    got = probe.Bigrams.count(ids, 10, piece=piece)
    by_hand = Counter(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    rows = np.repeat(np.arange(10), np.diff(got.starts))
    found = {(a, b): w for a, b, w in zip(rows.tolist(), got.successors.tolist(), got.weights, strict=True)}
    assert found == by_hand
    assert got.unigrams.tolist() == np.bincount(ids, minlength=10).tolist()


def test_counts_over_shards(tmp_path):
    texts = ["the cat sat on the mat", "the dog sat on the cat"] * 3
    tokenizer = Tokenizer.train(texts, vocab=270)
    tokens = write_tokens(texts, tokenizer, tmp_path, shard_tokens=7)
    assert len(list(tmp_path.glob("*.bin"))) > 2
    whole = tokens[:]
    one, two = probe.Bigrams.count(tokens), probe.Bigrams.count(whole, tokenizer.vocab)
    assert np.array_equal(one.weights, two.weights)
    assert np.array_equal(one.successors, two.successors)
    again = probe.Bigrams.load(one.save(tmp_path / "pairs.safetensors"))
    assert np.array_equal(again.rows(np.arange(tokenizer.vocab)), one.rows(np.arange(tokenizer.vocab)))


def test_back_off_and_surprisal():
    pairs = probe.Bigrams.count(np.array([0, 1, 0, 1, 0, 2]), 4)
    np.testing.assert_allclose(
        pairs.rows(np.array([[0, 1], [2, 3]]))[0], [[0, 2 / 3, 1 / 3, 0], [1, 0, 0, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(pairs.rows(np.array([2, 3])), [[1 / 2, 1 / 3, 1 / 6, 0]] * 2, rtol=1e-6)  # unigrams
    bits = pairs.surprisal(np.array([0, 0, 1, 3]), np.array([1, 0, 0, 2]))
    np.testing.assert_allclose(bits, [math.log2(1.5), math.inf, 0, math.log2(6)], atol=1e-9)
    entropy = 3 / 5 * (2 / 3 * math.log2(1.5) + 1 / 3 * math.log2(3))
    assert pairs.entropy() == pytest.approx(entropy)
    assert probe.Bigrams.count(np.array([], int), 4).rows(np.array([1])).tolist() == [[0.25] * 4]


def test_rows_are_counted_by_themselves():
    got = probe.Bigrams.count([np.array([0, 1]), np.array([2]), np.array([1, 0])], 3)
    assert got.pairs == 2
    assert got.unigrams.sum() == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probe.Bigrams.count(np.array([0, 1])), "vocab = 0: say how many"),
        (lambda: probe.Bigrams.count(np.array([0, 7]), 4), "7"),
        (lambda: probe.Bigrams.of_table(np.ones((2, 2))), "rows sum to 1"),
        (lambda: probe.Bigrams.of_table(np.eye(2), [0, 1]), "one above 0"),
        (lambda: probe.Bigrams.of_table(np.eye(2), [np.nan, 1]), "one above 0"),
        (lambda: probe.Bigrams.of_table(np.full((2, 2), np.nan)), "rows sum to 1"),
        (lambda: probe.Bigrams.of_table([[2, -1], [0.5, 0.5]]), "nowhere below 0"),
        (lambda: probe.Bigrams.of_table(np.zeros((0, 0))), "square"),
        (lambda: probe.Bigrams.count([0, 1, 2], 4), "a row of ids has shape"),
        (lambda: probe.Bigrams.count(np.arange(4), 4, piece=-1), "piece = -1"),
    ],
)
def test_bigrams_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("part", ["starts", "successors", "weights", "unigrams"])
def test_a_damaged_file_of_counts(part, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = probe.Bigrams.count(np.arange(6), 6).save(tmp_path / "pairs.safetensors")
    raw = load_file(path)
    wrong = {"starts": raw["starts"][:4], "successors": raw["successors"] + 50, "unigrams": raw["unigrams"][:3]}
    wrong["weights"] = -raw["weights"]
    save_file({**raw, part: wrong[part].copy()}, path)
    with pytest.raises(DataError, match="holds no bigram counts"):
        probe.Bigrams.load(path)
    assert math.isnan(probe.Bigrams.count(np.array([], int), 4).entropy())


# --- masks ------------------------------------------------------------------------------------------------------------


def test_the_rules_are_the_papers():
    x = np.array([-2.0, 0.0, 3.0])
    u = np.array([0.3, 0.5, 0.9])
    s = 1 / (1 + np.exp(-(np.log(u / (1 - u)) + x) / (2 / 3)))
    np.testing.assert_allclose(hard_concrete(x, u), np.clip(s * 1.2 - 0.1, 0, 1), atol=1e-6)
    np.testing.assert_allclose(open_chance(x), 1 / (1 + np.exp(-(x - 2 / 3 * np.log(0.1 / 1.1)))), atol=1e-6)
    scores = np.random.default_rng(0).standard_normal((7, 9)).astype(np.float32)
    for share in (0.1, 0.5, 1.0):
        kept = np.asarray(top(scores, share)) > 0
        assert kept.sum() == round(share * 63)
        assert kept.all() or scores[kept].min() > scores[~kept].max()


@pytest.mark.parametrize("rule", ["continuous", "hard_concrete", "topk", "binary"])
def test_a_mask_multiplies_a_frozen_matrix(rule):
    model = edit(Transformer(ModelConfig(**SMALL)), r"blocks\.0\.mlp\.up", "mask", rule=rule, keep=0.5, noise=False)
    mask, inner = model.blocks[0].mlp.up, Transformer(ModelConfig(**SMALL)).blocks[0].mlp.up.weight()
    share = {"continuous": 0.5, "hard_concrete": 0.5, "binary": 1.0}
    if rule in share:
        np.testing.assert_allclose(mask.weight(), share[rule] * inner, rtol=1e-6)
    else:
        assert (np.asarray(mask.weight()) != 0).mean() == 0.5
        assert np.abs(inner[mask.kept()]).min() > np.abs(inner[~mask.kept()]).max()
    assert np.array_equal(fold(model).blocks[0].mlp.up.weight(), mask.weight())
    if rule != "binary":  # gradients reach the scores and nothing else
        graph, state = nnx.split(model)
        slopes = jax.grad(lambda s: (nnx.merge(graph, s).blocks[0].mlp.up.weight() ** 2).sum(), allow_int=True)(state)
        flat = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(slopes)}
        assert np.abs(flat["blocks.0.mlp.up.scores"]).max() > 0
        assert not flat["blocks.0.mlp.up.inner.kernel"].any()


def test_the_heat_follows_the_clock_and_zeros_are_never_kept():
    plain = Transformer(ModelConfig(**SMALL))
    values = {name: np.array(x) for name, x in named(plain).items()}
    values["blocks.0.mlp.up.kernel"][0, 0] = 0
    assign(plain, values)
    mask = edit(plain, r"blocks\.0\.mlp\.up", "mask", growth=2.0).blocks[0].mlp.up
    assert mask.scores[...][0, 0] == NEVER
    mask.scores.set_value(mask.scores[...].at[1, 1].set(0.5))
    mask.clock.set_value(np.float32(3))
    soft = mask.soft()
    assert soft[1, 1] == pytest.approx(1 / (1 + math.exp(-4)))
    assert soft[0, 0] == 0
    assert not mask.kept()[0, 0]


def test_a_mask_trains_and_survives_a_file(tmp_path):
    """Scores learn in an ordinary training, weights that `rates` freezes do not; the file brings all of it back."""
    ids = np.tile(np.arange(12), 40)
    model = Transformer(ModelConfig(**SMALL, init_std=0.5))
    edit(model, r"blocks\.0\.mlp\.\w+", "mask", rule="topk", keep=0.3)
    before = {name: np.array(x) for name, x in named(model).items()}
    config = TrainConfig(steps=40, batch=4, learning_rate=0.02, optimizer="adamw", rates=(".*=0", r".*\.scores=1"))
    losses = [s.loss for s in train(model, Tokens.from_array(ids, vocab=12), config).every_step()]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    after = named(model)
    for name in before:
        assert np.array_equal(before[name], after[name]) == (not name.endswith(("scores", "clock")))
    save(model, tmp_path / "m")
    assert np.array_equal(load(tmp_path / "m")(ids[None, :8]), model(ids[None, :8]))


@pytest.mark.parametrize("wrong", [{"rule": "none"}, {"growth": 0.5}, {"keep": 0}])
def test_settings_of_a_mask_that_cannot_be(wrong):
    with pytest.raises(EditError, match=str(next(iter(wrong)))):
        edit(Transformer(ModelConfig(**SMALL)), r"blocks\.0\.mlp\.up", "mask", **wrong)


# --- subnetworks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """A bigram world of twelve words as ids, and its exact table."""
    found = World(mode="bigram", words=12, sharpness=1.5)
    number = {word: i for i, word in enumerate(found.chain.words)}
    ids = np.array([number[word] for text in found.texts(300) for word in text.split()])
    return Tokens.from_array(ids, vocab=12), probe.Bigrams.of_table(found.chain.table), found


@pytest.fixture(scope="module")
def hunt(world):
    """The planted model, its masks, and what is found in it by two penalties at once."""
    tokens, table, found = world
    model, true = planted(found.chain.table, layers=1)
    return model, true, probe.find(model, tokens, table, sizes=(0.03, 3.0), steps=400, batch=8, length=32)


def test_the_planted_subnetwork_is_found(hunt):
    _, true, (gentle, harsh) = hunt
    hits = sum(int((gentle.masks[path] & true[path]).sum()) for path in true)
    assert hits / gentle.kept > 0.95  # precision
    assert hits / sum(mask.sum() for mask in true.values()) > 0.85  # recall; weights near 0 are not missed
    assert gentle.where(r"blocks\.0\.mlp\..*") > 0.95
    assert harsh.kept < gentle.kept
    assert gentle.stable
    assert gentle.decided


def test_what_is_measured_of_it(hunt, world):
    tokens, table, _ = world
    model, true, _ = hunt
    report = measure(model, Subnetwork(true), table, tokens, windows=20, length=32)
    rows = report.rows
    assert rows["full"].r > 0.99
    assert rows["subnetwork"].r > 0.99
    assert rows["subnetwork"].soft == pytest.approx(table.entropy(), abs=0.05)  # of the words that were read
    assert abs(rows["random"].r) < 0.5
    assert rows["complement"].bits > rows["full"].bits + 0.3
    assert report.first_mlp == 1
    assert report.seen == 1
    assert "subnetwork" in repr(report)


def test_members_are_found_as_they_would_be_alone(world):
    tokens, table, found = world
    model, _ = planted(found.chain.table, layers=1)
    given = {"steps": 12, "batch": 2, "length": 8, "early": False}
    together = probe.find(model, tokens, table, sizes=(0.1, 1.0), **given)
    alone = probe.find(model, tokens, table, sizes=(1.0,), **given)[0]
    np.testing.assert_allclose(together[1].losses, alone.losses, rtol=1e-4)
    same = [np.mean(alone.masks[path] == mask) for path, mask in together[1].masks.items()]
    assert np.mean(same) > 0.99


@pytest.mark.parametrize(("rule", "more"), [("topk", {"keep": 0.1, "learning_rate": 0.01}), ("hard_concrete", {})])
def test_other_rules_and_the_models_own_predictions_as_target(world, rule, more):
    tokens, _, found = world
    model, _ = planted(found.chain.table, layers=1)
    (part,) = probe.find(model, tokens, None, sizes=(0.1,), rule=rule, steps=30, batch=4, length=16, **more)
    assert part.losses[-3:].mean() < part.losses[:3].mean() + 0.05
    assert 0 < part.kept < part.total
    if rule == "topk":
        assert part.share == pytest.approx(0.1, abs=0.01)


def test_parts_of_a_model():
    model = Transformer(ModelConfig(**SMALL, init_std=0.3))
    rng = np.random.default_rng(0)
    shapes = {
        n.removesuffix(".kernel"): x.shape for n, x in named(model).items() if n.startswith("blocks") and x.ndim == 2
    }
    part = Subnetwork({name: rng.random(shape) < 0.3 for name, shape in shapes.items()})
    ids = rng.integers(0, 12, (2, 9), dtype=np.int32)
    by_hand = Transformer(ModelConfig(**SMALL, init_std=0.3))
    masked = {n: np.asarray(x) * part.masks.get(n.removesuffix(".kernel"), 1) for n, x in named(by_hand).items()}
    assign(by_hand, masked)
    np.testing.assert_allclose(part.model(model)(ids), by_hand(ids), atol=1e-6)
    assert part.complement().kept == part.total - part.kept
    shuffled = part.shuffled(1)
    assert {p: m.sum() for p, m in shuffled.masks.items()} == {p: m.sum() for p, m in part.masks.items()}
    head = part.with_part("blocks.0.attn.o", np.s_[:4], on=False)
    assert not head.masks["blocks.0.attn.o"][:4].any()
    assert part.masks["blocks.0.attn.o"][:4].any()
    with pytest.raises(DataError, match="mask of another model"):
        part.model(Transformer(ModelConfig(**{**SMALL, "width": 16})))
    with pytest.raises(DataError, match="give booleans"):
        Subnetwork({"m": np.ones((2, 2), int)})
    with pytest.raises(DataError, match="at least one matrix"):
        Subnetwork({})
    untied = Transformer(ModelConfig(**SMALL, init_std=0.3, head="untied"))
    head = Subnetwork({"head.out": np.zeros((8, 12), bool)})  # a matrix that is not masked unless asked for
    assert not np.asarray(head.model(untied)(ids)).any()
    with pytest.raises(DataError, match="no matrix 'x'"):
        part.with_part("x")


def test_overlap_against_chance():
    rng = np.random.default_rng(0)
    a = Subnetwork({"m": rng.random((30, 40)) < 0.2, "n": rng.random((20, 20)) < 0.5})
    b = Subnetwork({"m": rng.random((30, 40)) < 0.2, "n": rng.random((20, 20)) < 0.5})
    chance = sum(a.masks[p].sum() * b.masks[p].sum() / a.masks[p].size for p in "mn") / a.total
    for by in ("weights", "rows"):
        other, self = overlap(a, b, shuffles=400, by=by), overlap(a, a, shuffles=400, by=by)
        assert other.chance == pytest.approx(chance, rel=0.05)
        assert other.p > 0.005
        assert self.both == pytest.approx(a.share)
        assert self.of_first == 1
        assert self.p == pytest.approx(1 / 401)
    with pytest.raises(DataError, match="their matrices differ"):
        overlap(a, Subnetwork({"m": a.masks["m"]}))


def test_correlation_is_pearsons_and_leaves_infinities_out():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 40, 10)) + 5
    y += x
    y[0, 0] = np.inf
    good = np.isfinite(y)
    r, (low, high) = correlation(x, y)
    assert r == pytest.approx(np.corrcoef(x[good], y[good])[0, 1])
    assert low < r < high


def test_spikes_make_a_run_unstable_only_when_late():
    calm = np.full(300, 2.0)
    early, late = calm.copy(), calm.copy()
    early[50:60] = 4.0
    late[280:] = 4.0
    assert is_stable(calm)
    small = np.full(300, 0.4)
    small[250:] = 0.55  # more than a quarter above, and still so at the end
    assert not is_stable(small)
    assert is_stable(early)
    assert not is_stable(late)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"target": probe.Bigrams.of_table(np.eye(3))}, DataError, "the target knows 3 ids, the model 12"),
        ({"sizes": ()}, DataError, "need at least one"),
        ({"sizes": (-1,)}, DataError, "penalties and the rate"),
        ({"sizes": (math.nan,)}, DataError, "penalties and the rate"),
        ({"data": np.zeros((3, 9), int)}, DataError, "give Tokens"),
        ({"learning_rate": -1.0}, DataError, "penalties and the rate"),
        ({"data": Tokens.from_array(np.zeros(40, int), vocab=99)}, DataError, "the texts have 99 ids"),
        ({"rule": "binary"}, EditError, "learns nothing"),
        ({"where": "nothing"}, EditError, "no module matches"),
    ],
)
def test_a_search_that_cannot_be(more, error, message):
    given = {"target": None, "steps": 2, **more}
    model, tokens = Transformer(ModelConfig(**SMALL)), Tokens.from_array(np.zeros(40, int), vocab=12)
    with pytest.raises(error, match=message):
        probe.find(model, given.pop("data", tokens), given.pop("target"), **given)


def test_matrices_inside_a_wrapped_mlp_are_not_passed_over():
    tokens = Tokens.from_array(np.zeros(40, int), vocab=12)
    for where in (r"blocks\.0\.mlp", r"blocks\.0"):
        model = edit(Transformer(ModelConfig(**SMALL)), where, "codebook", side="output", codes=4, k=1)
        with pytest.raises(EditError, match=f"{where} has a Codebook around it"):
            probe.find(model, tokens, None, steps=2)
