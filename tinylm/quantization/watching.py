"""What the codes of a model do while it trains: how many are zero, how many changed, where signs flip.

seen = Watched(trainer)
for step in trainer:
    seen.look()
seen                                    # curves, in a notebook
seen.flips("blocks.0.mlp.up")           # a map of the weights whose sign changes
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from tinylm.markup import FAINT, Markup, Picture, framed, number, tag
from tinylm.quantization.spec import QuantizationError
from tinylm.show import BLUE, GREEN, ORANGE, Line, chart, points, table
from tinylm.techniques import modules
from tinylm.techniques.rounding import Codes, Rounding
from tinylm.weights import bind, pure

CELLS = 40  # of a heat map, in either direction
SHADES = 12  # of it
FEW = 16  # levels
ROWS = 16  # of the table of matrices, before those of the same name become one
LINES = 12  # of blocks, in the chart of scales


class Look(NamedTuple):
    """One matrix at one step.

    Attributes:
        step: training steps done. zeros: share of codes that are 0. changed: share that differs from the look before.
        flipped: share whose sign is the opposite of their last one that was not 0.
        drift: mean of |log(scale / scale at the first look)|.
    """

    step: int
    zeros: float
    changed: float
    flipped: float
    drift: float


@functools.lru_cache(maxsize=16)
def _reader(graph: Any) -> Any:
    return jax.jit(lambda params: {path: m.rounded()[:2] for path, m in codes_in(bind(graph, params))})


def codes_in(model: Any) -> list[tuple[str, Rounding]]:
    """Every matrix of a model that has codes with scales."""
    return [(path, m) for path, m in modules(model) if isinstance(m, Rounding) and not getattr(m, "by_table", False)]


def look(model: Any) -> dict[str, Codes]:
    """Path -> codes and scales of every matrix that has them, as NumPy arrays; of a model or a `Trainer`."""
    graph, params = (model.graph, model.state.params) if hasattr(model, "state") else pure(model)
    return {path: Codes(np.asarray(c), np.asarray(s)) for path, (c, s) in _reader(graph)(params).items()}


class Watched:
    """The codes of a training model, look by look. `source` is a `Trainer`, or a model that is trained elsewhere.

    Attributes:
        history: path -> its looks. flipped: path -> how often each weight's sign flipped, (inputs, outputs).

    Raises:
        QuantizationError: no matrix of the model has codes.
    """

    def __init__(self, source: Any):
        self.source = source
        self.history: dict[str, list[Look]] = {}
        self.flipped: dict[str, np.ndarray] = {}
        self._first: dict[str, np.ndarray] = {}
        self._codes: dict[str, np.ndarray] = {}
        self._signs: dict[str, np.ndarray] = {}
        self.look()
        if not self.history:
            raise QuantizationError('no matrix of this model has codes: edit(model, ..., "ternary") gives it some')

    def look(self, step: int | None = None) -> dict[str, Look]:
        """Take the codes as they are now; what came of it, by path. `step` defaults to the trainer's.

        Raises QuantizationError where other matrices have codes than before.
        """
        if step is None:
            step = int(getattr(self.source, "step", len(next(iter(self.history.values()), []))))
        new, found = {}, look(self.source)
        if self.history and set(found) != set(self.history):
            changed = ", ".join(sorted(set(found) ^ set(self.history)))
            raise QuantizationError(f"matrices began or ceased to have codes ({changed}): make another Watched")
        for path, kept in found.items():
            codes, scale = np.asarray(kept.codes), np.asarray(kept.scale)
            signs = np.sign(codes).astype(np.int8)
            if path not in self.history:
                self.history[path], self._first[path] = [], scale
                self._codes[path], self._signs[path] = codes, signs
                self.flipped[path] = np.zeros(codes.shape, np.int32)
            flipped = signs * self._signs[path] < 0
            self.flipped[path] += flipped
            drift = float(np.abs(np.log(np.maximum(scale, 1e-30) / np.maximum(self._first[path], 1e-30))).mean())
            changed = float((codes != self._codes[path]).mean())
            new[path] = Look(step, float((codes == 0).mean()), changed, float(flipped.mean()), drift)
            self.history[path].append(new[path])
            self._codes[path], self._signs[path] = codes, np.where(signs == 0, self._signs[path], signs)
        return new

    def flips(self, path: str) -> Picture:
        """How often signs flipped, over the matrix: outputs to the right, inputs down, means over small areas."""
        if path not in self.flipped:
            raise QuantizationError(f"no codes at {path!r}; known: {', '.join(self.flipped)}")
        return heat(self.flipped[path], f"sign flips in {path}, {len(self.history[path])} looks")

    def picture(self) -> Picture:
        """Codes over the steps, scales over the steps, block by block; and the newest look at each matrix.

        Codes are those of the matrices with few levels, where there are such: in int8 nearly every code always changes.
        A model of many matrices has one row for those of the same name in all blocks.
        """
        steps = [look.step for look in next(iter(self.history.values()))]
        few = [path for path, codes in self._codes.items() if int(codes.max()) - int(codes.min()) < FEW]
        mean = self._mean(few or list(self.history))
        parts = [("% zero", 1, BLUE), ("% changed", 2, ORANGE), ("% sign flipped", 3, GREEN)]
        codes = [Line(steps, 100 * mean[:, at], label, color) for label, at, color in parts]
        blocks = self._groups(r"^(blocks\.\d+)\..*", r"\1")
        shades = np.linspace(1, 0.35, len(blocks))
        scales = [
            Line(steps, np.exp(self._mean(own)[:, 4]), name, BLUE, opacity=shade)
            for (name, own), shade in zip(blocks.items(), shades, strict=True)
        ]
        groups = self._groups(r"^blocks\.\d+", "blocks.*" if len(self.history) > ROWS else r"\g<0>")
        rows = []
        for name, own in groups.items():
            zeros, changed, flipped, drift = self._mean(own)[-1, 1:]
            rows.append([name, *(f"{100 * v:.2f} %" for v in (zeros, changed, flipped)), f"{np.exp(drift):.2f}"])
        title = f"codes at step {steps[-1]:,}; changes since the look before, scales since the first"
        grid = table(rows, ["matrix", "zero", "changed", "sign flipped", "scale, factor"], title)
        drawn = chart(codes, y_label="percent of the codes", x_label="steps", log_x=False)
        drifted = chart(scales[:LINES], y_label="scale moved, factor", x_label="steps", log_x=False)
        own = points(codes, x_label="steps", y_label="percent of the codes")
        own += points(scales, x_label="steps", y_label="")[1:]
        return Picture(framed(drawn, drifted, Markup(grid.html)), grid.text, own)

    def _mean(self, paths: list[str]) -> np.ndarray:
        """(looks, fields of `Look`), the mean over matrices by their size."""
        size = np.array([self._codes[path].size for path in paths], float)
        looks = np.array([self.history[path] for path in paths], float)
        return np.einsum("p,plf->lf", size / size.sum(), looks)

    def _groups(self, pattern: str, by: str) -> dict[str, list[str]]:
        """Paths by what becomes of them when a pattern in them is replaced."""
        found: dict[str, list[str]] = {}
        for path in self.history:
            found.setdefault(re.sub(pattern, by, path), []).append(path)
        return found

    def __repr__(self) -> str:
        return self.picture().text

    def _repr_html_(self) -> str:
        return self.picture().html


def heat(values: np.ndarray, title: str) -> Picture:
    """A matrix as an SVG of at most `CELLS` by `CELLS` squares, the mean of each as how dark it is; and as text.

    All squares of a shade are one path: a rectangle for each would make a notebook's file ten times as large.
    """
    down, across = (min(CELLS, n) for n in values.shape)
    edges = [np.linspace(0, n, k + 1).astype(int) for n, k in zip(values.shape, (down, across), strict=True)]
    sums = np.add.reduceat(np.add.reduceat(values.astype(float), edges[0][:-1], 0), edges[1][:-1], 1)
    means = sums / np.outer(np.diff(edges[0]), np.diff(edges[1]))
    most = means.max()
    side = 12
    shade = np.ceil(means / most * SHADES - 0.004).astype(int) if most > 0 else np.zeros(means.shape, int)
    paths = []
    for level in range(1, SHADES + 1):
        at = "".join(f"M{side * j} {side * i}h{side}v{side}h-{side}z" for i, j in np.argwhere(shade == level))
        paths.append(tag("path", d=at, fill=BLUE, opacity=round(level / SHADES, 3)) if at else None)
    said = f"{title}: mean {number(float(means.mean()))}, most {number(float(most))} per weight"
    frame = tag("rect", x=0, y=0, width=side * across, height=side * down, fill="none", stroke="currentColor",
                stroke_opacity=0.35)  # fmt: skip
    svg = tag(
        "svg", tag("title", said), *paths, frame, viewBox=f"0 0 {side * across} {side * down}", role="img",
        aria_label=said, style=f"display:block;width:100%;max-width:{side * across}px;height:auto",
    )  # fmt: skip
    signs = " .:-=+*#%@"
    text = ["".join(signs[min(9, int(10 * v / most))] if most else " " for v in row) for row in means[::2]]
    return Picture(framed(tag("div", said, style=FAINT), svg), "\n".join([said, *text]), means.tolist())
