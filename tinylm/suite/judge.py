"""Grades from a judge, in the manner of TinyStories (Eldan and Li 2023, section 2.2): any callable, no network here.

    judge = Judge(lambda prompt: client.complete(prompt))
    judge(model)                       # a Result; its `transcripts` hold every word that was exchanged

The judge is asked twice about each story: first to describe it, then, with its own words before it, to grade it. A
wrong answer and an error are counted and named, never read as a grade.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinylm.evaluation import EvaluationError
from tinylm.suite.completions import Completion, complete
from tinylm.suite.prompts import PROMPTS, Prompt
from tinylm.suite.results import Result, digest, estimates

__all__ = ["AGES", "Judge", "JudgeError", "Transcript", "parse_grades"]

GRADES = ("grammar", "creativity", "consistency")
AGES = {"A": "3 or under", "B": "4-5", "C": "6-7", "D": "8-9", "E": "10-12", "F": "13-16"}
ASSESS = """\
A student was given the beginning of a story and had to complete it. The symbol *** stands where the beginning stops \
and the student's own text starts; the sentence that it cuts was finished by the student.

{beginning} *** {completion}

Describe the student's part of the story in a few sentences. Is its grammar correct? Is it consistent with the \
beginning, and does it finish the cut sentence in a sensible way? Does it have ideas of its own?{plot} \
Do not give grades yet."""
PLOT = " Does the plot make sense from the beginning to the end?"
GRADE = """\
{question}

Your description was:

{answer}

Now grade the student's part, each with a whole number from 0 to 10, and guess the age of the student from these \
groups: {ages}. Answer with exactly one line of this form and nothing else:

{form}"""


class JudgeError(EvaluationError):
    """Not one grade could be had from the judge; the message says what it answered or raised."""


class Transcript(NamedTuple):
    """What was asked and answered about one story. `grades` is None where it failed, and `error` says why."""

    completion: Completion
    exchanges: tuple[tuple[str, Any], ...]
    grades: dict[str, float] | None
    age: str | None
    error: str | None


def parse_grades(answer: object, grades: Sequence[str] = GRADES) -> tuple[dict[str, float], str]:
    """({grade: 0..10}, age group) of an answer.

    Text must hold exactly one line "Grammar: 8/10, Creativity: 7/10, Consistency: 9/10, Age group: C" (of the asked
    grades, in order, upper or lower case; Markdown's stars are ignored). A mapping must hold exactly these names, in
    lower case, numbers from 0 to 10, and "age_group". Raises EvaluationError with what was found instead.
    """
    if isinstance(answer, Mapping):
        found = dict(answer)
        age = found.pop("age_group", None)
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in found.values())
        if set(found) != set(grades) or not numbers or age not in AGES or not all(0 <= v <= 10 for v in found.values()):
            raise EvaluationError(
                f"the scores {dict(answer)!r:.200} must be {', '.join(grades)} (0 to 10) and age_group"
            )
        return {name: float(found[name]) for name in grades}, str(age)
    if not isinstance(answer, str):
        raise EvaluationError(f"the judge must give a text or a mapping of scores, not {type(answer).__name__}")
    form = ", ".join(rf"{name}: (10|[0-9])/10" for name in grades) + r", age group: ([a-f])\.?"
    lines = [re.fullmatch(form, line.replace("*", "").strip(), re.IGNORECASE) for line in answer.splitlines()]
    hits = [hit for hit in lines if hit]
    if len(hits) != 1:
        raise EvaluationError(f"{len(hits)} lines of grades, not one, in the answer {answer!r:.200}")
    *values, age = hits[0].groups()
    return {name: float(value) for name, value in zip(grades, values, strict=True)}, age.upper()


@dataclasses.dataclass(frozen=True)
class Grading(Result):
    """A `Result` with the `transcripts` behind it, one per story."""

    transcripts: tuple[Transcript, ...] = ()

    __repr__ = Result.__repr__


class Judge:
    """Grades stories by asking a callable.

    Attributes:
        ask: prompt text -> answer text, or at once a mapping of scores (see `parse_grades`): then it is asked once.
        grades: what is graded: grammar, creativity, consistency, and plot where it was asked for.
    """

    def __init__(self, ask: Callable[[str], Any], *, plot: bool = False) -> None:
        """`plot`: ask for a grade of the plot too, as TinyStories does for stories that follow instructions."""
        if not callable(ask):
            raise EvaluationError(f"a judge is a callable that takes a prompt and gives an answer, not {ask!r:.60}")
        self.ask = ask
        self.grades = (*GRADES, "plot") if plot else GRADES

    def questions(self, made: Completion) -> tuple[str, Callable[[str], str]]:
        """The first prompt about a story, and the second as a function of the answer."""
        plot = PLOT if "plot" in self.grades else ""
        first = ASSESS.format(beginning=made.prompt, completion=made.text.strip(), plot=plot)
        form = ", ".join(f"{name.capitalize()}: N/10" for name in self.grades) + ", Age group: X"
        ages = ", ".join(f"{letter} ({years})" for letter, years in AGES.items())
        return first, lambda answer: GRADE.format(question=first, answer=answer, ages=ages, form=form)

    def grade(self, made: Completion) -> Transcript:
        """Ask about one story. An error of the callable, or an answer that cannot be read, is in the transcript."""
        first, second = self.questions(made)
        exchanges: list[tuple[str, Any]] = []
        try:
            answer = self.ask(first)
            exchanges.append((first, answer))
            if not isinstance(answer, Mapping):
                if not isinstance(answer, str):
                    parse_grades(answer)
                asked = second(answer)
                answer = self.ask(asked)
                exchanges.append((asked, answer))
            grades, age = parse_grades(answer, self.grades)
        except Exception as error:  # whatever a client raises: one story's answer is lost, and the report says so
            return Transcript(made, tuple(exchanges), None, None, f"{type(error).__name__}: {error}")
        return Transcript(made, tuple(exchanges), grades, age, None)

    def stories(self, made: Sequence[Completion], *, seed: int = 0, name: str = "judge") -> Grading:
        """Grades of stories that exist already: means over those that could be graded, intervals over beginnings.

        Figures: the grades (0 to 10) and `age_group`, as A = 0 ... F = 5. Raises JudgeError where all failed.
        """
        transcripts = tuple(self.grade(one) for one in made)
        failed = [t.error for t in transcripts if t.error is not None]
        if len(failed) == len(transcripts):
            raise JudgeError(
                f"the judge graded none of {len(transcripts)} stories: {failed[0] if failed else 'none given'}"
            )
        items = {
            grade: np.array([t.grades[grade] if t.grades else np.nan for t in transcripts]) for grade in self.grades
        }
        items["age_group"] = np.array([list(AGES).index(t.age) if t.age else np.nan for t in transcripts], float)
        prompts = [one.prompt for one in made]
        order = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        documents = np.array([order[prompt] for prompt in prompts])
        notes = (
            (f"{len(failed)} of {len(transcripts)} stories have no grades; the first: {failed[0]}",) if failed else ()
        )
        return Grading(
            task=name, figures=estimates(items, documents=documents, seed=seed), items=items, documents=documents,
            settings={"stories": len(transcripts), "failed": len(failed), "seed": seed}, sha256=digest(prompts),
            notes=notes, transcripts=transcripts,
        )  # fmt: skip

    def __call__(
        self,
        model: Any,
        *,
        prompts: Sequence[Prompt] = PROMPTS,
        samples: int = 1,
        tokens: int = 300,
        seed: int = 0,
        **sampling: Any,
    ) -> Grading:
        """Let a model continue the frozen beginnings and grade what it wrote; arguments as in `rubric`.

        TinyStories took 10 samples of about 50 beginnings at temperature 1. Raises JudgeError, GenerateError.
        """
        asked = [prompt.text for prompt in prompts for _ in range(samples)]
        found = self.stories(complete(model, asked, tokens=tokens, seed=seed, **sampling), seed=seed)
        return dataclasses.replace(found, settings={**found.settings, "tokens": tokens, "samples": samples, **sampling})
