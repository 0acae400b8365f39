"""What the codes of a model do while it trains: how many are zero, how many changed, where signs flip.

seen = Watched(trainer)
for step in trainer:
    seen.look()
seen                                    # curves, in a notebook
seen.flips("blocks.0.mlp.up")           # a map of the weights whose sign changes
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from tinylm.markup import FAINT, Markup, Picture, framed, number, tag
from tinylm.quantization.spec import QuantizationError
from tinylm.show import BLUE, GREEN, ORANGE, Line, chart, table
from tinylm.techniques import modules
from tinylm.techniques.rounding import Codes, Rounding
from tinylm.weights import bind, pure

CELLS = 40  # of a heat map, in either direction


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
        """Take the codes as they are now; what came of it, by path. `step` defaults to the trainer's."""
        step = getattr(self.source, "step", len(next(iter(self.history.values()), []))) if step is None else step
        new = {}
        for path, (codes, scale, *_) in look(self.source).items():
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
        """Curves of the means over all matrices, and the newest look at each."""
        paths = list(self.history)
        size = np.array([self._codes[p].size for p in paths], float)
        looks = np.array([[look[1:] for look in self.history[p]] for p in paths])
        steps = [look.step for look in self.history[paths[0]]]
        mean = np.einsum("p,plf->lf", size / size.sum(), looks)
        lines = [
            Line(steps, 100 * mean[:, 0], "% zero", BLUE),
            Line(steps, 100 * mean[:, 1], "% changed", ORANGE),
            Line(steps, 100 * mean[:, 3], "% scale drift", GREEN),
        ]
        drawn = chart(lines, x_label="steps", y_label="percent", log_x=False)
        rows = [[p, *(f"{100 * v:.2f} %" for v in self.history[p][-1][1:])] for p in paths]
        grid = table(rows, ["matrix", "zero", "changed", "sign flipped", "scale drift"], f"codes at step {steps[-1]:,}")
        return Picture(framed(drawn, Markup(grid.html)), grid.text)

    def __repr__(self) -> str:
        return self.picture().text

    def _repr_html_(self) -> str:
        return self.picture().html


def heat(values: np.ndarray, title: str) -> Picture:
    """A matrix as an SVG of at most `CELLS` by `CELLS` squares, the mean of each as how dark it is; and as text."""
    down, across = (min(CELLS, n) for n in values.shape)
    edges = [np.linspace(0, n, k + 1).astype(int) for n, k in zip(values.shape, (down, across), strict=True)]
    sums = np.add.reduceat(np.add.reduceat(values.astype(float), edges[0][:-1], 0), edges[1][:-1], 1)
    means = sums / np.outer(np.diff(edges[0]), np.diff(edges[1]))
    most = means.max()
    side = 14
    squares = [
        tag("rect", x=side * j, y=side * i, width=side, height=side, fill=BLUE, opacity=round(means[i, j] / most, 3))
        for i in range(down) for j in range(across) if most and means[i, j] > 0.004 * most
    ]  # fmt: skip
    said = f"{title}: mean {number(float(means.mean()))}, most {number(float(most))} per weight"
    frame = tag("rect", x=0, y=0, width=side * across, height=side * down, fill="none", stroke="currentColor",
                stroke_opacity=0.35)  # fmt: skip
    svg = tag(
        "svg", tag("title", said), *squares, frame, viewBox=f"0 0 {side * across} {side * down}", role="img",
        aria_label=said, style=f"display:block;width:100%;max-width:{side * across}px;height:auto",
    )  # fmt: skip
    shades = " .:-=+*#%@"
    text = ["".join(shades[min(9, int(10 * v / most))] if most else " " for v in row) for row in means[::2]]
    return Picture(framed(tag("div", said, style=FAINT), svg), "\n".join([said, *text]))
