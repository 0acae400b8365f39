"""What is done to documents before they become tokens: split, sampled, duplicates removed, leaks from train counted."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.reading import END, TextError, documents

__all__ = [
    "END",
    "ContaminationReport",
    "DedupReport",
    "TextError",
    "bands",
    "clean",
    "contamination",
    "deduplicate",
    "documents",
    "fingerprint",
    "sample",
    "split",
]


def _several(*given: Iterable[str]) -> None:
    """A text is an iterable of str too: its characters would pass for documents."""
    if any(isinstance(docs, str) for docs in given):
        raise TextError("give a list of documents, not one text")


# ---- splitting and sampling by hash


def fingerprint(text: str) -> bytes:
    """16 bytes that agree for texts equal up to white space."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _draw(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(fingerprint(text) + str(seed).encode(), digest_size=8).digest(), "big")


def split(docs: Iterable[str], *, valid: float = 0.05, seed: int = 0) -> tuple[list[str], list[str]]:
    """(train, valid): each document goes by its own hash, so adding documents never moves one across.

    Raises TextError when one side is left empty: with few documents give a file for validation, or another share.
    """
    _several(docs)
    if not 0 < valid < 1:
        raise TextError(f"valid = {valid}: the share must be between 0 and 1")
    sides: tuple[list[str], list[str]] = ([], [])
    for text in docs:
        sides[_draw(text, seed) < valid * 2**64].append(text)
    if not sides[0] or not sides[1]:
        total, empty = len(sides[0]) + len(sides[1]), "train" if not sides[0] else "valid"
        raise TextError(
            f"a split of {total} document(s) at {valid:g} leaves {empty} empty: "
            "give a validation file of its own, split the text into more documents, or change the share"
        )
    return sides


def sample(docs: Iterable[str], count: int, *, seed: int = 0) -> list[str]:
    """`count` of the documents, drawn by hash (whatever their order) in one pass; equal texts count once."""
    worst: list[tuple[int, int, str]] = []
    held: set[int] = set()
    for i, text in enumerate(docs):
        draw = _draw(text, seed)
        if draw in held or (len(worst) >= count and -worst[0][0] <= draw):
            continue
        held.add(draw)
        heapq.heappush(worst, (-draw, i, text))
        if len(worst) > count:
            held.discard(-heapq.heappop(worst)[0])
    return [text for _, _, text in sorted(worst, reverse=True)]


# ---- duplicates

SHINGLE = 5  # words
HASHES = 100
# a random odd factor each: x -> factor x mod 2^64 orders the shingles anew
FACTORS = np.random.Generator(np.random.PCG64(HASHES)).integers(0, 2**63, HASHES, np.uint64) * np.uint64(2) + np.uint64(
    1
)
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DedupReport:
    """`exact` and `near` documents were removed, `kept` stayed; up to five `examples` of (kept, removed) beginnings."""

    documents: int
    exact: int
    near: int
    kept: int
    bytes_before: int
    bytes_after: int
    threshold: float | None
    examples: tuple[tuple[str, str], ...]

    @property
    def share(self) -> float:
        """Removed documents per document."""
        return (self.exact + self.near) / max(1, self.documents)


def bands(near: float, hashes: int = HASHES) -> tuple[int, int, float]:
    """(bands, rows, missed): the most rows per band that miss a pair at the threshold in < 0.1 % of cases."""
    rows = max((r for r in range(1, 21) if (1 - near**r) ** (hashes // r) < 1e-3), default=1)
    return hashes // rows, rows, (1 - near**rows) ** (hashes // rows)


def deduplicate(
    docs: Iterable[str], *, near: float | None = 0.8, progress: Callable[[int], Any] = lambda done: None
) -> tuple[list[str], DedupReport]:
    """Keep the first of each group of equal or nearly equal documents.

    Equal: up to white space. Nearly equal: Jaccard similarity of the sets of 5-word shingles (lower case, punctuation
    dropped) of at least `near` with a document that was kept. Candidates come from MinHash with banding (Broder 1997;
    Leskovec et al., Mining of Massive Datasets, 3.4): 100 hashes, and at the default 0.8 20 bands of 5, which miss a
    pair at the threshold with probability (1 - 0.8^5)^20 = 0.04 % and fewer above it; each candidate is then compared
    exactly, so nothing below the threshold is removed. near=None removes equal ones only. `progress` is called with the
    documents done so far.
    """
    _several(docs)
    if near is not None and not 0 < near <= 1:
        raise TextError(f"near = {near}: a similarity above 0 and at most 1, or None")
    seen: set[bytes] = set()
    unique: list[str] = []
    examples: list[tuple[str, str]] = []
    total = before = 0
    for text in docs:
        total += 1
        before += len(text.encode())
        mark = fingerprint(text)
        if mark not in seen:
            seen.add(mark)
            unique.append(text)
        elif len(examples) < 3:
            examples.append((text[:100], text[:100]))
    twins = {} if near is None else _twins(unique, near, progress)
    examples += [(unique[first][:100], unique[i][:100]) for i, first in list(twins.items())[: 5 - len(examples)]]
    kept = [text for i, text in enumerate(unique) if i not in twins]
    after = sum(len(text.encode()) for text in kept)
    exact = total - len(unique)
    return kept, DedupReport(total, exact, len(twins), len(kept), before, after, near, tuple(examples))


def _twins(texts: list[str], near: float, progress: Callable[[int], Any]) -> dict[int, int]:
    """Each text to remove -> the earlier, kept text that it nearly repeats.

    Only texts that share a band with another are looked at again, so beside the texts the memory is about 1 kB each.
    """
    count, rows, _ = bands(near)
    ids: dict[str, int] = {}
    if not texts:
        return {}
    found = []
    for at in range(0, len(texts), 1024):
        found.append(_bands(texts[at : at + 1024], ids, count, rows))
        progress(min(at + 1024, len(texts)))
    keys = np.concatenate(found).ravel()
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    same = keys[1:] == keys[:-1]
    shared = (np.append(False, same) | np.append(same, False)) & (keys != 0)
    group = np.cumsum(np.append(True, ~same))[shared]
    text = order[shared] // count
    order = np.argsort(text, kind="stable")
    text, group = text[order], group[order]
    twins: dict[int, int] = {}
    kept: dict[int, list[int]] = defaultdict(list)  # group of equal bands -> the texts in it that stay
    sets: dict[int, np.ndarray] = {}
    for part in np.split(np.arange(len(text)), np.flatnonzero(np.diff(text)) + 1) if len(text) else []:
        me, groups = int(text[part[0]]), group[part].tolist()
        mine = _shingles(texts[me], ids)
        for other in sorted({i for g in groups for i in kept[g]}):
            both = len(np.intersect1d(mine, sets[other], assume_unique=True))
            if both >= near * (len(mine) + len(sets[other]) - both):
                twins[me] = other
                break
        else:
            sets[me] = mine
            for g in groups:
                kept[g].append(me)
    return twins


def _bands(texts: list[str], ids: dict[str, int], count: int, rows: int) -> np.ndarray:
    """(texts, count) uint64: a hash of each band of each text's MinHash signature; 0 for a text without words."""
    sets = [_shingles(text, ids) for text in texts]
    full = np.array([len(s) > 0 for s in sets])
    out = np.zeros((len(texts), count), np.uint64)
    if not full.any():
        return out
    sets = [s for s in sets if len(s)]
    flat, starts = np.concatenate(sets), np.cumsum([0, *map(len, sets)])[:-1]
    keys = np.zeros((count, len(sets)), np.uint64) + np.arange(count, dtype=np.uint64)[:, None]
    least = np.empty_like(keys)
    for factors in FACTORS[: count * rows].reshape(rows, count):
        for band, factor in enumerate(factors):
            np.minimum.reduceat(flat * factor, starts, out=least[band])
        keys = _scramble(keys ^ least)
    out[full] = keys.T | np.uint64(1)
    return out


def _shingles(text: str, ids: dict[str, int]) -> np.ndarray:
    """The set of a text's 5-word runs as sorted hashes; a shorter text is one run."""
    return np.unique(_grams(_numbers(text, ids), SHINGLE, whole=True))


def _numbers(text: str, ids: dict[str, int]) -> np.ndarray:
    """The words of a text as numbers, numbered as they appear: Python's own hash changes with every run."""
    return np.array([ids.setdefault(word, len(ids)) for word in WORD.findall(text.lower())], np.uint64)


def _grams(words: np.ndarray, size: int, whole: bool = False) -> np.ndarray:
    """A 64-bit hash of each run of `size` words; `whole`: a shorter text is one run."""
    if len(words) < size:
        if not whole or not len(words):
            return np.empty(0, np.uint64)
        size = len(words)
    out = np.full(len(words) - size + 1, size, np.uint64)
    for i in range(size):
        out = _scramble(out ^ words[i : len(words) - size + 1 + i])
    return out


def _scramble(x: np.ndarray) -> np.ndarray:
    x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(29))


# ---- what of valid is in train


@dataclass(frozen=True)
class ContaminationReport:
    """How much of valid occurs in train. `exact`: equal up to white space; `overlapping`: the others of which at least
    `threshold` of the `ngram`-word runs occur in train. `flagged`: the numbers of all of them in valid, in order."""

    documents: int
    exact: int
    overlapping: int
    ngram: int
    threshold: float
    flagged: tuple[int, ...]

    @property
    def share(self) -> float:
        """Flagged documents per document of valid."""
        return len(self.flagged) / max(1, self.documents)


def contamination(
    train: Iterable[str], valid: Iterable[str], *, ngram: int = 8, threshold: float = 0.5
) -> ContaminationReport:
    """Compare valid with train, which is streamed; memory grows with valid only.

    Words are lower-cased and stripped of punctuation. A document of fewer than `ngram` words can only be exact.
    """
    _several(train, valid)
    if ngram < 1 or not 0 < threshold <= 1:
        raise TextError(f"ngram = {ngram}, threshold = {threshold}: at least 1, and a share above 0")
    ids: dict[str, int] = {}
    grams, marks = [], []
    for text in valid:
        marks.append(fingerprint(text))
        grams.append(np.unique(_grams(_numbers(text, ids), ngram)))
    wanted = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)
    hit = np.zeros(len(wanted), bool)
    seen: set[bytes] = set()
    marked = set(marks)
    train = iter(train)
    known = ids.get
    while block := list(itertools.islice(train, 256)):
        seen.update(marked.intersection(map(fingerprint, block)))
        if len(wanted):
            # a word that valid lacks gets a number that no run of valid has; the same between documents
            stop = ["\x00"] * ngram
            words = [word for text in block for word in (*WORD.findall(text.lower()), *stop)]
            found = _grams(np.array([known(word, len(ids)) for word in words], np.uint64), ngram)
            at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
            hit[at[wanted[at] == found]] = True
    exact, overlapping = [], []
    for i, (mark, own) in enumerate(zip(marks, grams, strict=True)):
        if mark in seen:
            exact.append(i)
        elif len(own) and hit[np.searchsorted(wanted, own)].mean() >= threshold:
            overlapping.append(i)
    flagged = tuple(sorted(exact + overlapping))
    return ContaminationReport(len(marks), len(exact), len(overlapping), ngram, threshold, flagged)


def clean(
    valid: Iterable[str], train: Iterable[str], *, ngram: int = 8, threshold: float = 0.5
) -> tuple[list[str], ContaminationReport]:
    """valid without the documents that `contamination` flags, and its report."""
    _several(train, valid)
    valid = list(valid)
    report = contamination(train, valid, ngram=ngram, threshold=threshold)
    flagged = set(report.flagged)
    return [text for i, text in enumerate(valid) if i not in flagged], report
