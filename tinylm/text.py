"""What is done to documents before they become tokens: split, sampled, duplicates removed, leaks from train counted."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .reading import END, TextError, documents

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


def deduplicate(docs: Iterable[str], *, near: float | None = 0.8) -> tuple[list[str], DedupReport]:
    """Keep the first of each group of equal or nearly equal documents.

    Equal: up to white space. Nearly equal: Jaccard similarity of the sets of 5-word shingles (lower case, punctuation
    dropped) of at least `near` with a document that was kept. Candidates come from MinHash with banding (Broder 1997;
    Leskovec et al., Mining of Massive Datasets, 3.4): 100 hashes, and at the default 0.8 20 bands of 5, which miss a
    pair at the threshold with probability (1 - 0.8^5)^20 = 0.04 % and fewer above it; each candidate is then compared
    exactly, so nothing below the threshold is removed. near=None removes equal ones only.
    """
    if near is not None and not 0 < near <= 1:
        raise TextError(f"near = {near}: a similarity above 0 and at most 1, or None")
    seen: set[bytes] = set()
    kept: list[str] = []
    examples: list[tuple[str, str]] = []
    finder = _Near(near) if near is not None else None
    total = exact = nearly = before = after = 0
    docs = iter(docs)
    while block := list(itertools.islice(docs, 1024)):
        fresh = []
        for text in block:
            total += 1
            before += len(text.encode())
            mark = fingerprint(text)
            if mark in seen:
                exact += 1
                examples.append((text[:100], text[:100]))
            else:
                seen.add(mark)
                fresh.append(text)
        twins = finder.add(fresh) if finder else [None] * len(fresh)
        for text, twin in zip(fresh, twins, strict=True):
            if twin is None:
                kept.append(text)
                after += len(text.encode())
            else:
                nearly += 1
                examples.append((twin, text[:100]))
        del examples[5:]
    return kept, DedupReport(total, exact, nearly, len(kept), before, after, near, tuple(examples))


class _Near:
    """The kept documents so far: their shingles, MinHash signatures, and buckets of equal bands."""

    def __init__(self, near: float) -> None:
        self.near = near
        self.bands, self.rows, _ = bands(near)
        rng = np.random.Generator(np.random.PCG64(HASHES))
        self.factor = rng.integers(0, 2**63, HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
        self.ids: dict[str, int] = {}
        self.buckets: dict[int, list[int]] = defaultdict(list)
        self.shingles: list[np.ndarray] = []
        self.signs: list[np.ndarray] = []
        self.heads: list[str] = []

    def add(self, texts: list[str]) -> list[str | None]:
        """For each text the beginning of the kept document it nearly repeats, or None: then it is kept from now on."""
        sets = [np.unique(_grams(_numbers(text, self.ids), SHINGLE, whole=True)) for text in texts]
        held = [s for s in sets if len(s)]
        if not held:
            return [None] * len(texts)
        flat = np.concatenate(held)
        starts = np.cumsum([0, *map(len, held)])[:-1]
        signs = np.empty((len(held), HASHES), np.uint32)
        for k, factor in enumerate(self.factor):
            signs[:, k] = np.minimum.reduceat(flat * factor, starts) >> np.uint64(32)
        banded = signs[:, : self.bands * self.rows].reshape(len(held), self.bands, self.rows)
        keys = np.zeros((len(held), self.bands), np.uint64) + np.arange(self.bands, dtype=np.uint64)
        for row in range(self.rows):
            keys = _scramble(keys ^ banded[:, :, row])
        keyed = iter(zip(keys.tolist(), signs, strict=True))
        return [
            self._twin(text, shingles, *next(keyed)) if len(shingles) else None
            for text, shingles in zip(texts, sets, strict=True)
        ]

    def _twin(self, text: str, shingles: np.ndarray, keys: list[int], sign: np.ndarray) -> str | None:
        candidates = sorted({i for key in keys if key in self.buckets for i in self.buckets[key]})
        if candidates:
            # the signature's estimate has a deviation of at most 0.05: five of them below the threshold is no candidate
            alike = (np.stack([self.signs[i] for i in candidates]) == sign).mean(1)
            for i in np.array(candidates)[alike >= self.near - 0.25]:
                other = self.shingles[i]
                small, large = sorted((len(shingles), len(other)))
                if small < self.near * large:
                    continue
                both = len(np.intersect1d(shingles, other, assume_unique=True))
                if both >= self.near * (small + large - both):
                    return self.heads[i]
        for key in keys:
            self.buckets[key].append(len(self.heads))
        self.shingles.append(shingles)
        self.signs.append(sign)
        self.heads.append(text[:100])
        return None


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
    valid = list(valid)
    report = contamination(train, valid, ngram=ngram, threshold=threshold)
    flagged = set(report.flagged)
    return [text for i, text in enumerate(valid) if i not in flagged], report
