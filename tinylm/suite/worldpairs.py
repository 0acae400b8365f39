"""Minimal pairs from the embedded world, whose labels say what each story must keep to.

A pair is the beginning of a story up to one sentence, and the same with one word of that sentence wrong. Grammar:
was/were, a/an. Reference: the pronoun and the possessive of the hero. Consistency: the hero's name, and what a thing
is, what colour it has, how many there are, once it has been said. Every pair is proved: the world gives the whole story
with the wrong word probability 0 (`World.logprob`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence

from tinylm.evaluation import EvaluationError
from tinylm.suite.pairs import Pair
from tinylm.world import Story, World
from tinylm.world.lexicon import BOYS, COLOURS, GIRLS, NUMBERS, TOYS

__all__ = ["PARADIGMS", "world_pairs"]

STREAM = 2**40 + 9  # of the world's stories; seeds of training text are below 2^32
LONGEST = 900  # bytes of a pair's text: what a context of 512 small tokens can hold
NAMES = {"f": [str(word) for word in GIRLS.options], "m": [str(word) for word in BOYS.options]}
PRONOUN = {"f": ("She", "He", "her", "his"), "m": ("He", "She", "his", "her")}
WORDS = {
    "colour": [str(word) for word in COLOURS.options],
    "number": [str(word) for word in NUMBERS.options],
    "object": [str(word) for word in TOYS],
}
Change = tuple[int, int, str]  # start, end, what stands there in the bad text


def _sex(story: Story) -> str:
    return "f" if story.labels["hero"] in NAMES["f"] else "m"


def _opening(story: Story) -> int:
    """Where the first paragraph ends: until there "he", "she", "his" and "her" are the hero."""
    end = story.text.find("\n\n")
    return end if end >= 0 else len(story.text)


def _pronoun(story: Story, _: Callable) -> Iterator[Change]:
    right, wrong, *_rest = PRONOUN[_sex(story)]
    for found in re.finditer(rf"(?<=[.!?] ){right}\b", story.text[: _opening(story)]):
        yield found.start(), found.end(), wrong


def _possessive(story: Story, _: Callable) -> Iterator[Change]:
    *_rest, right, wrong = PRONOUN[_sex(story)]
    for found in re.finditer(rf"\b{right}\b", story.text[: _opening(story)]):
        yield found.start(), found.end(), wrong


def _was(story: Story, _: Callable) -> Iterator[Change]:
    """The name, he or she was; they were."""
    subjects = {"was": f"(?:[Hh]e|[Ss]he|{story.labels['hero']})", "were": "[Tt]hey"}
    for right, wrong in (("was", "were"), ("were", "was")):
        for found in re.finditer(rf"\b{subjects[right]} ({right})\b", story.text):
            yield found.start(1), found.end(1), wrong


def _article(story: Story, _: Callable) -> Iterator[Change]:
    """a before a consonant, an before a vowel; letters that are spoken otherwise (u, h, o of "one") are left alone."""
    for found in re.finditer(r"\b(a|an)\b (?=[a-z])(?![uh]|one)", story.text):
        yield found.start(1), found.end(1), "a" if found[1] == "an" else "an"


def _name(story: Story, pick: Callable) -> Iterator[Change]:
    hero = story.labels["hero"]
    others = [name for name in NAMES[_sex(story)] if name not in story.text]
    for found in list(re.finditer(rf"\b{hero}\b", story.text[_opening(story) :])):
        at = found.start() + _opening(story)
        yield at, at + len(hero), pick(others)


def _again(kind: str, *roles: tuple[str, str]) -> Callable[[Story, Callable], Iterator[Change]]:
    """A label that is said again: each (label, format of it in the story) from its second mention on."""

    def changes(story: Story, pick: Callable) -> Iterator[Change]:
        cast = story.labels["cast"]
        for label, form in roles:
            needed = re.findall(r"{(\w+)}", form)
            if not all(name in cast for name in needed):
                continue
            phrase, word = form.format(**cast), cast[label]
            places = [m.start() for m in re.finditer(rf"\b{re.escape(phrase)}\b", story.text)]
            others = [w for w in WORDS[kind] if w != word and w not in story.text and w[0] not in "aeiou"]
            for at in places[1:]:
                start = at + phrase.index(word)
                before = re.search(r"\b(a|an) $", story.text[:start])
                if others and not before:  # a new article would be a second mistake
                    yield start, start + len(word), pick(others)

    return changes


PARADIGMS: dict[str, tuple[str, Callable[[Story, Callable], Iterator[Change]]]] = {
    "was_were": ("grammar", _was),
    "a_an": ("grammar", _article),
    "pronoun": ("reference", _pronoun),
    "possessive": ("reference", _possessive),
    "name": ("consistency", _name),
    "object": ("consistency", _again("object", ("thing", "{colour} {thing}"), ("thing", "the {thing}"))),
    "colour": ("consistency", _again("colour", ("colour", "{colour} {thing}"), ("hue", "{hue} {garment}"))),
    "number": ("consistency", _again("number", ("number", "{number}"))),
}  # paradigm -> its phenomenon, and the changes that make a story's sentence wrong


def world_pairs(
    each: int = 100, *, world: World | None = None, seed: int = STREAM, paradigms: Sequence[str] = ()
) -> list[Pair]:
    """`each` pairs of every paradigm, at most one of a paradigm from one story; the same for equal arguments.

    Args:
        each: pairs per paradigm. world: default `World()`. seed: the stream of stories; the default is one that
            neither training nor validation reads. paradigms: names of `PARADIGMS`; default all.

    Raises EvaluationError for an unknown paradigm, and where 200 * each stories do not hold enough pairs.
    """
    world = World() if world is None else world
    names = tuple(paradigms) or tuple(PARADIGMS)
    if unknown := sorted(set(names) - set(PARADIGMS)):
        raise EvaluationError(f"no paradigm is called {', '.join(unknown)}; known: {', '.join(PARADIGMS)}")
    if world.mode != "stories" or each < 1:
        raise EvaluationError(f"each = {each}, world.mode = {world.mode!r}: at least 1, and a world of stories")
    found: dict[str, list[Pair]] = {name: [] for name in names}
    for number, story in enumerate(world.stories(200 * each, seed=seed)):
        wanted = [name for name in names if len(found[name]) < each]
        if not wanted:
            break
        for name in wanted:
            if pair := _pair(world, story, number, name):
                found[name].append(pair)
    if short := [name for name, pairs in found.items() if len(pairs) < each]:
        raise EvaluationError(f"this world has too few stories with a pair of {', '.join(short)}: ask for fewer")
    return [pair for pairs in found.values() for pair in pairs]


def _pair(world: World, story: Story, number: int, name: str) -> Pair | None:
    """The first pair of a paradigm that is short enough and whose bad text the world cannot write, or None."""
    draw = int.from_bytes(hashlib.blake2b(f"{name} {story.text}".encode(), digest_size=8).digest(), "big")
    phenomenon, changes = PARADIGMS[name]
    for start, end, wrong in changes(story, lambda words: words[draw % len(words)]):
        stop = next((s.end for s in story.sentences if s.start <= start < s.end), end)
        good = story.text[:stop]
        bad = good[:start] + wrong + good[end:]
        if len(good.encode()) <= LONGEST and world.logprob(bad + story.text[stop:]) == -math.inf:
            return Pair(good, bad, name, phenomenon, "world", number)
    return None
