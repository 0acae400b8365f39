"""How a layer turns the stream: linear maps between layers, and the angles of their eigenvalues.

Chang and Bergen (2025), section 6: the first layer turns the current token's direction into the next token's, and the
bigram subnetwork alone does the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tinylm import show
from tinylm.data import DataError, Tokens, Windows
from tinylm.model import Transformer
from tinylm.probe.activations import record
from tinylm.probe.linear import ridge


@dataclasses.dataclass(frozen=True)
class Rotations:
    """Of the maps from every layer's stream to one place.

    Attributes:
        names: "embed", "blocks.0.resid", ... . to: where the maps lead.
        angle: (layers + 1,) median absolute argument of the eigenvalues, degrees, 0 to 180. scale: median modulus.
        fit: (layers + 1,) share of variance explained, on the rows held out.
    """

    names: tuple[str, ...]
    to: str
    angle: np.ndarray
    scale: np.ndarray
    fit: np.ndarray

    def table(self) -> show.Picture:
        """One line per layer."""
        rows = [
            [n, f"{a:.1f}", f"{s:.3f}", f"{f:.3f}"]
            for n, a, s, f in zip(self.names, self.angle, self.scale, self.fit, strict=True)
        ]
        return show.table(rows, ["stream", "angle, degrees", "scale", "explained"], f"maps to {self.to}")


def rotations(
    model: Transformer,
    data: Tokens | np.ndarray,
    to: str = "last",
    *,
    rows: int = 100,
    length: int = 64,
    alpha: float = 1.0,
    seed: int = 0,
) -> Rotations:
    """Ridge regressions with intercept from the stream after each layer to one place, and their eigenvalues.

    Args:
        data: texts, or (rows, T) ids. to: "last", the stream before the last norm; "input", the token's embedding; or
            "next", the stream after the following layer, so that each layer's own turn is seen.
        rows, length: of the texts read; a fifth is held out. alpha: of the ridge.

    Raises DataError: another `to`, or fewer than 5 rows.
    """
    if to not in ("last", "input", "next"):
        raise DataError(f"to = {to!r}: take last, input or next")
    if isinstance(data, Tokens):
        source = Windows(data, batch=1, length=min(length, model.config.context), seed=seed)
        data = np.concatenate([source(i).tokens for i in range(min(rows, source.windows))])
    ids = np.asarray(data, np.int32)
    if len(ids) < 5:
        raise DataError(f"{len(ids)} rows: a fit and a check need at least 5")
    values = record(model, ids, r"embed|blocks\.\d+\.resid")
    names = ("embed", *(f"blocks.{layer}.resid" for layer in range(model.config.layers)))
    streams = np.stack([values[name] for name in names]).astype(np.float32)
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    cut = len(ids) - max(1, len(ids) // 5)
    goals: list[Any] = [np.asarray(model.embed.weight())[ids]] * len(names)
    if to == "last":
        goals = [streams[-1]] * len(names)
    elif to == "next":
        names, goals = names[:-1], list(streams[1:])
    found = []
    for x, y in zip(streams, goals, strict=False):
        w, b = (np.asarray(v, np.float64) for v in ridge(flat(x[:cut]), flat(y[:cut]), alpha))
        own, aim = flat(x[cut:]).astype(np.float64), flat(y[cut:]).astype(np.float64)
        explained = 1 - ((own @ w + b - aim) ** 2).sum() / ((aim - aim.mean(0)) ** 2).sum()
        found.append((*turn(w), explained))
    angle, scale, fit = np.array(found).T
    return Rotations(names, to, angle, scale, fit)


def turn(matrix: np.ndarray) -> tuple[float, float]:
    """Median absolute argument (degrees) and median modulus of a square matrix's eigenvalues."""
    values = np.linalg.eigvals(matrix)
    return float(np.median(np.abs(np.angle(values, deg=True)))), float(np.median(np.abs(values)))
