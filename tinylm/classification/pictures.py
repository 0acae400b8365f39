"""Pictures of classifiers and committees: accuracy against K, confusion, disagreement, cascades; all static markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tinylm.classification.analysis import Cascade, Point
from tinylm.markup import FAINT, Markup, Picture, framed, tag, visible
from tinylm.show import BLUE, GREEN, ORANGE, Level, Line, chart

__all__ = ["cascade_curve", "confusion_map", "disagreement_map", "k_curve"]

MOST = 40  # classes of a map that are shown


def k_curve(curves: Mapping[str, Sequence[Point]], levels: Mapping[str, float] | None = None) -> Picture:
    """Accuracy against the number of members, one curve per rule; thin lines are the span over subsets.

    Args:
        curves: name -> points of `curve`. levels: name -> accuracy, drawn across: the deep model, the wide one.
    """
    colors, lines = (BLUE, ORANGE, GREEN), []
    for i, (name, points) in enumerate(curves.items()):
        x, color = [float(p.k) for p in points], colors[i % 3]
        for edge in ([p.low for p in points], [p.high for p in points]):
            lines.append(Line(x, edge, color=color, width=1, opacity=0.35))
        lines.append(Line(x, [p.accuracy for p in points], name, color, dots=True))
    marks = [Level(value, name) for name, value in (levels or {}).items()]
    svg = chart(lines, marks, x_label="members", y_label="accuracy", log_x=False)
    rows = [
        f"{visible(name)}: " + ", ".join(f"{p.k}: {p.accuracy:.3f} [{p.low:.3f}, {p.high:.3f}]" for p in points)
        for name, points in curves.items()
    ]
    return Picture(framed(svg), "\n".join([*rows, *(f"{visible(n)}: {v:.3f}" for n, v in (levels or {}).items())]))


def confusion_map(confusion: np.ndarray, names: Sequence[str], title: str = "") -> Picture:
    """(C, C) counts as tinted cells, row the true class; a row's tint is the share of its texts.

    Of more than `MOST` classes those with the most mistakes are shown.
    """
    wrong = confusion.sum(1) - np.diagonal(confusion)
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST])
    part, labels = confusion[np.ix_(shown, shown)], [names[i] for i in shown]
    share = part / np.maximum(confusion[shown].sum(1, keepdims=True), 1)
    cells = [[str(v) if v else "" for v in row] for row in part.tolist()]
    hidden = len(names) - len(shown)
    note = "row: true class; column: chosen" + (f"; {hidden} classes with fewer mistakes left out" if hidden else "")
    return _grid(share, cells, labels, title, note, "0,114,178")


def disagreement_map(matrix: np.ndarray, names: Sequence[str] = (), title: str = "") -> Picture:
    """(K, K) shares of texts on which two members differ, or correlations of their errors."""
    names = list(names) or [f"{i + 1}" for i in range(len(matrix))]
    cells = [[f"{100 * v:.0f}" if np.isfinite(v) else "" for v in row] for row in matrix]
    off = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
    top = np.nanmax(off) if np.isfinite(off).any() else 1.0
    return _grid(matrix / max(top, 1e-9), cells, names, title, "percent, of pairs of members", "213,94,0")


def _grid(tint: np.ndarray, cells: list[list[str]], names: Sequence[str], title: str, note: str, rgb: str) -> Picture:
    small = "padding:1px 5px;text-align:right;font-size:11px"
    head = tag("tr", tag("th", "", style=small), *(tag("th", _short(n), title=n, style=small) for n in names))
    body = []
    for name, shares, row in zip(names, np.nan_to_num(tint), cells, strict=True):
        marked = (
            tag("td", value, style=f"{small};background:rgba({rgb},{0.75 * min(1.0, max(0.0, float(s))):.2f})")
            for s, value in zip(shares, row, strict=True)
        )
        body.append(tag("tr", tag("th", _short(name), title=name, style=small), *marked, style="background:none"))
    table = tag("table", tag("thead", head), tag("tbody", *body), style="border-collapse:collapse;margin:0")
    caption = tag("div", tag("b", title), style="margin-bottom:4px") if title else None
    wide = max((len(_short(n)) for n in names), default=1)
    lines = [visible(_short(n)).rjust(wide) + " " + " ".join(v.rjust(4) for v in row)
             for n, row in zip(names, cells, strict=True)]  # fmt: skip
    text = "\n".join(filter(None, [visible(title), *lines, note]))
    scrolled = tag("div", table, style="overflow-x:auto")
    return Picture(framed(caption, scrolled, tag("div", note, style=f"margin-top:4px;{FAINT}")), text)


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= 14 else f"{text[:13]}…"


def cascade_curve(found: Cascade, names: tuple[str, str] = ("committee", "deep model")) -> Picture:
    """Accuracy against mean FLOPs per text, most unsure first, with random and oracle deferral."""
    at = np.unique(np.linspace(0, len(found.share) - 1, 60).astype(int))
    x = (found.flops[at] / 1e6).tolist()
    lines = [
        Line(x, found.oracle[at].tolist(), "oracle", GREEN),
        Line(x, found.accuracy[at].tolist(), "most unsure", BLUE),
        Line(x, found.random[at].tolist(), "random", opacity=0.6),
    ]
    svg = chart(lines, x_label="MFLOP per text", y_label="accuracy", log_x=False)
    note = f"{names[0]} alone (left) to {names[1]} on every text: {found.recovered:.0%} of what an oracle gains"
    some = at[:: max(1, len(at) // 6)]
    text = "\n".join(
        f"{found.flops[i] / 1e6:9.3f} MFLOP  {found.share[i]:4.0%} deferred  {found.accuracy[i]:.3f}  "
        f"(random {found.random[i]:.3f}, oracle {found.oracle[i]:.3f})"
        for i in some
    )
    return Picture(framed(Markup(svg), tag("div", visible(note), style=FAINT)), f"{text}\n{visible(note)}")
