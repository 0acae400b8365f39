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
    if str(path).startswith(HUB):
        from tinylm.formats.hub import pull

        path = pull(str(path).removeprefix(HUB))
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    name = "hf" if path.is_dir() else format_of(path)
    if name is None:
        raise FormatError(f"{path}: no known format has the suffix {path.suffix!r}; known: {_suffixes()}, or a folder")
    if path.is_file() and (begin := _beginning(path)).startswith(PICKLES):
        raise FormatError(
            f"{path} is a pickle or an archive of one ({begin[:2]!r}), and loading it can run any code: tinylm never "
            "does. Convert it to safetensors where you trust it (safetensors.torch.save_file)"
        )
    if not FORMATS[name].reads:
        raise FormatError(f"{path}: {name} files are written, not read; keep the folder it was made from")
    return _call(name, "read", path, options)


def write(model: Transformer, path: str | os.PathLike, *, format: str | None = None, **options: Any) -> Path:
    """Write a model for another program; an older file of that name is replaced, whole or not at all.

    Args:
        model: any of the kit's; techniques that are not plain weights must be folded first.
        path: the file or folder. format: needed only where the name does not say it.
        options: of the format, such as `dtype="q8_0"` for gguf; see `tinylm.formats.<format>.write`.

    Raises:
        FormatError: everything about the model that the format cannot say; then nothing is written.
    """
    name = format or format_of(path)
    if name not in FORMATS:
        raise FormatError(
            f"format = {format!r}{suggest(str(format), FORMATS)}"
            if format
            else f"{path}: the suffix {Path(path).suffix!r} names no format; known: {_suffixes()}"
        )
    said = format_of(path)
    if said not in (None, name):
        raise FormatError(f"{path} has the suffix of {said}, but format = {name!r} was asked for")
    if FORMATS[name].suffixes and said is None:
        raise FormatError(f"{path}: a {name} file ends in {FORMATS[name].suffixes[0]}")
    folder = Path(path).parent
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _call(name, "write", model, Path(path), options)
    except BaseException:
        for each in missing:  # innermost first; nothing is left of what could not be written
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _call(name: str, what: str, *given: Any) -> Any:
    """`read` or `write` of a format with the options it knows. Raises FormatError for another."""
    *args, options = given
    function: Callable = getattr(importlib.import_module(f"tinylm.formats.{FORMATS[name].room}"), what)
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            there = f"it takes {', '.join(known)}" if known else "it takes none"
            raise FormatError(f"{name} has no option {option!r}: {there}")
    return function(*args, **options)


def _suffixes() -> str:
    return ", ".join(suffix for kind in FORMATS.values() for suffix in kind.suffixes)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)
