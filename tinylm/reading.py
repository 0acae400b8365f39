"""Documents from files, folders, hub data sets or Python lists.

A document is a str. Reading streams: a file is held in memory only as far as one document of it. Line ends are kept as
they are (CRLF too): the bytes that are scored are the bytes of the file. A byte-order mark is dropped.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import logging
import operator
import os
import re
import stat
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
CHUNK = 2**20
READABLE = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


class TextError(ValueError):
    """A text that cannot be read or used; the message names the file, the place in it and the remedy."""


LIMIT = 4 * 2**20  # bytes of a json file that describes others


def regular(path: str | os.PathLike, limit: int | None = LIMIT, *, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most `limit`; a pipe is not waited for, a device not read to its end.

    With `follow=False` a link is refused, too: what is written next must stay in its folder. Raises OSError, and
    ValueError for what is no such file.
    """
    more = os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | more)) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if limit is not None and status.st_size > limit:
            raise ValueError(f"it has {status.st_size:,} bytes, over the limit of {limit:,}")
        return stream.read()


def documents(
    source: str | os.PathLike | Iterable[str],
    *,
    separator: str | None = END,
    errors: str = "strict",
    field: str = "text",
    limit: int | None = None,
) -> Iterator[str]:
    """The documents of `source`, one by one, without leading and trailing newlines; empty ones are left out.

    Args:
        source: a text file, split at `separator` (a file without one is a single document); .jsonl or .parquet, whose
            column `field` is the text; any of these but parquet gzipped (.gz); a folder of them, read in sorted order;
            "hf:ID[@CONFIG][:SPLIT]", a data set of the Hugging Face hub or a folder in its layout, streamed (SPLIT is
            train unless given); or an iterable of str.
        separator: None never splits.
        errors: what to do with bytes that are not UTF-8: "strict" raises, "replace" puts U+FFFD, "ignore" drops them;
            the last two warn with the number.
        limit: stop after this many documents.

    Raises TextError with file, line and byte offset for text that cannot be read, and when a file or folder holds no
    document; FileNotFoundError for a path that does not exist.
    """
    if errors not in ("strict", "replace", "ignore"):
        raise TextError(f"errors = {errors!r}: must be strict, replace or ignore")
    if separator == "":
        raise TextError("separator = '': give None to keep each file whole")
    check_limit(limit)
    if isinstance(source, bytes) or not isinstance(source, (str, os.PathLike, Iterable)):
        raise TextError(f"documents takes a path or an iterable of str, got {type(source).__name__}")
    if isinstance(source, (str, os.PathLike)):
        found: Iterator[str] = _named(str(source), separator, errors, field)
    else:
        found = _given(source)
    return itertools.islice(_stripped(found, source), limit)


def check_limit(limit: int | None) -> None:
    """Raise TextError unless `limit` can be a number of documents, or is None."""
    try:
        fits = limit is None or (operator.index(limit) >= 0 and not isinstance(limit, bool))
    except TypeError:
        raise TextError(f"limit = {limit!r}: must be a whole number or None") from None
    if not fits:
        raise TextError(f"limit = {limit!r}: must be at least 0 or None")


def files_of(folder: Path) -> list[Path]:
    """What `documents` reads of a folder, in its order: names with a known ending, hidden ones left out."""
    return sorted(p for p in folder.rglob("*") if p.name.lower().endswith(READABLE) and not p.name.startswith("."))


def _stripped(found: Iterator[str], source: Any) -> Iterator[str]:
    some = False
    for text in found:
        text = text.strip("\r\n")
        if text:
            some = True
            yield text
    if not some and isinstance(source, (str, os.PathLike)):
        raise TextError(f"{source}: no documents, it is empty")


def _given(source: Iterable[str]) -> Iterator[str]:
    for i, text in enumerate(source):
        if not isinstance(text, str):
            raise TextError(f"document {i}: expected str, got {type(text).__name__}")
        yield text


def _named(source: str, separator: str | None, errors: str, field: str) -> Iterator[str]:
    if source.startswith("hf:"):
        yield from _hub(source, field)
        return
    path = Path(source)
    try:
        known = path.exists()
    except (OSError, ValueError):  # a name too long, a NUL, a symlink loop
        known = False
    if not known:
        looks = " (to pass a text itself, put it in a list)" if "\n" in source or len(source) > 255 else ""
        raise FileNotFoundError(f"no file or folder {source[:200]!r}{looks}")
    files = [path]
    if path.is_dir():
        files = files_of(path)
        if not files:
            raise TextError(f"{path}: no {', '.join(READABLE)} in this folder")
    for file in files:
        if not file.is_file():
            raise TextError(f"{file}: not a regular file")
        name = file.name.lower().removesuffix(".gz")
        if name.endswith(".jsonl"):
            yield from _jsonl(file, errors, field)
        elif name.endswith(".parquet"):
            yield from _parquet(file, field)
        elif name.endswith((".json", ".csv", ".tsv", ".zip", ".zst", ".xz", ".bz2", ".tar")):
            raise TextError(f"{file}: this kind is not read; convert it to one of {', '.join(READABLE)}")
        else:
            yield from _split(_text(file, errors), separator)


def _open(file: Path) -> io.BufferedIOBase:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")


def _chunks(file: Path, by_line: bool = False) -> Iterator[bytes]:
    """The bytes of a file, unzipped, without a byte-order mark, in pieces of 1 MB or in lines."""
    try:
        with _open(file) as stream:
            read = stream.readline if by_line else lambda: stream.read(CHUNK)
            raw = read().removeprefix(codecs.BOM_UTF8)
            while raw:
                yield raw
                raw = read()
    except EOFError:
        raise TextError(f"{file}: the gzip file ends too early; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TextError(f"{file}: not a sound gzip file ({error})") from None


class _Decoder:
    """Bytes to text with the place of the first bad byte, or the count of repaired ones."""

    def __init__(self, file: Path, errors: str) -> None:
        self.file, self.errors, self.offset, self.line, self.bad = file, errors, 0, 1, 0
        self.rest = b""

    def feed(self, raw: bytes, final: bool = False) -> str:
        raw = self.rest + raw
        try:
            text, used = codecs.utf_8_decode(raw, "strict", final)
        except UnicodeDecodeError as error:
            at = error.start
            if self.errors == "strict":
                line = self.line + raw.count(b"\n", 0, at)
                raise TextError(
                    f"{self.file}: not UTF-8 at byte {self.offset + at} (0x{raw[at]:02x}), line {line}; "
                    "convert it, or read it with errors='replace'"
                ) from None
            text, used = codecs.utf_8_decode(raw, "replace", final)
            true = codecs.utf_8_decode(raw, "ignore", final)[0]
            self.bad += len(text) - len(true)
            text = true if self.errors == "ignore" else text
        self.offset += used
        self.line += raw.count(b"\n", 0, used)
        self.rest = raw[used:]
        return text

    def close(self) -> None:
        if self.bad:
            did = "replaced" if self.errors == "replace" else "dropped"
            warnings.warn(f"{self.file}: {self.bad} invalid UTF-8 sequences {did}", stacklevel=2)


def _text(file: Path, errors: str) -> Iterator[str]:
    decoder = _Decoder(file, errors)
    for raw in _chunks(file):
        yield decoder.feed(raw)
    yield decoder.feed(b"", final=True)
    decoder.close()


def _split(pieces: Iterable[str], separator: str | None) -> Iterator[str]:
    """The texts between separators; a separator may straddle two pieces."""
    if separator is None:
        yield "".join(pieces)
        return
    held: list[str] = []
    tail = ""
    for piece in pieces:
        first, *others = (tail + piece).split(separator)
        if others:
            yield "".join([*held, first])
            held = []
            yield from others[:-1]
            first = others[-1]
        cut = max(0, len(first) - len(separator) + 1)
        held.append(first[:cut])
        tail = first[cut:]
    yield "".join([*held, tail])


def _jsonl(file: Path, errors: str, field: str) -> Iterator[str]:
    decoder = _Decoder(file, errors)
    for number, raw in enumerate(_chunks(file, by_line=True), 1):
        line = decoder.feed(raw, final=True)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{file}, line {number}: not json ({error})") from None
        if not isinstance(record, dict):
            raise TextError(f"{file}, line {number}: expected an object with {field!r}, got {type(record).__name__}")
        text = _field(record, field, f"{file}, line {number}")
        try:
            text.encode()
        except UnicodeEncodeError:
            if errors == "strict":
                raise TextError(f"{file}, line {number}: {field!r} holds a lone surrogate") from None
            decoder.bad += 1
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
        yield text
    decoder.close()


def _field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise TextError(
            f"{where}: no field {field!r}; it has {', '.join(map(repr, record)) or 'none'} (choose with field=)"
        )
    if not isinstance(record[field], str):
        raise TextError(f"{where}: {field!r} must be text, got {type(record[field]).__name__}")
    return record[field]


def _parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise TextError(
                    f"{file}: no column {field!r}; it has {', '.join(map(repr, names))} (choose with field=)"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield _field({field: text}, field, f"{file}, row {row}")
                    row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError(f"{file}: not a readable parquet file ({error})") from None


def _hub(source: str, field: str) -> Iterator[str]:
    """Rows of a data set, streamed with `datasets` (which takes 2 s to import)."""
    name, split = source.removeprefix("hf:"), "train"
    if re.fullmatch(r".*:[A-Za-z0-9_]+", name):
        name, split = name.rsplit(":", 1)
    name, _, config = name.partition("@")
    if not name:
        raise TextError(f"{source!r}: write hf:ID, hf:ID:SPLIT or hf:ID@CONFIG:SPLIT")
    with _Quiet():
        import datasets

        rows: Iterator[Any]
        number = 0
        try:
            rows = iter(datasets.load_dataset(name, config or None, split=split, streaming=True))
            row = next(rows, None)
        except (OSError, ValueError, RuntimeError) as error:
            raise TextError(f"{source}: cannot be read ({error}); a local file of the same data works too") from None
        while row is not None:
            yield _field(row, field, f"{source}, row {number}")
            number += 1
            try:
                row = next(rows, None)
            except (OSError, ValueError, RuntimeError) as error:
                raise TextError(
                    f"{source}: stopped after {number} rows ({error}); run again or use a local file"
                ) from None


class _Quiet:
    """The hub's warnings and the progress bars of `datasets` are off inside: what goes wrong is said once, by us.

    Streams may overlap and end in any order: the last to end restores what the first found.
    """

    inside, level, bars = 0, logging.NOTSET, False
    lock = threading.Lock()

    def __enter__(self) -> None:
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars

        with _Quiet.lock:
            _Quiet.inside += 1
            if _Quiet.inside == 1:
                logger = logging.getLogger("huggingface_hub")
                _Quiet.level, _Quiet.bars = logger.level, not are_progress_bars_disabled()
                logger.setLevel(logging.ERROR)
                if _Quiet.bars:
                    _unwarned(disable_progress_bars)

    def __exit__(self, *failure: object) -> None:
        from datasets.utils import enable_progress_bars

        with _Quiet.lock:
            _Quiet.inside -= 1
            if not _Quiet.inside:
                logging.getLogger("huggingface_hub").setLevel(_Quiet.level)
                if _Quiet.bars:
                    _unwarned(enable_progress_bars)


def _unwarned(call: Callable[[], Any]) -> None:
    """Call without the warning that an environment variable has the last word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
