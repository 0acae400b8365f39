"""What a model has to beat on the same bytes: n-gram models and file compressors, in bits per byte. NumPy only.

The account is the one every figure of the kit uses. A document is framed as `begin, tokens..., end`; what comes before
a token predicts it; the final `end` is predicted and paid for, `begin` is given; only the raw UTF-8 bytes of the text
divide. So scores of different tokenizers, n-grams, compressors and models compare.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NGRAMS = {"unigram": 1, "bigram": 2, "kneser_ney_5": 5}
BASELINES = (*NGRAMS, "gzip", "xz", "xz_given_train")
XZ_TRAIN = 2**24  # bytes of training text that xz sees: 9 -e takes about 1 s for 1 MB


class EvaluationError(ValueError):
    """A score that cannot be computed, or would mislead; the message names the cause and the remedy."""


def frame(
    documents: Iterable[str], tokenizer: Any, *, start: int | None = None, end: int | None = None, lossy: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """The documents as `start, tokens..., end`, and the raw bytes that divide.

    Args:
        documents: texts. tokenizer: anything with `encode(text) -> ids`; `encode_batch`, `decode_bytes`, `prefix`,
            `begin`, `end`, `vocab` are used where it has them.
        start, end: ids around each document, where the tokenizer has no `end` or the model was trained on others; the
            default is the tokenizer's `begin` and `end`, and `end` for both where it has no `begin` or `end` is given.
        lossy: accept a tokenizer that drops information. Its bits per byte are too low: it codes another, easier text.

    Returns:
        One int32 array of length tokens + 2 per document, and the documents' lengths in bytes, int64.

    Raises:
        EvaluationError: no document, an empty one, no `end` id, ids outside the vocabulary, text that is not recovered.
    """
    documents = list(documents)
    if not documents:
        raise EvaluationError("there is no document to score: the file is empty or every document in it is")
    if end is None:
        end = getattr(tokenizer, "end", None)
        start = getattr(tokenizer, "begin", None) if start is None else start
    if end is None:
        raise EvaluationError("the tokenizer has no end token, and each document must be closed by one: pass end=ID")
    start = end if start is None else start
    try:
        raw = [text.encode() for text in documents]
    except UnicodeEncodeError as error:
        raise EvaluationError(f"a document is not valid Unicode ({error}): clean it before scoring") from error
    if not all(raw):
        raise EvaluationError(f"document {raw.index(b'')} is empty and has no byte to divide by: drop it")
    many = getattr(tokenizer, "encode_batch", None) or (lambda texts: [tokenizer.encode(text) for text in texts])
    framed = [np.concatenate(([start], ids, [end])).astype(np.int32) for ids in many(documents)]
    check_ids(framed, getattr(tokenizer, "vocab", None))
    if not lossy:
        back = getattr(tokenizer, "decode_bytes", None) or (lambda ids: tokenizer.decode(ids).encode())
        prefix = getattr(tokenizer, "prefix", b"")
        for number, (ids, text) in enumerate(zip(framed, raw, strict=True)):
            if back(ids[1:-1]) != prefix + text:
                raise EvaluationError(
                    f"document {number} ({text[:40]!r}...) does not come back from the tokenizer byte for byte, so the "
                    "score would be another text's: use a byte-level tokenizer, or pass lossy=True and report it"
                )
    return framed, np.array([len(r) for r in raw])


def check_ids(framed: Sequence[np.ndarray], vocab: int | None) -> None:
    """Raises EvaluationError for an id outside 0..vocab-1: JAX would clamp it and score another token, silently."""
    for number, ids in enumerate(framed):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocab is not None and high >= vocab):
            bad, allowed = low if low < 0 else high, "0 and up" if vocab is None else f"0..{vocab - 1}"
            raise EvaluationError(
                f"document {number} holds id {bad}, and the vocabulary is {allowed}: another tokenizer's?"
            )


class KneserNey:
    """An interpolated modified Kneser-Ney n-gram model (Chen and Goodman 1998), the estimate of KenLM's lmplz.

    The highest order counts occurrences. Lower orders count the distinct tokens seen to the left of an n-gram, or, at
    the start of a document, where nothing can be to the left, occurrences. Three discounts per order (for counts 1, 2,
    and 3 or more) come from how many n-grams were seen 1 to 4 times, so nothing is tuned on the text to be scored;
    where too little text leaves them undefined they are 0.5, 1, 1.5. The unigrams are interpolated with 1 / vocab:
    every token has a probability above 0. Distributions sum to 1. No context reaches past the start of a document.
    """

    def __init__(self, framed: Sequence[np.ndarray], vocab: int, order: int = 5) -> None:
        """`framed`: documents as `frame` gives them, ids below `vocab`; `order`: longest n-gram, at least 1."""
        check_ids(framed, vocab)
        self.vocab = vocab
        ids, offset = _stream(framed)
        # An n-gram is known by the row of its key in a sorted table: key = row of its first n - 1 tokens * vocab + last
        # token. `gram[i]` is the row of the n-gram that ends at position i.
        self.keys = [np.arange(vocab)]
        counts = [np.bincount(ids[offset > 0], minlength=vocab)]
        gram = ids
        for n in range(2, order + 1):
            at = np.flatnonzero(offset >= n - 1)
            if not len(at):
                break  # no document is that long
            keys, first, row, count = np.unique(
                gram[at - 1] * vocab + ids[at], return_index=True, return_inverse=True, return_counts=True
            )
            left = np.bincount(gram[at[first]], minlength=len(counts[-1]))  # distinct n-grams ending in each (n-1)-gram
            counts[-1] = np.where(left > 0, left, counts[-1])
            gram = np.full(len(ids), -1)
            gram[at] = row
            self.keys.append(keys)
            counts.append(count)
        self.discounts = [_discounts(count) for count in counts]
        self.kept, self.total, self.spread = [], [], []
        for n, (keys, count, discount) in enumerate(zip(self.keys, counts, self.discounts, strict=True), start=1):
            context = np.zeros(vocab, int) if n == 1 else keys // vocab
            size = 1 if n == 1 else len(self.keys[n - 2])
            taken = discount[np.minimum(count, 3)]
            self.kept.append(count - taken)  # per n-gram: what is left of its count
            self.total.append(np.bincount(context, count, size))  # per context: all counts
            self.spread.append(np.bincount(context, taken, size))  # per context: what was taken, for lower orders

    def logprobs(self, framed: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Natural log-probability of every token but the first of each document: float64 arrays of length len - 1."""
        check_ids(framed, self.vocab)
        ids, offset = _stream(framed)
        p = np.full(len(ids), 1 / self.vocab)
        gram = ids
        for n, keys in enumerate(self.keys, start=1):
            at = np.flatnonzero(offset >= max(n - 1, 1))
            context = np.zeros(len(at), int) if n == 1 else gram[at - 1]
            total, spread = (np.where(context >= 0, table[n - 1][context], 0) for table in (self.total, self.spread))
            key = context * self.vocab + ids[at]
            row = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            found = (context >= 0) & (keys[row] == key)
            kept = np.where(found, self.kept[n - 1][row], 0)
            seen = total > 0
            p[at[seen]] = (kept[seen] + spread[seen] * p[at[seen]]) / total[seen]
            if n > 1:
                gram = np.full(len(ids), -1)
                gram[at] = np.where(found, row, -1)
        return [np.log(q[1:]) for q in np.split(p, np.cumsum([len(doc) for doc in framed])[:-1])]

    def bits(self, framed: Sequence[np.ndarray]) -> np.ndarray:
        """Bits per document, its end token included: (documents,) float64."""
        return np.array([-logp.sum() / math.log(2) for logp in self.logprobs(framed)])


def _stream(framed: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All documents one after the other, int64, and each position's distance from the start of its document."""
    lengths = np.array([len(doc) for doc in framed])
    ids = np.concatenate(framed).astype(np.int64)
    return ids, np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What to take from a count of 0, 1, 2, and 3 or more (Chen and Goodman 1998, modified Kneser-Ney)."""
    n = [int((counts == k).sum()) for k in range(1, 5)]
    if min(n[:3]) > 0:
        y = n[0] / (n[0] + 2 * n[1])
        discount = np.array([0.0, *(k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3))])
        if (discount[1:] > 0).all():  # a discount of 0 would leave nothing to what was not seen
            return discount
    return np.array([0.0, 0.5, 1.0, 1.5])


def baselines(
    train: Iterable[str], valid: Iterable[str], tokenizer: Any, *, names: Sequence[str] = BASELINES
) -> dict[str, float]:
    """Bits per byte of `valid` under models far simpler than a transformer.

    - unigram, bigram, kneser_ney_5: `KneserNey` of order 1, 2, 5 over the tokens of `train`; no setting is tuned.
    - gzip, xz: the file `valid` makes, documents joined by one zero byte, at the strongest setting; headers included.
    - xz_given_train: by how much `valid` lengthens the xz file of `train` (its last 16 MiB).

    Raises EvaluationError as `frame` does, and for an unknown name. About 4 s for 2 MB of training text,
    nearly all of it xz.
    """
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise EvaluationError(f"no baseline is called {', '.join(unknown)}; known: {', '.join(BASELINES)}")
    train, valid = list(train), list(valid)
    framed, sizes = frame(valid, tokenizer)
    total = int(sizes.sum())
    known, _ = frame(train, tokenizer) if set(names) & set(NGRAMS) else ([], None)
    data, before = ("\0".join(docs).encode() for docs in (valid, [*train, ""]))
    before = before[-XZ_TRAIN:]
    scores = {}
    for name in names:
        if name in NGRAMS:
            bits = KneserNey(known, tokenizer.vocab, NGRAMS[name]).bits(framed).sum()
        elif name == "gzip":
            bits = 8 * len(gzip.compress(data, 9, mtime=0))
        elif name == "xz":
            bits = 8 * len(_xz(data))
        else:
            bits = 8 * (len(_xz(before + data)) - len(_xz(before)))
        scores[name] = float(bits / total)
    return scores


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
