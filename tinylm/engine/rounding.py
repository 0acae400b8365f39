"""Matrices of weights to codes with scales, into the panels of a `.tlm` file, and back.

    bits        weights                            bits per weight, scales aside
    float32     as they are                        32
    int8        -127 .. 127                        8
    planes      -120 .. 120, as two nibbles with a random offset per column, so that one nibble bounds the other   8
    int4        -7 .. 7                            4
    ternary     -1 .. 1, five to a byte on disk; two bits each in memory    1.6
    ternary2    -1 .. 1, two bits each on disk too, so that the file is mapped as it is    2

A scale holds for a row, or for `group` columns of it. Everything is a function of the values alone.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from tinylm.engine.layout import PANEL, Kind, Tensor, ints, parts, problem, tensor_bytes, up

BITS = {
    "float32": Kind.panel_float,
    "int8": Kind.panel_int8,
    "planes": Kind.panel_planes,
    "int4": Kind.panel_int4,
    "ternary": Kind.packed_ternary,
    "ternary2": Kind.panel_ternary,
}
LARGEST = {
    Kind.panel_int8: 127,
    Kind.panel_planes: 120,
    Kind.panel_int4: 7,
    Kind.panel_ternary: 1,
    Kind.packed_ternary: 1,
}
SHRINKS = np.linspace(
    1, 0.7, 13, dtype=np.float32
)  # of int4's scale: clipping the largest weights may round the rest finer
POWERS = 3 ** np.arange(5)


class Rounded(NamedTuple):
    """A matrix as integers: weight [r, k] is codes[r, k] * scales[r, k // group], or scales[r, 0] with group 0."""

    kind: Kind
    codes: np.ndarray
    """(rows, columns) int8; float32, the weights themselves, where nothing is rounded."""
    scales: np.ndarray
    """(rows, groups) float32, each a float16 where there are groups."""
    group: int

    def dense(self) -> np.ndarray:
        """(rows, columns) float32: the weights that the file stands for."""
        if self.kind == Kind.panel_float:
            return self.codes
        return self.codes * _spread(self.scales, self.group, self.codes.shape[1])


def quantize(matrix: np.ndarray, bits: str, *, group: int = 0, absmean: bool = False) -> Rounded:
    """Round a matrix (outputs, inputs).

    Args:
        matrix: finite float32 values.
        bits: see the table above. The ternary kinds take a matrix only if it is ternary, in every row or group a
            {-a, 0, a} of its own; codes and scales are then exact.
        group: columns per scale, a multiple of 16; 0: a scale per row. Scales of groups are float16.
        absmean: the ternary kinds round any matrix, a being the mean magnitude (BitNet b1.58, Ma et al. 2024).

    Raises:
        FormatError: unknown bits, an impossible group; values not finite, not ternary, or beyond float16 scales.
    """
    if bits not in BITS:
        raise problem(f"bits = {bits!r}: must be one of {', '.join(BITS)}")
    if group < 0 or group % PANEL or (group and bits == "planes"):
        raise problem(f"group = {group}: must be a multiple of {PANEL}, or 0 for a scale per row, as planes need")
    kind, matrix = BITS[bits], np.ascontiguousarray(matrix, np.float32)
    if not np.isfinite(matrix).all():
        raise problem("holds values that are not finite")
    if kind == Kind.panel_float:
        return Rounded(kind, matrix, np.zeros((len(matrix), 0), np.float32), 0)
    columns, width = matrix.shape[1], group or matrix.shape[1]
    cut = np.pad(matrix, [(0, 0), (0, up(columns, width) - columns)]).reshape(len(matrix), -1, width)
    peak = np.abs(cut).max(-1)
    if LARGEST[kind] == 1:
        scales = _ternary_scales(cut, peak, group, absmean, columns)
    else:
        scales = _stored(peak / np.float32(LARGEST[kind]), group)
    codes = _codes(cut, scales, LARGEST[kind])
    if kind == Kind.panel_int4:
        best = _error(cut, codes, scales)
        for shrink in SHRINKS[1:]:
            tried = _stored(peak * shrink / np.float32(LARGEST[kind]), group)
            found = _codes(cut, tried, LARGEST[kind])
            error = _error(cut, found, tried)
            better = error < best
            codes[better], scales[better], best[better] = found[better], tried[better], error[better]
    return Rounded(kind, codes.reshape(len(matrix), -1)[:, :columns], scales, group)


def taken(codes: np.ndarray, scales: np.ndarray, group: int, bits: str) -> Rounded | None:
    """A matrix that is codes and scales already, see `Rounded`; None where these bits cannot hold it.

    Raises FormatError for scales of groups that are no float16 numbers.
    """
    kind = BITS[bits]
    if kind == Kind.panel_float or group % PANEL or (group and bits == "planes"):
        return None
    if not np.isfinite(scales).all() or (scales < 0).any() or np.abs(codes.astype(np.int32)).max() > LARGEST[kind]:
        return None
    if group and (_stored(scales, group) != scales).any():
        raise problem(
            f"its scales, one per {group} inputs, are no float16 numbers, as files have: train it with half=True"
        )
    return Rounded(kind, codes.astype(np.int8), scales, group)


def _ternary_scales(cut: np.ndarray, peak: np.ndarray, group: int, absmean: bool, columns: int) -> np.ndarray:
    if not absmean:
        odd = ((cut != 0) & (np.abs(cut) != peak[..., None])).any((1, 2))
        if odd.any():
            raise problem(
                f"{odd.sum():,} of {len(odd):,} rows are not ternary; train it so, or round it with absmean=True"
            )
        scales = _stored(peak, group)
        if (scales != peak).any():
            raise problem("its scales are no float16 numbers, as groups need; use group=0")
        return scales
    filled = np.minimum(cut.shape[2], columns - cut.shape[2] * np.arange(cut.shape[1]))
    return _stored(np.abs(cut).sum(-1) / filled.astype(np.float32), group)


def _stored(scales: np.ndarray, group: int) -> np.ndarray:
    """The scales that the file can hold, nearest to these."""
    if not group:
        return scales.astype(np.float32)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16).astype(np.float32)
    if not np.isfinite(half).all():
        raise problem(
            f"weights up to {scales.max():.3g} times 127 are beyond the float16 scales of groups; use group=0"
        )
    return half


def _codes(cut: np.ndarray, scales: np.ndarray, largest: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.rint(cut / scales[..., None])
    return np.nan_to_num(np.clip(steps, -largest, largest), nan=0.0).astype(np.int8) * (scales != 0)[..., None]


def _error(cut: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.square(cut - codes * scales[..., None]).sum(-1)


def _spread(scales: np.ndarray, group: int, columns: int) -> np.ndarray:
    """(rows, groups) -> (rows, 1) or (rows, columns)."""
    return np.repeat(scales, group, axis=1)[:, :columns] if group else scales


# --- panels -----------------------------------------------------------------------------------------------------------


def pack(rounded: Rounded) -> tuple[Tensor, Tensor | None]:
    """The tensor of a file, and the dither that goes with planes."""
    kind, (rows, columns), group = rounded.kind, rounded.codes.shape, rounded.group
    padded = np.pad(rounded.codes, [(0, up(rows, PANEL) - rows), (0, up(columns, PANEL) - columns)])
    panels = padded.reshape(-1, PANEL, padded.shape[1])
    dither, codes = None, None
    if kind == Kind.panel_float:
        codes = panels.astype("<f4").transpose(0, 2, 1)
    elif kind == Kind.panel_int8:
        codes = _columns((panels.astype(np.int16) + 128).astype(np.uint8), 4)
    elif kind == Kind.panel_planes:
        dither = _dither(rounded.codes)
        moved = (panels.astype(np.int16) + 128 + dither).astype(np.uint8)
        codes = np.stack([_nibbles(moved >> 4), _nibbles(moved & 15)])
    elif kind == Kind.panel_int4:
        codes = _nibbles((panels + 8).astype(np.uint8))
    else:
        codes = _pairs((panels + 1).astype(np.uint8))
        if kind == Kind.packed_ternary:
            fields = _fields(codes.reshape(-1))
            fields = np.pad(fields, (0, -len(fields) % 5), constant_values=1)
            codes = (fields.reshape(-1, 5) * POWERS).sum(-1).astype(np.uint8)
    data = np.zeros(tensor_bytes(kind, rows, columns, group), np.uint8)
    codes = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    data[: len(codes)] = codes
    tensor = Tensor(kind, rows, columns, group, data)
    scales = parts(tensor)[1]
    if scales.size:
        filled = np.pad(rounded.scales, [(0, len(padded) - rows), (0, 0)])
        scales[:] = filled.reshape(len(panels), PANEL, -1).transpose(0, 2, 1)
    return tensor, None if dither is None else ints(dither)


def unpack(tensor: Tensor, dither: Tensor | None = None) -> Rounded:
    """The inverse of `pack`."""
    kind, rows, columns, group = tensor[:4]
    data, stored = parts(tensor)
    panels, padded = up(rows, PANEL) // PANEL, up(columns, PANEL)
    if kind == Kind.panel_float:
        codes = data.view("<f4").reshape(panels, padded, PANEL).transpose(0, 2, 1)
    elif kind == Kind.panel_int8:
        codes = _rows(data.reshape(panels, -1, PANEL, 4)).astype(np.int16) - 128
    elif kind == Kind.panel_planes:
        high, low = (_rows(_halves(plane.reshape(panels, -1, PANEL, 4))) for plane in data.reshape(2, -1))
        codes = 16 * high.astype(np.int16) + low - 128 - dither.values.astype(np.int16)  # type: ignore[union-attr]
    elif kind == Kind.panel_int4:
        codes = _rows(_halves(data.reshape(panels, -1, PANEL, 4))).astype(np.int16) - 8
    else:
        if kind == Kind.packed_ternary:
            fields = (data[:, None] // POWERS % 3).reshape(-1)[: panels * PANEL * padded]
        else:
            fields = _fields(data)
        fields = fields.reshape(panels, -1, PANEL, 4, 4).transpose(0, 2, 1, 4, 3)  # panel, row, step, i, j
        codes = fields.reshape(panels, PANEL, padded).astype(np.int16) - 1
    codes = codes.reshape(-1, padded)[:rows, :columns]
    if kind == Kind.panel_float:
        return Rounded(kind, np.ascontiguousarray(codes), np.zeros((rows, 0), np.float32), 0)
    scales = stored.astype(np.float32).transpose(0, 2, 1).reshape(-1, stored.shape[1])
    return Rounded(kind, codes.astype(np.int8), scales[:rows], group)


def _dither(codes: np.ndarray) -> np.ndarray:
    """One offset per column, -8 .. 7, 0 where columns are filled up: from a hash of the codes, so that equal matrices
    give equal files.
    """
    noise = np.frombuffer(hashlib.shake_256(codes.tobytes()).digest(codes.shape[1]), np.uint8)
    return np.pad((noise & 15).astype(np.int16) - 8, (0, up(len(noise), PANEL) - len(noise)))


def _columns(panels: np.ndarray, step: int) -> np.ndarray:
    """(P, 16, C) -> (P, C / step, 16, step): the order in memory."""
    return panels.reshape(len(panels), PANEL, -1, step).transpose(0, 2, 1, 3)


def _rows(cells: np.ndarray) -> np.ndarray:
    """The inverse: (P, steps, 16, step) -> (P, 16, C)."""
    return cells.transpose(0, 2, 1, 3).reshape(len(cells), PANEL, -1)


def _nibbles(panels: np.ndarray) -> np.ndarray:
    """(P, 16, C), values below 16 -> (P, C / 8, 16, 4): columns j and 4 + j of a step of 8 in one byte."""
    cells = _columns(panels, 8)
    return cells[..., :4] | cells[..., 4:] << 4


def _halves(cells: np.ndarray) -> np.ndarray:
    """The inverse: (P, C / 8, 16, 4) -> (P, C / 8, 16, 8)."""
    return np.concatenate([cells & 15, cells >> 4], axis=-1)


def _pairs(panels: np.ndarray) -> np.ndarray:
    """(P, 16, C), values below 4 -> (P, C / 16, 16, 4): columns j, 4 + j, 8 + j, 12 + j of a step of 16 in one byte."""
    cells = _columns(panels, 16)
    return sum(cells[..., 4 * i : 4 * i + 4] << 2 * i for i in range(4))  # type: ignore[return-value]


def _fields(data: np.ndarray) -> np.ndarray:
    """(bytes,) -> (4 bytes,): the four fields of each byte, the lowest first."""
    return (data[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1)
