"""What the room draws: heat maps that survive saving, small enough for a notebook file, told apart without colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinylm.data import DataError
from tinylm.markup import FAINT, Markup, Picture, framed, number, tag, visible
from tinylm.show import BLUE, ORANGE

LONGEST = 16  # letters of a label
LEVELS = 6  # shades: one path each, so that a map of thousands of cells is a few kilobytes


def spelled(tokenizer: Any, id: int) -> str:
    """A token as text to read: line breaks and spaces made visible; its number without a tokenizer."""
    if tokenizer is None:
        return str(int(id))
    piece = tokenizer.decode_bytes([int(id)]).decode("utf-8", "backslashreplace")
    return piece.replace("\n", "⏎").replace(" ", "·") or f"[{int(id)}]"


def cells(
    values: np.ndarray,
    *,
    size: int = 300,
    least: float = 0.0,
    most: float | None = None,
    title: str = "",
    words: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Markup:
    """An SVG of a matrix: darker is larger, orange below zero. `words` label rows (and columns, if none are given)."""
    rows, width = values.shape
    known = np.where(np.isfinite(values), values, 0.0)  # others stay blank
    most = float(np.abs(known).max()) if most is None else most
    level = np.rint(np.minimum(np.abs(known) / (most or 1.0), 1.0) * LEVELS).astype(int)
    level = np.where(np.abs(known) > least, level, 0)
    parts = []
    for sign, ink in ((1, BLUE), (-1, ORANGE)):
        for k in range(1, LEVELS + 1):
            at = np.argwhere((level == k) & (np.sign(values) == sign))
            path = "".join(f"M{c} {r}h1v1h-1z" for r, c in at.tolist())
            parts.append(tag("path", d=path, fill=ink, opacity=round(k / LEVELS, 2)) if path else None)
    edge = tag("path", d=f"M0 0h{width}v{rows}h-{width}z", fill="none", stroke="currentColor", stroke_width=0.06,
               opacity=0.6)  # fmt: skip
    under = list(columns or (words if width == rows else ()))
    left, low = (
        0.6 * max((len(word[:LONGEST]) for word in some), default=0) + 0.6 * bool(some) for some in (words, under)
    )
    scale = max(rows, width) / 30  # of a letter, in cells
    labels = []
    small = {"fill": "currentColor", "font_size": round(0.9 * scale, 2)}
    for r, word in enumerate(words):
        labels.append(
            tag("text", word[:LONGEST], x=-0.3 * scale, y=round(r + 0.5 + 0.3 * scale, 2), text_anchor="end", **small)
        )
    for c, word in enumerate(under):
        style = f"writing-mode:vertical-rl;font-size:{0.9 * scale:.2f}px"
        labels.append(tag("text", word[:LONGEST], x=c + 0.5, y=rows + 0.3 * scale, style=style, fill="currentColor"))
    box = f"{-left * scale:g} 0 {width + left * scale:g} {rows + low * scale:g}"
    style = f"display:block;width:{size * (1 + left * scale / width):.0f}px;max-width:100%;height:auto"
    about = {"viewBox": box, "role": "img", "aria_label": title, "style": style}
    return tag("svg", tag("title", title), *parts, edge, *labels, **about)


def heat_map(
    values: np.ndarray, *, rows: Sequence[str] = (), columns: Sequence[str] = (), title: str = "", unit: str = ""
) -> Picture:
    """A matrix of figures, such as a patching sweep: blue above zero, orange below, darker is further away.

    What is not finite stays blank. Raises DataError: no (rows, columns) of figures, none of them finite, or labels of
    another number.
    """
    values = np.atleast_2d(np.asarray(values, np.float64))
    if values.ndim != 2 or not np.isfinite(values).any():
        raise DataError(f"a heat map shows finite figures, (rows, columns); these have shape {values.shape}")
    for name, labels, count in (("rows", rows, len(values)), ("columns", columns, values.shape[1])):
        if len(labels) not in (0, count):
            raise DataError(f"{len(labels)} labels for {count} {name}: give one each, or none")
    values = np.where(np.isfinite(values), values, np.nan)
    svg = cells(values, size=440, title=title, words=rows, columns=columns)
    high, low = np.nanmax(values), np.nanmin(values)
    note = f"from {number(low)} to {number(high)} {unit}".strip()
    r, c = map(int, np.unravel_index(int(np.nanargmax(values)), values.shape))
    where = f"{rows[r] if len(rows) else r}, {columns[c] if len(columns) else c}"
    text = visible(f"{title}: {note}; largest at {where}")
    head = tag("div", tag("b", title), style="margin-bottom:4px") if title else None
    across, down = columns or range(values.shape[1]), rows or range(len(values))
    numbers = [["", *across], *([name, *row] for name, row in zip(down, values.tolist(), strict=True))]
    below = tag("div", f"{note}; largest at {where}", style=f"margin-top:4px;{FAINT}")
    return Picture(framed(head, svg, below), text, numbers)
