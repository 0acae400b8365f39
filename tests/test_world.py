"""The world: probabilities that are exact, stories that are coherent, and an answer key that is right."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.config import ConfigError
from tinylm.world import PLOTS, TOPICS, World, WorldTooLarge, engine
from tinylm.world.engine import Dist, Teller, Word

STORIES = list(World().stories(600))
DEMO_DIGEST = "import hashlib; from tinylm.world import World; "
DEMO_DIGEST += "print(hashlib.sha256(''.join(World(facts=50).texts(40, seed=3)).encode()).hexdigest())"


def ambiguous(s: Teller) -> None:
    """ "ab" in two ways: 1/2 * 1/2 + 1/2 * 1/4; also "a", "abb", "aab"."""
    if s.choose((True, False)):
        s.say("a[|b]")
    else:
        s.say("[a|aa*3]b")
        s.draw(Dist((0, 1)))


# Probabilities


def test_ambiguity_is_summed() -> None:
    assert math.exp(engine.logprob(ambiguous, "ab")) == pytest.approx(0.25 + 0.125, abs=1e-15)
    assert math.exp(engine.logprob(ambiguous, "aab")) == pytest.approx(0.375, abs=1e-15)
    assert len(list(engine.derivations(ambiguous, "ab"))) == 3
    assert math.fsum(math.exp(r.logprob) for r in engine.derivations(ambiguous)) == pytest.approx(1, abs=1e-15)


SMALL = [
    World(small=4),
    World(small=5, topics=("sea", "farm"), topic_weights=(3.0, 1.0), plots=("lost", "storm"), facts=6),
    World(mode="fsm", states=5, successors=3, length=6),
    World(mode="bigram", words=4, length=5),
]


@pytest.mark.parametrize("world", SMALL, ids=lambda w: f"{w.mode}-{w.small}")
def test_a_small_world_sums_to_one(world: World) -> None:
    texts = world.enumerate()
    assert len(texts) > 500
    assert abs(math.fsum(map(math.exp, texts.values())) - 1) < 1e-12
    for text in list(texts)[:: max(1, len(texts) // 200)]:
        assert world.logprob(text) == pytest.approx(texts[text], abs=1e-12)
    # what is drawn is what was enumerated, as often as stated
    drawn = Counter(world.texts(4000, seed=5))
    assert set(drawn) <= set(texts)
    entropy = -math.fsum(math.exp(p) * p for p in texts.values())
    surprisal = np.array([-texts[text] for text, count in drawn.items() for _ in range(count)])
    assert abs(surprisal.mean() - entropy) < 4 * surprisal.std() / math.sqrt(4000) + 1e-9
    if world.mode != "stories":
        assert world.chain.entropy == pytest.approx(entropy, rel=1e-12)


@pytest.mark.parametrize(
    ("world", "number"),
    [
        (World(small=12), 800),
        (World(mode="fsm", length=12), 3000),
        (World(mode="bigram", words=20, length=12), 3000),
        (World(seed=2, facts=500, zipf=1.2), 150),
        (World(), 250),
        pytest.param(World(), 10_000, marks=pytest.mark.slow),
    ],
)
def test_logprob_equals_the_record(world: World, number: int) -> None:
    for story in world.stories(number, seed=1):
        scored = world.logprob(story.text)
        assert scored >= story.logprob - 1e-9
        assert scored == pytest.approx(story.logprob, abs=1e-9), story.text  # today every text has one derivation


def test_floor_of_chains_agrees_with_the_closed_form() -> None:
    for world in (World(mode="bigram", length=30), World(mode="bigram", words=10, sharpness=6.0, length=40, seed=1)):
        floor, exact = world.floor(600, seed=2), world.exact_floor()
        assert floor.standard_error > 0
        assert abs(floor.bits_per_byte - exact.bits_per_byte) < 4 * floor.standard_error
    fsm = World(mode="fsm")
    assert fsm.exact_floor().bits_per_byte == pytest.approx((math.log2(100) + 62 * math.log2(10)) / 126)
    assert fsm.floor(20).bits_per_byte == pytest.approx(fsm.exact_floor().bits_per_byte)


def test_floor_of_stories_and_its_standard_error() -> None:
    world = World()
    stated = world.floor([s.text for s in STORIES])
    assert (stated.stories, stated.bytes) == (600, sum(len(s.text.encode()) for s in STORIES))
    # the generator's own record of 8,000 other stories, in 20 batches, is an independent estimate of both
    batches = []
    for b in range(20):
        bits = size = 0.0
        for s in range(400):
            run = engine.sample(world.program, engine.stream(9, 400 * b + s))
            bits, size = bits - run.logprob / math.log(2), size + len("".join(run.out))
        batches.append(bits / size)
    spread = np.std(batches, ddof=1)
    assert abs(stated.bits_per_byte - np.mean(batches)) < 4 * math.hypot(stated.standard_error, spread / math.sqrt(20))
    assert 0.5 < spread / (stated.standard_error * math.sqrt(600 / 400)) < 2


def test_the_posterior_is_bayes() -> None:
    world = World(small=4)
    text = next(iter(world.enumerate()))
    assert sum(world.posterior(text, "topic").values()) == pytest.approx(1)
    for story in STORIES[:10]:
        assert world.replace(small=0).posterior(story.text, "plot") == {story.labels["plot"]: 1.0}

    def program(s: Teller) -> None:
        s.labels["side"] = s.choose(("left", "right"), (3, 1))
        s.say("[x|y]" if s.labels["side"] == "left" else "x")

    world.__dict__["program"] = program
    world.__dict__["small"] = 0
    assert world.posterior("x", "side") == pytest.approx({"left": 0.6, "right": 0.4})


# Texts that cannot be


def test_impossible_texts_say_why() -> None:
    world = World()
    story = next(s for s in STORIES if s.labels["plot"] == "lost")
    colour = story.labels["cast"]["colour"]
    other = "pink" if colour != "pink" else "golden"
    at = story.text.rindex(colour)
    forgot = story.text[:at] + other + story.text[at + len(colour) :]  # the colour of the lost thing changes on the way
    for text, position in (
        (forgot, at),
        (story.text[:-9], len(story.text) - 9),
        (story.text + " x", len(story.text)),
        ("", 0),
    ):
        assert world.logprob(text) == -math.inf
        reason = world.explain(text)
        assert f"character {position}" in reason or text is forgot, reason
    assert repr(colour)[1:4] in world.explain(forgot)
    assert "the end of the text" in world.explain(story.text + " x")
    assert world.explain(story.text) == "the world can write this text"
    with pytest.raises(ValueError, match="cannot write this text"):
        world.posterior("Call me Ishmael.")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 599), st.floats(0, 1, exclude_max=True), st.sampled_from("aeiQ. \n7"))
def test_a_changed_letter_is_found(index: int, where: float, letter: str) -> None:
    text = STORIES[index].text
    at = int(where * len(text))
    changed = text[:at] + letter + text[at + 1 :]
    if changed == text or World().logprob(changed) > -math.inf:
        return
    found = int(re.search(r"beyond character (\d+)", World().explain(changed))[1])  # type: ignore[index]
    assert found >= at  # everything before the change is still a beginning the world can write


# What a reader sees


def test_stories_read_well() -> None:
    for story in STORIES:
        text = story.text
        assert 500 <= len(text) <= 1800, text
        assert 4 <= text.count("\n\n") + 1 <= 8, text
        assert not re.search(r"  |\n\n\n| [.,!?]|[{}\[\]|*]|\.\.(?!\.)", text), text
        assert not re.search(r"\b[Aa] [aeiou]", text), text
        assert not re.search(r"\b[Aa]n [^aeiouh]", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text
        assert text.count('"') % 2 == 0
        for sentence in story.sentences:
            assert sentence.text[0].isupper() or sentence.text[0] == '"', sentence
            assert sentence.text[-1] in '.!?"', sentence
        people = [v for k, v in story.labels["cast"].items() if k in ("hero", "friend", "rival")]
        assert len(set(people)) == len(people)


def test_stories_vary() -> None:
    texts = [s.text for s in STORIES]
    assert len(set(texts)) == len(texts)
    words = set(re.findall(r"[a-z]+", " ".join(World().texts(6000, seed=4)).lower()))
    assert 1000 <= len(words) <= 2000
    assert {s.labels["plot"] for s in STORIES} == set(PLOTS)
    assert {s.labels["topic"] for s in STORIES} == set(TOPICS)
    openings = Counter(" ".join(text.split()[:2]) for text in texts)
    assert max(openings.values()) < 120


def test_pronouns_keep_to_their_owner() -> None:
    """Where everybody in a story is of one sex, no pronoun of the other occurs."""
    checked = 0
    for story in World().stories(1500, seed=8):
        words = Counter(re.findall(r"[a-z]+", story.text.lower()))
        used = {
            "f": words["she"] + words["her"] + words["herself"],
            "m": words["he"] + words["his"] + words["him"] + words["himself"],
        }
        sexes = _sexes(story.labels["cast"])
        for sex in "fm":
            if sex not in sexes:
                checked += 1
                assert used[sex] == 0, story.text
    assert checked > 20


def _sexes(cast: dict[str, str]) -> set[str]:
    from tinylm.world.lexicon import FAMILY, NAMES, PETS

    known = {str(word): word["he"] for dist in (FAMILY, NAMES, PETS) for word in dist.options}
    for topic in TOPICS.values():
        for name in ("adult", "animal"):
            known |= {str(word): word["he"] for word in topic.cast[name].options}
    roles = ("hero", "friend", "rival", "elder", "adult", "animal", "pet")
    return {"f" if known[cast[role]] == "she" else "m" for role in roles if role in cast}


# The answer key


def test_labels_are_what_the_text_says() -> None:
    speakers = 0
    for story in STORIES:
        cast = story.labels["cast"]
        assert {"topic", "plot", "moral", "hero"} <= set(story.labels)
        assert cast["hero"] in story.text
        assert sum(s.labels["feature"] == "moral" for s in story.sentences) == 1
        assert sum(s.labels["feature"] == "twist" for s in story.sentences) >= 1, story.labels
        for sentence in story.sentences:
            labels = sentence.labels
            assert story.text[sentence.start : sentence.end] == sentence.text
            assert (labels["speaker"] is not None) == ('"' in sentence.text), sentence
            speakers += labels["speaker"] is not None
            for thing, holder in labels["holds"].items():
                assert holder in story.text or holder in ("both", "nobody"), (thing, holder)
                assert thing[:3] in story.text.lower(), (thing, story.text)  # "jugs of milk", "calves"
        joined = "".join(story.text[a.end : b.start] for a, b in itertools.pairwise(story.sentences))
        assert set(joined) <= {" ", "\n"}
    assert speakers > 1200


def test_said_of_a_plot() -> None:
    lost = next(s for s in World(plots=("lost",)).stories() if "At last, " in s.text)
    holds = [next(iter(s.labels["holds"].values()), None) for s in lost.sentences]
    order = [h for i, h in enumerate(holds) if i == 0 or h != holds[i - 1]]
    cast = lost.labels["cast"]
    assert order == [None, cast["hero"], "nobody", cast["friend"], cast["hero"]]


# Dials


def test_topics_and_plots_narrow_the_world() -> None:
    world = World(topics=("sea", "north"), topic_weights=(9.0, 1.0), plots=("storm", "wish"))
    stories = list(world.stories(600))
    assert {s.labels["plot"] for s in stories} == {"storm", "wish"}
    sea = sum(s.labels["topic"] == "sea" for s in stories)
    assert abs(sea - 540) < 4 * math.sqrt(600 * 0.9 * 0.1)


def test_facts_are_zipf_and_cloze() -> None:
    world = World(facts=40, zipf=1.0, seed=7)
    table = world.fact_table
    assert [fact.rank for fact in table] == list(range(1, 41))
    assert math.fsum(fact.probability for fact in table) == pytest.approx(1)
    n, told = 3000, Counter()
    for text in world.texts(n):
        hits = [fact for fact in table if fact.prompt + fact.answer + "." in text]
        assert len(hits) == 1
        told[hits[0].entity] += 1
    for fact in table:
        expected = n * fact.probability
        assert abs(told[fact.entity] - expected) < 5 * math.sqrt(expected) + 1, fact
    assert world.fact_table == World(facts=40, zipf=1.0, seed=7).fact_table != World(facts=40, seed=8).fact_table


def test_fsm_is_tokfsm() -> None:
    world = World(mode="fsm", seed=42)
    table = world.successor_table
    assert table.shape == (100, 10)
    assert all(len(set(row)) == 10 for row in table.tolist())
    np.testing.assert_allclose(world.chain.table.sum(1), 1)
    for story in world.stories(50):
        states = [s.labels["state"] for s in story.sentences]
        assert story.text == "".join(f"{s:02d}" for s in states)
        assert len(states) == 63
        assert all(b in table[a] for a, b in itertools.pairwise(states))


def test_bigram_counts_follow_the_table() -> None:
    world = World(mode="bigram", words=6, length=50, sharpness=1.0)
    chain = world.chain
    counts = np.zeros((6, 6))
    for text in world.texts(400):
        ids = [chain.words.index(word) for word in text.split(" ")]
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    expected = counts.sum(1, keepdims=True) * chain.table
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 30 + 5 * math.sqrt(60)


@pytest.mark.parametrize(
    ("task", "classes"), [("topic", 2), ("topic", 8), ("plot", 16), ("feeling", 5), ("where", 2), ("where", 64)]
)
def test_classification_is_balanced(task: str, classes: int) -> None:
    texts, labels, names, best = World().classification(task, classes, n=3 * classes, seed=1)
    assert len(texts) == len(labels) == 3 * classes
    assert len(names) == classes
    assert set(Counter(labels.tolist()).values()) == {3}
    assert best == (None if task == "feeling" else 1.0)
    if task == "where":  # read the text again, word by word
        for text, label in zip(texts, labels, strict=True):
            where = {m[1]: m[2] for m in re.finditer(r"(?:put|moved) the (\w+) (?:in|to) the (\w+)\.", text)}
            asked = re.search(r"Where is the (\w+)\?", text)[1]  # type: ignore[index]
            assert names[label] == f"{asked} in {where[asked]}"
    if task == "topic":
        for text, label in zip(texts, labels, strict=True):
            assert World().posterior(text, "topic") == {names[label]: 1.0}


def test_noise_lowers_the_best_accuracy_as_stated() -> None:
    clean, noisy = (World().classification("where", 4, n=4000, seed=1, noise=noise) for noise in (0.0, 0.4))
    assert noisy.bayes_accuracy == pytest.approx(0.7)
    assert abs((clean.labels == noisy.labels).mean() - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 4000)


# The same everywhere


def test_a_story_is_a_pure_function() -> None:
    world = World(facts=50)
    assert world.story(7, seed=3) == World(facts=50).story(7, seed=3)
    assert world.story(7, seed=3).text == list(world.texts(10, seed=3))[7]
    assert [s.text for s in world.stories(2, seed=3, start=7)] == list(world.texts(2, seed=3, start=7))
    assert sum(map(len, world.corpus(20_000))) >= 20_000
    assert World.from_dict(world.to_dict()) == world


@pytest.mark.parametrize("hash_seed", ["1", "77"])
def test_bytes_do_not_depend_on_the_hash_seed(hash_seed: str) -> None:
    here = hashlib.sha256("".join(World(facts=50).texts(40, seed=3)).encode()).hexdigest()
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[1])}
    there = subprocess.run([sys.executable, "-c", DEMO_DIGEST], env=env, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


# Errors


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"topics": ("see",)}, "did you mean 'sea'"),
        ({"plots": ("lots",)}, "did you mean 'lost'"),
        ({"mode": "haiku"}, "must be one of stories, bigram, fsm"),
        ({"topics": ("sea", "sea")}, "names one twice"),
        ({"topic_weights": (1.0,)}, "needs one for each of 8"),
        ({"facts": 3}, "at least 8"),
        ({"states": 101}, "from 2 to 100"),
        ({"states": 5, "successors": 6}, "from 1 to 5"),
        ({"seed": -1}, "from 0"),
    ],
)
def test_impossible_settings(settings_: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        World(**settings_)


def test_other_errors() -> None:
    with pytest.raises(WorldTooLarge, match="limit = 100"):
        World().enumerate(100)
    with pytest.raises(ConfigError, match="only bigram and fsm"):
        World().chain
    with pytest.raises(ConfigError, match="did you mean 'topic'"):
        World().classification("topics")
    with pytest.raises(ConfigError, match="from 2 to 8"):
        World().classification("topic", 9)
    with pytest.raises(ValueError, match="at least 2 texts"):
        World().floor(1)
    with pytest.raises(ValueError, match="cannot write text 1: .*character 0"):
        World().floor([STORIES[0].text, "xx", "yy"])
    with pytest.raises(ValueError, match="at least 0"):
        World().story(0, seed=-1)
    for template in ("[a|b", "a]", "[a|a]"):
        with pytest.raises(ValueError, match=r"unclosed|unbalanced|equal"):
            engine.parse(template)


def test_words_of_one_story_are_not_used_twice() -> None:
    names = Dist([Word({"": c}) for c in "abc"], (5, 3, 2))

    def program(s: Teller) -> None:
        s.let(x=names, y=names, z=names)
        s.say("{x}{y}{z}")

    runs = {"".join(r.out): math.exp(r.logprob) for r in engine.derivations(program)}
    assert set(runs) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert runs["abc"] == pytest.approx(0.5 * 3 / 5)
    assert runs["cba"] == pytest.approx(0.2 * 3 / 8)
