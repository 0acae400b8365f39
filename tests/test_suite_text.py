"""The suite's measures of texts: against brute force, published implementations' numbers, and cases made by hand."""

import dataclasses
import hashlib
import json
import math
import re
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinylm.evaluation import EvaluationError
from tinylm.suite import (
    PROMPTS,
    Completion,
    Corpus,
    Judge,
    JudgeError,
    memorisation,
    overlap,
    rouge_l,
    rouge_n,
    rubric_of,
    self_bleu,
    variety,
)
from tinylm.suite.judge import AGES, parse_grades
from tinylm.suite.memorisation import halves
from tinylm.suite.overlap import words
from tinylm.world import World

letters = st.lists(st.sampled_from("abcd"), max_size=14)
some = st.lists(letters.filter(bool), min_size=1, max_size=6)

# --- ROUGE ------------------------------------------------------------------------------------------------------------

ONE = "The cat sat on the mat, and the cat slept. It was the cat's mat!"
TWO = "A cat sat on a mat. The dog slept on the cat and the mat."


def test_rouge_as_googles():
    """Figures of rouge-score 0.1.2, `RougeScorer([...]).score(target=TWO, prediction=ONE)`."""
    assert rouge_n(ONE, TWO, 1) == pytest.approx((0.6875, 0.7333333333333333, 0.7096774193548386))
    assert rouge_n(ONE, TWO, 2) == pytest.approx((0.4, 0.42857142857142855, 0.4137931034482759))
    assert rouge_l(ONE, TWO) == pytest.approx((0.5625, 0.6, 0.5806451612903225))


def slow_lcs(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


@given(letters, letters, st.integers(1, 3))
def test_rouge_by_its_definition(a, b, n):
    grams = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in (a, b)]
    shared = sum(min(grams[0].count(g), grams[1].count(g)) for g in set(grams[0]))
    got = rouge_n(a, b, n)
    assert got.precision == pytest.approx(shared / len(grams[0]) if grams[0] else 0)
    assert got.recall == pytest.approx(shared / len(grams[1]) if grams[1] else 0)
    paper = rouge_n(a, b, n, clip=False)
    assert paper.precision == pytest.approx(np.mean([g in grams[1] for g in grams[0]]) if grams[0] else 0)
    p, r, f = rouge_l(a, b)
    assert (p * len(a), r * len(b)) == pytest.approx((slow_lcs(a, b), slow_lcs(a, b)))
    assert f == pytest.approx(2 * p * r / (p + r) if p + r else 0)


# --- what a corpus holds ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(some, st.lists(letters, min_size=1, max_size=4), st.integers(1, 3))
@example([["a"]], [[]], 3)  # a corpus without a single run of three
def test_a_corpus_by_brute_force(documents, texts, n):
    corpus = Corpus(" ".join(one) for one in documents)
    held = ["," + ",".join(one) + "," for one in documents]
    inside = lambda run, of: any("," + ",".join(run) + "," in text for text in of)  # noqa: E731
    unseen, runs, near = corpus.unseen(texts, n), corpus.longest(texts), corpus.nearest(texts, n)
    for i, text in enumerate(texts):
        grams = [text[j : j + n] for j in range(len(text) - n + 1)]
        if not grams:
            assert math.isnan(unseen[i])
            assert near[i][0] == -1
        else:
            assert unseen[i] == pytest.approx(np.mean([not inside(g, held) for g in grams]))
            best = max(np.mean([inside(g, [one]) for g in grams]) for one in held)
            assert near[i][1] == pytest.approx(best)
            assert np.mean([inside(g, [held[near[i][0]]]) for g in grams]) == pytest.approx(best)
        every = [text[a:b] for a in range(len(text)) for b in range(a + 1, len(text) + 1)]
        longest = max((len(run) for run in every if inside(run, held)), default=0)
        length, start, document = runs[i]
        assert length == longest
        assert document == -1 or inside(text[start : start + length], [held[document]])


def test_a_copy_is_found_in_real_sizes():
    train = list(World().texts(400))
    copy, other = train[123], World().story(0, seed=77).text
    half = " ".join(words(copy)[:40]) + " xyzzy " + " ".join(words(other)[-60:])
    got = overlap([copy, half, other, "", "?!"], train)
    assert got["copied"].tolist()[:3] == [1, 0, 0]
    assert got["longest"][0] == len(words(copy))
    assert got["longest"][1] >= 40
    assert got["new_5"][0] == 0 < got["new_5"][2]
    assert got["nearest_rouge2"][0] == 1
    assert got["nearest_rougeL"][0] == 1
    assert np.isnan(got["new_1"][3:]).all()
    assert np.isnan(got["copied"][3:]).all()
    with pytest.raises(EvaluationError, match="holds no word"):
        Corpus(["", "!"])


def test_the_audit_tells_a_copier_from_a_writer(monkeypatch):
    """The model is played: one knows every text by heart, the other goes on with other stories of the world."""
    train, fresh = list(World().texts(60)), list(World().texts(40, seed=1))
    ends = {halves(text)[0]: halves(text)[1] for text in [*train, *fresh]}
    others = World().texts(None, seed=2)
    room = sys.modules[memorisation.__module__]

    def audit(play):
        monkeypatch.setattr(room, "complete", lambda m, prompts, **_: [Completion(p, play(p), True) for p in prompts])
        return memorisation(None, train, [*fresh, train[5]], count=20)

    copier = audit(ends.__getitem__)
    assert copier["copied"] == copier["end_rouge2"] == copier["nearest_rouge2"] == 1
    assert copier["new_5"] == 0
    assert copier.notes == ("1 of 41 held-out texts occur in the training text: left out",)
    writer = audit(lambda _: halves(next(others))[1])
    assert writer["copied"] < 0.2
    assert writer["end_rouge2"] < 0.5
    real = writer.groups["source"]["real"]
    assert set(writer.groups["source"]) == {"training", "held-out", "real"}
    assert abs(writer["new_3"] - real["new_3"].value) < 0.1  # both are stories of the world that nobody copied
    assert "twin_rouge2" not in real
    assert set(json.loads(json.dumps(writer.to_dict()))["groups"]["source"]) == {"training", "held-out", "real"}
    with pytest.raises(EvaluationError, match="only 1 held-out texts"):
        memorisation(None, train, [fresh[0]], count=20)


def test_halves():
    assert halves("one two  three\nfour five", 0.4) == ("one two", "  three\nfour five")
    assert halves("one", 0.1) == ("one", "")
    assert halves("") == ("", "")


# --- how alike --------------------------------------------------------------------------------------------------------


def test_self_bleu_as_nltks():
    """Figures of nltk 3.10.4: `sentence_bleu(others, text, smoothing_function=SmoothingFunction().method1)`."""
    texts = [
        "the cat sat on the mat and slept", "the cat sat on a red mat", "a dog ran to the mat and sat on the mat",
        "the cat", "nobody knows",
    ]  # fmt: skip
    nltk = [0.7071067811865476, 0.39442436483275556, 0.3209138982794099, 0.316227766016838, 0]
    assert self_bleu(texts) == pytest.approx(nltk)
    assert self_bleu([one.split() for one in texts]) == pytest.approx(nltk)
    assert self_bleu(["a b c d e"] * 3) == pytest.approx([1, 1, 1])
    with pytest.raises(EvaluationError, match="1 is too few"):
        self_bleu(["alone"])


def test_variety_falls_with_sameness():
    stories = list(World().texts(12))
    mixed, same = variety(stories), variety([stories[0]] * 12)
    assert mixed["self_bleu"] < 0.9 < same["self_bleu"] == pytest.approx(1)
    assert mixed["distinct_4"] > same["distinct_4"] == pytest.approx(97 / (12 * 97))
    assert mixed.figures["distinct_2"].ci95 is None
    assert mixed.figures["self_bleu"].ci95 is not None


# --- the rubric -------------------------------------------------------------------------------------------------------


def test_the_beginnings_are_frozen():
    text = "\n".join(prompt.text for prompt in PROMPTS)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "c4a27e2372457fcdec67d8f2e5053f4b70e160cf7ec9ce1f32be5db4b5ce558b"
    )
    for prompt in PROMPTS:
        assert all(re.search(rf"\b{name}\b", prompt.text) for name in prompt.names)
        assert re.search(r"[\w,]$", prompt.text)  # in the middle of a sentence, and no space after it


BEGUN = 'Tom met Mia. "Look,'
MADE = [
    # continuation, ended, names kept, closed, quotes balanced, repetition
    ('" said Tom. Mia laughed.', True, 1.0, 1, 1, 0.0),
    ('" he said. He laughed', True, 0.0, 0, 1, 0.0),
    ('" said Tom.\nMia said, "I', False, 1.0, 0, 1, 0.0),  # cut off: what its last paragraph opens is forgiven
    ('" said Tom, "yes.\nMia said nothing.', False, 1.0, 0, 0, 0.0),
    (" said Tommy. Mia laughed.", True, 0.5, 1, 0, 0.0),
    ('" \u201cOh\u201d \u201d.', True, 0.0, 1, 0, math.nan),
    ('" go go go go go go go go.', True, 0.0, 1, 1, 4 / 5),
]


def test_rubrics_by_hand():
    made = [Completion(BEGUN, text, ended) for text, ended, *_ in MADE]
    got = rubric_of(made, [("Tom", "Mia")] * len(made), vocabulary={"said", "tom", "mia", "go"})
    names, ends, quotes, again = ([row[2 + i] for row in MADE] for i in range(4))
    assert got.items["names_kept"].tolist() == names
    assert got.items["closed"].tolist() == ends
    assert got.items["quotes_balanced"].tolist() == quotes
    np.testing.assert_allclose(got.items["repetition"], again)
    assert got.items["known_words"][0] == pytest.approx(3 / 4)
    assert got.items["words"].tolist() == [4, 4, 5, 6, 4, 1, 8]
    assert got.figures["closed"].units == 1  # seven continuations of one beginning are one unit
    assert got.figures["closed"].ci95 is None


# --- the judge --------------------------------------------------------------------------------------------------------

STORIES = [Completion(prompt.text, " they went home and slept.", True) for prompt in PROMPTS[:6]]
LINE = "Grammar: 8/10, Creativity: 5/10, Consistency: 10/10, Age group: C"


def test_a_judge_is_asked_twice_and_everything_is_kept():
    asked = []

    def ask(prompt):
        asked.append(prompt)
        return f"Thank you.\n**{LINE}**" if "Your description was" in prompt else "A fine little story."

    got = Judge(ask).stories(STORIES)
    assert (got["grammar"], got["creativity"], got["consistency"], got["age_group"]) == (8, 5, 10, 2)
    assert got.figures["grammar"].ci95 == (8, 8)
    assert len(asked) == 12
    assert f"{STORIES[0].prompt} *** they went home" in asked[0]
    assert asked[1].startswith(asked[0])
    assert "A fine little story." in asked[1]
    assert "Grammar: N/10, Creativity: N/10, Consistency: N/10, Age group: X" in asked[1]
    assert got.transcripts[0].exchanges == ((asked[0], "A fine little story."), (asked[1], f"Thank you.\n**{LINE}**"))
    assert not got.notes
    assert "transcripts" not in got.to_dict()


def test_failures_are_counted_and_named():
    turns = iter(range(100))

    def ask(prompt):
        turn = next(turns)
        if turn == 0:
            raise TimeoutError("no answer in 30 s")
        if turn == 1:
            return {"grammar": 11, "creativity": 1, "consistency": 1, "age_group": "A"}
        return {"grammar": 6, "creativity": 1, "consistency": 2.5, "age_group": "A"}

    got = Judge(ask).stories(STORIES)
    assert got.notes == ("2 of 6 stories have no grades; the first: TimeoutError: no answer in 30 s",)
    assert got.notes[0] in repr(got)
    assert got.settings["failed"] == 2
    assert (got["grammar"], got.figures["grammar"].units) == (6, 4)
    assert got.transcripts[1].error.startswith("EvaluationError: the scores")
    with pytest.raises(JudgeError, match="graded none of 6 stories: ValueError: key missing"):
        Judge(lambda prompt: (_ for _ in ()).throw(ValueError("key missing"))).stories(STORIES)
    with pytest.raises(KeyboardInterrupt):
        Judge(lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt())).stories(STORIES)
    with pytest.raises(EvaluationError, match="a callable"):
        Judge("gpt-4")


@pytest.mark.parametrize(
    "answer",
    [
        LINE.replace("8/10", "8"), LINE.replace("8/10", "11/10"), LINE.replace("8/10", "8.5/10"),
        LINE.replace("8/10", "-8/10"), LINE.replace(": C", ": G"), LINE.replace("Grammar", "Spelling"),
        f"{LINE}\n{LINE}", f"I would say {LINE}", "", 8, None,
        {"grammar": 1, "creativity": 1, "consistency": 1}, {"grammar": True, "creativity": 1, "consistency": 1,
        "age_group": "A"}, {"grammar": 1, "creativity": 1, "consistency": math.nan, "age_group": "A"},
        {"grammar": 1, "creativity": 1, "consistency": 1, "age_group": "A", "plot": 1},
    ],
)  # fmt: skip
def test_nothing_but_grades_is_read_as_grades(answer):
    with pytest.raises(EvaluationError):
        parse_grades(answer)


def test_grades_are_read():
    assert parse_grades(LINE.lower() + ".") == ({"grammar": 8, "creativity": 5, "consistency": 10}, "C")
    assert set(AGES) == set("ABCDEF")
    plot = Judge(lambda _: {"grammar": 1, "creativity": 2, "consistency": 3, "plot": 4, "age_group": "F"}, plot=True)
    got = plot.stories(STORIES[:2])
    assert (got["plot"], got["age_group"]) == (4, 5)
    assert "Plot: N/10" in plot.questions(STORIES[0])[1]("x")
    assert dataclasses.replace(got, task="other").transcripts == got.transcripts
