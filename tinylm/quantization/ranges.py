"""Where scales come from: smallest and largest value, percentile, least squared error, least divergence. NumPy."""

from __future__ import annotations

import numpy as np

# Of the largest magnitude, where a range may end: one far outlier can make it fifty times what suits the others.
RATIOS = np.concatenate([np.geomspace(0.02, 0.3, 24, endpoint=False), np.linspace(0.3, 1, 57)])
TINY = 1e-12


def rows(w: np.ndarray, per: str | int) -> np.ndarray:
    """(cells, weights): the matrix (inputs, outputs) with a row for each scale; NaN fills the last group."""
    inputs, outputs = w.shape
    if per == "tensor":
        return w.reshape(1, -1)
    if per == "channel" or int(per) >= inputs:
        return w.T
    groups = -(-inputs // int(per))
    filled = np.full((groups * int(per), outputs), np.nan, w.dtype)
    filled[:inputs] = w
    return filled.reshape(groups, int(per), outputs).transpose(0, 2, 1).reshape(groups * outputs, int(per))


def of_cells(values: np.ndarray, per: str | int, shape: tuple[int, int]) -> np.ndarray:
    """One value per row of `rows`, as (1, 1), (1, outputs) or (groups, outputs)."""
    return values.reshape(1, 1) if per == "tensor" else values.reshape(-1, shape[1])


def spread(values: np.ndarray, per: str | int, inputs: int) -> np.ndarray:
    """What `of_cells` gave, so that it multiplies a matrix of so many inputs."""
    if per in ("tensor", "channel") or len(values) == 1:
        return values
    return np.repeat(values, int(per), 0)[:inputs]


def scales(
    cells: np.ndarray, low: int, high: int, *, kind: str = "max", percentile: float = 99.9, half: bool = False
) -> np.ndarray:
    """(cells,) float32 scales of symmetric codes low..high.

    `half` makes them float16 numbers, rounded up, so that nothing is clipped that was not before.
    """
    magnitude = np.abs(cells)
    most = np.nanmax(magnitude, 1)
    if kind == "percentile":
        most = np.nanpercentile(magnitude, percentile, axis=1)
    found = most / max(high, 1)
    if kind == "mse":
        error = np.full(len(cells), np.inf)
        for ratio in RATIOS * (1.5 if high == 1 else 1.0):  # of three or four levels the best reach beyond the largest
            tried = np.maximum(ratio * most / max(high, 1), TINY)[:, None]
            lost = np.nansum((np.clip(np.round(cells / tried), low, high) * tried - cells) ** 2, 1)
            better = lost < error
            found[better], error[better] = tried[better, 0], lost[better]
    if kind == "kl":
        found = np.array([entropy(row[~np.isnan(row)], high) / max(high, 1) for row in magnitude])
    return stored(found, half)


def affine(
    cells: np.ndarray, levels: int, *, kind: str = "max", percentile: float = 99.9, half: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(cells,) scales and zeros of codes 0..levels-1; every range holds 0, which is a code: 0 stays exactly 0."""
    low, high = np.minimum(np.nanmin(cells, 1), 0), np.maximum(np.nanmax(cells, 1), 0)
    if kind == "percentile":
        share = (100 - percentile) / 2
        low = np.minimum(np.nanpercentile(cells, share, axis=1), 0)
        high = np.maximum(np.nanpercentile(cells, 100 - share, axis=1), 0)
    if kind == "kl":
        most = np.array([entropy(np.abs(row[~np.isnan(row)]), levels // 2) for row in cells])
        low, high = np.maximum(low, -most), np.minimum(high, most)
    best = _affine(low, high, levels, half)
    if kind == "mse":
        error = _lost(cells, *best, levels)
        for ratio in RATIOS:
            tried = _affine(low * ratio, high * ratio, levels, half)
            lost = _lost(cells, *tried, levels)
            better = lost < error
            for kept, new in zip((*best, error), (*tried, lost), strict=True):
                kept[better] = new[better]
    return best


def _affine(low: np.ndarray, high: np.ndarray, levels: int, half: bool) -> tuple[np.ndarray, np.ndarray]:
    scale = stored((high - low) / (levels - 1), half)
    return scale, np.clip(np.round(-low / scale), 0, levels - 1)


def _lost(cells: np.ndarray, scale: np.ndarray, zero: np.ndarray, levels: int) -> np.ndarray:
    codes = np.clip(np.round(cells / scale[:, None]) + zero[:, None], 0, levels - 1)
    return np.nansum(((codes - zero[:, None]) * scale[:, None] - cells) ** 2, 1)


def stored(scale: np.ndarray, half: bool) -> np.ndarray:
    """Scales as float32 numbers that the file can hold, never 0."""
    if not half:
        return np.maximum(scale, TINY).astype(np.float32)
    near = np.maximum(scale, 2.0**-24).astype(np.float16)
    return np.where(near < scale, np.nextafter(near, np.float16(np.inf)), near).astype(np.float32)


def entropy(magnitude: np.ndarray, codes: int = 127, bins: int = 2048) -> float:
    """The end of the range whose rounding loses the least information (TensorRT's calibration, Migacz 2017).

    Of the histogram of magnitudes every cut i is tried: what lies beyond is added to the last bin (P), the bins are
    merged to codes + 1 levels and spread again over those that are not empty (Q); the least KL(P || Q) wins.
    """
    most = float(magnitude.max(initial=0.0))
    if most == 0.0:
        return TINY
    counts, edges = np.histogram(magnitude, bins=bins, range=(0.0, most))
    counts, levels = counts.astype(np.float64), codes + 1
    counts[0] = 0 if np.count_nonzero(counts[1:]) else counts[0]  # zeros are exact in every range
    best, end = np.inf, most
    for i in range(min(levels, bins), bins + 1):
        p = counts[:i].copy()
        kept = p.copy()
        p[-1] += counts[i:].sum()
        level = np.arange(i) * levels // i
        total, filled = np.bincount(level, kept, levels), np.bincount(level, kept > 0, levels)
        q = np.where(kept > 0, (total / np.maximum(filled, 1))[level], 0.0)
        if not q.sum() or not p.sum():
            continue
        p, q = p / p.sum(), q / q.sum()
        some = p > 0
        loss = float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))))
        if loss < best:
            best, end = loss, float(edges[i])
    return end
