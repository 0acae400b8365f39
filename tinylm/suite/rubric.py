"""What a program can tell about a story: cheap, deterministic stand-ins for parts of a grade, never called one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tinylm.evaluation import EvaluationError, diversity
from tinylm.suite.completions import Completion, complete
from tinylm.suite.prompts import PROMPTS, Prompt
from tinylm.suite.results import Result, digest, estimates

__all__ = ["MEASURES", "rubric", "rubric_of"]

CLOSED = re.compile(r"[.!?…][\"'\u201d\u2019)]*\s*$")
WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def names_kept(made: Completion, names: Sequence[str]) -> float:
    """Share of the beginning's names that the continuation says again; NaN where there is none."""
    said = set(re.findall(r"[^\W\d_]+", made.text))
    return float(np.mean([name in said for name in names])) if names else float("nan")


def closed(made: Completion, _: Sequence[str]) -> float:
    """1 where the model ended the text itself, and with a finished sentence."""
    return float(made.ended and CLOSED.search(made.text) is not None)


def quotes_balanced(made: Completion, _: Sequence[str]) -> float:
    """1 where every opened quotation is closed: straight marks are even, curly ones open and close in turn.

    A text that was cut off may end inside one: then what its last paragraph opens is forgiven.
    """
    text = made.whole if made.ended else made.whole.rpartition("\n")[0]
    if text.count('"') % 2:
        return 0.0
    inside = False
    for mark in re.findall("[\u201c\u201d]", text):
        if (mark == "\u201c") == inside:
            return 0.0
        inside = not inside
    return float(not inside)


def repetition(made: Completion, _: Sequence[str]) -> float:
    """Share of the continuation's 4-grams that occurred before in it; NaN where it has none. Less is better."""
    found = diversity([made.text])["repeated_4gram"]
    return float("nan") if found is None else float(found)


MEASURES = {"names_kept": names_kept, "closed": closed, "quotes_balanced": quotes_balanced, "repetition": repetition}


def rubric_of(
    made: Sequence[Completion],
    names: Sequence[Sequence[str]],
    *,
    vocabulary: Iterable[str] | None = None,
    seed: int = 0,
    name: str = "rubric",
) -> Result:
    """The measures of stories that exist already.

    Figures: the functions of `MEASURES`; `words`, of the continuation; with `vocabulary` (lower-cased words, as of the
    training text) `known_words`, the share of the continuation's words that are in it. Intervals over beginnings:
    several continuations of one are drawn together.

    Args:
        made: the stories. names: of the people in each beginning. seed: of the intervals. name: of the task.
    """
    if not made:
        raise EvaluationError("there is no story to measure")
    items = {
        key: np.array([measure(one, own) for one, own in zip(made, names, strict=True)])
        for key, measure in MEASURES.items()
    }
    spoken = [[word.lower() for word in WORD.findall(one.text)] for one in made]
    items["words"] = np.array([len(one) for one in spoken], float)
    if vocabulary is not None:
        known = frozenset(vocabulary)
        items["known_words"] = np.array([np.mean([w in known for w in one]) if one else np.nan for one in spoken])
    prompts = [one.prompt for one in made]
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    documents = np.array([order[prompt] for prompt in prompts])
    return Result(
        task=name, figures=estimates(items, documents=documents, seed=seed), items=items, documents=documents,
        settings={"stories": len(made), "prompts": len(order), "seed": seed}, sha256=digest(prompts),
    )  # fmt: skip


def rubric(
    model: Any,
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    samples: int = 4,
    tokens: int = 300,
    seed: int = 0,
    vocabulary: Iterable[str] | None = None,
    name: str = "rubric",
    **sampling: Any,
) -> Result:
    """Let a model continue the frozen beginnings, `samples` times each, and measure what it wrote: see `rubric_of`.

    `tokens`, `sampling`: as in `complete`; the default is the model's own distribution (temperature 1).
    """
    asked = [prompt for prompt in prompts for _ in range(samples)]
    made = complete(model, [prompt.text for prompt in asked], tokens=tokens, seed=seed, **sampling)
    found = rubric_of(made, [prompt.names for prompt in asked], vocabulary=vocabulary, seed=seed, name=name)
    return dataclasses.replace(found, settings={**found.settings, "tokens": tokens, "samples": samples, **sampling})
