"""What the kit draws: static HTML and SVG that survive saving and reloading a notebook, and the same as plain text.

Pure functions of their arguments: no IPython, no scripts, no files, no fonts or pictures from elsewhere. Colours
follow the notebook's theme through `currentColor`; the few fixed ones (after Okabe and Ito 2008) can be told apart by
colour-blind eyes and seen on light and dark grounds, and no difference is told by colour alone.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinylm.config import ModelConfig
from tinylm.markup import FAINT, RULE, Markup, Picture, duration, framed, join, number, tag, visible
from tinylm.presets import size

BLUE, ORANGE, GREEN = "#1F80C4", "#D55E00", "#009E73"
LONGEST = 4000  # characters of one text that are shown; the rest is counted
POINTS = 300  # of one line: more than the eye resolves, few enough for a small notebook file

# --- tables and texts -------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[object]], header: Sequence[object] = (), title: str = "") -> Picture:
    """Rows under a header; numbers stand to the right."""

    def cell(name: str, value: object) -> Markup:
        right = isinstance(value, (int, float)) or bool(re.fullmatch(r"[-+]?[\d.,]+( ?[%A-Za-z]{1,4})?", str(value)))
        style = f"padding:3px 14px 3px 0;text-align:{'right' if right else 'left'};background:none"
        return tag(name, value, style=style + (";font-weight:600" if name == "th" else ""))

    shown = [[f"{v:,}" if type(v) is int else number(v, 4) if isinstance(v, float) else v for v in row] for row in rows]
    head = tag("thead", tag("tr", *(cell("th", h) for h in header), style=RULE)) if header else None
    body = tag("tbody", *(tag("tr", *(cell("td", v) for v in row), style="background:none") for row in shown))
    caption = tag("div", tag("b", title), style="margin-bottom:4px") if title else None
    grid = tag("table", head, body, style="border-collapse:collapse;font-size:13px;margin:0")
    lines = [[visible(v).replace("\n", " ") for v in row] for row in ([list(header)] if header else []) + shown]
    widths = [max(len(row[i]) for row in lines if i < len(row)) for i in range(max(map(len, lines), default=0))]
    text = "\n".join("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=False)).rstrip() for row in lines)
    numbers = [*([list(header)] if header else []), *map(list, rows)]
    return Picture(framed(caption, grid), "\n".join(filter(None, [visible(title), text])), numbers)


def sample(text: object, title: object = "", *, prompt: str = "") -> Picture:
    """A text as a quotation, its `prompt` in bold; at most `LONGEST` characters are shown."""
    text = str(text)
    rest = f" … ({len(text) - LONGEST:,} more characters)" if len(text) > LONGEST else ""
    text, begun = text[:LONGEST], len(prompt) if prompt and text.startswith(prompt) else 0
    inside = join([tag("b", text[:begun]) if begun else None, text[begun:], rest])
    style = "white-space:pre-wrap;overflow-wrap:anywhere;padding:2px 0 2px 12px;margin-bottom:8px"
    style += ";border-left:3px solid rgba(128,128,128,.45)"
    head = tag("div", title, style=f"margin:0 0 3px;{FAINT}") if title else None
    return Picture(
        framed(head, tag("div", inside, style=style)), visible("\n".join(filter(None, [str(title), text + rest])))
    )


def tokens(tokenizer: Any, text: str) -> Picture:
    """How a tokenizer cuts a text: one tinted span per token, its id when pointed at."""
    ids = [int(i) for i in tokenizer.encode(text[:LONGEST])]
    tints = ("0,114,178", "230,159,0", "0,158,115", "204,121,167")

    def piece(i: int) -> str:
        return tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace")

    edge = "border-radius:3px;padding:1px 0;box-shadow:inset 1px 0 0 rgba(128,128,128,.55)"
    spans = [
        tag(
            "span",
            piece(t).replace("\n", "⏎\n"),
            title=f"token {t}",
            style=f"background:rgba({tints[i % 4]},.32);{edge}",
        )
        for i, t in enumerate(ids)
    ]
    size_of = len(text[:LONGEST].encode("utf-8", "replace"))
    line = f"{len(ids):,} tokens for {size_of:,} bytes: {number(size_of / max(1, len(ids)))} bytes per token"
    body = tag("div", *spans, style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75")
    return Picture(
        framed(body, tag("div", line, style=f"margin-top:6px;{FAINT}")),
        "|".join(visible(piece(t)) for t in ids) + f"\n{line}",
    )


def sizes(config: ModelConfig) -> Picture:
    """Where the parameters of a model are, and what it costs."""
    cost = size(config)
    rows: list[list[object]] = [[n, v, f"{v / cost.total:.1%}"] for n, v in cost.groups.items() if v]
    rows.append(["total", cost.total, "100%"])
    groups = table(
        rows, ["group", "parameters", "share"], f"{config.layers} layers, {config.width} wide, {config.heads} heads"
    )
    files = [
        [n, f"{v / 1024:,.0f} KiB"]
        for n, v in (("float32", cost.float32), ("int8", cost.int8), ("ternary", cost.ternary))
    ]
    costs = table([*files, ["arithmetic per token", f"{cost.flops / 1e6:,.2f} MFLOP"]], ["as a file", "size"])
    both = tag("div", Markup(groups.html), Markup(costs.html), style="display:flex;flex-wrap:wrap;gap:8px 48px")
    return Picture(framed(both), f"{groups.text}\n\n{costs.text}", groups.numbers)


# --- charts -----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One curve: `y` over `x`, of equal length; a label gets the last value behind it, none is drawn without one."""

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    label: str = ""
    color: str = "currentColor"
    width: float = 2.0
    opacity: float = 1.0
    dots: bool = False


class Level(NamedTuple):
    """A dashed horizontal line at `y`."""

    y: float
    label: str
    color: str = "currentColor"
    opacity: float = 1.0


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round values inside the range: about five, or on a log scale 1, 2, 5 per decade, or whole decades if many."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**d for d in decades for m in ((1,) if len(decades) > 4 else (1, 2, 5))]
    else:
        raw = (high - low) / 5
        base = 10 ** math.floor(math.log10(raw))
        step = base * next(m for m in (1, 2, 2.5, 5, 10) if m * base >= raw * 0.999)
        found = [i * step for i in range(math.ceil(low / step), math.floor(high / step * (1 + 1e-9)) + 1)]
    return [t for t in found if low <= t <= high * (1 + 1e-9)]


def short(x: float) -> str:
    """A tick's label: `500`, `20k`, `1.5M`."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= unit:
            return f"{x / unit:g}{name}"
    return f"{x:g}"


def chart(
    lines: Sequence[Line], levels: Sequence[Level] = (), *, x_label: str, y_label: str, log_x: bool = True
) -> Markup:
    """An SVG line chart, labels at the lines' ends, so no legend is needed. Values that are not finite leave a gap."""
    width, height, left, right, top, bottom = 760, 300, 44, 150, 22, 40
    finite = [(x, y) for ln in lines for x, y in zip(ln.x, ln.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    heights = [y for _, y in finite] + [lv.y for lv in levels if math.isfinite(lv.y)]
    x0, x1 = (min(x for x, _ in finite), max(x for x, _ in finite)) if finite else (1.0, 10.0)
    log_x = log_x and x0 > 0
    if x1 <= x0:
        x1 = x0 * 10 if log_x else x0 + 1
    y1, y0 = (max(heights), min(heights)) if heights else (1.0, 0.0)
    y0 = 0.0 if 0 <= y0 < 0.4 * y1 else y0 - 0.06 * (y1 - y0 or 1)
    y1 += 0.04 * (y1 - y0) or 1
    scale = math.log if log_x else float

    def px(x: float) -> float:
        return round(left + (scale(x) - scale(x0)) / (scale(x1) - scale(x0)) * (width - left - right), 1)

    def py(y: float) -> float:
        return round(top + (y1 - y) / (y1 - y0) * (height - top - bottom), 1)

    small = {"font_size": 12, "fill": "currentColor"}
    parts = []
    for t in ticks(y0, y1):
        parts.append(
            tag("line", x1=left, x2=width - right, y1=py(t), y2=py(t), stroke="currentColor", stroke_opacity=0.12)
        )
        parts.append(
            tag("text", short(round(t, 9)), x=left - 7, y=py(t), text_anchor="end", dominant_baseline="middle", **small)
        )
    for t in ticks(x0, x1, log_x):
        parts.append(tag("text", short(t), x=px(t), y=height - bottom + 17, text_anchor="middle", **small))
    parts.append(tag("text", x_label, x=width - right, y=height - 6, text_anchor="end", opacity=0.75, **small))
    parts.append(tag("text", y_label, x=left - 30, y=12, opacity=0.75, **small))
    ends: list[tuple[float, str, str, float]] = []
    for lv in (lv for lv in levels if math.isfinite(lv.y)):
        style = {"stroke": lv.color, "stroke_dasharray": "6 4", "stroke_width": 1.6, "opacity": lv.opacity}
        parts.append(tag("line", x1=left, x2=width - right, y1=py(lv.y), y2=py(lv.y), **style))
        ends.append((py(lv.y), f"{lv.label} {number(lv.y)}", lv.color, max(lv.opacity, 0.75)))
    for ln in lines:
        points = [
            (px(x), py(y)) if math.isfinite(x) and math.isfinite(y) else None for x, y in zip(ln.x, ln.y, strict=True)
        ]
        path = "".join(
            "" if p is None else f"{'M' if i == 0 or points[i - 1] is None else 'L'}{p[0]:g} {p[1]:g}"
            for i, p in enumerate(points)
        )
        drawn = [p for p in points if p]
        style = {"stroke": ln.color, "stroke_width": ln.width, "stroke_linejoin": "round", "opacity": ln.opacity}
        parts.append(tag("path", d=path, fill="none", **style) if path else None)
        parts += [tag("rect", x=p[0] - 3, y=p[1] - 3, width=6, height=6, rx=3, fill=ln.color) for p in drawn if ln.dots]
        if drawn and ln.label:
            last = next(
                y for x, y in zip(reversed(ln.x), reversed(ln.y), strict=True) if math.isfinite(x) and math.isfinite(y)
            )
            ends.append((drawn[-1][1], f"{ln.label} {number(last)}", ln.color, 1.0))
    for at, (y, label, color, opacity) in zip(apart([e[0] for e in ends], 15, top, height - bottom), ends, strict=True):
        reach = {"stroke": color, "stroke_width": 1, "opacity": 0.5}
        parts.append(tag("line", x1=width - right + 2, x2=width - right + 9, y1=y, y2=at, **reach))
        label_style = {"font_size": 12, "fill": "currentColor", "opacity": opacity, "dominant_baseline": "middle"}
        parts.append(tag("rect", x=width - right + 11, y=at - 4, width=8, height=8, rx=2, fill=color, opacity=opacity))
        parts.append(tag("text", label, x=width - right + 23, y=at, **label_style))
    what = f"{y_label} over {x_label}: " + ", ".join(label for _, label, _, _ in ends)
    return tag(
        "svg", tag("title", what), *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=what,
        style="display:block;width:100%;height:auto;font-family:inherit;overflow:visible",
    )  # fmt: skip


def plot(
    lines: Sequence[Line], levels: Sequence[Level] = (), *, x_label: str, y_label: str, log_x: bool = True
) -> Picture:
    """A `chart` as a picture, with its figures as text and for `save`."""
    svg = chart(lines, levels, x_label=x_label, y_label=y_label, log_x=log_x)
    rows = points(lines, levels, x_label=x_label, y_label=y_label)
    text = "\n".join("  ".join(number(v, 4) if isinstance(v, float) else str(v) for v in row) for row in rows[:40])
    return Picture(framed(svg), visible(text + (f"\n… {len(rows) - 40:,} more rows" if len(rows) > 40 else "")), rows)


def points(lines: Sequence[Line], levels: Sequence[Level] = (), *, x_label: str, y_label: str) -> list[list[object]]:
    """The figures behind a chart as rows, the header first; a line without a label is called after its place."""
    rows: list[list[object]] = [["line", x_label, y_label]]
    for i, line in enumerate(lines):
        rows += [[line.label or f"line {i + 1}", x, y] for x, y in zip(line.x, line.y, strict=True)]
    return rows + [[level.label, "", level.y] for level in levels]


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in the same order, at least `gap` apart, and inside low..high as far as they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [0.0] * len(wanted)
    at = low - gap
    for i in order:
        at = found[i] = max(wanted[i], at + gap)
    at = high + gap
    for i in reversed(order):
        at = found[i] = min(found[i], at - gap)
    return found


def bars(
    values: Mapping[str, float], *, unit: str = "", strong: Sequence[str] = (), floor: float | None = None
) -> Picture:
    """Horizontal bars, the `strong` ones in colour; `floor` is a mark across all of them."""
    finite = [v for v in values.values() if math.isfinite(v)]
    most = max([*finite, floor or 0.0, 1e-9])
    width, row, right = 760, 23, 70
    left = min(318, max(60, 14 + 8 * max(map(len, map(visible, values)), default=0)))
    parts = []
    for i, (name, value) in enumerate(values.items()):
        long = max(0.0, value) / most * (width - left - right) if math.isfinite(value) else 0.0
        ink = {"fill": BLUE} if name in strong else {"fill": "currentColor", "opacity": 0.35}
        word = {"font_size": 12.5, "fill": "currentColor", "dominant_baseline": "central", "y": row * i + row / 2}
        word["style"] = "font-weight:600" if name in strong else None
        label = tag("text", tag("title", name), cut(name, (left - 14) // 8), x=left - 9, text_anchor="end", **word)
        bar = tag("rect", x=left, y=row * i + 4, width=round(long, 1), height=row - 8, rx=2, **ink)
        parts += [label, bar, tag("text", number(value), x=round(left + long, 1) + 7, **word)]
    if floor is not None:
        at = round(left + floor / most * (width - left - right), 1)
        dashed = {"stroke": GREEN, "stroke_width": 2, "stroke_dasharray": "5 4"}
        parts.append(tag("line", x1=at, x2=at, y1=0, y2=row * len(values), **dashed))
    note = f"{unit}; the dashed line is the floor, {number(floor)}" if floor is not None else unit
    told = ", ".join(f"{name} {number(value)}" for name, value in values.items())
    svg = tag(
        "svg", tag("title", f"{unit}: {told}"), *parts, viewBox=f"0 0 {width} {max(1, row * len(values))}", role="img",
        aria_label=f"{unit}: {told}", style="display:block;width:100%;height:auto;font-family:inherit",
    )  # fmt: skip
    text = "\n".join(f"{visible(n)[:24]:24}  {number(v):>8}" for n, v in values.items())
    rows = [["", unit], *([name, value] for name, value in values.items())]
    rows += [] if floor is None else [["the floor", floor]]
    html_ = framed(svg, tag("div", note, style=f"margin-top:8px;{FAINT}"))
    return Picture(html_, f"{text}\n{visible(note)}", rows)


def cut(text: object, length: int) -> str:
    """At most so many characters, the last one `…` where there were more."""
    whole = visible(text)
    return whole if len(whole) <= length else f"{whole[: max(1, length - 1)]}…"


# --- a training run ---------------------------------------------------------------------------------------------------

SAID = {
    "running": "training",
    "done": "done",
    "interrupted": "interrupted: the model is usable, and the training can go on",
    "stopped": "stopped: the model is usable, and the training can go on",
    "diverged": "diverged: the model holds the weights from before the step that was not finite",
}


class Curves(NamedTuple):
    """What a trainer has seen, in one unit: x is tokens; `train` is smoothed over `raw`, `valid` has its own x."""

    unit: str
    x: np.ndarray
    raw: np.ndarray
    train: np.ndarray
    valid_x: np.ndarray
    valid: np.ndarray


def curves(trainer: Any) -> Curves:
    """The losses of a `Trainer` as at most `POINTS` points: bits per byte if bytes are known, else nats per token."""
    losses, history = trainer.losses, trainer.history
    known = getattr(trainer.batches, "tokens", None)
    bytes_per_token = getattr(known, "bytes_per_prediction", 0) or trainer.valid_bytes
    bits = bool(bytes_per_token) and trainer.config.objective == "next_token"
    before = max(0, trainer.step - len(losses))  # steps of earlier sittings: only the logged ones are known
    old = [(s.step, s.loss) for s in history if s.step <= before]
    steps = np.array([s for s, _ in old] + list(range(before + 1, before + 1 + len(losses))), float)
    raw = np.array([v for _, v in old] + losses, float) / (math.log(2) * bytes_per_token if bits else 1.0)
    if len(raw) > POINTS:  # means of neighbours, finer at the start, where a log axis shows more
        edges = np.unique(np.geomspace(1, len(raw) + 1, POINTS).astype(int)) - 1
        counts = np.diff(edges)
        steps, raw = (np.add.reduceat(v, edges[:-1]) / counts for v in (steps, raw))
    places = np.arange(len(raw))  # a running mean around each point lags behind nothing
    first, behind = np.maximum(0, places - len(raw) // 25), np.minimum(len(raw), places + len(raw) // 25 + 1)
    sums = np.concatenate([[0.0], np.cumsum(raw)])
    smooth = (sums[behind] - sums[first]) / (behind - first)
    points = [(s.tokens, s.valid_bits if bits else s.valid_loss) for s in history]
    valid = np.array([p for p in points if p[1] is not None], float).reshape(-1, 2)
    return Curves(
        "bits per byte" if bits else "nats per token",
        steps * trainer.tokens_per_step,
        raw,
        smooth,
        valid[:, 0],
        valid[:, 1],
    )


def run_summary(
    trainer: Any,
    *,
    floor: float | None = None,
    baselines: Mapping[str, float] | None = None,
    story: Picture | None = None,
    panel: Picture | None = None,
    notes: Sequence[object] = (),
    step: Any = None,
) -> Picture:
    """A training run at one look: state, figures, curves. `fit` shows the same while it runs.

    Args:
        trainer: from `train`, `resume` or `fit`.
        floor, baselines: bits per byte, drawn where the curves are in that unit.
        panel: shown below the curves. story: shown below that, from `sample`. notes: lines at the end. step: newer than
            the last logged one.
    """
    c, last = curves(trainer), step or (trainer.history[-1] if trainer.history else None)
    in_bits = c.unit == "bits per byte"
    floor = floor if in_bits else None
    score = (c.valid[-1], "validation") if len(c.valid) else (c.train[-1], "training") if len(c.train) else (None, "")
    speed = last.tokens_per_second if last else 0.0
    left = last.eta if last and trainer.outcome == "running" else None
    figures = [(number(score[0]), f"{c.unit}, {score[1]}".rstrip(", "))]
    if floor is not None and score[0] is not None:
        figures.append((number(abs(score[0] - floor)), "above the floor" if score[0] >= floor else "below the floor"))
    figures.append((number(speed) if speed else "–", "tokens per second"))
    figures.append((duration(trainer.elapsed), "spent") if left is None else (duration(left), "to go"))
    share = min(1.0, max(0.0, trainer.progress))
    of = f" of {trainer.steps:,}" if trainer.steps else ""
    seen = short(float(f"{trainer.step * trainer.tokens_per_step:.3g}"))
    state = SAID[trainer.outcome] if last or trainer.outcome != "running" else "starting: the first step compiles"
    line = f"step {trainer.step:,}{of} · {seen} tokens · {share:.0%}"
    lines = [
        Line(c.x, c.raw, color=BLUE, width=1, opacity=0.45),
        Line(c.x, c.train, "training", BLUE),
        Line(c.valid_x, c.valid, "validation", ORANGE, dots=len(c.valid) <= 40),
    ]
    drawn = baselines if baselines and in_bits else {}
    levels = [Level(v, name, opacity=0.45) for name, v in drawn.items()]
    levels += [] if floor is None else [Level(floor, "floor", GREEN)]
    large, little = "font-size:24px;font-weight:600;line-height:1.2", f"font-size:12px;{FAINT}"
    tiles = (tag("div", tag("div", v, style=large), tag("div", what, style=little)) for v, what in figures)
    apart_ = "display:flex;flex-wrap:wrap;justify-content:space-between;gap:2px 16px"
    html_ = framed(
        tag("div", tag("b", state), tag("span", line, style=FAINT), style=apart_),
        tag(
            "div", tag("div", style=f"width:{share:.1%};height:100%;background:{BLUE};border-radius:3px"),
            style="height:6px;margin:5px 0 10px;background:rgba(128,128,128,.25);border-radius:3px",
        ),
        tag("div", *tiles, style="display:flex;flex-wrap:wrap;gap:6px 40px;margin-bottom:10px"),
        chart(lines, levels, x_label="tokens", y_label=c.unit),
        *(tag("div", Markup(p.html), style="margin-top:10px") for p in (panel, story) if p is not None),
        *(tag("div", note, style=f"margin-top:6px;{FAINT}") for note in notes),
    )  # fmt: skip
    text = f"{state} · {line} · " + " · ".join(f"{v} {what}" for v, what in figures)
    below = [textwrap.indent(p.text, "  ") for p in (panel, story) if p is not None]
    named = [lines[0]._replace(label="training, each step"), *lines[1:]]
    rows = points(named, levels, x_label="tokens", y_label=c.unit)
    return Picture(html_, "\n".join([visible(text), *below, *map(visible, notes)]), rows)
