"""The evaluation suite for tiny models: what they know of grammar and consistency, what they copy, how they write.

    from tinylm.suite import evaluate_suite, minimal_pairs, read_pairs, world_pairs
    minimal_pairs(model, world_pairs())                  # pairs that the embedded world proves
    minimal_pairs(model, read_pairs("blimp"))            # BLiMP's files
    evaluate_suite(model, text="valid.txt")              # everything that needs nothing else

Tasks give a `Result`: figures with 95 percent intervals over items, by group; `difference` compares two in pairs.
Everything depends on its seed alone. Items, beginnings and choices are frozen and named by a sha256.

    pairs        minimal pairs: BLiMP's form, or from the world        minimal_pairs, read_pairs, world_pairs
    cloze        the last word of a passage, LAMBADA's form            cloze, read_clozes, story_clozes
    rubric       names kept, closed, quotes balanced, repetition       rubric, PROMPTS
    variety      self-BLEU and distinct-n                              variety, self_bleu
    memorisation shared runs, ROUGE, new n-grams, with a control       memorisation, overlap, Corpus
    judge        grades from any callable, TinyStories' questions      Judge
    dynamics     any of these for every checkpoint of a run            dynamics
    harness      lm-evaluation-harness on a model of the kit           tinylm.suite.harness.harness
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.evaluation import EvaluationError
from tinylm.markup import Markup, join
from tinylm.suite.cloze import Cloze, cloze, read_clozes, story_clozes
from tinylm.suite.completions import Completion, complete
from tinylm.suite.dynamics import Dynamics, dynamics
from tinylm.suite.judge import Judge, JudgeError
from tinylm.suite.memorisation import memorisation, overlap
from tinylm.suite.overlap import Corpus, rouge_l, rouge_n
from tinylm.suite.pairs import Pair, minimal_pairs, read_pairs
from tinylm.suite.prompts import PROMPTS, Prompt
from tinylm.suite.results import Estimate, Result, difference, estimate
from tinylm.suite.rubric import rubric, rubric_of
from tinylm.suite.scoring import Scorer
from tinylm.suite.variety import self_bleu, variety
from tinylm.suite.worldpairs import PARADIGMS, STREAM, world_pairs
from tinylm.text import documents
from tinylm.world import World

__all__ = [
    "PARADIGMS", "PROMPTS", "TASKS", "Cloze", "Completion", "Corpus", "Dynamics", "Estimate", "Judge", "JudgeError",
    "Pair", "Prompt", "Report", "Result", "Scorer", "cloze", "complete", "difference", "dynamics", "estimate",
    "evaluate_suite", "memorisation", "minimal_pairs", "overlap", "read_clozes", "read_pairs", "rouge_l",
    "rouge_n", "rubric", "rubric_of", "self_bleu", "story_clozes", "variety", "world_pairs",
]  # fmt: skip

TASKS = ("pairs", "cloze", "rubric", "variety", "memorisation")
Source = str | os.PathLike | Iterable[str]


@dataclass(frozen=True)
class Report:
    """The results of several tasks."""

    results: tuple[Result, ...]

    def __getitem__(self, task: str) -> Result:
        """A task's result. Raises EvaluationError for one that was not run."""
        for result in self.results:
            if result.task == task:
                return result
        raise EvaluationError(f"{task!r} was not run; there are {', '.join(r.task for r in self.results)}")

    def to_dict(self) -> dict[str, Any]:
        """{task: Result.to_dict()}, ready for json."""
        return {result.task: result.to_dict() for result in self.results}

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self.results))

    def _repr_html_(self) -> str:
        return join([Markup(result._repr_html_()) for result in self.results])


def evaluate_suite(
    model: Any,
    tasks: Sequence[str] = (),
    *,
    pairs: str | Path | None = None,
    clozes: str | Path | None = None,
    text: Source | None = None,
    train: Source | None = None,
    count: int = 100,
    limit: int | None = None,
    tokens: int = 200,
    seed: int = 0,
    progress: Callable[[str], Any] = lambda task: None,
) -> Report:
    """Run tasks on a decoder.

    Args:
        model: with its tokenizer. tasks: of `TASKS`; default all that the given data allow.
        pairs: file or folder in BLiMP's form; default the world's pairs, `count` of each paradigm.
        clozes: json lines {"text": passage}; default `2 * count` made from `text`, or else from the world's stories.
        text: held-out stories, for the clozes and as the control of the memorisation audit.
        train: training text; with `text`, the memorisation audit is run, of `count` beginnings.
        count: see above. limit: pairs of each paradigm and passages read from files. tokens: of a completion.
        seed: of all choices. progress: called with the name of each task before it.

    Raises EvaluationError for an unknown task or one whose data are missing; TextError, GenerateError.
    """
    named = tuple(tasks) or tuple(t for t in TASKS if t != "memorisation" or (train is not None and text is not None))
    if unknown := sorted(set(named) - set(TASKS)):
        raise EvaluationError(f"no task is called {', '.join(unknown)}; known: {', '.join(TASKS)}")
    if "memorisation" in named and (train is None or text is None):
        raise EvaluationError("memorisation needs train=, the training text, and text=, held-out text as a control")
    stories = None if text is None else list(documents(text))

    def stories_made() -> list[Completion]:
        asked = [prompt.text for prompt in PROMPTS for _ in range(4)]
        return complete(model, asked, tokens=tokens, seed=seed)

    made = stories_made() if {"rubric", "variety"} & set(named) else []
    results = []
    for task in named:
        progress(task)
        if task == "pairs":
            items = world_pairs(count) if pairs is None else read_pairs(pairs, limit=limit)
            results.append(minimal_pairs(model, items, seed=seed))
        elif task == "cloze":
            passages = World().texts(20 * count, seed=STREAM) if stories is None else stories
            made_of = read_clozes(clozes, limit=limit) if clozes is not None else story_clozes(passages, 2 * count)
            results.append(cloze(model, made_of, seed=seed))
        elif task == "rubric":
            found = rubric_of(made, [prompt.names for prompt in PROMPTS for _ in range(4)], seed=seed)
            results.append(dataclasses.replace(found, settings={**found.settings, "tokens": tokens}))
        elif task == "variety":
            results.append(variety([one.text for one in made], seed=seed))
        else:
            results.append(
                memorisation(model, documents(train or ()), stories or (), count=count, tokens=tokens, seed=seed)
            )
    return Report(tuple(results))
