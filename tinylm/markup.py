"""HTML that cannot bite: the one `esc`, a small builder of elements, what a picture is, and how one is saved.

Text from outside (model output, data, file names, errors) becomes markup only through `esc`; `tag` writes no element
and no attribute that could run, load or link anything.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinylm.store import write_bytes

# Controls but tab and newline, everything that is invisible or turns the reading direction, halves of surrogate pairs.
HIDDEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
TAGS = frozenset(
    [
        "b", "div", "h1", "h2", "line", "path", "rect", "span", "svg", "table", "tbody", "td", "text", "th", "thead",
        "title", "tr",
    ]
)  # fmt: skip
ATTRIBUTES = frozenset(
    [
        "aria-label", "class", "d", "dominant-baseline", "fill", "font-size", "height", "opacity", "role", "rx",
        "stroke", "stroke-dasharray", "stroke-linejoin", "stroke-opacity", "stroke-width", "style", "text-anchor",
        "title", "transform", "viewBox", "width", "x", "x1", "x2", "y", "y1", "y2",
    ]
)  # fmt: skip


class Markup(str):
    """Text that is HTML already: made by `esc` and `tag` only."""


def visible(text: object) -> str:
    """The text with every control, invisible or direction-changing character spelled out, as `\\u202e`."""

    def spelled(match: re.Match[str]) -> str:
        code = ord(match[0])
        if code < 0x20:
            return chr(0x2400 + code)  # the pictures of the control characters: ESC becomes ␛
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return HIDDEN.sub(spelled, str(text))


def plain(text: object) -> str:
    """The text as a terminal may show it: `visible`, but for the joiners that emoji and Persian are written with."""
    joiners = re.split("([\u200c\u200d])", str(text).replace("\r\n", "\n"))
    return "".join(part if part in ("\u200c", "\u200d") else visible(part) for part in joiners)


def esc(text: object) -> Markup:
    """Any text as inert HTML: what `visible` makes of it, with `& < > " '` as entities. Markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(visible(text), quote=True))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """`<name attributes>children</name>`, everything escaped. Raises ValueError for any but `TAGS` and `ATTRIBUTES`.

    Underscores in attribute names become hyphens, `class_` is `class`; attributes that are None are left out.
    """
    if name not in TAGS:
        raise ValueError(f"<{name}> is not among the elements this kit writes")
    written = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if key not in ATTRIBUTES:
            raise ValueError(f"{key}= is not among the attributes this kit writes")
        if value is not None:
            written += f' {key}="{esc(value)}"'
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other, escaped; None is left out."""
    return Markup("".join(esc(part) for part in parts if part is not None))


@dataclasses.dataclass(frozen=True)
class Picture:
    """Something to look at: `html` in a notebook, `text` (what `repr` gives) where there is none.

    `numbers` are the figures behind it as rows, the header first; empty where it shows words.
    """

    html: str
    text: str
    numbers: Sequence[Sequence[object]] = ()

    def save(self, path: str | os.PathLike, *, title: str = "") -> Path:
        """Write the drawing (.svg), the figures behind it (.csv), or all of it as a page (.html); whole or not at all.

        `title` is the page's. Words alone are drawn as text. Raises ValueError: another ending, or no figures; OSError.
        """
        path = Path(path)
        kind = path.suffix.lower()
        if kind == ".csv" and not self.numbers:
            raise ValueError(f"{path}: no figures are behind this picture; save it as .svg or .html")
        if kind not in (".svg", ".csv", ".html"):
            raise ValueError(f"{path}: a picture is saved as .svg, .csv or .html, by how its name ends")
        if kind == ".html":
            title = title or path.stem
            written = page(title, join([tag("h1", title), Markup(self.html)]))
        else:
            written = drawing(self.html, self.text) if kind == ".svg" else table_of(self.numbers)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, written.encode())
        return path

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


FRAME = (
    "font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:13px;line-height:1.45;max-width:760px;"
    "color:var(--jp-content-font-color1,var(--vscode-foreground,inherit));font-variant-numeric:tabular-nums"
)
RULE = "border-bottom:1px solid rgba(128,128,128,.35)"
FAINT = "opacity:.72"


def framed(*parts: object) -> Markup:
    """The outermost element of everything shown. The classes keep MathJax from reading `$...$` in a text."""
    return tag("div", *parts, class_="tinylm mathjax_ignore tex2jax_ignore", style=FRAME)


# --- files ------------------------------------------------------------------------------------------------------------

WIDE, GAP = 760.0, 12.0  # of a drawing, and between two
DRAWN = re.compile(r"<svg( .*?)>(.*?)</svg>", re.DOTALL)  # what `tag` writes; none stands inside another
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root{color-scheme:light dark}
body{font:14px/1.5 system-ui,sans-serif;max-width:800px;margin:28px auto 60px;padding:0 20px}
h1{font-size:25px;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 10px;padding-bottom:4px;border-bottom:1px solid #8885}
td{overflow-wrap:anywhere}
@media print{h2{break-after:avoid}}
"""


def page(title: str, body: Markup, *, style: str = STYLE, policy: str = POLICY) -> str:
    """A whole HTML file that loads nothing from elsewhere."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width">{tag("title", title)}'
        f"<style>{style}</style></head><body>{body}</body></html>\n"
    )


def drawing(inside: str, text: str) -> str:
    """The drawings of a markup as one SVG file, side by side where there is room; of words, their lines."""
    x = y = high = wide = 0.0
    placed = []
    for about, within in DRAWN.findall(inside) or [lines_of(text)]:
        left, top, width, height = map(float, re.search(r'viewBox="([^"]*)"', about)[1].split())  # type: ignore[index]
        fixed = re.search(r"width:(\d+)px", about)
        shown = float(fixed[1]) if fixed else width
        if x and x + shown > WIDE:
            x, y, high = 0.0, y + high + GAP, 0.0
        tall = shown * height / width
        box = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{shown:g}", "height": f"{tall:g}", "style": "overflow:visible"}
        placed.append(tag("svg", Markup(within), viewBox=f"{left:g} {top:g} {width:g} {height:g}", **box))
        wide, high, x = max(wide, x + shown), max(high, tall), x + shown + GAP
    size = f'width="{wide + 2 * GAP:g}" height="{y + high + 2 * GAP:g}"'
    box = f'viewBox="{-GAP:g} {-GAP:g} {wide + 2 * GAP:g} {y + high + 2 * GAP:g}"'
    font = 'font-family="system-ui,sans-serif" color="#222"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} {font}>{join(placed)}</svg>\n'


def lines_of(text: str) -> tuple[str, str]:
    """Words as the inside of a drawing, in a fixed pitch: what `drawing` takes them for."""
    lines = visible(text).split("\n")
    wide = max(60.0, 7.25 * max(map(len, lines)))
    drawn = (
        tag("text", line.replace(" ", "\xa0"), x=0, y=16 * i + 12, font_size=12, fill="currentColor", style=MONO)
        for i, line in enumerate(lines)
    )
    return f' viewBox="0 0 {wide:g} {16 * len(lines)}"', join(drawn)


MONO = "font-family:ui-monospace,Menlo,Consolas,monospace"


def table_of(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV (RFC 4180). A text that a spreadsheet would take for a formula gets an apostrophe in front."""

    def cell(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value

    file = io.StringIO()
    csv.writer(file).writerows([cell(value) for value in row] for row in rows)
    return file.getvalue()


# --- in a notebook ----------------------------------------------------------------------------------------------------


def pane() -> Any:
    """An ipywidgets pane; its `put(shown)` takes a `Picture`, `Markup` or None, and shows any other text as text."""
    import ipywidgets

    class Pane(ipywidgets.HTML):
        def put(self, shown: Any) -> None:
            markup = Markup(shown.html) if isinstance(shown, Picture) else shown
            self.value = str(framed(markup)) if markup is not None else ""

    return Pane()


def number(x: float | None, digits: int = 3) -> str:
    """A figure to read: thousands separated, at most `digits` decimals and about as many significant; – if unknown."""
    if x is None or not math.isfinite(x):
        return "–"
    if x == 0 or abs(x) >= 10 ** (digits - 1):
        return f"{x:,.0f}"
    return f"{x:.{min(digits, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def duration(seconds: float) -> str:
    """`8 s`, `2 min 5 s`, `3 h 7 min`."""
    if not math.isfinite(seconds):
        return "–"
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"
