"""Codes of any number of levels as bytes, and back without a loss.

    levels          bits per code   layout
    3               1.6             five codes to a byte: c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4, the last byte filled with 0
    129 .. 256      8               a byte each
    others to 2^16  n               n bit planes, lowest first, of eight codes to a byte, lowest bit first

Codes are whole numbers from 0 to levels - 1, taken in C order.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Int, UInt8

POWERS = 3 ** np.arange(5)


def width(levels: int) -> int:
    """Bits per code, 3 levels aside."""
    return max(1, (levels - 1).bit_length())


def size(levels: int, count: int) -> int:
    """Bytes of that many codes."""
    if levels == 3:
        return -(-count // 5)
    return count if width(levels) == 8 else width(levels) * -(-count // 8)


def pack(codes: np.ndarray | Array, levels: int) -> np.ndarray:
    """(bytes,) uint8. Raises ValueError for a code that is none."""
    flat = np.asarray(codes).reshape(-1)
    if len(flat) and flat.dtype.kind not in "iu":
        raise ValueError(f"codes are {flat.dtype}: must be whole numbers")
    if not 2 <= levels <= 2**16:
        raise ValueError(f"levels = {levels}: must be 2 to 65536")
    if len(flat) and not (flat.min() >= 0 and flat.max() < levels):
        raise ValueError(f"codes from {flat.min()} to {flat.max()}: must be 0 to {levels - 1}")
    if levels == 3:
        digits = np.zeros((-(-len(flat) // 5), 5), np.int64)
        digits.reshape(-1)[: len(flat)] = flat
        return (digits @ POWERS).astype(np.uint8)
    n = width(levels)
    if n == 8:
        return flat.astype(np.uint8)
    planes = (flat[None] >> np.arange(n)[:, None]) & 1
    return np.packbits(planes.astype(np.uint8), axis=1, bitorder="little").reshape(-1)


def unpack(packed: UInt8[Array | np.ndarray, " bytes"], levels: int, count: int) -> Int[Array | np.ndarray, " count"]:
    """The codes, int32; traceable. Of a NumPy array by NumPy, which has nothing to compile."""
    given = packed.astype(np.int32)
    if levels == 3:
        return (given[:, None] // POWERS.astype(np.int32) % 3).reshape(-1)[:count]
    n = width(levels)
    if n == 8:
        return given
    bits = (given.reshape(n, -1, 1) >> np.arange(8, dtype=np.int32)) & 1
    return (bits << np.arange(n, dtype=np.int32)[:, None, None]).sum(0, dtype=np.int32).reshape(-1)[:count]
