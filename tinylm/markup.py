"""HTML that cannot bite: the one `esc`, a small builder of elements, and what a picture is.

Text from outside (model output, data, file names, errors) becomes markup only through `esc`; `tag` writes no element
and no attribute that could run, load or link anything.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Iterable
from typing import Any

# Controls but tab and newline, everything that is invisible or turns the reading direction, halves of surrogate pairs.
HIDDEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
TAGS = frozenset(
    ["b", "div", "line", "path", "rect", "span", "svg", "table", "tbody", "td", "text", "th", "thead", "title", "tr"]
)
ATTRIBUTES = frozenset(
    [
        "aria-label", "class", "d", "dominant-baseline", "fill", "font-size", "height", "opacity", "role", "rx",
        "stroke", "stroke-dasharray", "stroke-linejoin", "stroke-opacity", "stroke-width", "style", "text-anchor",
        "title", "viewBox", "width", "x", "x1", "x2", "y", "y1", "y2",
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
    """Something to look at: `html` in a notebook, `text` (what `repr` gives) where there is none."""

    html: str
    text: str

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
