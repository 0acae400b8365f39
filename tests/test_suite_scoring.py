"""The suite's scores: against the plain forward pass, closed forms, and what the world proves."""

import functools
import gzip
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_model import NumpyModel

from tinylm.config import ModelConfig
from tinylm.evaluation import EvaluationError
from tinylm.model import Transformer
from tinylm.suite import (
    PARADIGMS,
    Cloze,
    Pair,
    Scorer,
    cloze,
    difference,
    estimate,
    minimal_pairs,
    read_clozes,
    read_pairs,
    story_clozes,
    world_pairs,
)
from tinylm.suite import worldpairs as room
from tinylm.tokenizer import Tokenizer
from tinylm.weights import named
from tinylm.world import World

CONTEXT = 40


@functools.cache
def model(context=CONTEXT, **changes):
    tokenizer = Tokenizer.train(World().texts(40), vocab=600)
    sizes = {"vocab": tokenizer.vocab, "context": context, "width": 32, "layers": 2, "heads": 2, "init_std": 0.3}
    return Transformer(ModelConfig(**sizes | changes), rngs=3, tokenizer=tokenizer)


def plain_logprobs(m, ids):
    """(len(ids) - 1, V) float64 log-probabilities: the slow twin, one text at a time, no batch, no padding."""
    logits = NumpyModel(m.config, named(m))(np.asarray(ids)[:-1])
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def brute(m, text):
    """Nats of a text after the begin token."""
    ids = [m.tokenizer.begin, *m.tokenizer.encode(text)]
    return plain_logprobs(m, ids)[np.arange(len(ids) - 1), ids[1:]]


# --- the scorer -------------------------------------------------------------------------------------------------------


def test_texts_cost_what_the_plain_forward_says():
    texts = ["The cat sat.", "Once upon a time there was a fox.", "é", "Lily saw a red ball, and Tom saw a blue one."]
    for got, text in zip(Scorer(model(), batch=2).texts(texts), texts, strict=True):
        np.testing.assert_allclose(got, brute(model(), text), atol=2e-5)


def test_continuations_cost_what_the_plain_forward_says():
    m = model()
    story = World().story(0).text
    pairs = [(story[:n], story[n : n + 6]) for n in range(5, 60, 7)] + [("", "The cat"), ("The cat", " sat")]
    for got, (before, text) in zip(Scorer(m, batch=3).continuations(pairs), pairs, strict=True):
        ids = [m.tokenizer.begin, *m.tokenizer.encode(before + text)]
        held = np.cumsum([len(m.tokenizer.decode_bytes([i])) for i in ids[1:]])
        first = int((held <= len(before.encode())).sum())
        table = plain_logprobs(m, ids)[first:]
        assert got.logprob == pytest.approx(table[np.arange(len(table)), ids[1 + first :]].sum(), abs=1e-4)
        assert got.tokens == len(table)
        assert got.greedy == all(table.argmax(1) == ids[1 + first :])


def test_a_long_context_is_cut_on_the_left_and_a_long_continuation_refused():
    m, story = model(), World().story(1).text
    (got,) = Scorer(m).continuations([(story, " The end")])
    ids = [m.tokenizer.begin, *m.tokenizer.encode(story + " The end")]
    tail = len(m.tokenizer.encode(" The end"))
    table = plain_logprobs(m, ids[-1 - CONTEXT :])[-tail:]
    assert got.cut == len(ids) - 1 - CONTEXT > 0
    assert got.logprob == pytest.approx(table[np.arange(tail), ids[-tail:]].sum(), abs=1e-4)
    with pytest.raises(EvaluationError, match="score it as a text"):
        Scorer(m).continuations([("a", story)])


def test_the_chain_rule():
    m, (before, text) = model(), ("Lily had a", " red ball.")
    one, two, both = Scorer(m).continuations([("", before), (before, text), ("", before + text)])
    assert one.logprob + two.logprob == pytest.approx(both.logprob, abs=1e-4)
    assert Scorer(m).texts([before + text])[0].sum() == pytest.approx(both.logprob, abs=1e-4)


class Pieces:
    """Tokens are the given strings, taken greedily; the last id begins and ends a text."""

    def __init__(self, *pieces):
        self.pieces, self.vocab, self.end = pieces, len(pieces) + 1, len(pieces)

    def encode(self, text):
        ids = []
        while text:
            ids.append(next(i for i, piece in enumerate(self.pieces) if text.startswith(piece)))
            text = text[len(self.pieces[ids[-1]]) :]
        return np.array(ids, np.int32)

    def decode_bytes(self, ids):
        return "".join(self.pieces[i] if i < self.end else "" for i in ids).encode()


def test_greedy_means_that_every_token_is_the_likeliest():
    m = Transformer(ModelConfig(vocab=5, context=16, width=16, layers=1, heads=2, init_std=0.4), rngs=0)
    ids = [4, 1]
    for _ in range(5):
        ids.append(int(plain_logprobs(m, [*ids, 0])[-1, :4].argmax()))
    text = "".join("abcd"[i] for i in ids[2:])
    wrong = text[:-1] + ("a" if text[-1] != "a" else "b")
    likely = [plain_logprobs(m, [*ids[:i], 0])[-1].argmax() == ids[i] for i in range(2, 7)]
    got = Scorer(m, tokenizer=Pieces(*"abcd")).continuations([("b", text), ("b", wrong)])
    assert [one.greedy for one in got] == [all(likely), False]
    assert all(likely), "the end token is likeliest: choose another seed, or nothing is tested"


def test_a_token_across_the_border_is_the_continuations():
    m = Transformer(ModelConfig(vocab=5, context=8, width=16, layers=1, heads=2, init_std=0.4), rngs=0)
    scorer = Scorer(m, tokenizer=Pieces("ab", "a", "b", "c"))
    (split,) = scorer.continuations([("ca", "bc")])  # read as c, ab, c
    table = plain_logprobs(m, [4, 3, 0, 3])
    assert split.tokens == 2
    assert split.logprob == pytest.approx(table[1, 0] + table[2, 3], abs=1e-5)


def test_what_cannot_be_scored_is_named():
    with pytest.raises(EvaluationError, match="needs a decoder"):
        Scorer(SimpleNamespace(config=ModelConfig(kind="encoder", vocab=300, context=8, width=16, layers=1, heads=2)))
    with pytest.raises(EvaluationError, match="is empty"):
        Scorer(model()).continuations([("a", "")])
    with pytest.raises(EvaluationError, match="no token to score"):
        Scorer(model()).texts(["a", ""])
    broken = Pieces("a", "b")
    broken.decode_bytes = lambda ids: b"??"
    m = Transformer(ModelConfig(vocab=3, context=8, width=16, layers=1, heads=2), rngs=0)
    with pytest.raises(EvaluationError, match="does not come back"):
        Scorer(m, tokenizer=broken).continuations([("a", "bb")])


# --- estimates --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(3, 2, size=60)
    got = estimate(values)
    half = 2.0010 * values.std(ddof=1) / math.sqrt(60)  # t(59, 0.975)
    assert got.value == pytest.approx(values.mean())
    assert got.ci95 == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06)


def test_items_of_one_document_are_drawn_together():
    values = np.random.default_rng(1).normal(size=40)
    once = estimate(values)
    repeated = estimate(np.repeat(values, 5), documents=np.repeat(np.arange(40), 5))
    assert repeated.value == pytest.approx(once.value)
    assert repeated.ci95 == pytest.approx(once.ci95)
    assert repeated.units == 40
    naive = estimate(np.repeat(values, 5))
    assert naive.ci95[1] - naive.ci95[0] < 0.6 * (once.ci95[1] - once.ci95[0])


def test_missing_values_and_weights():
    assert estimate([1.0, math.nan, 3.0]) == estimate([1.0, 3.0])
    assert estimate([1.0, 4.0], weights=[3, 1]).value == pytest.approx(1.75)
    assert estimate([2.0]).ci95 is None
    with pytest.raises(EvaluationError, match="none of the 2 items"):
        estimate([math.nan, math.nan])


# --- minimal pairs ----------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_pairs_the_plain_forward_prefers():
    m = model()
    texts = ["The cat", "The dog is", "A red ball", "An red ball", "Lily was sad.", "Lily were sad.", "a b", "a b c d"]
    pairs = [Pair(a, b, "few" if i < 3 else "many") for i, (a, b) in enumerate(itertools.permutations(texts[:5], 2))]
    pairs += [Pair(texts[i], texts[i + 1], "many") for i in (2, 4, 6)] + [Pair("same", "same", "tie")]
    got = minimal_pairs(m, pairs)
    sums = np.array([[brute(m, p.good).sum(), brute(m, p.bad).sum()] for p in pairs])
    right = sums[:, 0] > sums[:, 1]
    assert 0.2 < right.mean() < 0.8
    np.testing.assert_allclose(got.items["margin"], sums[:, 0] - sums[:, 1], atol=1e-3)
    np.testing.assert_array_equal(got.items["accuracy"], right)
    per_byte = sums / np.array([[len(p.good), len(p.bad)] for p in pairs])
    np.testing.assert_array_equal(got.items["accuracy_per_byte"], per_byte[:, 0] > per_byte[:, 1])
    assert any(got.items["accuracy_per_byte"] != right)
    assert got.groups["paradigm"]["tie"]["accuracy"].value == 0
    assert got["accuracy"] == pytest.approx(right.mean())
    assert got.groups["paradigm"]["few"]["accuracy"].value == pytest.approx(right[:3].mean())
    assert json.loads(json.dumps(got.to_dict()))["figures"]["accuracy"]["value"] == got["accuracy"]
    assert "accuracy" in repr(got)
    assert "<table" in got._repr_html_()


def test_batches_and_seeds_change_nothing():
    pairs = [Pair(a, b, "x") for a, b in itertools.permutations(World().story(3).text.split(". ")[:4], 2)]
    a, b = minimal_pairs(model(), pairs, batch=2), minimal_pairs(model(), pairs)
    np.testing.assert_allclose(a.items["margin"], b.items["margin"], atol=1e-3)
    assert a.sha256 == b.sha256
    zero = difference(b, b)
    assert (zero.value, zero.ci95) == (0, (0, 0))
    with pytest.raises(EvaluationError, match="not of the same items"):
        difference(a, minimal_pairs(model(), pairs[:3]))
    with pytest.raises(EvaluationError, match="no figure 'acuracy'"):
        a["acuracy"]


def test_many_groups_are_counted_not_listed():
    pairs = [Pair(f"a {i}", f"b {i}", f"paradigm_{i:02}", "all") for i in range(30)]
    shown = repr(minimal_pairs(model(), pairs))
    assert "paradigm: 30, in .groups['paradigm']" in shown
    assert "paradigm_07" not in shown


LINES = [
    {"sentence_good": "A b.", "sentence_bad": "A c.", "UID": "x", "linguistics_term": "t", "field": "syntax"},
    {"sentence_good": "A b!", "sentence_bad": "A c!", "UID": "x", "linguistics_term": "t", "field": "syntax"},
    {"sentence_good": "D.", "sentence_bad": "E."},
]


@pytest.mark.parametrize("name", ["one.jsonl", "one.jsonl.gz", "."])
def test_blimps_files(tmp_path, name):
    raw = "\n".join(map(json.dumps, LINES)).encode() + b"\n\n"
    file = tmp_path / ("one.jsonl" if name == "." else name)
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    (tmp_path / "notes.txt").write_text("not read")
    got = read_pairs(tmp_path / name)
    assert got[0] == Pair("A b.", "A c.", "x", "t", "syntax")
    assert got[2] == Pair("D.", "E.", "one", "one")
    assert [pair.good for pair in read_pairs(tmp_path / name, limit=1)] == ["A b.", "D."]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"sentence_good": "a"}', r"p.jsonl line 1: needs 'sentence_good' and 'sentence_bad'"),
        (b"[1]", r"line 1: a json object is needed"),
        (b"{}\n{", r"needs 'sentence_good'"),
        (b"{", r"p.jsonl cannot be read as json lines"),
        (b"\xff", r"p.jsonl cannot be read as json lines"),
        (b"", r"holds no pair"),
    ],
)
def test_bad_files_are_named(tmp_path, raw, said):
    (tmp_path / "p.jsonl").write_bytes(raw)
    with pytest.raises(EvaluationError, match=said):
        read_pairs(tmp_path / "p.jsonl")


def test_the_real_blimp(shared_data):
    pairs = read_pairs(shared_data / "eval" / "blimp.jsonl.gz", limit=2)
    known = [
        json.loads(line)["UID"]
        for line in (shared_data / "eval/blimp_reference_models_summary.jsonl").read_text().splitlines()
    ]
    paradigms = {pair.paradigm for pair in pairs}
    assert len(pairs) == 2 * len(paradigms) == 90
    assert paradigms <= set(known)


# --- the world's pairs ------------------------------------------------------------------------------------------------


def test_the_world_writes_the_good_text_and_never_the_bad_one():
    world, each = World(), 4
    pairs = world_pairs(each)
    assert {p.paradigm for p in pairs} == set(PARADIGMS)
    for pair in pairs:
        story = world.story(pair.document, room.STREAM).text
        assert story.startswith(pair.good)
        assert math.isfinite(world.logprob(story))
        assert world.logprob(pair.bad + story[len(pair.good) :]) == -math.inf
        words = [re.findall(r"[\w']+|\W", text) for text in (pair.good, pair.bad)]
        start = next(i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b)
        end = next(i for i, (a, b) in enumerate(zip(*(w[::-1] for w in words), strict=False)) if a != b)
        assert len(words[0]) - start - end <= 3, pair  # a thing may have two words
        assert len(pair.good.encode()) <= room.LONGEST


def test_each_paradigm_is_what_it_says():
    found = {name: world_pairs(6, paradigms=[name]) for name in PARADIGMS}

    def change(pair):
        a, b = (re.findall(r"\w+", text) for text in (pair.good, pair.bad))
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        return a, a[at], b[at], at

    for pair in found["a_an"]:
        words, right, wrong, at = change(pair)
        assert (right, wrong) == (("an", "a") if words[at + 1][0] in "aeiou" else ("a", "an"))
    for name, changes in (("was_were", {"was", "were"}), ("pronoun", {"He", "She"}), ("possessive", {"his", "her"})):
        assert all({*change(pair)[1:3]} == changes for pair in found[name])
    for name in ("name", "colour", "number"):
        for pair in found[name]:
            words, right, wrong, at = change(pair)
            assert right in words[:at], (name, pair)  # said before
            assert wrong not in words, (name, pair)


def test_world_pairs_are_frozen_and_one_of_a_kind_per_story():
    pairs = world_pairs(5)
    assert pairs == world_pairs(5)
    assert world_pairs(2, paradigms=["name"]) == [p for p in pairs if p.paradigm == "name"][:2]
    assert len({(p.paradigm, p.document) for p in pairs}) == len(pairs)
    with pytest.raises(EvaluationError, match="no paradigm is called nmae"):
        world_pairs(5, paradigms=["nmae"])
    with pytest.raises(EvaluationError, match="a world of stories"):
        world_pairs(5, world=World(mode="fsm"))


# --- cloze ------------------------------------------------------------------------------------------------------------

TALE = "Tom had a boat. The boat was red. Mia saw it. She liked it very much. They went to the lake with the boat."


def test_clozes_ask_for_a_word_that_was_said():
    (item,) = story_clozes([TALE])
    assert item == Cloze(TALE.removesuffix(" boat."), "boat", "They went to the lake with the")
    with pytest.raises(EvaluationError, match="no story holds an item"):
        story_clozes([TALE.replace("the boat.", "their mother."), "One. Two.", TALE.replace("boat.", "it.")])


def test_clozes_are_chosen_by_hash():
    stories = list(World().texts(300))
    items = story_clozes(stories, 20)
    assert items == story_clozes(stories[::-1], 20)
    assert items != story_clozes(stories, 20, seed=1)
    whole = set(story_clozes(stories, 10_000))
    assert set(items) < whole
    assert len({item.context for item in whole}) == len(whole)
    for item in items:
        assert item.context.endswith(item.sentence)
        assert re.search(rf"\b{item.word}\b", item.context, re.IGNORECASE)
        assert not re.search(rf"\b{item.word}\b", item.sentence, re.IGNORECASE)


def test_lambadas_form(tmp_path):
    text = 'She took the cake. "Look," he said, "that is my cake'
    (tmp_path / "l.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "only"}) + "\n")
    with pytest.raises(EvaluationError, match="line 2: 'text' must be a text of at least two words"):
        read_clozes(tmp_path / "l.jsonl")
    (item,) = read_clozes(tmp_path / "l.jsonl", limit=1)
    assert item == Cloze(text.removesuffix(" cake"), "cake", '"Look," he said, "that is my')


def test_cloze_figures_are_the_plain_forwards():
    m = model()
    items = [Cloze("Tom had a boat. He liked the", "boat", "He liked the"), Cloze("A red fox. Oh! A", "fox", "A")]
    got = cloze(m, items)
    for i, item in enumerate(items):
        for name, before in (("nats", item.context), ("nats_sentence", item.sentence)):
            expected = brute(m, before).sum() - brute(m, f"{before} {item.word}").sum()
            assert got.items[name][i] == pytest.approx(expected, abs=1e-3)
    assert got["gain"] == pytest.approx(got["nats_sentence"] - got["nats"])
    assert 0 <= got["accuracy"] <= 1


@settings(deadline=None, max_examples=20)
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_an_accuracy_is_the_mean_whatever_its_interval(right):
    got = estimate(np.array(right, float))
    assert got.value == pytest.approx(sum(right) / len(right))
    assert got.ci95 is None or got.ci95[0] - 1e-9 <= got.value <= got.ci95[1] + 1e-9
