"""ggml's tensor types: blocks of bytes to float arrays and back, bit for bit as ggml's reference functions do it.

A row of a tensor is cut into blocks of 1, 32 or 256 values; a block holds its integers and its scales. Layouts: ggml's
`ggml-common.h`; the ternary types are Compilade's (llama.cpp pull request 8151), 1.6875 and 2.0625 bits per weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from tinylm.formats.tables import FormatError

Blocks = np.ndarray  # (blocks, bytes) uint8 on the packed side, (blocks, values) float32 on the other

TRITS = np.array([81, 27, 9, 3, 1], np.uint16)  # a byte of TQ1_0 holds five trits, the first the most significant
NIBBLES = np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)  # shifts
PAIRS = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)


class Type(NamedTuple):
    """One of ggml's types: `values` per block in `bytes`. `encode` is None for a type that is only read."""

    name: str
    number: int
    values: int
    bytes: int
    decode: Callable[[Blocks], Blocks]
    encode: Callable[[Blocks], Blocks] | None = None


def packed_size(kind: Type, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape (outermost first). Raises FormatError when its rows are no whole blocks."""
    if shape[-1] % kind.values:
        raise FormatError(f"rows of {shape[-1]:,} values are no whole blocks of {kind.values} ({kind.name})")
    return math.prod(shape) // kind.values * kind.bytes


def decode(data: np.ndarray, kind: Type, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 array of `shape` that `data`, (bytes,) uint8, holds."""
    return kind.decode(data.reshape(-1, kind.bytes)).reshape(shape)


def encode(array: np.ndarray, kind: Type, *, rounding: bool = False) -> np.ndarray:
    """(bytes,) uint8 of an array whose last axis is a whole number of blocks.

    The ternary types refuse a block that is not {-d, 0, d} with d a float16, so what they give comes back bit for bit
    (a negative zero comes back as zero). `rounding`: take the largest magnitude as d and round, as ggml does.

    Raises:
        FormatError: a type that is only read; values that it cannot hold.
    """
    if kind.encode is None:
        raise FormatError(f"{kind.name} is only read, not written; written are {', '.join(WRITTEN)}")
    packed_size(kind, array.shape)
    blocks = np.ascontiguousarray(array, np.float32).reshape(-1, kind.values)
    if not np.isfinite(blocks).all():
        raise FormatError("values that are not finite")
    if kind.name in TERNARY and not rounding:
        scale = np.abs(blocks).max(axis=1, keepdims=True)
        odd = ((blocks != 0) & (np.abs(blocks) != scale)).any(axis=1)
        if odd.any():
            raise FormatError(f"{odd.sum():,} of {len(odd):,} blocks of {kind.values} weights are not ternary")
        with np.errstate(over="ignore"):
            wide = scale.astype(np.float16) != scale
        if wide.any():
            raise FormatError(f"{wide.sum():,} of {len(wide):,} blocks have a scale that is not a float16")
    limit = kind.name in ("F16", "Q8_0", *TERNARY)
    most = float(np.abs(blocks).max(initial=0)) / (127 if kind.name == "Q8_0" else 1)
    if limit and most >= 65520:  # what rounds to infinity
        raise FormatError(f"{most:.3g} is beyond float16, in which {kind.name} keeps it")
    return np.ascontiguousarray(kind.encode(blocks)).view(np.uint8).reshape(-1)


def rounded(x: np.ndarray) -> np.ndarray:
    """To the nearest whole number, halves away from zero as C's roundf; exact where adding 0.5 would round."""
    floor = np.floor(np.abs(x))
    return np.copysign(floor + (np.abs(x) - floor >= 0.5), x)


def _half(b: Blocks, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 (blocks, 1)."""
    return np.ascontiguousarray(b[:, at : at + 2]).view("<f2").astype(np.float32)


def _halves(x: np.ndarray) -> Blocks:
    return x.astype("<f2").view(np.uint8)


def _nibbles(b: Blocks, group: int) -> Blocks:
    """Per `group` bytes first their low, then their high four bits: (blocks, 2 * bytes)."""
    return (b.reshape(len(b), -1, 1, group) >> NIBBLES & 15).reshape(len(b), -1)


def _bits(b: Blocks) -> Blocks:
    """The 32 bits of a little-endian uint32 (blocks, 4), lowest first, as 0 or 16."""
    return np.unpackbits(b, axis=1, bitorder="little") << 4


# --- 32 values per block ----------------------------------------------------------------------------------------------


def _q4_0(b: Blocks) -> Blocks:
    return _half(b, 0) * (_nibbles(b[:, 2:], 16).astype(np.float32) - 8)


def _q4_1(b: Blocks) -> Blocks:
    return _half(b, 0) * _nibbles(b[:, 4:], 16).astype(np.float32) + _half(b, 2)


def _q5_0(b: Blocks) -> Blocks:
    return _half(b, 0) * ((_nibbles(b[:, 6:], 16) | _bits(b[:, 2:6])).astype(np.float32) - 16)


def _q5_1(b: Blocks) -> Blocks:
    return _half(b, 0) * (_nibbles(b[:, 8:], 16) | _bits(b[:, 4:8])).astype(np.float32) + _half(b, 2)


def _q8_0(b: Blocks) -> Blocks:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _to_q8_0(x: Blocks) -> Blocks:
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    codes = rounded(x * np.where(np.isfinite(inverse), inverse, 0)).astype(np.int8)
    return np.concatenate([_halves(scale), codes.view(np.uint8)], axis=1)


# --- 256 values per block, scales of their own for each 32 or 16 ------------------------------------------------------


def _scales(b: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K's and Q5_K's eight scales and eight offsets (blocks, 8, 1), six bits each, in twelve bytes."""
    low, middle, high = b[:, :4], b[:, 4:8], b[:, 8:12]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    offsets = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    return scales.astype(np.float32)[..., None], offsets.astype(np.float32)[..., None]


def _affine(b: Blocks, codes: Blocks) -> Blocks:
    scales, offsets = _scales(b[:, 4:16])
    scales, offsets = _half(b, 0)[..., None] * scales, _half(b, 2)[..., None] * offsets
    return (scales * codes.reshape(len(b), 8, 32).astype(np.float32) - offsets).reshape(len(b), 256)


def _q4_k(b: Blocks) -> Blocks:
    return _affine(b, _nibbles(b[:, 16:], 32))


def _q5_k(b: Blocks) -> Blocks:
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _affine(b, _nibbles(b[:, 48:], 32) | fifth.reshape(len(b), 256) << 4)


def _q6_k(b: Blocks) -> Blocks:
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> PAIRS & 3).reshape(len(b), 256)
    codes = (_nibbles(b[:, :128], 64) | high << 4).astype(np.float32) - 32
    scales = _half(b, 208)[..., None] * b[:, 192:208].view(np.int8).astype(np.float32)[..., None]
    return (scales * codes.reshape(len(b), 16, 16)).reshape(len(b), 256)


# --- ternary ----------------------------------------------------------------------------------------------------------


def _trits(x: Blocks) -> tuple[np.ndarray, Blocks]:
    """Scale (blocks, 1) and codes 0, 1, 2 for -d, 0, d."""
    scale = np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    return scale, (rounded(x * np.where(np.isfinite(inverse), inverse, 0)) + 1).astype(np.uint8)


def _tq2_0(b: Blocks) -> Blocks:
    codes = b[:, :64].reshape(-1, 2, 1, 32) >> PAIRS & 3
    return (codes.reshape(len(b), 256).astype(np.float32) - 1) * _half(b, 64)


def _to_tq2_0(x: Blocks) -> Blocks:
    scale, codes = _trits(x)
    codes = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << PAIRS, axis=2).reshape(len(x), 64)
    return np.concatenate([codes, _halves(scale)], axis=1)


PARTS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))  # TQ1_0's bytes: where, how many, trits in each


def _tq1_0(b: Blocks) -> Blocks:
    """A byte is the fraction trits / 243 in 1/256, rounded up: times 3 to the n, its top is the trit n."""
    parts = []
    for at, count, trits in PARTS:
        powers = (3 ** np.arange(trits, dtype=np.uint8))[:, None]
        fraction = b[:, None, at : at + count] * powers  # wraps at 256 on purpose: the trits before n fall away
        parts.append((fraction.astype(np.uint16) * 3 >> 8).reshape(len(b), -1))
    return (np.concatenate(parts, axis=1).astype(np.float32) - 1) * _half(b, 52)


def _to_tq1_0(x: Blocks) -> Blocks:
    scale, codes = _trits(x)
    parts, at = [], 0
    for _, count, trits in PARTS:
        digits = codes[:, at : at + count * trits].reshape(len(x), trits, count).astype(np.uint16)
        number = (digits * TRITS[:trits, None]).sum(axis=1, dtype=np.uint16)
        parts.append(((number * 256 + 242) // 243).astype(np.uint8))
        at += count * trits
    return np.concatenate([*parts, _halves(scale)], axis=1)


TYPES = {
    kind.name: kind
    for kind in (
        Type("F32", 0, 1, 4, lambda b: b.view("<f4").astype(np.float32), lambda x: x.astype("<f4")),
        Type("F16", 1, 1, 2, lambda b: b.view("<f2").astype(np.float32), lambda x: x.astype("<f2")),
        Type("Q4_0", 2, 32, 18, _q4_0),
        Type("Q4_1", 3, 32, 20, _q4_1),
        Type("Q5_0", 6, 32, 22, _q5_0),
        Type("Q5_1", 7, 32, 24, _q5_1),
        Type("Q8_0", 8, 32, 34, _q8_0, _to_q8_0),
        Type("Q4_K", 12, 256, 144, _q4_k),
        Type("Q5_K", 13, 256, 176, _q5_k),
        Type("Q6_K", 14, 256, 210, _q6_k),
        Type(
            "BF16",
            30,
            1,
            2,
            lambda b: b.view(ml_dtypes.bfloat16).astype(np.float32),
            lambda x: x.astype(ml_dtypes.bfloat16),
        ),
        Type("TQ1_0", 34, 256, 54, _tq1_0, _to_tq1_0),
        Type("TQ2_0", 35, 256, 66, _tq2_0, _to_tq2_0),
    )
}
"""By name."""
NUMBERED = {kind.number: kind for kind in TYPES.values()}
WRITTEN = tuple(name for name, kind in TYPES.items() if kind.encode)
TERNARY = ("TQ1_0", "TQ2_0")
UNREAD = {  # ggml's other types, so that a message can name them
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    39: "MXFP4",
    40: "NVFP4",
}
