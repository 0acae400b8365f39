"""The GGUF container, versions 2 and 3, little-endian: metadata, a table of tensors, then their data.

    magic "GGUF", uint32 version, uint64 tensors, uint64 entries
    entries    key, uint32 type, value; an array is uint32 type, uint64 count, the values
    table      name, uint32 dimensions, uint64 each (innermost first), uint32 ggml type, uint64 offset
    data       begins, as every tensor in it, at a multiple of general.alignment (32)

A string is its uint64 length and its UTF-8 bytes. Every length, count and offset is held against the size of the file
before anything is made of it; arrays stay in the mapped file until somebody asks. Layout: ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinylm.formats import ggml
from tinylm.formats.tables import FormatError, complain
from tinylm.store import PathLike, replacing

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
CODES = {np.dtype(code): number for number, code in NUMBERS.items()}
ENTRIES, TENSORS, STRINGS, TEXT = 2**14, 2**15, 2**21, 2**22  # more than any model has of them; TEXT in bytes
LONGEST_NAME = 63  # bytes of a tensor's name; ggml reserves 64


@dataclasses.dataclass(frozen=True, eq=False)
class Strings:
    """An array of strings, still in the file: `count` of them, lengths checked, from byte `at` on."""

    data: memoryview = dataclasses.field(repr=False)
    at: int
    count: int

    def __iter__(self) -> Iterator[str]:
        """Raises FormatError for a string that is not UTF-8."""
        at = self.at
        for i in range(self.count):
            (length,) = struct.unpack_from("<Q", self.data, at)
            at += 8 + length
            yield _text(bytes(self.data[at - length : at]), f"string {i}")


class Place(NamedTuple):
    """Where a tensor lies: its type, its shape (outermost first), its first byte in the file and how many follow."""

    kind: ggml.Type
    shape: tuple[int, ...]
    at: int
    size: int


@dataclasses.dataclass(frozen=True)
class File:
    """A sound file, mapped, not read.

    Attributes:
        path: its name. metadata: by key: a number, a truth value, a text, a NumPy array, or `Strings`.
        tensors: by name, in the order of the table.
    """

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Place]
    data: memoryview = dataclasses.field(repr=False)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, shaped outermost first."""
        place = self.tensors[name]
        return ggml.decode(np.frombuffer(self.data, np.uint8, place.size, place.at), place.kind, place.shape)


def open_file(path: PathLike) -> File:
    """Map a GGUF file and check its whole structure; no tensor is decoded.

    Raises FileNotFoundError, and FormatError with the file's name for anything that is no sound GGUF file.
    """
    path = os.fspath(path)
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a named pipe must not hang us
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size < 24:
            raise FormatError(f"{path}: no GGUF file of 24 bytes or more")
        data = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(file)
    with named(path):
        return _File(data).parsed(str(path))


@contextlib.contextmanager
def named(path: PathLike) -> Iterator[None]:
    """Put the file's name in front of a FormatError."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


class _File:
    """A cursor over the bytes that never reads past their end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0
        self.strings, self.text = STRINGS, TEXT  # what is still granted

    def parsed(self, path: str) -> File:
        magic = bytes(self.data[:4])
        if magic != MAGIC:
            hint = "; it is compressed: unpack it first" if magic[:2] == b"\x1f\x8b" else ""
            raise FormatError(f"no GGUF file: it begins with {magic!r}{hint}")
        self.at = 4
        version = self.number("<I", "its version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"{swapped}, big-endian" if swapped in (2, 3) else f"{version}"
            raise FormatError(f"GGUF version {what}: known are 2 and 3, little-endian")
        tensors, entries = self.number("<Q", "a count"), self.number("<Q", "a count")
        for count, most, least, what in ((tensors, TENSORS, 25, "tensors"), (entries, ENTRIES, 13, "entries")):
            if count > min(most, len(self.data) // least):
                raise FormatError(f"{count:,} {what} are announced in {len(self.data):,} bytes (at most {most:,})")
        metadata: dict[str, Any] = {}
        for i in range(entries):
            key = self.string(f"key {i}")
            if key in metadata or not key:
                raise FormatError(f"the key {key[:60]!r} occurs twice" if key else f"key {i} is empty")
            metadata[key] = self.value(self.number("<I", f"the type of {key[:60]!r}"), key[:60])
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise FormatError(f"general.alignment = {str(alignment)[:60]}: not a power of two up to 65,536")
        table = [self.entry(i, alignment) for i in range(tensors)]
        start = -(-self.at // alignment) * alignment
        return File(path, metadata, self.placed(table, start), self.data)

    def entry(self, i: int, alignment: int) -> tuple[str, Place]:
        name = self.string(f"the name of tensor {i}")
        if not name or len(name.encode()) > LONGEST_NAME:
            raise FormatError(f"tensor {i} has a name of {len(name)} characters: 1 to {LONGEST_NAME} bytes are allowed")
        rank = self.number("<I", f"the dimensions of {name!r}")
        if not 1 <= rank <= 4:
            raise FormatError(f"tensor {name!r} has {rank:,} dimensions: 1 to 4 are allowed")
        shape = tuple(self.number("<Q", f"a dimension of {name!r}") for _ in range(rank))[::-1]
        number, offset = self.number("<I", f"the type of {name!r}"), self.number("<Q", f"the offset of {name!r}")
        if number not in ggml.NUMBERED:
            kind = ggml.UNREAD.get(number, f"number {number}")
            raise FormatError(f"tensor {name!r} has the type {kind}; known are {', '.join(ggml.TYPES)}")
        if 0 in shape:
            raise FormatError(f"tensor {name!r} is empty: its shape is {shape}")
        kind = ggml.NUMBERED[number]
        try:
            size = ggml.packed_size(kind, shape)
        except FormatError as error:
            raise FormatError(f"tensor {name!r}: {error}") from None
        if offset % alignment or offset + size > len(self.data):
            raise FormatError(
                f"tensor {name!r} would take {size:,} bytes from {offset:,} on, aligned to {alignment}, in a file of "
                f"{len(self.data):,}"
            )
        return name, Place(kind, shape, offset, size)

    def placed(self, table: Sequence[tuple[str, Place]], start: int) -> dict[str, Place]:
        tensors = {name: place._replace(at=start + place.at) for name, place in table}
        if len(tensors) != len(table):
            names = sorted(name for name, _ in table)
            twice = next(a for a, b in itertools.pairwise(names) if a == b)
            raise FormatError(f"tensor {twice!r} occurs twice")
        end, last = start, "the table"
        for name, place in sorted(tensors.items(), key=lambda item: item[1].at):
            if place.at < end:
                raise FormatError(f"tensor {name!r} overlaps {last!r}")
            end, last = place.at + place.size, name
        if tensors and end > len(self.data):
            raise FormatError(f"tensor {last!r} ends at byte {end:,} of a file of {len(self.data):,}")
        return tensors

    def value(self, kind: int, key: str) -> Any:
        if kind in NUMBERS:
            number = self.array(kind, 1, key)[0]
            return float(str(number)) if kind == 6 else number.item()  # 1e-05, not 9.999999747378752e-06
        if kind == BOOL:
            return bool(self.array(kind, 1, key)[0])
        if kind == STRING:
            return self.string(f"the value of {key!r}")
        if kind != ARRAY:
            raise FormatError(f"{key!r} has the unknown type {kind}")
        inner, count = self.number("<I", f"the type of {key!r}"), self.number("<Q", f"the length of {key!r}")
        if inner == STRING:
            return self.listed(count, key)
        if inner in NUMBERS or inner == BOOL:
            return self.array(inner, count, key)
        what = "an array of arrays" if inner == ARRAY else f"an array of the unknown type {inner}"
        raise FormatError(f"{key!r} is {what}, which no known model needs")

    def array(self, kind: int, count: int, key: str) -> np.ndarray:
        dtype = np.dtype(NUMBERS.get(kind, "u1"))
        array = np.frombuffer(self.take(count * dtype.itemsize, f"the value of {key!r}"), dtype)
        if kind == BOOL:
            if (array > 1).any():
                raise FormatError(f"{key!r} is neither true nor false: {array.max()}")
            array = array.view(bool)
        return array

    def listed(self, count: int, key: str) -> Strings:
        if count > min(self.strings, len(self.data) // 8):
            raise FormatError(f"{key!r} announces {count:,} strings in a file of {len(self.data):,} bytes")
        self.strings -= count
        start = at = self.at
        size, length_at = len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length_at(self.data, at)[0] if at + 8 <= size else size
            if at > size:
                raise FormatError(f"{key!r} ends beyond the end of the file")
        self.at = at
        return Strings(self.data, start, count)

    def string(self, what: str) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > self.text:
            raise FormatError(f"{what} has {length:,} bytes: names and texts may have {TEXT:,} together")
        self.text -= length
        return _text(bytes(self.take(length, what)), what)

    def number(self, code: str, what: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.data) - self.at:
            left = len(self.data) - self.at
            raise FormatError(f"{what} needs {count:,} bytes at byte {self.at:,}, and {left:,} are left")
        self.at += count
        return self.data[self.at - count : self.at]


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8 at byte {error.start}: {raw[:20]!r}") from None


def write_file(
    path: PathLike,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[ggml.Type, np.ndarray]],
    *,
    rounding: bool = False,
) -> None:
    """Write version 3, durably and whole or not at all; the same arguments always give the same bytes.

    Args:
        path: the file. metadata: truth values, whole numbers (uint32), floats (float32), texts, lists of texts, and
            NumPy arrays of numbers.
        tensors: for each name its type and its float array, outermost dimension first. rounding: as `ggml.encode`.

    Raises:
        FormatError: all values that a type cannot hold, with the tensors' names. OSError: the disk refuses.
    """
    head = bytearray(struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _value(key, value)
    offset, encoded, problems = 0, [], []
    for name, (kind, array) in tensors.items():
        try:
            data = ggml.encode(array, kind, rounding=rounding)
        except FormatError as error:
            problems.append(f"{name}: {error}")
            continue
        head += _string(name) + struct.pack("<I", array.ndim)
        head += struct.pack(f"<{array.ndim}Q", *reversed(array.shape)) + struct.pack("<IQ", kind.number, offset)
        encoded += [data, bytes(-len(data) % ALIGNMENT)]
        offset += len(data) + len(encoded[-1])
    complain(problems)
    head += bytes(-len(head) % ALIGNMENT)
    with replacing(path, len(head) + offset) as file:
        for part in (head, *encoded):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(file, rest) :]


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """Type and value of one entry."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int) and 0 <= value < 2**32:
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in CODES:
        return struct.pack("<IIQ", ARRAY, CODES[value.dtype], len(value)) + value.tobytes()
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    raise FormatError(f"{key} = {str(value)[:60]!r} is nothing that GGUF metadata can say")
