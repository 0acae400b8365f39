"""What two texts share, and what a text shares with a corpus: ROUGE, n-grams never seen, the longest run of words.

Words are runs of a-z and 0-9 in lower case, as in Google's rouge-score.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tinylm.evaluation import EvaluationError

__all__ = ["Corpus", "Rouge", "Run", "ngrams", "rouge_l", "rouge_n", "words"]

BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(BASE, -1, 2**64)


def words(text: str) -> list[str]:
    """The words of a text."""
    return re.findall(r"[a-z0-9]+", text.lower())


def ngrams(of: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs."""
    return Counter(zip(*(of[i:] for i in range(n)), strict=False))


class Rouge(NamedTuple):
    """Shares of the candidate (precision) and of the reference (recall) that are in the other, and their mean f."""

    precision: float
    recall: float
    f: float

    @classmethod
    def of(cls, both: tuple[int, int], sizes: tuple[int, int]) -> Rouge:
        """From what is shared and the size, on either side; 0 where a side is empty."""
        p, r = (b / n if n else 0.0 for b, n in zip(both, sizes, strict=True))
        return cls(p, r, 2 * p * r / (p + r) if p + r else 0.0)


def rouge_n(candidate: str | Sequence[str], reference: str | Sequence[str], n: int = 2, *, clip: bool = True) -> Rouge:
    """ROUGE-n (Lin 2004) of two texts, or of two lists of words.

    An n-gram counts as often as it occurs in both. Without `clip` it is the measure of TinyStories (Eldan and Li 2023):
    precision is the share of the candidate's n-grams that occur in the reference at all, recall the reverse.
    """
    a, b = (ngrams(words(t) if isinstance(t, str) else t, n) for t in (candidate, reference))
    sizes = a.total(), b.total()
    if clip:
        shared = (a & b).total()
        return Rouge.of((shared, shared), sizes)
    return Rouge.of((sum(c for g, c in a.items() if g in b), sum(c for g, c in b.items() if g in a)), sizes)


def rouge_l(candidate: str | Sequence[str], reference: str | Sequence[str]) -> Rouge:
    """ROUGE-L (Lin 2004): the longest common subsequence of words, over the words of either text."""
    a, b = (words(t) if isinstance(t, str) else t for t in (candidate, reference))
    shared = _lcs(a, b)
    return Rouge.of((shared, shared), (len(a), len(b)))


def _lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table per big integer (Hyyrö 2004)."""
    full, places = (1 << len(a)) - 1, dict.fromkeys(a, 0)
    for i, word in enumerate(a):
        places[word] |= 1 << i
    row = full
    for word in b:
        hit = row & places.get(word, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()


class Run(NamedTuple):
    """A run of `length` words that a text shares with a corpus: where it starts in the text's words, and in which
    document it occurs; `length` 0 and `document` -1 where they share none."""

    length: int
    start: int
    document: int


class Corpus:
    """An index of texts by their runs of words: a few seconds and about 100 bytes a word for some MB of text.

    Runs are compared by a 64-bit polynomial hash of random words: two different ones agree with chance 2^-64 or so.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        """Raises EvaluationError for no text, or none with a word."""
        self.texts = list(texts)
        self.ids: dict[str, int] = {}
        self.split = [words(text) for text in self.texts]
        stream: list[int] = []
        for number, one in enumerate(self.split):
            stream += [self.ids.setdefault(word, len(self.ids)) for word in one]
            stream.append(-1 - number)  # ends a document, and equals no other
        if not self.ids:
            raise EvaluationError(f"the corpus of {len(self.texts)} texts holds no word")
        self.stream = np.array(stream, np.int64)
        self.starts = np.cumsum([0, *(len(one) + 1 for one in self.split)])[:-1]
        self._sums = _sums(self.stream)
        self._bigrams: tuple[np.ndarray, np.ndarray] | None = None

    def _rows(self, texts: Sequence[Sequence[str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        unknown = -1 - len(self.texts)
        return [_sums(np.array([self.ids.get(word, unknown) for word in one], np.int64)) for one in texts]

    def unseen(self, texts: Sequence[Sequence[str]], n: int) -> np.ndarray:
        """Share of each text's n-grams that the corpus does not hold: (texts,) float64, NaN for a shorter text."""
        own = [_hashes(row, n) for row in self._rows(texts)]
        return np.array([1 - np.mean(hit) if len(hit) else np.nan for hit in self._hits(own, n)])

    def _hits(self, own: Sequence[np.ndarray], n: int) -> list[np.ndarray]:
        """Which of these hashes of n-word runs occur in the corpus."""
        wanted = np.unique(np.concatenate([*own, np.empty(0, np.uint64)]))
        seen = np.zeros(len(wanted), bool)
        if len(wanted):
            mine = _hashes(self._sums, n)
            at = np.minimum(np.searchsorted(wanted, mine), len(wanted) - 1)
            seen[at[wanted[at] == mine]] = True
        return [seen[np.searchsorted(wanted, hashes)] for hashes in own]

    def longest(self, texts: Sequence[Sequence[str]]) -> list[Run]:
        """The longest run of words that each text shares with any document."""
        rows = self._rows(texts)
        least, most = np.zeros(len(texts), int), np.array([len(one) for one in texts], int) + 1
        while (open_ := most - least > 1).any():  # a shared run of n words holds shared ones of fewer: halve
            middle = np.minimum((least + most) // 2, np.maximum(2 * least, 8))
            for n in np.unique(middle[open_]).tolist():
                which = np.flatnonzero(open_ & (middle == n))
                hits = self._hits([_hashes(rows[i], n) for i in which], n)
                for i, hit in zip(which, hits, strict=True):
                    (least if hit.any() else most)[i] = n
        found = [Run(0, 0, -1)] * len(texts)
        for n in np.unique(least[least > 0]).tolist():
            mine = _hashes(self._sums, n)
            order = np.argsort(mine, kind="stable")
            for i in np.flatnonzero(least == n).tolist():
                hashes = _hashes(rows[i], n)
                at = np.minimum(np.searchsorted(mine, hashes, sorter=order), len(mine) - 1)
                start = int(np.flatnonzero(mine[order[at]] == hashes)[0])
                document = int(np.searchsorted(self.starts, order[at[start]], side="right")) - 1
                found[i] = Run(n, start, document)
        return found

    def nearest(self, texts: Sequence[Sequence[str]], n: int = 2) -> list[tuple[int, float]]:
        """For each text the document that holds the largest share of its n-grams, and that share; (-1, nan) without."""
        if self._bigrams is None or self._n != n:
            mine, self._n = _hashes(self._sums, n), n
            owner = np.searchsorted(self.starts, np.arange(len(mine)), side="right") - 1
            order = np.lexsort((owner, mine))
            mine, owner = mine[order], owner[order]
            new = np.ones(len(mine), bool)  # of an empty corpus none
            new[1:] = (mine[1:] != mine[:-1]) | (owner[1:] != owner[:-1])
            self._bigrams = mine[new], owner[new]
        hashes, owners = self._bigrams
        found = []
        for row in self._rows(texts):
            own, counts = np.unique(_hashes(row, n), return_counts=True)
            low, high = np.searchsorted(hashes, own), np.searchsorted(hashes, own, side="right")
            scores = np.zeros(len(self.texts))
            for a, b, count in zip(low.tolist(), high.tolist(), counts.tolist(), strict=True):
                scores[owners[a:b]] += count
            best = int(scores.argmax())
            found.append((best, float(scores[best] / counts.sum())) if len(own) else (-1, float("nan")))
        return found


def _sums(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running sums of a random number per word times BASE^place, modulo 2^64, and INVERSE^place."""
    x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(31)
    powers, inverse = (
        np.cumprod(np.append(np.uint64(1), np.full(len(ids), base, np.uint64))) for base in (BASE, INVERSE)
    )
    return np.append(np.uint64(0), np.cumsum(x * powers[:-1])), inverse


def _hashes(sums: tuple[np.ndarray, np.ndarray], n: int) -> np.ndarray:
    """A hash of each run of n words: none for a text of fewer."""
    total, inverse = sums
    count = max(0, len(total) - n)
    return (total[n:] - total[:count]) * inverse[:count] if count else np.empty(0, np.uint64)
