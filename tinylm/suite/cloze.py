"""Cloze in the manner of LAMBADA (Paperno et al. 2016): the last word of a passage, given all that came before.

`story_clozes` makes items from any stories: the last word of a sentence, where that word was said in an earlier one. So
a model that reads the whole passage can know it; the control is the same model reading the last sentence only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm.evaluation import EvaluationError
from tinylm.suite.pairs import json_lines
from tinylm.suite.results import Result, digest, estimates
from tinylm.suite.scoring import Scorer
from tinylm.text import sample

__all__ = ["Cloze", "cloze", "read_clozes", "story_clozes"]

SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"'\u201d\u2019]*\s*")
WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
EARLIER = 3  # sentences before the one whose last word is asked for
LEAST_WORDS = 4  # of that sentence: "The end." asks nothing
FUNCTION_WORDS = frozenset(
    """a about after again all also am an and any are around as at away back be because been before but by can could day
    did do does down each even every everyone everything for from get go good had happy has have he her here herself him
    himself his how i if in into is it its just like little lot made make me more much my never new no not now of off on
    one only or other our out over play ran said sad saw see she so some something that the their them then there they
    things this time to together too two up us very want was way we went were what when where which who will with would
    yes you your""".split()  # noqa: SIM905
)


class Cloze(NamedTuple):
    """A passage without its last word, and the word. `sentence`: the part of the context in the word's own sentence."""

    context: str
    word: str
    sentence: str = ""


def read_clozes(path: str | Path, *, field: str = "text", limit: int | None = None) -> list[Cloze]:
    """Items from json lines {"text": passage}, as LAMBADA is distributed: the last word, after white space, is asked.

    Raises EvaluationError, with file and line, for a passage of fewer than two words.
    """
    found: list[Cloze] = []
    for where, row in json_lines(path):
        if limit is not None and len(found) >= limit:
            break
        text = row.get(field)
        parts = text.rsplit(maxsplit=1) if isinstance(text, str) else []
        if len(parts) < 2:
            raise EvaluationError(f"{where}: {field!r} must be a text of at least two words, not {text!r:.60}")
        found.append(Cloze(parts[0], parts[1], _last_sentence(parts[0])))
    if not found:
        raise EvaluationError(f"{path} holds no passage")
    return found


def _last_sentence(context: str) -> str:
    ends = [found.end() for found in SENTENCE.finditer(context) if found.end() < len(context)]
    return context[ends[-1] if ends else 0 :]


def story_clozes(stories: Iterable[str], count: int = 200, *, seed: int = 0) -> list[Cloze]:
    """Items from stories, at most one each, chosen by hash: the same whatever the order, for equal stories and seed.

    A sentence of four words or more qualifies when three come before it and its last word (three letters or more, no
    function word) occurs in one of those, but not before in the sentence itself. Final punctuation is not asked for.

    Raises EvaluationError for stories that hold no item; fewer than `count` are given where there are not more.
    """
    found: dict[str, Cloze] = {}
    for story in stories:
        if item := _choose(story, seed):
            found["".join(item)] = item
    if not found:
        raise EvaluationError(
            f"no story holds an item: a sentence after {EARLIER} others that ends in a word of them; give longer texts"
        )
    return [found[key] for key in sample(found, count, seed=seed)]


def _choose(story: str, seed: int) -> Cloze | None:
    candidates, said = [], set()
    for number, found in enumerate(SENTENCE.finditer(story)):
        words = list(WORD.finditer(found[0]))
        if words and number >= EARLIER:
            last = words[-1]
            word, before = last[0], {w[0].lower() for w in words[:-1]}
            own = story[found.start() : found.start() + last.start()]
            fits = own.endswith(" ") and len(words) >= LEAST_WORDS and len(word) >= 3
            if fits and word.lower() in said - before - FUNCTION_WORDS:
                candidates.append(Cloze(story[: found.start() + last.start() - 1], word, own[:-1]))
        said |= {w[0].lower() for w in words}
    if not candidates:
        return None
    draw = hashlib.blake2b(f"{seed} {story}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return candidates[int.from_bytes(draw, "big") % len(candidates)]


def cloze(
    model: Any, items: Iterable[Cloze], *, tokenizer: Any = None, batch: int = 16, seed: int = 0, name: str = "cloze"
) -> Result:
    """Can a decoder name the last word?

    Figures: `accuracy`: each token of " word" is the model's most probable one (greedy over the whole word); `nats`:
    mean -log P(" word" | passage). `accuracy_sentence` and `nats_sentence` are the control: the same, given only the
    word's own sentence; what the passage adds is the difference. `gain` is nats_sentence - nats.

    Args:
        model: a decoder; a passage longer than its context is cut on the left. items: from `read_clozes` or
        `story_clozes`. tokenizer, batch: as in `Scorer`. seed: of the intervals. name: of the task.
    """
    items = list(items)
    if not items:
        raise EvaluationError("there is no cloze to score")
    scorer = Scorer(model, tokenizer=tokenizer, batch=batch)
    whole = scorer.continuations([(item.context, f" {item.word}") for item in items])
    alone = scorer.continuations([(item.sentence.lstrip(), f" {item.word}") for item in items])
    nats, control = (-np.array([one.logprob for one in found]) for found in (whole, alone))
    values = {
        "accuracy": np.array([one.greedy for one in whole], float),
        "nats": nats,
        "accuracy_sentence": np.array([one.greedy for one in alone], float),
        "nats_sentence": control,
        "gain": control - nats,
    }
    cut = sum(one.cut > 0 for one in whole)
    return Result(
        task=name, figures=estimates(values, seed=seed), items=values, sha256=digest([list(item) for item in items]),
        settings={"items": len(items), "seed": seed, "cut": cut},
        notes=(f"{cut} of {len(items)} passages were longer than the context and cut on the left",) if cut else (),
    )  # fmt: skip
