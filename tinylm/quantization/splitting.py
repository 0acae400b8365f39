"""Codes that stand for values of a table: k-means, and SplitQuant (Song and Lin 2025) as what it comes to.

SplitQuant writes a layer as the sum of three of the same shape, which hold the lowest, the middle and the highest
weights and zeros elsewhere, each rounded in a range of its own. Every weight is in one of them, so together they are a
table of at most 3 (2^bits - 1) + 1 values: 10 for 2 bits, 3.3 bits of information per weight and not 2. It has to be
seen beside a well clipped range (`range="mse"`), k-means with as many values, and a scale per channel.
"""

from __future__ import annotations

import numpy as np

from tinylm.quantization.ranges import affine


def kmeans(values: np.ndarray, k: int, rounds: int = 100) -> np.ndarray:
    """(k,) sorted centres of numbers: Lloyd's algorithm from k quantiles, on sorted values, so it is exact and fast."""
    x = np.sort(values.reshape(-1).astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(x)])
    centres = np.quantile(x, (np.arange(k) + 0.5) / k)
    for _ in range(rounds):
        edges = np.concatenate([[0], np.searchsorted(x, (centres[1:] + centres[:-1]) / 2, "right"), [len(x)]])
        count = np.diff(edges)
        moved = np.where(count > 0, np.diff(sums[edges]) / np.maximum(count, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def split(values: np.ndarray, parts: int = 3) -> np.ndarray:
    """(parts, *shape): arrays that add up to `values`, every weight in one of them by its cluster, zeros elsewhere.

    A weight on the lowest boundary belongs to the lower cluster, on a later one to the upper (w <= b1, b1 < w < b2,
    w >= b2 of three).
    """
    return np.where(np.arange(parts).reshape(-1, *[1] * values.ndim) == members(values, parts), values, 0)


def members(values: np.ndarray, parts: int = 3) -> np.ndarray:
    """Which part of `split` each weight is in."""
    centres = kmeans(values, parts)
    edges = (centres[1:] + centres[:-1]) / 2
    part = (values > edges[0]).astype(np.int64)
    for edge in edges[1:]:
        part += values >= edge
    return part


def kmeans_table(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(levels,) float32 values, and the code (inputs, outputs) of the nearest one: 2^bits values per tensor."""
    table = enough(np.unique(kmeans(w, 2**bits).astype(np.float32)))
    return table, nearest_of(w, table)


def split_table(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """SplitQuant's sum of three rounded parts, as a table and codes.

    Every part's range holds 0, since it is full of zeros, and rounds 0 to 0 exactly, so that the sum has no offset.
    """
    part = members(w)
    total = np.zeros(w.shape, np.float32)
    for own in range(3):
        if (part == own).any():
            kept = np.where(part == own, w, 0)
            scale, zero = affine(kept.reshape(1, -1), 2**bits)
            codes = np.clip(np.round(kept / scale[0]) + zero[0], 0, 2**bits - 1)
            total += ((codes - zero[0]) * scale[0]).astype(np.float32)  # zeros elsewhere are zeros still
    table, codes = np.unique(total, return_inverse=True)
    return enough(table), codes.reshape(w.shape)


def enough(table: np.ndarray) -> np.ndarray:
    """A table with at least two values, which a code needs: a matrix of equal weights has one."""
    return table if len(table) > 1 else np.append(table, np.nextafter(table[0], np.float32(np.inf)))


def nearest_of(w: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The code of the value of a sorted table that is nearest to each weight."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, w)
