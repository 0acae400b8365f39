"""Pictures of classifiers and committees: accuracy against K, confusion, disagreement, cascades; all static markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tinylm.classification.analysis import Cascade, Point
from tinylm.markup import FAINT, Markup, Picture, framed, tag, visible
from tinylm.show import BLUE, GREEN, ORANGE, Level, Line, chart, cut

__all__ = ["cascade_curve", "confusion_map", "disagreement_map", "k_curve"]

MOST = 40  # classes of a map that are shown
LONGEST = 14  # letters of a name


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
    numbers: list[list[object]] = [["rule", "members", "accuracy", "low", "high"]]
    numbers += [[name, p.k, p.accuracy, p.low, p.high] for name, points in curves.items() for p in points]
    numbers += [[name, "", value] for name, value in (levels or {}).items()]
    text = "\n".join([*rows, *(f"{visible(n)}: {v:.3f}" for n, v in (levels or {}).items())])
    return Picture(framed(svg), text, numbers)


def confusion_map(confusion: np.ndarray, names: Sequence[str], title: str = "") -> Picture:
    """(C, C) counts as tinted cells, row the true class; a row's tint is the share of its texts.

    Of more than `MOST` classes those with the most mistakes are shown.
    """
    wrong = confusion.sum(1) - np.diagonal(confusion)
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST])
    part, labels = confusion[np.ix_(shown, shown)], [names[int(i)] for i in shown]
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
    """Tinted cells with figures in them, as an SVG: rows and columns carry the same names."""
    short = [cut(name, LONGEST) for name in names]
    across, down, margin = 32, 19, 8 + round(6.4 * max(map(len, short), default=1))
    words = {"font_size": 11, "fill": "currentColor", "dominant_baseline": "central"}
    parts = []
    for i, name in enumerate(short):
        y, x = margin + down * (i + 0.5), margin + across * (i + 0.5)
        whole = tag("title", names[i])
        parts.append(tag("text", whole, name, x=margin - 6, y=y, text_anchor="end", **words))
        turn = f"rotate(-90 {x:g} {margin - 6})"
        parts.append(tag("text", whole, name, x=f"{x:g}", y=margin - 6, transform=turn, **words))
        for j, (share, value) in enumerate(zip(np.nan_to_num(tint[i]).tolist(), cells[i], strict=True)):
            at, shade = margin + across * j, round(0.75 * min(1.0, max(0.0, share)), 2)
            if shade:
                box = {"x": at, "y": margin + down * i, "width": across - 1, "height": down - 1}
                parts.append(tag("rect", fill=f"rgb({rgb})", opacity=shade, **box))
            if value:
                parts.append(tag("text", value, x=at + across / 2, y=y, text_anchor="middle", **words))
    width, height = margin + across * len(short), margin + down * len(short)
    svg = tag(
        "svg", tag("title", title or note), *parts, viewBox=f"0 0 {width} {height}", role="img",
        aria_label=title or note, style=f"display:block;width:{width}px;max-width:none;height:auto;font-family:inherit",
    )  # fmt: skip
    caption = tag("div", tag("b", title), style="margin-bottom:4px") if title else None
    wide = max(map(len, short), default=1)
    lines = [name.rjust(wide) + " " + " ".join(v.rjust(4) for v in row) for name, row in zip(short, cells, strict=True)]
    text = "\n".join(filter(None, [visible(title), *lines, note]))
    scrolled = tag("div", svg, style="overflow-x:auto")
    below = tag("div", note, style=f"margin-top:4px;{FAINT}")
    rows: list[list[object]] = [["", *names], *([name, *row] for name, row in zip(names, cells, strict=True))]
    return Picture(framed(caption, scrolled, below), text, rows)


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
    numbers: list[list[object]] = [["MFLOP per text", "deferred", "most unsure", "random", "oracle"]]
    columns = (found.flops / 1e6, found.share, found.accuracy, found.random, found.oracle)
    numbers += [list(row) for row in zip(*(column[at].tolist() for column in columns), strict=True)]
    return Picture(framed(Markup(svg), tag("div", visible(note), style=FAINT)), f"{text}\n{visible(note)}", numbers)
