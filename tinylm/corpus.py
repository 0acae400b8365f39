"""From any source to what training needs: clean documents, a tokenizer, token shards of train and valid, provenance.

A folder made here holds tokenizer.json, train-*.bin, valid-*.bin with their sidecars, and provenance.json. Asking for
the same again finds it and does nothing; asking for something else in the same folder is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinylm.config import ConfigError
from tinylm.reading import END, check_limit, files_of
from tinylm.shards import Tokens, write_tokens
from tinylm.text import clean as without_overlap
from tinylm.text import deduplicate, documents, sample, split
from tinylm.tokenizer import Kind, Tokenizer
from tinylm.world import World

WORLD_BYTES = 16_000_000  # of the embedded world, where a source is "world" and nothing says how much
LEARN_FROM = 20_000  # documents a tokenizer learns from: more changes nothing that shows
VOCAB, SHARE = 4096, 0.05
EVERY = 5.0  # seconds between two lines about slow work
SHARD = re.compile(r"(train|valid)-\d{5}\.(json|bin)")
UNFINISHED = re.compile(r"\.((train|valid)-\d{5}\.(json|bin)|(tokenizer|provenance)\.json)\.\d+")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token shards and their tokenizer; `about` is provenance.json: sources, hashes, counts before and after."""

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    valid: Tokens | None
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For json."""
        return {"folder": str(self.folder), **self.about}

    def __str__(self) -> str:
        lines = [f"{self.folder}: vocabulary {self.tokenizer.vocab:,}, tokenizer sha256 {self.tokenizer.sha256[:16]}"]
        for tokens in (self.train, self.valid):
            if tokens is not None:
                lines.append(
                    f"{tokens.split}: {tokens.documents:,} documents, {tokens.bytes:,} bytes, {len(tokens):,} tokens, "
                    f"{tokens.bytes_per_token:.2f} bytes per token, sha256 {tokens.sha256[:16]}"
                )
        return "\n".join(lines)


def prepare(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    valid: str | os.PathLike | None = None,
    tokenizer: Tokenizer | str | os.PathLike | None = None,
    vocab: int | None = None,
    kind: Kind | None = None,
    clean: bool = True,
    share: float = SHARE,
    separator: str | None = END,
    limit: int | None = None,
    first: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Read, clean, split, tokenize and write; or open what is there already.

    Args:
        sources: one or several that `text.documents` reads (files, folders, "hf:ID"), or "world"; a single folder of
            shards made here is opened as it is, and takes no other option.
        folder: where the shards go.
        valid: source of the held-out documents; without it `share` of the documents, picked by their hash.
        tokenizer: one to use, or its file; without it one of `kind` ("bpe") with `vocab` ids (4096) learns from the
            training text.
        clean: remove equal and nearly equal documents, and held-out ones that occur in the training text.
        separator: stands between the documents of a text file; None keeps each file whole.
        limit: the first so many documents. first: only the first so many tokens of each.
        say: gets a line at every stage, and every few seconds of a long one.

    Raises:
        ConfigError: the folder holds other data, or an option cannot apply. TextError, TokenizerError, DataError,
            FileNotFoundError.
    """
    sources, folder = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources), Path(folder)
    check_limit(limit)
    if len(sources) == 1 and (Path(sources[0]) / "provenance.json").is_file():
        given = {"valid": valid, "tokenizer": tokenizer, "vocab": vocab, "kind": kind, "limit": limit, "first": first}
        wrong = [name for name, value in given.items() if value is not None]
        wrong += [name for name, differs in (("clean", not clean), ("share", share != SHARE)) if differs]
        wrong += ["separator"] * (separator != END)
        if wrong:
            raise ConfigError(f"{sources[0]} holds token shards already: {', '.join(wrong)} cannot apply")
        return opened(Path(sources[0]))
    vocab, kind = VOCAB if vocab is None else vocab, kind or "bpe"
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    wish = {
        "sources": [identity(s, folder) for s in sources],
        "valid": None if valid is None else identity(valid, folder),
        "tokenizer": tokenizer.sha256 if tokenizer else {"kind": kind, "vocab": vocab},
        "clean": clean,
        "share": share,
        "separator": separator,
        "limit": limit,
        "first": first,
    }
    if (folder / "provenance.json").is_file():
        there = opened(folder, verify=True)
        if there.about["wish"] != json.loads(json.dumps(wish)):
            raise ConfigError(
                f"{folder} holds tokens made from other sources or settings; take another folder, or delete it"
            )
        say(f"{folder} is up to date")
        return there
    check_free(folder)

    docs = [text for s in sources for text in counted(read(s, separator, limit), "read", say)][:limit]
    held = None if valid is None else list(counted(read(valid, separator, None), "read of the held-out text", say))
    size = sum(len(text.encode()) for text in docs)
    say(f"read {len(docs):,} documents, {size / 1e6:.1f} MB")
    about: dict[str, Any] = {"wish": wish, "documents_read": len(docs), "bytes_read": size}
    if clean and any(s != "world" for s in sources):
        say(f"looking for duplicates among {len(docs):,} documents")
        progress = now_and_then(say, f"compared {{:,.0f}} of {len(docs):,} documents", unit=1)
        docs, duplicates = deduplicate(docs, progress=progress)
        about["duplicates"] = {"exact": duplicates.exact, "near": duplicates.near, "similarity": duplicates.threshold}
        say(f"removed {duplicates.exact:,} equal and {duplicates.near:,} nearly equal documents")
    if held is None:
        if len(docs) < 2:
            raise ConfigError(
                f"the text is {len(docs)} document, and one cannot be both trained on and held out: say what separates "
                r"its documents (--separator '\n\n' for paragraphs), or give a held-out text (--valid)"
            )
        docs, held = split(docs, valid=share)
    if clean and any(s != "world" for s in sources):
        say(f"looking for {len(held):,} held-out documents in the training text")
        held, overlap = without_overlap(held, counted(docs, "searched", say))
        about["contamination"] = {"exact": overlap.exact, "overlapping": overlap.overlapping, "ngram": overlap.ngram}
        leaked = f"{len(overlap.flagged):,} of {overlap.documents:,} held-out documents"
        say(f"removed {leaked} that occur in the training text")
    if not docs:
        raise ConfigError("no document is left to train on; give more text, or a smaller held-out share")
    if tokenizer is None:
        some = sample(docs, LEARN_FROM)
        say(f"learning a {kind} vocabulary of {vocab:,} from {len(some):,} documents")
        tokenizer = Tokenizer.train(counted(some, "counted the words of", say), vocab=vocab, kind=kind)
        say(f"learned a vocabulary of {tokenizer.vocab:,}")
    found = tokenizer.round_trip(sample(docs, 1000))
    about["round_trip_failures"] = found.failures
    changed = f"{found.failures} of {found.documents:,} sampled documents change in a round trip"
    say(f"{found.bytes_per_token:.2f} bytes per token; {changed}")
    for name, part in (("train", docs), ("valid", held)):
        if part:
            progress = now_and_then(say, name + ": {:,.0f} MB tokenized")
            tokens = write_tokens(part, tokenizer, folder, split=name, first=first, progress=progress)
            about[name] = {k: getattr(tokens, k) for k in ("documents", "bytes", "sha256")} | {"tokens": len(tokens)}
    tokenizer.save(folder / "tokenizer.json")
    # Last, and in one piece: a folder with provenance.json is whole.
    partial = folder / f".provenance.json.{os.getpid()}"
    partial.write_text(json.dumps(about, indent=2) + "\n")
    partial.replace(folder / "provenance.json")
    return opened(folder)


def check_free(folder: Path) -> None:
    """Raise ConfigError when the folder holds what `prepare` did not write, so it can only finish its own work."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; take another one for the tokens")
    names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if any(map(SHARD.fullmatch, names)):
        names = [name for name in names if name != "tokenizer.json"]
    foreign = [name for name in names if not SHARD.fullmatch(name) and not UNFINISHED.fullmatch(name)]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(f"{folder} holds other files ({', '.join(foreign[:3])}{more}); take an empty or new folder")


def now_and_then(say: Callable[[str], None], line: str, unit: float = 1e6) -> Callable[[int], None]:
    """A progress callback that says `line`, with what is done filled in (in megabytes), every few seconds."""
    last = time.monotonic()

    def progress(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            say(line.format(done / unit))

    return progress


def counted(docs: Iterable[str], done: str, say: Callable[[str], None]) -> Iterator[str]:
    """The documents as they come; every few seconds a line says how many have passed."""
    last, size = time.monotonic(), 0
    for count, text in enumerate(docs, 1):
        size += len(text.encode())
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            say(f"{done} {count:,} documents, {size / 1e6:,.1f} MB so far")
        yield text


def opened(folder: Path, verify: bool = False) -> Corpus:
    """The corpus in a folder that `prepare` made. Raises DataError, TokenizerError for one that is damaged."""
    about = json.loads((folder / "provenance.json").read_text())
    train = Tokens.open(folder, "train", verify=verify)
    valid = Tokens.open(folder, "valid", verify=verify) if "valid" in about else None
    return Corpus(folder, Tokenizer.load(folder / "tokenizer.json"), train, valid, about)


def read(source: Any, separator: str | None, limit: int | None) -> Iterator[str]:
    """The documents of a source; "world" is the embedded one."""
    if source != "world":
        yield from documents(source, separator=separator, limit=limit)
        return
    texts, held = World().texts(), 0
    while held < WORLD_BYTES:
        text = next(texts)
        held += len(text.encode())
        yield text


def identity(source: Any, out: Path | None = None) -> str:
    """What tells a source from another: the name of one that is far away, the hash of what is read of one that lies
    here; what is below `out`, the folder that is written, does not count."""
    if source == "world" or str(source).startswith("hf:"):
        return str(source)
    path, digest = Path(source), hashlib.sha256()
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {str(source)!r}")
    files = [p for p in files_of(path) if p.is_file()] if path.is_dir() else [path]
    if out is not None and path.resolve() in out.resolve().parents:
        files = [p for p in files if not p.resolve().is_relative_to(out.resolve())]
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
