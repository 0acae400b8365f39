"""Classification sets: texts with a class each, from files, the hub or the embedded world; and the papers' subsamples.

read_set("val_wiki.json", markers=True)     FewRel's original form, entities marked
read_set("train.jsonl.gz"), read_set("train.csv"), read_set("SST-2/train.tsv"), read_set("hf:ag_news")
read_set(World().classification("where", classes=16, n=2000))
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinylm.config import suggest

if TYPE_CHECKING:
    from _csv import Reader  # what csv.reader gives: it has no public name

__all__ = ["PROTOCOLS", "Dataset", "Protocol", "SetError", "read_set", "rows_of"]

TEXT = ("text", "sentence", "content", "description", "utterance", "question", "sentence1")
LABEL = ("label", "intent", "relation", "class", "category", "target", "label_text", "gold_label")
FEW = 8  # names of classes or columns that a message lists


class SetError(ValueError):
    """A classification set that cannot be read or used; the message says what of which."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """`texts` (N,) with `labels` (N,) int32 that index `names`; a class may have no text."""

    texts: tuple[str, ...]
    labels: np.ndarray
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if isinstance(self.texts, str) or isinstance(self.names, str) or labels.ndim != 1:
            raise SetError(f"texts and names must be sequences, labels of shape (N,) and not {labels.shape}")
        if len(self.texts) != len(labels) or not len(labels):
            raise SetError(f"{len(self.texts)} texts and {len(labels)} labels: give one label per text, and some texts")
        if len(set(self.names)) < len(self.names) or len(self.names) < 2:
            raise SetError(f"classes {self.names[:FEW]}: give at least two different names")
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(self.names):
            raise SetError(f"labels must be whole numbers from 0 to {len(self.names) - 1}")
        object.__setattr__(self, "labels", labels.astype(np.int32))
        object.__setattr__(self, "texts", tuple(self.texts))
        object.__setattr__(self, "names", tuple(self.names))

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        few = ", ".join(self.names[:FEW]) + (", ..." if len(self.names) > FEW else "")
        return f"Dataset({len(self):,} texts, {len(self.names)} classes: {few})"

    @property
    def counts(self) -> np.ndarray:
        """Texts of each class."""
        return np.bincount(self.labels, minlength=len(self.names))

    def take(self, where: Sequence[int] | np.ndarray) -> Dataset:
        """The texts at these places, in this order."""
        return Dataset(tuple(self.texts[i] for i in where), self.labels[np.asarray(where, int)], self.names)

    def balanced(self, per_class: int, *, seed: int = 42) -> Dataset:
        """So many texts of each class, drawn by Python's `random.sample` class after class, as the paper's code does.

        Raises SetError where a class has fewer.
        """
        if per_class < 1 or self.counts.min() < per_class:
            few = int(self.counts.argmin())
            raise SetError(f"per_class = {per_class}: class {self.names[few]!r} has {self.counts[few]} texts")
        draw = random.Random(seed)
        chosen = [draw.sample(np.flatnonzero(self.labels == c).tolist(), per_class) for c in range(len(self.names))]
        return self.take(np.concatenate(chosen))

    def split(self, held_out: float, *, seed: int = 0) -> tuple[Dataset, Dataset]:
        """(the rest, a share `held_out` of every class; at least one text of those that have two to each)."""
        if not 0 < held_out < 1:
            raise SetError(f"held_out = {held_out}: must be a share between 0 and 1")
        draw, out = np.random.default_rng(seed), np.zeros(len(self), bool)
        for c in range(len(self.names)):
            own = draw.permutation(np.flatnonzero(self.labels == c))
            out[own[: min(max(1, round(held_out * len(own))), max(len(own) - 1, 0))]] = True
        if not out.any():
            raise SetError("no class has two texts: nothing can be held out")
        return self.take(np.flatnonzero(~out)), self.take(np.flatnonzero(out))

    def numbered_as(self, names: Sequence[str]) -> Dataset:
        """The same texts with labels that index `names`, where every class is found by its name.

        A classifier whose classes are called "0", "1", ... has forgotten their names: as many of any name are taken in
        their order. Raises SetError for a class that `names` lacks.
        """
        names = tuple(names)
        unnamed = names == tuple(map(str, range(len(names)))) and len(names) == len(self.names)
        if names == self.names or unnamed:
            return self
        if lacking := [name for name in self.names if name not in names]:
            raise SetError(
                f"the classifier has {len(names)} classes and the set {len(self.names)}, of which it lacks "
                f"{len(lacking)}, such as {lacking[0]!r}{suggest(lacking[0], names)}"
            )
        return Dataset(self.texts, np.array([names.index(name) for name in self.names])[self.labels], names)

    def only(self, names: Sequence[str]) -> Dataset:
        """The texts of these classes, numbered in this order."""
        for name in names:
            if name not in self.names:
                raise SetError(f"no class is called {name!r}{suggest(name, self.names)}")
        new = {self.names.index(name): i for i, name in enumerate(names)}
        kept = [i for i, label in enumerate(self.labels.tolist()) if label in new]
        return Dataset(tuple(self.texts[i] for i in kept), np.array([new[self.labels[i]] for i in kept]), tuple(names))


class Protocol(NamedTuple):
    """A paper's subsample: texts per class to learn from and to test on; `apart` when both come from one file."""

    train: int
    test: int
    apart: bool

    def __call__(self, train: Dataset, test: Dataset | None = None, *, seed: int = 42) -> tuple[Dataset, Dataset]:
        """(train, test). Raises SetError where a class has too few texts, or a test set is missing."""
        if self.apart:
            both = train.balanced(self.train + self.test, seed=seed)
            place = np.arange(len(both)) % (self.train + self.test)
            return both.take(np.flatnonzero(place < self.train)), both.take(np.flatnonzero(place >= self.train))
        if test is None:
            raise SetError("this protocol takes its test texts from a file of their own: give test=")
        return train.balanced(self.train, seed=seed), test.balanced(self.test, seed=seed)


PROTOCOLS = {  # Tiny language models (Gross et al. 2025), from their code; each seeded with 42
    "ag_news": Protocol(1000, 1000, False),
    "dbpedia": Protocol(100, 100, False),
    "fewrel": Protocol(630, 70, True),
}


def read_set(
    source: Any,
    *,
    text: str | int | Sequence[str | int] | None = None,
    label: str | int | None = None,
    names: Sequence[str] | Mapping[str, str] | str | Path | None = None,
    markers: bool = False,
    split: str = "train",
    limit: int | None = None,
) -> Dataset:
    """Read a classification set.

    Args:
        source: a .json (FewRel: relation -> instances), .jsonl, .csv or .tsv file, gzipped or not; `hf:ID`; what
            `World.classification` gives; or pairs of text and label.
        text: name, or place from 0, of the column with the text; several are joined by a newline (pairs of sentences).
            Default: the first known name (text, sentence, ...). label: the same of the class.
        names: of the classes, in order, where the file has numbers; or their readable names by the file's (a mapping,
            or a json file of one: FewRel's pid2name.json).
        markers: put [h] [/h] and [t] [/t] around the head and the tail entity of a relation.
        split: of a hub id. limit: the first so many texts.

    Raises SetError: a missing file, column or field, an unknown suffix, or nothing to read.
    """
    if hasattr(source, "labels") and hasattr(source, "names"):
        return Dataset(tuple(source.texts)[:limit], np.asarray(source.labels)[:limit], tuple(source.names))
    if isinstance(source, str | Path):
        rows = _file(str(source), text, label, markers, split)
    else:
        rows = _pairs(source)
    texts, raw = [], []
    for one, kind in rows:
        if limit is not None and len(texts) >= limit:
            break
        texts.append(one)
        raw.append(kind)
    if not texts:
        raise SetError(f"{source}: no text in it")
    known = names
    if isinstance(names, str | Path):
        with _open(Path(names)) as file:
            try:
                known = json.load(file)
            except ValueError as error:
                raise SetError(f"{names}: {error}") from None
    return _numbered(texts, raw, known, str(source))


def _numbered(texts: list[str], raw: list[Any], names: Any, what: str) -> Dataset:
    """Classes by their names: those given; else numbers in their order, texts in the alphabet's."""
    if isinstance(names, Mapping):
        said = {str(key): value[0] if isinstance(value, list) else value for key, value in names.items()}
        raw, names = [said.get(str(kind), str(kind)) for kind in raw], None
    whole = all(isinstance(kind, int | np.integer) or str(kind).isdigit() for kind in raw)
    if names is not None:
        names = tuple(map(str, names))
        whole = whole and not all(str(kind) in names for kind in raw)  # classes may be called "1", "2", ...
        found = [int(kind) if whole else names.index(kind) if kind in names else -1 for kind in raw]
        if min(found) < 0 or max(found) >= len(names):
            wrong = raw[next(i for i, n in enumerate(found) if not 0 <= n < len(names))]
            raise SetError(f"{what}: class {wrong!r} is not among the {len(names)} names given")
        return Dataset(tuple(texts), np.array(found), names)
    order = sorted(set(raw), key=int if whole else str)
    place = {kind: i for i, kind in enumerate(order)}
    return Dataset(tuple(texts), np.array([place[kind] for kind in raw]), tuple(map(str, order)))


def _pairs(source: Any) -> Iterator[tuple[str, Any]]:
    """(text, class) of a sequence of pairs, each of which must be one."""
    if not isinstance(source, Iterable):
        raise SetError(f"{source!r} is no set: a file, hf:ID, World.classification(...), or pairs of text and label")
    for number, pair in enumerate(source, 1):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], str):
            raise SetError(f"pair {number} is {pair!r}: not a text and its class")
        yield pair[0], pair[1]


def _open(path: Path) -> io.TextIOBase:
    if not path.is_file():
        raise SetError(f"there is no file {str(path)!r}")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")  # type: ignore[return-value]
    return path.open(encoding="utf-8", newline="")


def _file(source: str, text: Any, label: Any, markers: bool, split: str) -> Iterator[tuple[str, Any]]:
    if source.startswith("hf:"):
        yield from _records(_hub(source.removeprefix("hf:"), split), text, label, markers, source)
        return
    path = Path(source)
    suffix = Path(source.removesuffix(".gz")).suffix.lower()
    if suffix not in (".json", ".jsonl", ".csv", ".tsv"):
        raise SetError(f"{source}: unknown suffix {suffix!r}; known: .json (FewRel), .jsonl, .csv, .tsv, hf:ID")
    with _open(path) as file:
        try:
            if suffix == ".json":
                yield from _relations(json.load(file), markers, source)
            elif suffix == ".jsonl":
                lines = (json.loads(line) for line in file if line.strip())
                yield from _records(lines, text, label, markers, source)
            else:
                quoting = csv.QUOTE_MINIMAL if suffix == ".csv" else csv.QUOTE_NONE  # GLUE's files quote nothing
                cells = csv.reader(file, delimiter="," if suffix == ".csv" else "\t", quoting=quoting)
                yield from _records(_columns(cells, text, label), text, label, markers, source)
        except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
            raise SetError(f"{source}: {error}") from None


def _columns(cells: Reader, text: Any, label: Any) -> Iterator[dict]:
    """Rows of a table as mappings: by the names of its first row, or by number where columns were given so."""
    numbered = isinstance(label, int) or isinstance(text, int)
    header = None if numbered else next(cells, [])
    for row in cells:
        if row:
            if header is not None and len(row) > len(header):
                raise SetError(
                    f"line {cells.line_num}: {len(row)} cells, and {len(header)} in the first; quote the text"
                )
            yield dict(enumerate(row)) if header is None else dict(zip(header, row, strict=False))


def _records(records: Iterable[Mapping], text: Any, label: Any, markers: bool, source: str) -> Iterator[tuple]:
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise SetError(f"{source}, row {number}: not a record with named fields")
        columns = text if isinstance(text, list | tuple) else [_field(record, text, TEXT, source, number)]
        missing = [c for c in columns if c not in record]
        if missing:
            raise SetError(f"{source}, row {number}: no field {missing[0]!r}; it has {list(record)[:FEW]}")
        kind = record[_field(record, label, LABEL, source, number)]
        if kind is None or kind != kind or any(record[c] is None for c in columns):  # NaN is no class either
            raise SetError(f"{source}, row {number}: no text or no class: {str(dict(record))[:80]}")
        whole = "\n".join(str(record[c]) for c in columns)
        if markers:
            whole = marked(str(whole).split(), _flat_span(record, "h", source), _flat_span(record, "t", source))
        yield whole, kind


def _field(record: Mapping, wanted: Any, usual: Sequence[str], source: str, number: int) -> Any:
    for name in usual if wanted is None else (wanted,):
        if name in record:
            return name
    asked = f"no field {wanted!r}" if wanted is not None else f"none of the fields {', '.join(usual)}"
    raise SetError(f"{source}, row {number}: {asked}; it has {list(record)[:FEW]}")


def _relations(raw: Any, markers: bool, source: str) -> Iterator[tuple[str, str]]:
    """FewRel: {"P177": [{"tokens": [...], "h": [name, id, [[places]]], "t": ...}]}."""
    try:
        for relation, instances in raw.items():
            for one in instances:
                words = one["tokens"]
                yield (marked(words, one["h"][2][0], one["t"][2][0]) if markers else " ".join(words)), relation
    except (AttributeError, KeyError, TypeError, IndexError):
        raise SetError(f"{source} is not in FewRel's form: relation -> instances with tokens, h and t") from None


def _flat_span(record: Mapping, field: str, source: str) -> list[int]:
    """The places of an entity in a record {"h": [name, "29 30", id]}."""
    try:
        return [int(place) for place in str(record[field][1]).split()]
    except (KeyError, IndexError, TypeError, ValueError):
        raise SetError(f"{source}: a record has no places of its entities in {field!r}; leave markers out") from None


def marked(words: Sequence[str], head: Sequence[int], tail: Sequence[int]) -> str:
    """The words with [h] [/h] around the head's places and [t] [/t] around the tail's."""
    before = {min(head): "[h]", min(tail): "[t]"} if min(head) != min(tail) else {min(head): "[h] [t]"}
    after = {max(head): "[/h]", max(tail): "[/t]"} if max(head) != max(tail) else {max(head): "[/t] [/h]"}
    parts = ([before.get(i), word, after.get(i)] for i, word in enumerate(words))
    return " ".join(part for three in parts for part in three if part)


def _hub(name: str, split: str) -> Iterator[Mapping]:
    """Rows of a data set of the hub; classes by name where it says them."""
    import datasets

    name, _, own = name.partition(":")
    try:
        rows: Any = datasets.load_dataset(name, own or None, split=split)
    except Exception as error:
        raise SetError(f"hf:{name}: {type(error).__name__}: {error}") from error
    kinds = {column: kind.names for column, kind in rows.features.items() if hasattr(kind, "names")}
    for row in rows:
        yield {c: kinds[c][v] if c in kinds and isinstance(v, int) and v >= 0 else v for c, v in row.items()}


def rows_of(texts: Sequence[str], tokenizer: Any, kind: str = "encoder") -> list[np.ndarray]:
    """Token ids of each text with what stands around it: an encoder's cls and sep, a decoder's begin and end."""
    ends = ("cls", "sep"), ("begin", "end")
    first, last = ends[kind != "encoder"]
    first, last = (getattr(tokenizer, r) for r in (first, last))
    if kind == "encoder":  # as the engine has it
        first, last = tokenizer.begin if first is None else first, tokenizer.end if last is None else last
    before, after = ([] if i is None else [i] for i in (first, last))
    return [np.array([*before, *ids, *after], np.int32) for ids in tokenizer.encode_batch(texts)]
