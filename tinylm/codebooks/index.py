"""Which code fires where in a corpus: an index on disk, written in one pass over the text and read by mapping it.

    index = build(model, tokens, "runs/index")
    index.postings("blocks.1.mlp.down", 0, 17)      # positions, ascending, nothing read but these

A folder of plain little-endian arrays and `index.json`, which holds their sizes and hashes. For each codebook and
group: `codes` (positions, k), what was chosen at each position, and `postings` with `offsets`, the positions of each
code one after the other. Positions count the corpus' tokens from 0; `starts` holds those at which documents begin.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.codebooks.books import CodebookError, books, read
from tinylm.reading import regular
from tinylm.shards import Tokens

FORMAT = "tinylm codebook index 1"
BLOCK = 1 << 20  # positions that are sorted at once
CHECKED = 1 << 26  # bytes up to which a file is hashed whenever it is opened


class Index:
    """A corpus with the codes of every position, memory-mapped. Made by `build`; `Index(folder)` opens one.

    Attributes:
        sites: name of each codebook -> its groups. codes: name -> codes per group. k: name -> chosen per position.
        tokens: (positions,) ids of the corpus. starts: (documents,) positions at which documents begin.
        folder: where it lies. about: what `build` was told, such as the corpus' sha256.

    Raises CodebookError, naming the file, for what is missing, cut short or damaged.
    """

    def __init__(self, folder: str | os.PathLike, *, verify: bool = False):
        self.folder = Path(folder)
        self.about = _said(self.folder / "index.json")
        self._files: dict[str, np.ndarray] = {}
        for name, said in self.about["files"].items():
            self._files[name] = _mapped(self.folder / name, said, verify)
        self.tokens, self.starts = self._files["tokens"], self._files["starts"]
        self.sites = {name: site["groups"] for name, site in self.about["sites"].items()}
        self.codes = {name: site["codes"] for name, site in self.about["sites"].items()}
        self.k = {name: site["k"] for name, site in self.about["sites"].items()}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts)

    @property
    def columns(self) -> list[tuple[str, int]]:
        """Every (name, group): a set of codes of its own."""
        return [(name, group) for name, groups in self.sites.items() for group in range(groups)]

    def _part(self, kind: str, name: str, group: int) -> np.ndarray:
        file = f"{name}.{group}.{kind}"
        if file not in self._files:
            known = ", ".join(f"{n} ({g} groups)" for n, g in self.sites.items())
            raise CodebookError(f"the index has no group {group} of {name!r}; it has {known}")
        return self._files[file]

    def chosen(self, name: str, group: int = 0) -> np.ndarray:
        """(positions, k) ids chosen at every position, mapped."""
        return self._part("codes", name, group)

    def postings(self, name: str, group: int, code: int) -> np.ndarray:
        """Positions at which a code was chosen, ascending, mapped. Raises CodebookError for a code there is not."""
        offsets = self._part("offsets", name, group)
        if not 0 <= code < len(offsets) - 1:
            raise CodebookError(f"{name} group {group} has no code {code}: they run from 0 to {len(offsets) - 2}")
        return self._part("postings", name, group)[offsets[code] : offsets[code + 1]]

    def counts(self, name: str, group: int = 0) -> np.ndarray:
        """(codes,) how often each was chosen."""
        return np.diff(self._part("offsets", name, group))

    def dead(self, name: str, group: int = 0) -> float:
        """Share of codes that no position chose; say `len(index)` beside it."""
        return float((self.counts(name, group) == 0).mean())

    def where(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents of positions, and the places inside them."""
        document = np.searchsorted(self.starts, positions, side="right") - 1
        return document, np.asarray(positions) - self.starts[document]

    def verify(self) -> None:
        """Hash every file. Raises CodebookError naming the damaged one."""
        for name, said in self.about["files"].items():
            _mapped(self.folder / name, said, True)

    def __repr__(self) -> str:
        return f"Index({len(self):,} positions, {self.documents:,} documents, {len(self.columns)} codebooks)"


# --- writing ----------------------------------------------------------------------------------------------------------


def windows(tokens: Tokens, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first new position) of the windows that read every document from its beginning.

    A document opens at each begin token (end token, where that opens one); longer ones are read in windows that start
    `stride` later each and add what no window before them held.
    """
    opens = tokens.end if tokens.begin is None else tokens.begin
    starts = [0]
    if opens is not None:
        blocks = range(0, len(tokens), BLOCK)
        starts = [a + at for a in blocks for at in np.flatnonzero(tokens[a : a + BLOCK] == opens).tolist()]
        starts = starts if starts and starts[0] == 0 else [0, *starts]
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        at, seen = begin, begin
        while seen < end:
            stop = min(at + context, end)
            yield at, stop, seen
            at, seen = at + stride, stop


def build(
    model: Any,
    tokens: Tokens,
    folder: str | os.PathLike,
    *,
    batch: int = 32,
    stride: int | None = None,
    on: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Index:
    """Index a corpus: run the model over it once, note every chosen code, and turn the notes round.

    Memory does not grow with the corpus: notes go to disk as they come, and are sorted block by block. The folder
    appears whole, or not at all; one of that name is replaced if it is an index.

    Args:
        tokens: the corpus. folder: to write. batch: windows per call of the model.
        stride: of windows in documents longer than the context; default half of it.
        on: False notes the nearest codes and lets states pass as they are: the control with codes that nobody trained.
        progress: called with the positions done.

    Raises:
        CodebookError: a model without codebooks, tokens that are not the model's, or a folder that is something else.
    """
    known, folder = books(model), Path(folder)
    if not isinstance(tokens, Tokens):
        raise CodebookError(
            f"tokens are {type(tokens).__name__}: give Tokens, as `write_tokens` or `Tokens.from_array` do"
        )
    if tokens.vocab > model.config.vocab:
        raise CodebookError(
            f"the tokens have {tokens.vocab} ids, the model {model.config.vocab}: not this model's corpus"
        )
    if len(tokens) >= 1 << 32:
        raise CodebookError(f"{len(tokens):,} positions do not fit 32 bits: index a part of them")
    if folder.exists() and not _replaceable(folder):
        raise CodebookError(
            f"{folder} holds something else than an index: choose another folder, or remove it yourself"
        )
    context = model.config.context
    stride = max(1, context // 2) if stride is None else stride
    if type(stride) is not int or not 0 < stride <= context:
        raise CodebookError(f"stride = {stride!r}: must be from 1 to the context of {context}")
    if type(batch) is not int or batch < 1:
        raise CodebookError(f"batch = {batch!r}: must be a whole number of windows, at least 1")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        sites = {n: {"groups": b.groups, "codes": b.book.shape[1], "k": b.k} for n, b in known.items()}
        wide = {n: np.uint16 if s["codes"] <= 1 << 16 else np.uint32 for n, s in sites.items()}
        files: dict[str, np.ndarray] = {"tokens": _new(work / "tokens", (len(tokens),), np.uint32)}
        for n, s in sites.items():
            for g in range(s["groups"]):
                files[f"{n}.{g}.codes"] = _new(work / f"{n}.{g}.codes", (len(tokens), s["k"]), wide[n])
        for at in range(0, len(tokens), BLOCK):
            files["tokens"][at : at + BLOCK] = tokens[at : at + BLOCK]
        run = functools.partial(read, model, on=on)
        starts = _note(run, tokens, files, (batch, context, stride), progress)
        files["starts"] = _new(work / "starts", (len(starts),), np.int64)
        files["starts"][:] = starts
        for n, s in sites.items():
            for g in range(s["groups"]):
                files |= _turned(work, f"{n}.{g}", files[f"{n}.{g}.codes"], s["codes"])
        said = {}
        for name, array in files.items():
            array.flush()  # type: ignore[attr-defined]
            kind = array.dtype.newbyteorder("<").str
            said[name] = {"dtype": kind, "shape": list(array.shape), "sha256": _sha256(work / name)}
        about = {"format": FORMAT, "sites": sites, "files": said, "corpus_sha256": tokens.sha256, "stride": stride}
        (work / "index.json").write_text(json.dumps(about, indent=1))
        if folder.exists():  # the old one goes when the new one is there
            os.rename(folder, old := work.with_name(f"{work.name}-old"))
            os.rename(work, folder)
            shutil.rmtree(old)
        else:
            os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Index(folder)


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty, or an index: then its arrays may be damaged, but its index.json says what it is."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder.is_dir()
    try:
        return bool(_said(folder / "index.json"))
    except CodebookError:
        return False


def _note(
    run: Callable, tokens: Tokens, files: dict[str, np.ndarray], sizes: tuple[int, int, int], progress: Any
) -> list[int]:
    """Write the codes of every position; returns where documents begin."""
    batch, context, stride = sizes
    starts: list[int] = []
    pending: list[tuple[int, int, int]] = []
    waiting: list[tuple[list[tuple[int, int, int]], Any]] = []  # one batch is on the device while the last is written

    def land() -> None:
        rows, found = waiting.pop(0)
        for name, ids in found.items():
            ids = np.asarray(ids)
            for g in range(ids.shape[2]):
                notes = files[f"{name}.{g}.codes"]
                for row, (at, stop, new) in enumerate(rows):
                    notes[new:stop] = ids[row, new - at : stop - at, g]
        if progress:
            progress(rows[-1][1])

    def launch() -> None:
        width = min(context, -(-max(stop - at for at, stop, _ in pending) // 64) * 64)
        batched = np.zeros((batch, width), np.int32)
        for row, (at, stop, _) in zip(batched, pending, strict=False):
            row[: stop - at] = tokens[at:stop]
        waiting.append((list(pending), run(batched)))
        pending.clear()

    for at, stop, new in windows(tokens, context, stride):
        if at == new:
            starts.append(at)
        pending.append((at, stop, new))
        if len(pending) == batch:
            launch()
        if len(waiting) > 1:
            land()
    if pending:
        launch()
    while waiting:
        land()
    return starts


def _turned(work: Path, name: str, notes: np.ndarray, codes: int) -> dict[str, np.ndarray]:
    """Positions by code, from codes by position: a counting sort that holds one block in memory."""
    count = np.zeros(codes, np.int64)
    for at in range(0, len(notes), BLOCK):
        count += np.bincount(notes[at : at + BLOCK].ravel(), minlength=codes)
    offsets = _new(work / f"{name}.offsets", (codes + 1,), np.int64)
    offsets[:] = np.concatenate([[0], np.cumsum(count)])
    postings = _new(work / f"{name}.postings", (int(offsets[-1]),), np.uint32)
    free = offsets[:-1].copy()
    for at in range(0, len(notes), BLOCK):
        block = notes[at : at + BLOCK]
        order = np.argsort(block.ravel(), kind="stable")
        own = np.bincount(block.ravel(), minlength=codes)
        # Of the r-th of a code's entries in this block: where the code's free room begins, plus r.
        place = np.repeat(free - np.concatenate([[0], np.cumsum(own)[:-1]]), own) + np.arange(block.size)
        postings[place] = (order // notes.shape[1] + at).astype(np.uint32)
        free += own
    return {f"{name}.offsets": offsets, f"{name}.postings": postings}


def _new(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if 0 in shape:
        path.touch()
        return np.empty(shape, dtype).view(_Empty)
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "w+", shape=shape)


class _Empty(np.ndarray):
    """An array without elements, which no file can be mapped as."""

    def flush(self) -> None:
        """Nothing to write."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _said(path: Path) -> dict[str, Any]:
    """index.json, checked as far as opening relies on it."""
    try:
        said = json.loads(regular(path))
        kinds = {"<u2", "<u4", "<i8"}
        good = said["format"] == FORMAT and {"tokens", "starts"} <= said["files"].keys()
        for name, file in said["files"].items():
            sizes = all(type(n) is int and n >= 0 for n in file["shape"])
            good &= file["dtype"] in kinds and sizes and len(file["shape"]) in (1, 2) and "/" not in name
        for name, site in said["sites"].items():
            good &= all(type(site[key]) is int and site[key] > 0 for key in ("groups", "codes", "k"))
            parts = [f"{name}.{g}.{part}" for g in range(site["groups"]) for part in ("codes", "offsets", "postings")]
            good &= set(parts) <= said["files"].keys()
    except FileNotFoundError:
        raise CodebookError(f"{path.parent} holds no index: {path.name} is missing; make one with `build`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CodebookError(
            f"{path} cannot be read as an index ({type(error).__name__}: {error}): build it again"
        ) from None
    if not good:
        raise CodebookError(f"{path} is not an index that this version reads: build it again")
    return said


def _mapped(path: Path, said: dict[str, Any], verify: bool) -> np.ndarray:
    shape, dtype = tuple(said["shape"]), np.dtype(said["dtype"])
    size = int(np.prod(shape)) * dtype.itemsize
    if not path.is_file() or path.stat().st_size != size:
        found = f"has {path.stat().st_size:,}" if path.is_file() else "is missing"
        raise CodebookError(f"{path} should have {size:,} bytes and {found}: build the index again")
    if (verify or size <= CHECKED) and _sha256(path) != said["sha256"]:
        raise CodebookError(f"{path} is damaged (its sha256 is not the noted one): build the index again")
    return np.memmap(path, dtype, "r", shape=shape) if size else np.empty(shape, dtype)
