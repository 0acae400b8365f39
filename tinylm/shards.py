"""Documents -> token shards on disk: memory-mapped ids, each file described and sealed by a json sidecar.

A token stream is `end, document, end, document, ..., end`: the end token comes before and after every document, so it
is both the start that a first token is predicted from and the end to be predicted. Foreign tokenizers that have a begin
token of their own get it in front of every document: `end, begin, document, end, begin, document, ..., end`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.reading import regular
from tinylm.tokenizer import Tokenizer, blocks

FORMAT = 1
CHECKED_AT_OPEN = 16 * 2**20  # bytes: smaller splits are hashed whole when opened (about 30 ms)
UNSEAL = 'delete its "seal"'  # what to do about a file that was changed on purpose
SEAL = "seal"
FIELDS = {
    "format": int,
    "dtype": str,
    "tokens": int,
    "documents": int,
    "bytes": int,
    "vocab": int,
    "end": (int, type(None)),
    "tokenizer_sha256": str,
    "sha256": str,
    "file": str,
    "shards": int,
}


class DataError(ValueError):
    """Token data that is missing, damaged, too small or not what its sidecar says."""


def sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """A json object with its seal, the sha256 of the rest of it: `seal_broken` finds what is changed later."""
    return {**about, SEAL: _seal(about)}


def seal_broken(about: Mapping[str, Any]) -> bool:
    """Whether an object has a seal that is not that of the rest; files of earlier versions have none."""
    try:
        return SEAL in about and about[SEAL] != _seal(about)
    except RecursionError:  # nothing of ours is nested so
        return True


def _seal(about: Mapping[str, Any]) -> str:
    rest = json.loads(json.dumps({key: value for key, value in about.items() if key != SEAL}))  # as it will be read
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_tokens(ids: np.ndarray, vocab: int, what: str = "tokens") -> None:
    """Raise DataError unless all ids are whole numbers in 0..vocab-1: JAX is silent about others, even -1 and -100."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise DataError(f"{what}: token ids must be whole numbers, got {ids.dtype}")
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        at = int(np.flatnonzero(ids.reshape(-1) == wrong)[0])
        raise DataError(f"{what}: id {wrong} at position {at} is outside 0..{vocab - 1}; was another tokenizer used?")


def write_tokens(
    docs: Iterable[str],
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    *,
    split: str = "train",
    first: int | None = None,
    shard_tokens: int = 2**27,
    progress: Callable[[int], Any] | None = None,
) -> Tokens:
    """Encode documents on all cores into `folder/<split>-00000.bin, ...`, each with a json sidecar; then open them.

    Ids are uint16 up to a vocabulary of 65,536, else uint32. Everything is written under temporary names and renamed at
    the end, sidecars last, so a split either exists whole or not at all; an older one of the same name is replaced.

    Args:
        docs: texts; empty ones are skipped.
        first: keep only this many tokens of each document (and count only the bytes they cover).
        shard_tokens: tokens per file.
        progress: called with the text bytes done so far, about every 4 MB.

    Raises DataError when there is no document, or the tokenizer has no end token.
    """
    if isinstance(docs, str):
        raise DataError("give a list of documents, not one text")
    end = tokenizer.sep if tokenizer.end is None else tokenizer.end
    if end is None:
        raise DataError(f"{tokenizer} has neither an end nor a separator token to put between documents")
    begin = None if tokenizer.begin == end else tokenizer.begin
    if tokenizer.mask is not None and begin == tokenizer.cls:
        begin = None  # RoBERTa's kind: `data.Rows` puts it there
    lead = np.array([end] if begin is None else [end, begin], np.int32)
    if shard_tokens < 1 or (first is not None and first < 1):
        raise DataError(f"shard_tokens = {shard_tokens}, first = {first}: must be at least 1")
    _check_split(split)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder, split, np.dtype(np.uint16 if tokenizer.vocab <= 2**16 else np.uint32), shard_tokens)
    done = 0
    try:
        for block in blocks(text for text in docs if text):
            for text, ids in zip(block, tokenizer.encode_batch(block), strict=True):
                size = len(text.encode())
                done += size
                if first is not None and len(ids) > first:
                    size, ids = tokenizer.covered(text, first), ids[:first]
                check_tokens(ids, tokenizer.vocab, f"document {writer.documents}")
                writer.add(np.append(lead, ids), size)
            if progress:
                progress(done)
        if not writer.documents:
            raise DataError("no documents to write: the source is empty")
        writer.write(np.array([end]))
        own = {} if begin is None else {"begin": begin}
        writer.finish({"vocab": tokenizer.vocab, "end": end, **own, "tokenizer_sha256": tokenizer.sha256})
    finally:
        writer.clean()
    return Tokens.open(folder, split)


class _Writer:
    """Shards under temporary names until `finish`."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, limit: int) -> None:
        self.folder, self.split, self.dtype, self.limit = folder, split, dtype, limit
        self.parts: list[dict[str, Any]] = []
        self.documents = 0
        self.file: Any = None
        self.clear_dead()

    def clear_dead(self) -> None:
        """Remove what a killed process left of this split, after a day: another machine may use the same number."""
        partial = re.compile(rf"\.{re.escape(self.split)}-\d{{5}}\.(json|bin)\.(\d{{1,9}})", re.ASCII)
        for path in self.folder.iterdir():
            found = partial.fullmatch(path.name)
            if found and path.is_file() and time.time() - path.stat().st_mtime > 86_400:
                try:
                    os.kill(int(found[2]), 0)
                except ProcessLookupError:
                    path.unlink()
                except PermissionError:  # it lives, as somebody else's
                    pass

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Say where: an error of an open file does not."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; tokens not written", str(self.folder)) from error

    def name(self, i: int, suffix: str) -> Path:
        return self.folder / f"{self.split}-{i:05d}.{suffix}"

    def partial(self, i: int) -> Path:
        return self.folder / f".{self.split}-{i:05d}.bin.{os.getpid()}"

    def add(self, ids: np.ndarray, size: int) -> None:
        """One document, its end token in front; it is counted in the shard it starts in."""
        if not self.parts or self.parts[-1]["tokens"] == self.limit:
            self.open()
        self.parts[-1]["documents"] += 1
        self.parts[-1]["bytes"] += size
        self.documents += 1
        self.write(ids)

    def open(self) -> None:
        self.close()
        self.file = self.partial(len(self.parts)).open("wb")
        self.parts.append({"tokens": 0, "documents": 0, "bytes": 0, "hash": hashlib.sha256()})

    def close(self) -> None:
        if self.file:
            with self.named_errors():
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
            self.file = None

    def write(self, ids: np.ndarray) -> None:
        ids = ids.astype(self.dtype)
        while len(ids):
            room = self.limit - self.parts[-1]["tokens"]
            if not room:
                self.open()
                continue
            raw = ids[:room].tobytes()
            with self.named_errors():
                self.file.write(raw)
            self.parts[-1]["hash"].update(raw)
            self.parts[-1]["tokens"] += len(ids[:room])
            ids = ids[room:]

    def finish(self, shared: dict[str, Any]) -> None:
        self.close()
        ours = re.compile(rf"{re.escape(self.split)}-\d{{5}}\.(json|bin)")
        for old in [p for p in self.folder.iterdir() if ours.fullmatch(p.name)]:
            old.unlink()
        for i in range(len(self.parts)):
            os.replace(self.partial(i), self.name(i, "bin"))
        for i, part in enumerate(self.parts):
            counts = {k: part[k] for k in ("tokens", "documents", "bytes")}
            sidecar = {
                "format": FORMAT,
                "dtype": self.dtype.name,
                **counts,
                **shared,
                "sha256": part["hash"].hexdigest(),
            }
            sidecar = sealed(sidecar | {"file": self.name(i, "bin").name, "shards": len(self.parts)})
            partial = self.folder / f".{self.split}-{i:05d}.json.{os.getpid()}"
            partial.write_text(json.dumps(sidecar, indent=1), encoding="utf-8")
            os.replace(partial, self.name(i, "json"))

    def clean(self) -> None:
        if self.file:
            with contextlib.suppress(OSError):  # a full disk refuses what is still to be written
                self.file.close()
        for i in range(len(self.parts)):
            self.partial(i).unlink(missing_ok=True)


class Tokens:
    """A split's tokens: shards on disk, memory-mapped, seen as one row. `len(tokens)`, `tokens[a:b]` -> (b-a,) int32.

    Attributes:
        split: its name. documents, bytes: of the raw text. vocab, end, tokenizer_sha256: of the tokenizer.
        begin: the token in front of every document, None where `end` alone is.
        sha256: of the whole split (the shards' hashes, hashed), known without reading the shards.
    """

    folder: Path | None = None  # where the shards lie; None in memory
    split = "train"

    def __init__(self, parts: list[np.ndarray], meta: dict[str, Any], files: list[tuple[Path, str]] = ()) -> None:  # type: ignore[assignment]
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self._files = list(files)
        self.split: str = meta["split"]
        self.documents: int = meta["documents"]
        self.bytes: int = meta["bytes"]
        self.vocab: int = meta["vocab"]
        self.end: int | None = meta["end"]
        self.begin: int | None = meta.get("begin")
        self.tokenizer_sha256: str = meta["tokenizer_sha256"]
        self.sha256: str = meta["sha256"]

    @classmethod
    def open(cls, folder: str | os.PathLike, split: str = "train", *, verify: bool = False) -> Tokens:
        """Map the shards of a split. Sizes, and a sample of the ids, are checked; all of it when small or `verify`.

        Raises DataError naming the file, what its sidecar says, and what was found.
        """
        _check_split(split)
        folder = Path(folder)
        found = sorted(folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].json"))
        if not found:
            other = sorted({p.name[:-11] for p in folder.glob("*-[0-9][0-9][0-9][0-9][0-9].json")})
            here = f"it has {', '.join(other)}" if other else "it has no token shards"
            raise DataError(f"no split {split!r} in {folder}: {here}")
        sidecars = [_sidecar(path) for path in found]
        lead = sidecars[0]
        if len(found) != lead["shards"] or [p.name for p in found] != [
            f"{split}-{i:05d}.json" for i in range(lead["shards"])
        ]:
            raise DataError(
                f"{folder}: {split} was written as {lead['shards']} shards, {len(found)} are there; write it again"
            )
        for path, side in zip(found, sidecars, strict=True):
            for key in ("dtype", "vocab", "end", "begin", "tokenizer_sha256", "shards"):
                if side.get(key) != lead.get(key):
                    raise DataError(f"{path}: {key} = {side.get(key)!r}, but {found[0].name} says {lead.get(key)!r}")
        parts = [_map(path, side) for path, side in zip(found, sidecars, strict=True)]
        for path in (path for path, side in zip(found, sidecars, strict=True) if seal_broken(side)):
            raise DataError(f"{path} was changed after it was written: write it again, or, if it was you, {UNSEAL}")
        meta = {**lead, **{k: sum(s[k] for s in sidecars) for k in ("documents", "bytes")}}
        meta["split"] = split
        meta["sha256"] = hashlib.sha256("".join(s["sha256"] for s in sidecars).encode()).hexdigest()
        tokens = cls(parts, meta, [(p.with_suffix(".bin"), s["sha256"]) for p, s in zip(found, sidecars, strict=True)])
        tokens.folder, tokens.split = folder, split
        if verify or sum(p.nbytes for p in parts) <= CHECKED_AT_OPEN:
            tokens.verify()
        return tokens

    @classmethod
    def from_array(
        cls,
        ids: np.ndarray,
        *,
        vocab: int,
        bytes: int = 0,
        documents: int = 1,
        end: int | None = None,
        tokenizer: str = "",
    ) -> Tokens:
        """Tokens held in memory. `bytes` of raw text (0: unknown), `tokenizer`: its sha256."""
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise DataError(f"tokens must be one row, got shape {ids.shape}")
        check_tokens(ids, vocab)
        held = np.array(ids, np.uint16 if vocab <= 2**16 else np.uint32)
        held.flags.writeable = False
        sha = hashlib.sha256(held.tobytes() + str(vocab).encode()).hexdigest()
        meta = {"documents": documents, "bytes": bytes, "vocab": vocab, "end": end, "sha256": sha, "split": "memory"}
        return cls([held], {**meta, "tokenizer_sha256": tokenizer})

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: int | slice) -> Any:
        if isinstance(where, slice):
            a, b, step = where.indices(len(self))
            if step != 1:
                raise DataError(f"tokens[a:b] takes no step, got {step}")
            out = np.empty(max(0, b - a), np.int32)
            self._read(a, out)
            return out
        i = operator.index(where)
        if not -len(self) <= i < len(self):
            raise IndexError(f"token {i} of {len(self)}")
        return int(self[i % len(self) : i % len(self) + 1][0])

    def _read(self, a: int, out: np.ndarray) -> None:
        """Fill `out` from position `a` on, across shards."""
        if len(self._parts) == 1:
            out[:] = self._parts[0][a : a + len(out)]
            return
        done, part = 0, int(np.searchsorted(self._starts, a, side="right")) - 1
        while done < len(out):
            piece = self._parts[part][a + done - int(self._starts[part]) :][: len(out) - done]
            out[done : done + len(piece)] = piece
            done, part = done + len(piece), part + 1

    @property
    def bytes_per_token(self) -> float:
        """Raw UTF-8 bytes of the documents per token of them (begin and end tokens not counted)."""
        return self.bytes / max(1, len(self) - self.documents * (1 if self.begin is None else 2) - 1)

    @property
    def bytes_per_prediction(self) -> float:
        """Raw bytes per predicted token, ends of documents included: turns nats per token into bits per byte."""
        return self.bytes / max(1, len(self) - 1)

    def verify(self) -> None:
        """Hash every shard and check every id. Raises DataError naming the damaged file."""
        for (path, sha), part in zip(self._files, self._parts, strict=True):
            found = hashlib.sha256(part.data).hexdigest()
            if found != sha:
                raise DataError(
                    f"{path}: sha256 is {found[:16]}..., its sidecar says {sha[:16]}...: damaged; write it again"
                )
            for at in range(0, len(part), 2**24):
                check_tokens(part[at : at + 2**24], self.vocab, str(path))

    def require(self, tokenizer: Tokenizer) -> None:
        """Raise DataError unless these tokens were made with `tokenizer`."""
        if self.tokenizer_sha256 and self.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(f"tokens made with tokenizer {self.tokenizer_sha256[:12]}, but {tokenizer} is in use")

    def __repr__(self) -> str:
        return (
            f"Tokens({len(self):,} tokens, {self.documents:,} documents, vocab={self.vocab}, sha256={self.sha256[:12]})"
        )


def _check_split(split: str) -> None:
    if not isinstance(split, str) or not split.replace("_", "").replace("-", "").isalnum():
        raise DataError(f"split = {split!r}: use letters, digits, '-' and '_'")


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        side = json.loads(regular(path).decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a json sidecar ({error})") from None
    if not isinstance(side, dict):
        raise DataError(f"{path}: not a json sidecar")
    for key, kind in FIELDS.items():
        if not isinstance(side.get(key, ...), kind) or isinstance(side[key], bool):
            raise DataError(f"{path}: {key} is {side.get(key)!r} or missing")
    if side["format"] != FORMAT:
        raise DataError(f"{path}: format {side['format']}; this version reads {FORMAT}")
    if side["dtype"] not in ("uint16", "uint32"):
        raise DataError(f"{path}: dtype {side['dtype']!r} must be uint16 or uint32")
    if type(side.get("begin", 0)) is not int:
        raise DataError(f"{path}: begin is {side['begin']!r}")
    if side["file"] != path.with_suffix(".bin").name or side["tokens"] < 1 or side["vocab"] < 1 or side["shards"] < 1:
        raise DataError(f"{path}: file, tokens, vocab or shards make no sense ({side['file']!r}, {side['tokens']})")
    if side["vocab"] > 2**32 or side["documents"] < 0 or side["bytes"] < 0:
        raise DataError(f"{path}: {side['documents']} documents, {side['bytes']} bytes, vocab {side['vocab']}")
    for key in ("end", "begin"):
        if side.get(key) is not None and not 0 <= side[key] < side["vocab"]:
            raise DataError(f"{path}: {key} = {side[key]} is no id of 0..{side['vocab'] - 1}")
    return side


def _map(path: Path, side: dict[str, Any]) -> np.ndarray:
    file = path.with_suffix(".bin")
    dtype = np.dtype(side["dtype"])
    if not file.exists():
        raise DataError(f"{file} is missing, {path.name} describes it")
    size = file.stat().st_size
    if size != side["tokens"] * dtype.itemsize:
        expected = side["tokens"] * dtype.itemsize
        raise DataError(
            f"{file}: {size:,} bytes, its sidecar says {side['tokens']:,} {dtype} tokens = {expected:,} bytes"
        )
    ids = np.asarray(np.memmap(file, dtype, "r"))  # a plain view: memmap's own indexing is slow
    sample = np.linspace(0, len(ids) - 1, min(len(ids), 4096)).astype(np.int64)
    check_tokens(ids[sample], side["vocab"], f"{file} (sampled)")
    return ids
