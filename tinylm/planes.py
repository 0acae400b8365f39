"""Arrays in fewer bytes, bit for bit: bytes of equal weight lie together, and each such plane is coded by itself.

    byte 0     version: 1
    byte 1     width: bytes per word, which is bytes per plane too (a complex number is two words)
    6 bytes    zeros
    8 bytes    number of words
    table      4 bytes per chunk and plane: 2^24 times its kind, plus
                   kind 0, one byte throughout: that byte        kind 1, as it is: its length
                   kind 2, a raw deflate stream: the length of the stream
    pieces     what kinds 1 and 2 announce, one after another

Everything little-endian; a chunk is 2^18 words (the last one fewer), and its planes go from the lowest byte to the top.

Before the split a word loses what would make its bytes look random. The sign of a float moves to the bottom, so that
the top byte is the exponent alone: 2.6 bits of information for weights, whose mantissa is noise. A signed integer, and
any difference, is folded (0, -1, 1, -2, ...), so that what is small has zeros on top. Against a base the words are
differences of the two arrays: equal arrays cost 4 bytes per 2^18 bytes.

Method: ZipNN (Hershcovitch et al. 2024, arXiv 2411.05239), which takes the exclusive or of two checkpoints where this
subtracts, because that was smaller (0.72 instead of 0.74 of the size for float32 weights ten training steps apart). The
coder is zlib restricted to Huffman codes: it makes the exponents of weights smaller than zstd does (0.33 of their size;
levels 1, 3, 9: 0.38, 0.42, 0.38; level 19 has 0.33 too, at a fiftieth of the speed). The same array gives the same
bytes with one build of zlib; another build may write others, which every build reads.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

VERSION = 1
CHUNK = 2**18
HEAD = struct.Struct("<BB6xQ")
CONSTANT, PLAIN, DEFLATED = range(3)
WORTH = 0.95  # of its size: a piece that shrinks less is kept as it is, since reading that costs nothing
SAMPLE = 17  # every such byte is looked at to see whether coding can pay; a prime, since widths of layers are none
WHOLE = "iub"  # kinds of type that are no floats; those of ml_dtypes have a kind of their own
NOISE = 7.7  # bits per byte that the sample may hold, a little above 8 * WORTH

Announced = tuple[np.dtype, tuple[int, ...], bool]  # an array's type and shape, and whether it is a difference


class PlanesDamaged(ValueError):
    """Bytes that `encode` cannot have made for such an array; the message is the reason."""


def encode(array: Any, base: Any = None) -> bytes:
    """`array` (any type of `store.DTYPES`, any shape) in coded form; not always smaller.

    With `base`, an array of the same type and shape, which `decode` then needs too, as the difference to it. Raises
    ValueError when base is of another type or shape.
    """
    array = _plain(array)
    base = None if base is None else _plain(base)
    if base is not None and (base.dtype, base.shape) != (array.dtype, array.shape):
        raise ValueError(f"base has type {base.dtype}, shape {base.shape}; array {array.dtype}, {array.shape}")
    words, old = _words(array), None if base is None else _words(base)
    table, pieces = [], []
    for start in range(0, len(words), CHUNK):
        part = slice(start, start + CHUNK)
        mixed = _mix(words[part], array.dtype, None if old is None else old[part])
        for plane in mixed.view(np.uint8).reshape(len(mixed), -1).T:
            kind, value, piece = _shrink(np.ascontiguousarray(plane))
            table.append(kind << 24 | value)
            pieces.append(piece)
    head = HEAD.pack(VERSION, words.itemsize, len(words)) + np.array(table, "<u4").tobytes()
    return b"".join([head, *pieces])


def decode(data: Any, dtype: np.dtype, shape: tuple[int, ...], base: np.ndarray | None = None) -> np.ndarray:
    """The array that `encode(array, base)` made `data` (bytes or any buffer of them) from.

    Memory is taken only after every length in `data` has been found to fit `dtype` and `shape`: for the array, which
    has at most 2^16 times the bytes of `data`, and a few MB. Raises PlanesDamaged.
    """
    data, dtype = memoryview(data).cast("B"), np.dtype(dtype).newbyteorder("<")
    layout = data, _word(dtype).itemsize, math.prod(shape) * dtype.itemsize
    for _ in _pieces(*layout):
        pass  # all of it is looked at before any memory is taken
    if base is not None and (base.dtype, base.shape) != (dtype, tuple(shape)):
        raise PlanesDamaged(f"its base has type {base.dtype} and shape {base.shape}")
    try:
        array = np.empty(shape, dtype)
    except ValueError as error:  # an empty array whose other sides overflow
        raise PlanesDamaged("its shape is impossible") from error
    words, old = _words(array), None if base is None else _words(_plain(base))
    for start, chunk in zip(range(0, len(words), CHUNK), _pieces(*layout), strict=True):
        part = slice(start, start + CHUNK)
        room = words[part]
        planes = room.view(np.uint8).reshape(len(room), -1).T
        for plane, (kind, value, begin) in zip(planes, chunk, strict=True):
            plane[:] = _grow(kind, value, data[begin:], len(plane))
        room[:] = _unmix(room, dtype, None if old is None else old[part])
    return array


def encode_all(arrays: Mapping[str, np.ndarray], earlier: Mapping[str, np.ndarray]) -> dict[str, tuple[bytes, bool]]:
    """Name: (coded form, whether as a difference to the array of that name in `earlier`), whichever is smaller."""

    def work(name: str) -> tuple[bytes, bool]:
        array, old = arrays[name], earlier.get(name)
        found = encode(array), False
        if old is not None and (old.dtype, old.shape) == (array.dtype, array.shape):
            found = min(found, (encode(array, old), True), key=lambda pair: len(pair[0]))
        return found

    return _threads(work, arrays)


def decode_all(
    coded: dict[str, Any], announced: Mapping[str, Announced], earlier: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays that `announced` describes, the differences among them being those to the `earlier` ones.

    They leave `coded` and `earlier` one by one, so that there are never two copies of all of them. Raises
    PlanesDamaged, naming the array.
    """

    def work(name: str) -> np.ndarray:
        dtype, shape, delta = announced[name]
        if delta and name not in earlier:
            raise PlanesDamaged(f"tensor {name!r} is not in its base")
        try:
            return decode(coded.pop(name), dtype, shape, earlier.pop(name) if delta else None)
        except PlanesDamaged as error:
            raise PlanesDamaged(f"tensor {name!r} cannot be decoded: {error}") from error

    return _threads(work, announced)


def _threads(work: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    """Name: work(name); zlib and NumPy let the other threads run meanwhile."""
    names = list(names)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def _pieces(data: memoryview, width: int, size: int) -> Iterator[list[tuple[int, int, int]]]:
    """(kind, value, where its piece begins) of every plane, chunk by chunk; they must tile `data` exactly."""
    if len(data) < HEAD.size:
        raise PlanesDamaged(f"it has {len(data)} bytes, too few for a head")
    count = size // width
    if size >= 2**63 or bytes(data[: HEAD.size]) != HEAD.pack(VERSION, width, count):
        raise PlanesDamaged("its head is not that of such an array")
    chunks = -(-count // CHUNK)
    begin = HEAD.size + 4 * chunks * width
    if len(data) < begin:
        raise PlanesDamaged(f"it has {len(data)} bytes, too few for a table of {chunks * width} planes")
    for number, row in enumerate(struct.iter_unpack(f"<{width}I", data[HEAD.size : begin])):
        length, chunk = min(CHUNK, count - number * CHUNK), []
        for entry in row:
            kind, value = entry >> 24, entry & 0xFFFFFF
            possible = {CONSTANT: value < 256, PLAIN: value == length, DEFLATED: 0 < value < length}
            if not possible.get(kind, False):
                raise PlanesDamaged(f"its table holds an impossible plane in chunk {number}")
            chunk.append((kind, value, begin))
            begin += 0 if kind == CONSTANT else value
        yield chunk
    if begin != len(data):
        raise PlanesDamaged(f"its pieces end at byte {begin}, and it has {len(data)}")


def _shrink(plane: np.ndarray) -> tuple[int, int, bytes]:
    """A plane's kind, the value for the table, and its piece."""
    counts = np.bincount(plane[::SAMPLE], minlength=256)
    share = counts[counts > 0] / counts.sum()
    if len(share) == 1 and (plane == plane[0]).all():
        return CONSTANT, int(plane[0]), b""
    if -(share @ np.log2(share)) < NOISE:
        # A Huffman code spends at least a bit on a byte; where one byte is most of them, its runs are shorter.
        strategies = (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)[: 1 + bool(share.max() > 0.5)]
        best = min((_deflated(plane, strategy) for strategy in strategies), key=len)
        if len(best) < WORTH * len(plane):
            return DEFLATED, len(best), best
    return PLAIN, len(plane), plane.tobytes()


def _deflated(plane: np.ndarray, strategy: int) -> bytes:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(plane.data) + coder.flush()


def _grow(kind: int, value: int, data: memoryview, length: int) -> np.ndarray | int:
    """The plane of `length` bytes again, or its one byte."""
    if kind == CONSTANT:
        return value
    if kind == PLAIN:
        return np.frombuffer(data[:value], np.uint8)
    coder = zlib.decompressobj(-15)
    try:
        plane = coder.decompress(data[:value], length + 1)
    except zlib.error as error:
        raise PlanesDamaged(f"a plane cannot be decoded ({error})") from error
    if len(plane) != length or not coder.eof or coder.unused_data:
        raise PlanesDamaged("a plane is decoded to another length")
    return np.frombuffer(plane, np.uint8)


def _mix(words: np.ndarray, dtype: np.dtype, old: np.ndarray | None) -> np.ndarray:
    """Words -> what is split into planes; the inverse of `_unmix`. Arithmetic is modulo 2^bits."""
    top = 8 * words.itemsize - 1
    words = _turned(words, dtype)
    if old is not None:
        words = words - _turned(old, dtype)
    return (words << 1) ^ -(words >> top) if old is not None or dtype.kind == "i" else words


def _unmix(words: np.ndarray, dtype: np.dtype, old: np.ndarray | None) -> np.ndarray:
    top = 8 * words.itemsize - 1
    if old is not None or dtype.kind == "i":
        words = (words >> 1) ^ -(words & 1)
    if old is not None:
        words = words + _turned(old, dtype)
    return words if dtype.kind in WHOLE else (words >> 1) | (words << top)


def _turned(words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return words if dtype.kind in WHOLE else (words << 1) | (words >> (8 * words.itemsize - 1))


def _plain(value: Any) -> np.ndarray:
    array = np.asarray(value, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _words(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(_word(array.dtype))


def _word(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"<u{dtype.itemsize // (2 if dtype.kind == 'c' else 1)}")
