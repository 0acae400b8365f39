"""Models of other programs: read and written under one set of names (`tables`).

    format     what it is                                       read     write
    hf         a folder for Hugging Face's transformers         yes      yes      a folder, or hf:NAME/REPO of the hub
    llama2c    one file for llama2.c, its tokenizer beside it   yes      yes      .bin
    gguf       one file for llama.cpp                           yes      yes      .gguf
    onnx       one file for onnxruntime and others              no       yes      .onnx

The format follows from the suffix; `tinylm.load` and `tinylm.save` come here with what is not their own.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tinylm.config import suggest
from tinylm.formats.tables import FormatError
from tinylm.model import Transformer
from tinylm.techniques import EditError, fold

__all__ = ["FORMATS", "HUB", "FormatError", "format_of", "read", "write"]

HUB = "hf:"
PICKLES = (
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x80\x03",
    b"\x80\x04",
    b"\x80\x05",
)  # zip archives of torch.save, and bare ones


class Format(NamedTuple):
    """Where a format's code lives (imported on first use) and what names its files have."""

    room: str
    suffixes: tuple[str, ...]
    reads: bool = True


FORMATS = {
    "hf": Format("hf", ()),
    "llama2c": Format("llama2c", (".bin",)),
    "gguf": Format("gguf_models", (".gguf",)),
    "onnx": Format("onnx_graph", (".onnx",), reads=False),
}


def format_of(path: str | os.PathLike) -> str | None:
    """The format that a file's name says, `.gz` aside; None for a folder and for any other suffix."""
    suffixes = [s.lower() for s in Path(path).suffixes if s.lower() != ".gz"]
    last = suffixes[-1] if suffixes else ""
    return next((name for name, kind in FORMATS.items() if last in kind.suffixes), None)


def read(path: str | os.PathLike, **options: Any) -> Transformer:
    """The model in another program's file or folder, or of the hub (`hf:NAME/REPO`), with its tokenizer if any.

    Raises FileNotFoundError, and FormatError: what the file is, all that is wrong with it, and the remedy.
    """
    place = Path(path)
    if str(path).startswith(HUB):
        function = _function("hf", "read", options)  # before anything is fetched
        from tinylm.formats.hub import pull

        return function(pull(str(path).removeprefix(HUB)), **options)
    if not place.exists():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    name = "hf" if place.is_dir() else format_of(place)
    if name is None:
        raise FormatError(
            f"{place}: no known format has the suffix {place.suffix!r}; known: {_suffixes()}, or a folder"
        )
    if place.is_file() and _is_pickle(place):
        raise FormatError(
            f"{place} is a pickle or an archive of one, and loading it can run any code: tinylm never does. Convert it "
            "to safetensors where you trust it (safetensors.torch.save_file)"
        )
    if not FORMATS[name].reads:
        raise FormatError(f"{place}: {name} files are written, not read; keep the folder it was made from")
    return _function(name, "read", options)(place, **options)


def write(model: Transformer, path: str | os.PathLike, *, format: str | None = None, **options: Any) -> Path:
    """Write a model for another program; an older file of that name is replaced, whole or not at all.

    Args:
        model: any of the kit's; techniques are folded first.
        path: the file or folder. format: "hf" for a folder; of a file the suffix says it.
        options: of the format, such as `dtype="q8_0"` for gguf; see `tinylm.formats.<format>.write`.

    Raises:
        FormatError: everything about the model that the format cannot say; then nothing is written.
    """
    place, said = Path(path), format_of(path)
    name = format or said
    if name not in FORMATS:
        known = f"{place}: the suffix {place.suffix!r} names no format; known: {_suffixes()}"
        raise FormatError(f"format = {format!r}{suggest(str(format), FORMATS)}" if format else known)
    if said not in (None, name):
        raise FormatError(f"{place} has the suffix of {said}, but format = {name!r} was asked for")
    if FORMATS[name].suffixes and said is None:
        raise FormatError(f"{place}: a {name} file ends in {FORMATS[name].suffixes[0]}")
    if said and place.suffix.lower() == ".gz":
        raise FormatError(f"{place}: {said} files are written uncompressed; leave .gz off, and compress it afterwards")
    function = _function(name, "write", options)
    try:
        model = fold(model) if model.config.edits else model
    except EditError as error:
        raise FormatError(f"{place}: {error}; tinylm.save into a folder keeps everything") from error
    missing = [each for each in (place.parent, *place.parent.parents) if not each.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        return function(model, place, **options)
    except BaseException:
        for each in missing:  # innermost first; nothing is left of what could not be written
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _function(name: str, what: str, options: dict[str, Any]) -> Callable:
    """`read` or `write` of a format. Raises FormatError for an option that it does not know."""
    function = getattr(importlib.import_module(f"tinylm.formats.{FORMATS[name].room}"), what)
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    require_known(options, known, f"{name} files" if what == "write" else f"reading {name}")
    return function


def require_known(options: dict[str, Any], known: list[str], what: str) -> None:
    """Raise FormatError for an option that is not known."""
    for option in options:
        if option not in known:
            raise FormatError(f"{what}: no option {option!r}; known: {', '.join(known) or 'none'}")


def _suffixes() -> str:
    return ", ".join(suffix for kind in FORMATS.values() for suffix in kind.suffixes)


def _is_pickle(path: Path) -> bool:
    """What torch.save writes, or a bare pickle. A llama2.c file of width 640 begins with 80 02 too, then zeros."""
    with path.open("rb") as file:
        begin = file.read(4)
    bare = begin[:1] == b"\x80" and begin[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and begin[2:] != b"\0\0"
    return bare or begin == b"PK\x03\x04"
