"""What every task of the suite gives back: figures with intervals, by group, and the values of each item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinylm import show
from tinylm.evaluation import EvaluationError, bootstrap

__all__ = ["Estimate", "Result", "difference", "digest", "estimate", "estimates"]


MOST = 20  # groups of one kind that are shown


class Estimate(NamedTuple):
    """A mean over items, its 95 percent interval, and how many units were resampled for it.

    `ci95` is None where there are fewer than two units, or where resampling says nothing about the figure.
    """

    value: float
    ci95: tuple[float, float] | None
    units: int

    def __str__(self) -> str:
        span = f" [{self.ci95[0]:.4g}, {self.ci95[1]:.4g}]" if self.ci95 else ""
        return f"{self.value:.4g}{span}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for json."""
        return {"value": self.value, "ci95": list(self.ci95) if self.ci95 else None, "units": self.units}


def estimate(
    values: np.ndarray | Sequence[float],
    *,
    documents: np.ndarray | Sequence[int] | None = None,
    weights: np.ndarray | Sequence[float] | None = None,
    seed: int = 0,
) -> Estimate:
    """The mean of (items,) values, with a bootstrap interval over items (see `evaluation.bootstrap`).

    Args:
        values: one per item; NaN marks an item that has none, and is left out.
        documents: the text that each item came from: items of one document are drawn together, since they agree.
        weights: of the mean, one per item. seed: of the resampling.

    Raises EvaluationError where no item has a value.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    has = ~np.isnan(values) & (weights > 0)
    if not has.any():
        raise EvaluationError(f"none of the {len(values)} items has a value: there is nothing to average")
    above, below = (values * weights)[has], weights[has]
    if documents is not None:
        _, unit = np.unique(np.asarray(documents)[has], return_inverse=True)
        above, below = np.bincount(unit, above), np.bincount(unit, below)
    return Estimate(float(above.sum() / below.sum()), bootstrap(above, below, seed=seed), len(above))


def estimates(
    items: Mapping[str, np.ndarray], *, documents: np.ndarray | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """`estimate` of every array that has any value."""
    return {
        name: estimate(values, documents=documents, seed=seed)
        for name, values in items.items()
        if not np.isnan(np.asarray(values, np.float64)).all()
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """The outcome of one task.

    Attributes:
        task: its name. figures: name -> Estimate over all items, the headline first.
        groups: kind of group -> group -> figures over its items, such as `groups["paradigm"]["npi_present_1"]`.
        items: name -> (items,) values that the figures are means of; `documents` is what was resampled.
        settings: what was asked, ready for json. sha256: of the items' texts: results compare only where it is equal.
        notes: what a reader must know, such as answers that could not be read.
    """

    task: str
    figures: Mapping[str, Estimate]
    groups: Mapping[str, Mapping[str, Mapping[str, Estimate]]] = field(default_factory=dict)
    items: Mapping[str, np.ndarray] = field(default_factory=dict)
    documents: np.ndarray | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        """A figure's value. Raises EvaluationError for a name it does not have."""
        if name not in self.figures:
            raise EvaluationError(f"{self.task} has no figure {name!r}; it has {', '.join(self.figures)}")
        return self.figures[name].value

    def to_dict(self) -> dict[str, Any]:
        """Everything but the items, ready for json."""
        plain = lambda table: {name: one.to_dict() for name, one in table.items()}  # noqa: E731
        return {
            "task": self.task,
            "figures": plain(self.figures),
            "groups": {kind: {name: plain(t) for name, t in table.items()} for kind, table in self.groups.items()},
            "settings": dict(self.settings),
            "sha256": self.sha256,
            "notes": list(self.notes),
        }

    def table(self) -> show.Picture:
        """The figures, and those of each group, to look at."""
        rows = [[self.task, *_cells(figure, one)] for figure, one in self.figures.items()]
        headline = next(iter(self.figures), "")
        for kind, groups in self.groups.items():
            if len(groups) > MOST:
                rows.append([f"{kind}: {len(groups)}, in .groups[{kind!r}]", "", "", "", ""])
                continue
            rows += [
                [f"{kind}: {name}", *_cells(headline, table[headline])]
                for name, table in groups.items()
                if headline in table
            ]
        return show.table(rows, ["task", "figure", "value", "95% interval", "units"])

    def __repr__(self) -> str:
        return "\n".join([self.table().text, *self.notes])

    def _repr_html_(self) -> str:
        return self.table().html


def _cells(name: str, one: Estimate) -> list[object]:
    return [name, f"{one.value:.4f}", f"{one.ci95[0]:.4f} to {one.ci95[1]:.4f}" if one.ci95 else "–", one.units]


def digest(texts: Sequence[object]) -> str:
    """sha256 of the items of a task, in order."""
    found = hashlib.sha256()
    for text in texts:
        found.update(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()


def difference(a: Result, b: Result, name: str | None = None, *, seed: int = 0) -> Estimate:
    """A figure of `a` minus that of `b`, items resampled in pairs; `name`: default the headline.

    Raises EvaluationError for results of other items, or a figure that is not a mean of items.
    """
    name = next(iter(a.figures)) if name is None else name
    if a.task != b.task or a.sha256 != b.sha256:
        raise EvaluationError(f"{a.task} and {b.task} are not of the same items: run one task on both models")
    if name not in a.items or name not in b.items:
        raise EvaluationError(f"{name!r} is not measured item by item in both: choose one of {', '.join(a.items)}")
    x, y = (np.asarray(r.items[name], np.float64) for r in (a, b))
    if len(x) != len(y):
        raise EvaluationError(f"{len(x)} items and {len(y)}: generated texts cannot be compared in pairs")
    return estimate(x - y, documents=a.documents, seed=seed)
