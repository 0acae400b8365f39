"""The file every checkpoint is: a safetensors container that knows its own sha256 and appears whole or not at all.

    8 bytes    length of the header, little-endian
    header     {"__metadata__":{"sha256":"<64 digits>","tinylm":"<json>"},"name":{"dtype","shape","data_offsets"},...}
    data       the tensors one after another, little-endian, widest element first, then by name

The sha256 is over the whole file with its own 64 digits replaced by zeros, so any changed, missing or added byte is
found; plain safetensors files load 994 of 1,000 flipped bits as if nothing had happened. The same tensors and metadata
always give the same bytes (the safetensors library writes its metadata in random order).

With `codec="planes"` a tensor that `planes` makes smaller is stored as bytes under its own name; "tinylm" then says its
type and shape, and, where it is the difference to the same tensor of another file, the name and sha256 of that file:

    {"format":2,"planes":{"name":{"dtype","shape","delta"},...},"base":{"file","sha256"},"metadata":{...}}

The sha256 is over what is stored, so nothing is decoded to check a file. Where nothing is coded, the format is 1.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np

from tinylm import planes
from tinylm.config import Codec

FORMAT = 1  # of a file that holds its tensors as they are
CODED = 2  # of one that does not: readers of format 1 say that they are too old for it
DTYPES = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "C64": np.dtype("<c8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
START = b'{"__metadata__":{"sha256":"'  # the slot follows, at a fixed place, so hashing needs no trust in the header
SLOT = slice(8 + len(START), 8 + len(START) + 64)
ZEROS = "0" * 64
HEADER_LIMIT = 16 * 2**20  # json in memory takes up to thirty times its bytes: half a gigabyte at worst
PIECE = 4 * 2**20
MEGABYTE = 1e6
ENTRY = 128  # bytes a coded tensor costs in the header
LEFTOVER = re.compile(r"\.tinylm-[0-9a-f]{16}\.(tmp|trash)")

PathLike = str | os.PathLike


class CheckpointDamaged(ValueError):
    """A file that is not what was written: the message names the file and the reason. It is never loaded."""


class StateMismatch(ValueError):
    """A sound file that does not fit here: other names, shapes, types, settings, or a newer format."""


def write_file(
    path: PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    *,
    codec: Codec = "raw",
    base: PathLike | None = None,
) -> None:
    """Write arrays (NumPy or JAX, any shape) and json-able metadata to `path`, durably: it survives a power cut.

    Args:
        path: replaced, whole or not at all; a link of that name is replaced itself.
        tensors, metadata: what `read_file` gives back, bit for bit.
        codec: "planes" stores each tensor in fewer bytes where it can; needs memory for the coded ones meanwhile.
        base: with "planes", an earlier file in the same folder: what changed little since costs little, and this
            file cannot be read without that one. It must not have a base itself.

    Raises ValueError (TypeError for metadata that json cannot say) before anything is written, and OSError (its
    subclass, with `filename`, free and needed MB in the message) when the disk refuses; then `path` is what it was
    before, or, where only the folder could not be synced, whole and new but not yet safe from a power cut. For `base`
    also what `read_file` raises.
    """
    if codec not in get_args(Codec):
        raise ValueError(f"codec = {codec!r}: must be one of {', '.join(get_args(Codec))}")
    arrays = {name: _storable(name, tensors[name]) for name in tensors}
    inner: dict[str, Any] = {"format": FORMAT, "metadata": dict(metadata or {})}
    if base is not None and codec != "planes":
        raise ValueError('a base makes a difference only with codec "planes"')
    if codec == "planes":
        arrays, about = _coded(arrays, *_base_for(path, base))
        inner |= {"format": CODED, **about} if about else {}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # widest first: every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"sha256": ZEROS, "tinylm": _dumps(inner)}}
    end = 0
    for name in order:
        array, begin = arrays[name], end
        end += array.nbytes
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a tensor name is not valid Unicode: {error}") from error
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"names and metadata take {len(text)} bytes, over the limit of {HEADER_LIMIT}: split the file")
    head = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(head)
    for name in order:
        digest.update(_bytes(arrays[name]))
    head = head[: SLOT.start] + digest.hexdigest().encode() + head[SLOT.stop :]
    with replacing(path, len(head) + end) as file:
        _write(file, memoryview(head))
        for name in order:
            _write(file, _bytes(arrays[name]))


def read_file(path: PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors (each its own writable array) and the metadata of a file made by `write_file`.

    Raises FileNotFoundError, CheckpointDamaged for any byte that differs from what was written (also for a file that
    `write_file` did not make), StateMismatch when a newer format wrote it, or when its base is missing or another file.
    """
    tensors, inner, _ = _read(path, keep=True)
    return tensors, inner["metadata"]


def verify_file(path: PathLike) -> dict[str, Any]:
    """The metadata, after checking every byte as `read_file` does (those of its base too), in constant memory.

    Raises what that raises.
    """
    return _read(path, keep=False)[1]["metadata"]


def write_bytes(path: PathLike, data: bytes) -> None:
    """Replace `path` by `data`, whole and durably or not at all. Raises OSError as `write_file` does."""
    with replacing(path, len(data)) as file:
        _write(file, memoryview(data))


@contextlib.contextmanager
def replacing(path: PathLike, size: int) -> Iterator[int]:
    """A file descriptor whose `size` bytes become `path` when the block ends, on the disk, or never.

    A temporary name in the same folder, fsync, rename, fsync of the folder; the temporary is removed on any failure.
    """
    path = Path(path)
    temporary = leftover(path.parent, "tmp")
    room, file = None, -1
    try:
        room = free_bytes(path.parent)
        if room is not None and room < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        yield file
        os.fsync(file)
        closing, file = file, -1
        os.close(closing)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if file >= 0:
                os.close(file)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        free = "unknown" if room is None else f"{room / MEGABYTE:.1f}"
        reason = f"{error.strerror or error}; not saved: {size / MEGABYTE:.1f} MB needed, {free} MB free"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error  # OSError picks the subclass by number


def sync_folder(folder: PathLike) -> None:
    """Make renames inside `folder` survive a power cut."""
    with named_errors(folder, "not on the disk yet"):
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno != errno.EINVAL:  # network and FUSE file systems that have no such call
                raise
        finally:
            os.close(file)


@contextlib.contextmanager
def named_errors(path: PathLike, what: str) -> Iterator[None]:
    """Give every OSError of the block the path and the words `what`; calls on descriptors know neither."""
    try:
        yield
    except OSError as error:  # the constructor picks the subclass by the number
        raise OSError(error.errno or errno.EIO, f"{error.strerror or error}; {what}", str(path)) from error


def free_bytes(folder: PathLike) -> int | None:
    """Bytes an ordinary user may still write there; None where the file system does not say."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize if room.f_blocks else None


def leftover(folder: Path, kind: str) -> Path:
    """A new name for a short-lived file: "tmp" (being written) or "trash" (being deleted); fits where any name fits."""
    return folder / f".tinylm-{os.urandom(8).hex()}.{kind}"


def clear_leftovers(folder: PathLike) -> list[str]:
    """Remove temporary and trash files of earlier crashes, nothing else; only the writer of a folder may call it."""
    with os.scandir(folder) as entries:
        found = [e.name for e in entries if LEFTOVER.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
    for name in found:
        os.unlink(Path(folder) / name)
    return found


def _storable(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value, order="C")  # not ascontiguousarray: that turns a scalar into a vector
    dtype = array.dtype.newbyteorder("<")
    if name == "__metadata__" or not isinstance(name, str):
        raise ValueError(f"{name!r} cannot be a tensor's name")
    if dtype not in CODES:
        raise ValueError(f"tensor {name!r} has type {array.dtype}; a file can hold {', '.join(map(str, CODES))}")
    return array.astype(dtype, copy=False)


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_listed)


def _listed(value: Any) -> Any:
    if not hasattr(value, "tolist"):
        raise TypeError(f"metadata holds {value!r}, which json cannot say")
    return value.tolist()


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # ml_dtypes have no buffers


def _write(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data[:PIECE]) :]


def _coded(
    arrays: dict[str, np.ndarray], earlier: Mapping[str, np.ndarray], about_base: dict[str, str] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What to store, and what the metadata must say about it: nothing when no tensor became smaller."""
    coded = planes.encode_all(arrays, earlier)
    coded = {name: found for name, found in coded.items() if len(found[0]) + ENTRY < arrays[name].nbytes}
    entries = {
        name: {"dtype": CODES[arrays[name].dtype], "shape": list(arrays[name].shape), "delta": delta}
        for name, (_, delta) in coded.items()
    }
    stored = {name: np.frombuffer(coded[name][0], np.uint8) if name in coded else arrays[name] for name in arrays}
    about: dict[str, Any] = {"planes": entries} if entries else {}
    if any(delta for _, delta in coded.values()):
        about["base"] = about_base
    return stored, about


def _base_for(path: PathLike, base: PathLike | None) -> tuple[dict[str, np.ndarray], dict[str, str] | None]:
    """The tensors of the file that a new one at `path` shall build on, and how to find it again."""
    if base is None:
        return {}, None
    path, base = Path(path), Path(base)
    same_folder = os.path.realpath(base.parent) == os.path.realpath(path.parent)
    if not same_folder or not _neighbour(base.name) or (path.exists() and base.exists() and path.samefile(base)):
        raise ValueError(f"{base} cannot be the base of {path}: it must be another file of the same folder")
    tensors, inner, sha256 = _read(base, keep=True)
    if "base" in inner:
        raise ValueError(f"{base} cannot be a base, since it has one itself: give that one, {inner['base']['file']}")
    return tensors, {"file": base.name, "sha256": sha256}


def _base_of(path: PathLike, about: dict[str, str], keep: bool) -> dict[str, np.ndarray]:
    """The tensors that `path` is the difference to."""
    base = Path(path).parent / about["file"]
    try:
        tensors, _, sha256 = _read(base, keep=keep, whole=True)
    except CheckpointDamaged as error:
        raise CheckpointDamaged(f"{path} needs its base: {error}") from error
    except OSError as error:
        raise StateMismatch(f"{path} needs its base {base}: {error.strerror}") from error
    if sha256 != about["sha256"]:
        raise StateMismatch(f"{path} needs its base {base} as it was: sha256 {about['sha256']}, and it has {sha256}")
    return tensors


def _announced(inner: dict[str, Any], layout: Mapping[str, Any]) -> dict[str, planes.Announced]:
    """Name: (type, shape, whether it is a difference) of every coded tensor."""
    base, entries, found = inner.get("base"), inner.get("planes"), {}
    if "base" in inner and (
        type(base) is not dict
        or set(base) != {"file", "sha256"}
        or not all(type(value) is str for value in base.values())
        or not _neighbour(base["file"])
    ):
        raise _Flaw("it names an impossible base")
    if type(entries) is not dict or not entries:
        raise _Flaw("its metadata is incomplete")
    for name, entry in entries.items():
        if type(entry) is not dict or set(entry) != {"dtype", "shape", "delta"} or type(entry["delta"]) is not bool:
            raise _Flaw(f"tensor {name!r} is not described by dtype, shape and delta")
        dtype, shape = DTYPES.get(str(entry["dtype"])), entry["shape"]
        if dtype is None or not _naturals(shape) or len(shape) > 32 or (entry["delta"] and base is None):
            raise _Flaw(f"tensor {name!r} has an unknown type, an impossible shape or no base")
        if name not in layout or layout[name][:2] != (DTYPES["U8"], (layout[name][2],)):
            raise _Flaw(f"tensor {name!r} is not stored as bytes")
        found[name] = dtype, tuple(shape), entry["delta"]
    return found


def _neighbour(name: str) -> bool:
    """Whether `name` is that of a file in the same folder: no file can make us open anything else."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")


def _read(path: PathLike, *, keep: bool, whole: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """The tensors (if `keep`), what the header says, and the sha256; a file that must be `whole` may have no base.

    Everything the header claims is checked before any memory is taken for it, then reading and hashing are one pass.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK: a named pipe must not hang us
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _Flaw("it is not a regular file")
        size = status.st_size
        prefix = _exactly(file, min(size, SLOT.stop))
        if size < SLOT.stop:
            raise _Flaw(f"it has {size} bytes, too few for a header")
        (length,) = struct.unpack("<Q", prefix[:8])
        if length > min(HEADER_LIMIT, size - 8) or length % 8 or length < SLOT.stop - 8:
            raise _Flaw(f"it claims a header of {length} bytes in a file of {size}")
        if prefix[8 : SLOT.start] != START:
            raise _Flaw("it has no tinylm hash (a plain safetensors file? those are converted, not loaded)")
        head = prefix + _exactly(file, 8 + length - len(prefix))
        digest = hashlib.sha256(head[: SLOT.start] + ZEROS.encode() + head[SLOT.stop :])
        layout, inner = _layout(head[8:], size - 8 - length)
        tensors = {}
        scratch = None if keep else bytearray(min(PIECE, size))
        for name, (dtype, shape, nbytes) in layout.items():
            if keep:
                tensors[name] = _room(name, shape, dtype)
            room = memoryview(scratch) if scratch is not None else _bytes(tensors[name])
            for start in range(0, nbytes, PIECE):
                piece = room[start : start + PIECE] if keep else room[: min(PIECE, nbytes - start)]
                _fill(file, piece)
                digest.update(piece)
        if digest.hexdigest().encode() != head[SLOT]:
            raise _Flaw("its sha256 does not match its content")
        if type(inner.get("format")) is int and inner["format"] > CODED:
            raise StateMismatch(f"{path} has format {inner['format']}, this tinylm reads up to {CODED}: update tinylm")
        if inner.get("format") not in (FORMAT, CODED) or type(inner.get("metadata")) is not dict:
            raise _Flaw("its metadata is incomplete")
        if inner["format"] == CODED:
            announced = _announced(inner, layout)
            if whole and "base" in inner:
                raise _Flaw("it is a difference itself, and a base must be whole")
            earlier = _base_of(path, inner["base"], keep) if "base" in inner else {}
            if keep:
                tensors |= planes.decode_all(tensors, announced, earlier)
        return tensors, inner, digest.hexdigest()
    except (_Flaw, planes.PlanesDamaged) as error:
        raise CheckpointDamaged(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # nothing was written, nothing can be lost
            os.close(file)


class _Flaw(Exception):
    """A reason, still without the file's name."""


def _layout(text: bytes, data: int) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...], int]], dict[str, Any]]:
    """Header -> name: (type, shape, bytes) in file order, and our metadata. The tensors must tile the data exactly."""
    header = _json(text)
    outer = header.pop("__metadata__")
    if type(outer) is not dict or type(outer.get("tinylm")) is not str:
        raise _Flaw("its header holds no tinylm metadata")
    places = {}
    for name, entry in header.items():
        if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _Flaw(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise _Flaw(f"tensor {name!r} has the unknown type {str(entry['dtype'])[:20]!r}")
        if not _naturals(shape) or len(shape) > 32 or not _naturals(offsets) or len(offsets) != 2:
            raise _Flaw(f"tensor {name!r} has an impossible shape or offset")
        count = 1
        for n in shape:
            count *= n
        if offsets[1] - offsets[0] != count * dtype.itemsize:
            raise _Flaw(f"tensor {name!r} has offsets that do not fit its shape")
        places[name] = (*offsets, dtype, tuple(shape))
    layout, end = {}, 0
    for name, (begin, stop, dtype, shape) in sorted(places.items(), key=lambda item: item[1][:2]):
        if begin != end:
            raise _Flaw(f"tensor {name!r} begins at byte {begin} of the data, not at {end}: a gap or an overlap")
        layout[name], end = (dtype, shape, stop - begin), stop
    if end != data:
        raise _Flaw(f"its tensors take {end} bytes but it holds {data}")
    return layout, _json(outer["tinylm"])


def _json(text: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _Flaw(f"its header is not valid json ({error})") from error
    if type(value) is not dict:
        raise _Flaw("its header is not a json object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _room(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        return np.empty(shape, dtype)
    except ValueError as error:  # an empty tensor whose other sides overflow
        raise _Flaw(f"tensor {name!r} has an impossible shape") from error


def _naturals(values: Any) -> bool:
    return type(values) is list and all(type(n) is int and 0 <= n < 2**48 for n in values)


def _exactly(file: int, count: int) -> bytes:
    data = bytearray(count)
    _fill(file, memoryview(data))
    return bytes(data)


def _fill(file: int, room: memoryview) -> None:
    while room:
        got = os.readv(file, [room])
        if not got:
            raise _Flaw("it ends early")
        room = room[got:]
