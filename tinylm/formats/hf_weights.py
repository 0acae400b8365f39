"""Plain safetensors files, one or several: everything a header claims is checked before a tensor is fetched.

    8 bytes    length of the header, little-endian
    header     json: {"name": {"dtype", "shape", "data_offsets"}, ..., "__metadata__": {...}}
    data       the tensors one after another, without gaps

Unlike a checkpoint of ours (`store`) such a file has no checksum: a flipped bit of a weight is another weight.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tinylm.formats.tables import FormatError, complain
from tinylm.store import replacing

FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64}
BITS |= {"F64": 64, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
LONGEST = 700 * 2**10  # bytes of a header, or of any json: room for 5,000 tensors; as objects up to 28 times as many
NAME = 256  # characters
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Place(NamedTuple):
    """Where a tensor lies."""

    file: Path
    begin: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


class Weights:
    """The tensors of a folder's model.safetensors, or of the shards that its index names.

    Attributes:
        places: by name.

    Raises:
        FormatError: no such file (with what to do about a pickle); a header, an index or shards that contradict
            themselves or the files, all of it.
    """

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, Place] = {}
        if (folder / SINGLE).is_file():
            self.places = header(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._shards(folder)
        else:
            raise FormatError(f"{folder} {_lacking(folder)}")

    def _shards(self, folder: Path) -> None:
        index = folder / INDEX
        names = load_json(index).get("weight_map")
        if type(names) is not dict or not all(type(file) is str for file in names.values()):
            raise FormatError(f"{index}: weight_map must name a file for each tensor")
        problems = []
        for file in sorted(set(names.values())):
            if not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
                problems.append(f"{index} names {file[:NAME]!r}, which is no safetensors file of this folder")
            elif not (folder / file).is_file():
                problems.append(f"{folder / file} is missing")
            else:
                try:
                    found = header(folder / file)
                except FormatError as error:
                    problems.append(str(error))
                    continue
                expected = {name for name, where in names.items() if where == file}
                problems += [f"{folder / file} lacks {name}" for name in sorted(expected - found.keys())]
                extra = sorted(found.keys() - expected)
                problems += [f"{folder / file} holds {name}, which the index does not say" for name in extra]
                self.places |= found
        complain(problems)

    def get(self, name: str) -> np.ndarray:
        """One tensor, of a float type. Raises FormatError when the file has shrunk since."""
        place = self.places[name]
        with place.file.open("rb") as file:
            file.seek(place.begin)
            data = file.read(place.bytes)
        if len(data) != place.bytes:
            raise FormatError(f"{place.file} ends inside {name}")
        return np.frombuffer(data, FLOATS[place.dtype]).reshape(place.shape)


def header(path: Path) -> dict[str, Place]:
    """Where every tensor of a file lies. The tensors must tile its data exactly. Raises FormatError."""
    try:
        return _header(path)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged, or no safetensors file: {error}") from None


def _header(path: Path) -> dict[str, Place]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not size:
            raise ValueError("the file is empty")
        if size < 8 or length > size - 8:
            raise ValueError(f"it claims a header of {length:,} bytes in a file of {size:,}")
        if length > LONGEST:
            raise ValueError(f"a header of {length:,} bytes, and this kit reads up to {LONGEST:,}")
        entries = json.loads(file.read(length).decode(), object_pairs_hook=_distinct)
    if type(entries) is not dict:
        raise ValueError("its header is no json object")
    entries.pop("__metadata__", None)
    start = 8 + length
    places = {name: _place(path, name, entry, start) for name, entry in entries.items()}
    end = start
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].bytes)):
        if place.begin != end:
            raise ValueError(f"tensor {name!r} begins at byte {place.begin:,}, not at {end:,}: a gap or an overlap")
        end += place.bytes
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, the file at {size:,}")
    return places


def _place(path: Path, name: str, entry: Any, start: int) -> Place:
    if len(name) > NAME or not name.isprintable():
        raise ValueError(f"the tensor name {name[:40]!r}... of {len(name)} characters")
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in BITS:
        raise ValueError(f"tensor {name!r} has the unknown type {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > 32 or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has an impossible shape or offset")
    size = math.prod(shape) * BITS[dtype] // 8
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"tensor {name!r} has offsets {offsets} for {size:,} bytes")
    return Place(path, start + offsets[0], size, dtype, tuple(shape))


def _naturals(values: Any) -> bool:
    return type(values) is list and all(type(n) is int and 0 <= n < 2**48 for n in values)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def load_json(path: Path) -> dict[str, Any]:
    """The object of a json file. Raises FormatError when there is none, or it is longer than such files are."""
    try:
        if path.stat().st_size > LONGEST:
            raise FormatError(f"{path}: longer than {LONGEST:,} bytes")
        value = json.loads(path.read_bytes().decode(), object_pairs_hook=_distinct)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None
    if type(value) is not dict:
        raise FormatError(f"{path} is damaged: it holds no json object")
    return value


def _lacking(folder: Path) -> str:
    """What is there instead of weights, and what to do."""
    names = sorted(os.listdir(folder))
    if pickles := [name for name in names if name.endswith((*PICKLES, ".bin.index.json"))]:
        return (
            f"holds its weights only as a pickle ({', '.join(pickles[:3])}), and loading a pickle can run any code: "
            "tinylm never does. Where you trust it, convert it in transformers: AutoModelForX.from_pretrained(folder)"
            ".save_pretrained(another), with the X of its config.json, writes model.safetensors"
        )
    return f"has no {SINGLE} and no {INDEX}; it holds {', '.join(names[:8]) or 'nothing'}"


def write_file(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """Write tensors in this order, as one float type; the same ones always give the same bytes. Raises OSError."""
    kind, end, entries = FLOATS[CODES[dtype]], 0, {}
    for name, array in tensors.items():
        begin, end = end, end + array.size * kind.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, 8 + len(text) + end) as descriptor, open(descriptor, "wb", closefd=False) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.astype(kind).tobytes())
