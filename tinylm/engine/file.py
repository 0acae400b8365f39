"""The engine's file, `.tlm`: one model, ready to be memory-mapped, with every constant that running it needs.

Version 1, little-endian; offsets in bytes:

    0    8   magic "tinylm\\r\\n"
    8    4   u32 version = 1
    12   4   u32 0
    16   8   u64 size of the whole file
    24   4   u32 CRC-32C (Castagnoli) of bytes 32 .. end
    28   4   u32 0
    32   32  sha256 of bytes 64 .. end
    64       constants: 64 fields of 4 bytes, see `Constants`; fields that are not named there are 0
    320      tensor table, one entry of 112 bytes per tensor:
             72 bytes name (UTF-8, zero padded, at least one zero), i32 kind, rows, columns, group, 0, 0,
             u64 offset, u64 bytes
    ...      the tensors, each from a multiple of 64 on; bytes between them are zero

A matrix has a row per output and a column per input. Panel p holds rows 16p .. 16p + 15, columns are padded to C, a
multiple of 16, and P = ceil(rows / 16); rows and columns that are missing have weight 0, and rows the scale 0.

    kind  name            codes                      what a byte holds
    0     floats          rows * columns float32     vectors have one row
    1     ints            rows * columns int32
    2     raw             columns bytes, one row
    8     panel_float     [P][C][16] float32         no scales
    9     panel_int8      [P][C/4][16][4]            w + 128, -127 <= w <= 127
    10    panel_planes    [P][C/8][16][4] twice      u = w + 128 + dither[column], -120 <= w <= 120: first u >> 4
                                                     of all, then u & 15, two to a byte as in panel_int4
    11    panel_int4      [P][C/8][16][4]            (w[k+j] + 8) | (w[k+4+j] + 8) << 4, -7 <= w <= 7;
                                                     k = 8 * step, j = 0..3
    12    panel_ternary   [P][C/16][16][4]           sum over i = 0..3 of (w[k+4i+j] + 1) << 2i; k = 16 * step
    13    packed_ternary  ceil(16 P C / 5) bytes     t[0] + 3 t[1] + 9 t[2] + 27 t[3] + 81 t[4], where t = w + 1
                                                     are panel_ternary's fields, byte after byte, i = 0 first,
                                                     filled up with 1

Scales follow the codes, from the next multiple of 64 in the tensor on: with group 0 float32 [P][16], else float16
[P][ceil(C / group)][16], each for `group` columns, a multiple of 16. A weight is w * scale.

Tensors have the kit's dotted names. A matrix of the blocks may have NAME.bias (floats, one row) and NAME.input (one
float: its input's scale, instead of one per token); panel_planes has NAME.dither (ints, 1 x C, -8 .. 7).

    embed                             matrix vocab x width
    embed_positions, embed_types      floats context x width, token_types x width
    embed_norm.scale .bias            floats; all norms: scale, and bias where the norm is a layernorm
    blocks.0.attn_norm, .mlp_norm     norms
    blocks.0.attn.q .k .v .o          matrices
    blocks.0.attn.q.norm and so on    a norm of a matrix's own, of its input, before that is rounded: an RMSNorm, with
                                      .bias a layernorm. Where q, k and v all have one, attn_norm may be missing, and
                                      mlp_norm where up and gate have; not in post-norm blocks
    blocks.0.attn.q_norm, .k_norm     RMSNorm scales, head_width
    blocks.0.mlp.up .down .gate       matrices; gate for swiglu, geglu and reglu
    norm                              norm, but for post-norm blocks
    windows                           ints 1 x layers: how many tokens attention reaches back, itself included; 0: all
    rotates                           ints 1 x layers: 1 where the layer has rotary positions
    head.out                          matrix: of an untied head, classes x width, or a tied head's own copy of the table
    head.dense, head.norm, head.bias  of the mlm head, the first of the classes head too; head.bias is 1 x vocab, and
                                      head.dense has a bias, as head.out of a classes head; a bare one has no head.dense
    tokenizer                         raw: tokenizer.json, keys sorted, no spaces
    pieces                            raw: u32 count, u32 offsets[count + 1], then the bytes that each id stands for
    merges                            raw: how texts become ids, see `encoding`; only where native code can do it
    provenance                        raw: json of the kit's version, the model's settings, the export's, and the edits
                                      of it
    grams                             raw: drafts for speculation
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinylm.engine.checking import check
from tinylm.engine.checksum import crc32c
from tinylm.engine.layout import ALIGN, CONSTANTS, TABLE, Constants, Flaw, Kind, Tensor, problem, tensor_bytes, up
from tinylm.store import PathLike, replacing

MAGIC, VERSION = b"tinylm\r\n", 1
HEAD = struct.Struct("<8sIIQII")
CHECKED, HASHED = 32, 64  # where the bytes of the CRC and of the sha256 begin
ENTRY = struct.Struct("<72s6i2Q")


class File(NamedTuple):
    """A sound file: `tensors` by name in the file's order, views of the mapped file; `sha256` in hexadecimal."""

    constants: Constants
    tensors: dict[str, Tensor]
    sha256: str


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: PathLike, constants: Constants, tensors: Mapping[str, Tensor]) -> Path:
    """Write a file, whole and durably or not at all; its `tensors` constant is counted here.

    Raises FormatError, before anything is written, for what `read` would refuse, and OSError as `store.write_file`.
    """
    path, constants = Path(path), constants._replace(tensors=len(tensors))
    try:
        check(constants, tensors)
    except Flaw as flaw:
        raise problem(f"{path}: {flaw}") from None
    table, places, at = [], [], up(TABLE + len(tensors) * ENTRY.size)
    for name, tensor in tensors.items():
        numbers = tensor.kind, tensor.rows, tensor.columns, tensor.group, 0, 0
        table.append(ENTRY.pack(name.encode(), *numbers, at, len(tensor.data)))
        places.append((at, tensor.data))
        at = up(at + len(tensor.data))
    whole = bytearray(at)  # a tiny model fits into memory twice
    front = constants.packed() + b"".join(table)
    whole[CONSTANTS : CONSTANTS + len(front)] = front
    for place, data in places:
        whole[place : place + len(data)] = memoryview(data)  # type: ignore[arg-type]
    view = memoryview(whole)
    whole[CHECKED:HASHED] = hashlib.sha256(view[HASHED:]).digest()
    whole[: HEAD.size] = HEAD.pack(MAGIC, VERSION, 0, at, crc32c(view[CHECKED:]), 0)
    with replacing(path, at) as file:
        while view:
            view = view[os.write(file, view) :]
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: PathLike) -> File:
    """The contents of a file, all of it checked: both sums, every constant, name, shape, place and value range.

    Raises FileNotFoundError, and FormatError, which names the file and the reason, for everything else.
    """
    path = Path(path)
    try:
        data = _mapped(path)
        begin = bytes(data[:TABLE])
        magic, version, zero, size, crc, rest = HEAD.unpack_from(begin)
        if magic != MAGIC:
            raise Flaw("it does not begin as a .tlm file does")
        if version > VERSION:
            raise Flaw(f"it has version {version}, and this tinylm reads up to {VERSION}: update tinylm")
        if version < 1 or zero or rest:
            raise Flaw("its header holds what is not known")
        if size != len(data):
            raise Flaw(f"it should have {size:,} bytes and has {len(data):,}")
        digest = hashlib.sha256(memoryview(data[HASHED:]))  # type: ignore[arg-type]
        if crc32c(data[CHECKED:]) != crc or digest.digest() != begin[CHECKED:HASHED]:
            raise Flaw("its checksums do not match its content")
        constants = Constants.unpacked(begin[CONSTANTS:])
        tensors = _tensors(data, constants.tensors)
        check(constants, tensors)
        return File(constants, tensors, digest.hexdigest())
    except ValueError as flaw:  # a Flaw, or a name that is not UTF-8
        raise problem(f"{path} is no sound .tlm file: {flaw}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise problem(f"{path} cannot be read: {error.strerror}") from None


def _mapped(path: Path) -> np.ndarray:
    """All bytes of a regular file, (size,) uint8, read-only."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a named pipe must not hang us
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            if stat.S_ISDIR(status.st_mode):
                raise Flaw("a folder; the engine runs one file, which `tinylm export FOLDER story.tlm` makes")
            raise Flaw("it is not a regular file")
        if status.st_size < TABLE:
            raise Flaw(f"it has {status.st_size} bytes, too few for a header")
        return np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), np.uint8)
    finally:
        os.close(file)


def _tensors(data: np.ndarray, count: int) -> dict[str, Tensor]:
    """The table: names, kinds, sizes and places that fit the file and each other."""
    end = TABLE + count * ENTRY.size
    if not 0 <= count <= (len(data) - TABLE) // ENTRY.size:
        raise Flaw(f"it announces {count:,} tensors")
    tensors, places = {}, []
    for i, entry in enumerate(ENTRY.iter_unpack(data[TABLE:end].tobytes())):
        text, kind, rows, columns, group, zero, rest, offset, size = entry
        stem = text.rstrip(b"\0")
        if len(stem) == len(text) or b"\0" in stem or not stem or zero or rest:
            raise Flaw(f"entry {i} of its table is not known")
        name = stem.decode()  # a UnicodeDecodeError is a ValueError
        if name in tensors or not name.isprintable():
            raise Flaw(f"its tensor {name!r} occurs twice or has no name")
        if kind not in list(Kind) or rows < 1 or columns < 0 or group < 0:
            raise Flaw(f"{name} has kind {kind}, {rows} rows, {columns} columns and group {group}")
        if size != tensor_bytes(Kind(kind), rows, columns, group) or offset % ALIGN or offset + size > len(data):
            raise Flaw(f"{name} has {size:,} bytes from {offset:,} on")
        tensors[name] = Tensor(Kind(kind), rows, columns, group, data[offset : offset + size])
        places.append((offset, offset + size, name))
    for begin, stop, name in [*sorted(places), (len(data), len(data), "the end")]:
        if begin < end or data[end:begin].any():
            raise Flaw(f"{name} overlaps what lies before it, or something lies between")
        end = stop
    return tensors
