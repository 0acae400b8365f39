"""Which token follows which, counted exactly: the target of a bigram subnetwork, and what it is measured against.

    bigrams = Bigrams.count(tokens)          # shards of any size, read in pieces; memory grows with distinct pairs
    bigrams.rows(ids)                        # P(next | id), dense
    bigrams.surprisal(now, then)             # bits; inf where the pair was never seen

No smoothing: a seen id has its observed shares, an unseen one falls back to the unigram shares, and where nothing at
all was counted, to uniform ones (Chang and Bergen 2025, section 3).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as dump

from tinylm.data import DataError, Tokens, check_tokens
from tinylm.store import write_bytes

PIECE = 2**22  # tokens read at a time


class Bigrams:
    """Next-token shares given one token, of a corpus or of a table.

    Attributes:
        vocab: ids run from 0 to vocab - 1.
        starts: (vocab + 1,) int64; the successors of id i are at starts[i] : starts[i + 1] of the other two.
        successors: (pairs,) int32, rising within a row. weights: (pairs,) float64 counts, or probabilities.
        unigrams: (vocab,) float64 counts of all tokens.
    """

    def __init__(self, vocab: int, starts: np.ndarray, successors: np.ndarray, weights: np.ndarray, unigrams: Any):
        self.vocab, self.starts, self.successors, self.weights = vocab, starts, successors, weights
        self.unigrams = np.asarray(unigrams, np.float64)
        self.totals = np.bincount(np.repeat(np.arange(vocab), np.diff(starts)), weights, vocab)

    @classmethod
    def count(
        cls, tokens: Tokens | np.ndarray | Iterable[np.ndarray], vocab: int = 0, *, piece: int = PIECE
    ) -> Bigrams:
        """Count every pair of neighbours; pairs across documents too, as a model reads them.

        Args:
            tokens: a split, one row of ids, or rows of ids, each counted by itself.
            vocab: number of ids; may be left out for a split. piece: tokens read at a time.

        Raises DataError: no vocabulary given, an id that is not in it, or ids where rows were meant.
        """
        if piece < 1:
            raise DataError(f"piece = {piece}: read at least 1 token at a time")
        vocab = vocab or getattr(tokens, "vocab", 0)
        if vocab < 1:
            raise DataError(f"vocab = {vocab}: say how many token ids there are")
        keys, counts, unigrams = np.empty(0, np.int64), np.empty(0, np.int64), np.zeros(vocab)
        for ids, closes in _pieces(tokens, piece):
            check_tokens(ids, vocab)
            found, times = np.unique(ids[:-1].astype(np.int64) * vocab + ids[1:], return_counts=True)
            keys, where = np.unique(np.concatenate([keys, found]), return_inverse=True)
            counts = np.bincount(where, np.concatenate([counts, times]), len(keys)).astype(np.int64)
            unigrams += np.bincount(ids if closes else ids[:-1], minlength=vocab)
        starts = np.searchsorted(keys, np.arange(vocab + 1, dtype=np.int64) * vocab)
        return cls(vocab, starts, (keys % vocab).astype(np.int32), counts.astype(np.float64), unigrams)

    @classmethod
    def of_table(cls, table: np.ndarray, start: np.ndarray | None = None) -> Bigrams:
        """From (vocab, vocab) probabilities, such as `World(mode="bigram").chain.table`: an exact answer key.

        `start`: unigram shares, above 0; left out, they are uniform. Raises DataError unless rows sum to 1.
        """
        table = np.asarray(table, np.float64)
        square = table.ndim == 2 and table.shape[0] == table.shape[1] > 0
        if not (square and np.all(table >= 0) and np.all(np.abs(table.sum(1) - 1) <= 1e-6)):
            what = "square, nowhere below 0, and its rows sum to 1"
            raise DataError(f"a bigram table is {what}; this one has shape {table.shape}")
        start = np.full(len(table), 1 / len(table)) if start is None else np.asarray(start, np.float64)
        if start.shape != table.shape[:1] or not np.all((start > 0) & np.isfinite(start)):
            raise DataError(f"start has shape {start.shape} and least share {start.min()}: one above 0 for every id")
        rows, columns = np.nonzero(table)
        starts = np.searchsorted(rows, np.arange(len(table) + 1))
        return cls(len(table), starts, columns.astype(np.int32), (start[:, None] * table)[rows, columns], start)

    @property
    def pairs(self) -> int:
        """Distinct pairs."""
        return len(self.successors)

    def unigram(self) -> np.ndarray:
        """(vocab,) float64 shares of the tokens; uniform when nothing was counted."""
        total = self.unigrams.sum()
        return self.unigrams / total if total else np.full(self.vocab, 1 / self.vocab)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """P(next | id) for an array of ids of any shape: float32, one more axis of length vocab."""
        ids = np.asarray(ids)
        check_tokens(ids, self.vocab)
        own, where = np.unique(ids, return_inverse=True)
        table = np.zeros((len(own), self.vocab), np.float32)
        for row, i in zip(table, own.tolist(), strict=True):
            a, b = self.starts[i], self.starts[i + 1]
            if self.totals[i]:
                row[self.successors[a:b]] = self.weights[a:b] / self.totals[i]
            else:
                row[:] = self.unigram()
        return table[where.reshape(ids.shape)]

    def probability(self, now: np.ndarray, then: np.ndarray) -> np.ndarray:
        """P(then | now), float64, of two arrays of ids of one shape."""
        now, then = np.asarray(now, np.int64), np.asarray(then, np.int64)
        check_tokens(now, self.vocab)
        check_tokens(then, self.vocab)
        keys = np.repeat(np.arange(self.vocab, dtype=np.int64), np.diff(self.starts)) * self.vocab + self.successors
        at = np.searchsorted(keys, now * self.vocab + then)
        hit = keys[np.minimum(at, len(keys) - 1)] == now * self.vocab + then if len(keys) else np.zeros(now.shape, bool)
        weight = np.where(hit, self.weights[np.minimum(at, len(keys) - 1)] if len(keys) else 0.0, 0.0)
        totals = self.totals[now]
        return np.where(totals > 0, weight / np.where(totals > 0, totals, 1), self.unigram()[then])

    def surprisal(self, now: np.ndarray, then: np.ndarray) -> np.ndarray:
        """-log2 P(then | now), bits; inf for a pair that was never seen."""
        with np.errstate(divide="ignore"):
            return -np.log2(self.probability(now, then))

    def entropy(self) -> float:
        """Bits per token of the next token given this one, over what was counted; nan where nothing was."""
        if not self.pairs:
            return float("nan")
        share = self.weights / np.repeat(self.totals, np.diff(self.starts))
        return float(-(self.weights * np.log2(share)).sum() / self.totals.sum())

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file: whole, or not at all."""
        names = ("starts", "successors", "weights", "unigrams")
        write_bytes(path, dump({name: np.ascontiguousarray(getattr(self, name)) for name in names}))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Bigrams:
        """Read what `save` wrote. Raises DataError for another file."""
        try:
            raw = load_file(path)
            starts, successors, weights, unigrams = (
                raw[name] for name in ("starts", "successors", "weights", "unigrams")
            )
            vocab = len(unigrams)
            check_tokens(successors, vocab, "successors")
            fits = starts.shape == (vocab + 1,) and starts.dtype.kind == "i" and successors.shape == weights.shape
            if not (fits and starts[0] == 0 and starts[-1] == len(successors) and np.all(np.diff(starts) >= 0)):
                raise DataError("its parts do not fit together")
            if not all(np.all((x >= 0) & np.isfinite(x)) for x in (weights, unigrams)):
                raise DataError("a count is below 0, or no number")
            return cls(vocab, starts, successors, weights, unigrams)
        except (KeyError, SafetensorError, DataError) as error:
            raise DataError(f"{path} holds no bigram counts ({error}): write them with Bigrams.save") from None

    def __repr__(self) -> str:
        of = f" of {int(self.unigrams.sum()):,} tokens" if self.unigrams.sum() > 1.5 else ""  # 1: shares, not counts
        return f"Bigrams({self.pairs:,} distinct pairs{of}, vocab={self.vocab})"


def _pieces(tokens: Any, piece: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Pieces of a row, and whether it ends there; the last id of one is read again as the first of the next."""
    if isinstance(tokens, Tokens) or (isinstance(tokens, np.ndarray) and tokens.ndim == 1):
        for at in range(0, max(1, len(tokens) - 1), piece):
            yield np.asarray(tokens[at : at + piece + 1]), at + piece + 1 >= len(tokens)
    else:
        for row in tokens:
            if np.ndim(row) != 1:
                raise DataError(f"a row of ids has shape {np.shape(row)}: give one array of ids, or rows of them")
            yield np.asarray(row), True
