"""How a model came to be: its checkpoints, scored one after the other; `TrainConfig.milestones` keeps them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tinylm import show
from tinylm.checkpoint import load
from tinylm.evaluation import Evaluation, EvaluationError
from tinylm.run import Run
from tinylm.store import CheckpointDamaged
from tinylm.suite.results import Estimate, Result

__all__ = ["Dynamics", "dynamics"]


@dataclass(frozen=True, eq=False)
class Dynamics:
    """A table: a row per checkpoint, a column per figure ("task.figure").

    Attributes:
        steps: of the rows. figures: column -> one Estimate per row. notes: checkpoints that were passed over, and why.
    """

    steps: tuple[int, ...]
    figures: Mapping[str, tuple[Estimate, ...]]
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> list[float]:
        """The values of one figure over the steps. Raises EvaluationError for an unknown one."""
        if name not in self.figures:
            raise EvaluationError(f"there is no column {name!r}; there are {', '.join(self.figures)}")
        return [one.value for one in self.figures[name]]

    def to_dict(self) -> dict[str, Any]:
        """Ready for json."""
        figures = {name: [one.to_dict() for one in column] for name, column in self.figures.items()}
        return {"steps": list(self.steps), "figures": figures, "notes": list(self.notes)}

    def to_csv(self) -> str:
        """Steps and values, with `_low` and `_high` columns for the intervals, for a spreadsheet or a data frame."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["step", *(name + end for name in self.figures for end in ("", "_low", "_high"))])
        for i, step in enumerate(self.steps):
            row: list[object] = [step]
            for column in self.figures.values():
                row += [column[i].value, *(column[i].ci95 or ("", ""))]
            writer.writerow(row)
        return out.getvalue()

    def table(self) -> show.Picture:
        """The values, to look at."""
        rows = [
            [step, *(f"{column[i].value:.4g}" for column in self.figures.values())] for i, step in enumerate(self.steps)
        ]
        return show.table(rows, ["step", *self.figures])

    def __repr__(self) -> str:
        return "\n".join([self.table().text, *self.notes])

    def _repr_html_(self) -> str:
        return self.table().html


def dynamics(
    folder: str | os.PathLike,
    tasks: Mapping[str, Callable[[Any], Any]],
    *,
    steps: Iterable[int] | None = None,
    progress: Callable[[int], Any] = lambda step: None,
) -> Dynamics:
    """Every task on every checkpoint of a run.

        dynamics("runs/first", {"pairs": lambda model: minimal_pairs(model, world_pairs())})

    Args:
        folder: of a run; train with checkpoints that are kept. tasks: name -> function of a model that gives a
            `Result`, an `Evaluation`, or a number. steps: of the checkpoints; default all there are.
        progress: called with each step before it.

    A damaged checkpoint is passed over and noted. Raises FileNotFoundError for a folder that is no run or a step that
    it lacks, EvaluationError where no checkpoint could be read or a task gives something else.
    """
    if not tasks:
        raise EvaluationError("dynamics needs at least one task: {'pairs': lambda model: minimal_pairs(model, pairs)}")
    with Run.open(folder) as run:
        there, path = run.steps(), run.path
    wanted = there if steps is None else sorted(set(steps))
    if missing := [step for step in wanted if step not in there]:
        raise FileNotFoundError(f"{folder} has no checkpoint of step {missing[0]}; it has {there or 'none'}")
    done, notes = [], []
    columns: dict[str, list[Estimate]] = {}
    for step in wanted:
        progress(step)
        try:
            model = load(path(step))
        except CheckpointDamaged as error:
            notes.append(f"step {step} passed over: {error}")
            continue
        row = {}
        for name, task in tasks.items():
            row |= _figures(name, task(model))
        if done and row.keys() != columns.keys():
            raise EvaluationError(
                f"step {step} gives {sorted(row)}, earlier ones {sorted(columns)}: one table needs one set"
            )
        for name, one in row.items():
            columns.setdefault(name, []).append(one)
        done.append(step)
    if not done:
        raise EvaluationError(f"{folder} has no checkpoint to score: {'; '.join(notes) or 'it has none'}")
    return Dynamics(tuple(done), {name: tuple(column) for name, column in columns.items()}, tuple(notes))


def _figures(name: str, found: Any) -> dict[str, Estimate]:
    if isinstance(found, Result):
        return {f"{name}.{figure}": one for figure, one in found.figures.items()}
    if isinstance(found, Evaluation):
        return {f"{name}.bits_per_byte": Estimate(found.bits_per_byte, found.ci95, found.documents)}
    if isinstance(found, int | float) and not isinstance(found, bool):
        return {name: Estimate(float(found), None, 1)}
    raise EvaluationError(
        f"task {name!r} gives {type(found).__name__}: it must give a Result, an Evaluation or a number"
    )
