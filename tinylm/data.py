"""Tokens -> batches, where a batch is a pure function of (seed, step).

No iterator and no state: a run resumes at step n by asking for batch n. What writes and maps the tokens is `shards`.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.shards import DataError, Tokens, check_tokens, write_tokens
from tinylm.tokenizer import Tokenizer

__all__ = [
    "Batch", "Batches", "DataError", "Labelled", "Masked", "Rows", "Tokens", "Windows", "alike", "batches_of",
    "check_tokens", "padded", "permute", "picking", "require_fit", "write_tokens",
]  # fmt: skip


class Batch(NamedTuple):
    """What a model is trained on, numpy arrays of shape (batch, length).

    tokens: int32 inputs. targets: int32, what each position should predict. weights: float32 share of each position in
    the loss (None: all 1). positions: int32 (None: 0, 1, ...). segments: int32, attention stays inside equal numbers;
    0 is padding (None: one segment). picked: see `picking`. fetched: (batch, levels) int32, the nodes whose memory each
    row fetches, for models that have one (None: what the model's own state says).
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None
    picked: np.ndarray | None = None
    fetched: np.ndarray | None = None


def picking(batch: Batch, share: float, parts: int = 1) -> Batch:
    """The batch with `picked`: which positions have weight, so that the head is computed for those alone.

    (parts, P) int32, one row for each of `parts` equal parts of the batch, positions of the part counted row by row and
    padded with their number. P is a multiple of an eighth of the part that a `share` of its positions hardly ever
    exceeds (four standard deviations), so that one length is compiled, rarely two; where that would save nothing the
    batch is given back as it is.
    """
    if batch.weights is None:
        return batch
    weights = batch.weights.reshape(parts, -1)
    size = weights.shape[1]
    eighth, usual = max(1, size // 8), share * size + 4 * (share * size) ** 0.5
    most = max(int(np.count_nonzero(weights, axis=1).max()), usual)
    room = math.ceil(most / eighth) * eighth
    if room >= size:
        return batch
    picked = np.full((parts, room), size, np.int32)
    for row, found in zip(picked, weights, strict=True):
        at = np.flatnonzero(found)
        row[: len(at)] = at
    return batch._replace(picked=picked)


ROUNDS = 6


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    raw = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(np.frombuffer(raw, np.uint64))


@lru_cache(maxsize=64)
def _sides(n: int) -> tuple[np.uint64, np.uint64]:
    """The a by b rectangle, near to square, with the fewest cells beyond n."""
    root = max(1, math.isqrt(n - 1) + 1)
    a = min(range(root, root + min(root, 64)), key=lambda side: -(-n // side) * side)
    return np.uint64(a), np.uint64(-(-n // a))


def permute(index: np.ndarray, n: int, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """Where each index in 0..n-1 goes under the permutation of (seed, epoch): a bijection that needs no memory.

    A Feistel network of six rounds over pairs (l, r), l < a, r < b, with a b >= n and a about sqrt(n); a result of n or
    more is sent through again until it falls below n (cycle walking; Black and Rogaway 2002): rarely, a b is near n.
    """
    keys = _keys(seed, epoch)
    a, b = _sides(n)
    out = np.array(index, np.uint64)
    todo: Any = slice(None)
    while True:
        left, right = np.divmod(out[todo], b)
        for i in range(0, ROUNDS, 2):
            left = (left + _mix(right, keys[i])) % a
            right = (right + _mix(left, keys[i + 1])) % b
        out[todo] = left * b + right
        todo = np.flatnonzero(out >= n)
        if not len(todo):
            return out.astype(np.int64)


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit hash (the finaliser of splitmix64), shifted so that sums stay below 2^64."""
    x = (x ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(31)
    x *= np.uint64(0x94D049BB133111EB)
    x >>= np.uint64(32)
    return x


def _row_numbers(rows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """(batch,) rows of a step: epoch after epoch, each in its own order, every row once per epoch."""
    step = operator.index(step)
    if step < 0:
        raise DataError(f"step = {step}: must not be negative")
    epoch, at = divmod(step * batch, rows)
    if at + batch <= rows:
        return permute(np.arange(at, at + batch), rows, seed=seed, epoch=epoch)
    parts = []
    while batch:
        take = min(batch, rows - at)
        parts.append(permute(np.arange(at, at + take), rows, seed=seed, epoch=epoch))
        batch, epoch, at = batch - take, epoch + 1, 0
    return np.concatenate(parts)


class _Source:
    """What Windows and Rows share: the row numbers of a step."""

    tokens: Tokens
    windows: int
    batch: int
    length: int
    seed: int

    def __init__(self, tokens: Tokens, *, batch: int, length: int, seed: int = 0) -> None:
        for name, value, least in (("batch", batch, 1), ("length", length, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise DataError(f"{name} = {value!r}: must be a whole number of at least {least}")
        self.tokens, self.batch, self.length, self.seed = tokens, int(batch), int(length), int(seed)

    def epochs(self, step: int) -> float:
        """How many times the data has been seen before this step."""
        return step * self.batch / self.windows

    def indices(self, step: int) -> np.ndarray:
        """(batch,) numbers of the rows of a step."""
        return _row_numbers(self.windows, self.batch, self.seed, step)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the batches, json-able: two sources that agree give the same batches."""
        own = {"kind": type(self).__name__.lower(), "sha256": self.tokens.sha256, "windows": self.windows}
        return {**own, "length": self.length, "batch": self.batch, "seed": self.seed}


class Windows(_Source):
    """Packed next-token windows: `windows(step)` -> Batch, a pure function of (seed, step).

    Window w reads tokens[w length : w length + length + 1]; the inputs are all but the last, the targets all but the
    first. Each epoch visits each of the `windows` once. `documents=True` adds segments (the document's number in the
    window, from 1; an end token opens the document after it) and positions that restart with each, so that attention
    stays inside a document.
    """

    def __init__(self, tokens: Tokens, *, batch: int, length: int, seed: int = 0, documents: bool = False) -> None:
        super().__init__(tokens, batch=batch, length=length, seed=seed)
        self.documents = bool(documents)
        self.windows = (len(tokens) - 1) // self.length
        if self.windows < 1:
            need = f"one window of length {length} needs {length + 1}: add text or shorten the length"
            raise DataError(f"only {len(tokens)} tokens: {need}")
        if documents and tokens.end is None:
            raise DataError("documents=True needs tokens whose end token is known (Tokens.from_array(..., end=ID))")

    def __call__(self, step: int) -> Batch:
        rows = np.empty((self.batch, self.length + 1), np.int32)
        for row, start in zip(rows, (self.indices(step) * self.length).tolist(), strict=True):
            self.tokens._read(start, row)
        tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        if not self.documents:
            return Batch(tokens, targets)
        starts = tokens == (self.tokens.end if self.tokens.begin is None else self.tokens.begin)
        segments = np.cumsum(starts, axis=1, dtype=np.int32)
        segments += 1 - segments[:, :1]
        here = np.arange(self.length, dtype=np.int32)
        positions = here - np.maximum.accumulate(np.where(starts, here, 0), axis=1)
        return Batch(tokens, targets, None, positions.astype(np.int32), segments)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "documents": self.documents}


class Rows(_Source):
    """One document per row, as BERT's inputs: cls, its first length - 2 tokens, sep, padding (segment 0, weight 0).

    targets are the tokens themselves: wrap it in `Masked`. The documents' places are found by one pass over the tokens.
    """

    def __init__(self, tokens: Tokens, *, batch: int, length: int, cls: int, sep: int, pad: int, seed: int = 0) -> None:
        super().__init__(tokens, batch=batch, length=length, seed=seed)
        self.cls, self.sep, self.pad = cls, sep, pad
        check_tokens(np.array([cls, sep, pad]), tokens.vocab, "cls, sep, pad")
        if tokens.end is None or length < 3:
            raise DataError(f"rows need tokens whose end token is known, and a length of at least 3 (got {length})")
        ends = [np.flatnonzero(p == tokens.end) + s for p, s in zip(tokens._parts, tokens._starts, strict=False)]
        self._ends = np.concatenate(ends)
        self.windows = len(self._ends) - 1
        if self.windows < 1:
            raise DataError("no document between two end tokens")

    def __call__(self, step: int) -> Batch:
        tokens = np.full((self.batch, self.length), self.pad, np.int32)
        segments = np.zeros((self.batch, self.length), np.int32)
        for row, real, document in zip(tokens, segments, self.indices(step), strict=True):
            start = int(self._ends[document]) + (1 if self.tokens.begin is None else 2)
            size = min(int(self._ends[document + 1]) - start, self.length - 2)
            row[0], row[size + 1] = self.cls, self.sep
            self.tokens._read(start, row[1 : size + 1])
            real[: size + 2] = 1
        return Batch(tokens, tokens.copy(), segments.astype(np.float32), None, segments)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "cls": self.cls, "sep": self.sep, "pad": self.pad}


class Masked:
    """BERT's masking over a source of batches (Devlin et al. 2019, 3.1): `masked(step)` -> Batch, fresh in every batch.

    A share `rate` of the positions is chosen; of those 80 % become `mask`, 10 % an id drawn from 0..vocab-1, 10 % stay.
    weights are 1 on the chosen positions, targets the original tokens at the same positions (no shift). Deterministic
    in (seed, step). Ids in `keep` and padding are never chosen; a batch never has no chosen position if one can be.
    Positions and segments are the source's, None where it has none.
    """

    def __init__(
        self,
        windows: Windows | Rows,
        *,
        rate: float = 0.15,
        mask: int,
        vocab: int | None = None,
        keep: Iterable[int] = (),
    ) -> None:
        self.source, self.rate, self.mask = windows, float(rate), int(mask)
        self.vocab = windows.tokens.vocab if vocab is None else int(vocab)
        self.keep = tuple(sorted({int(i) for i in keep} | {self.mask}))
        if not 0 < self.rate < 1:
            raise DataError(f"rate = {rate}: must be between 0 and 1")
        check_tokens(np.array(self.keep), self.vocab, "mask and keep")
        self.tokens, self.windows, self.batch = windows.tokens, windows.windows, windows.batch
        self.length, self.seed = windows.length, windows.seed
        self.epochs, self.indices = windows.epochs, windows.indices
        self._kept = np.zeros(max(self.vocab, windows.tokens.vocab), bool)
        self._kept[list(self.keep)] = True

    def __call__(self, step: int) -> Batch:
        batch = self.source(step)
        original = batch.tokens
        key = int.from_bytes(hashlib.blake2b(f"mask:{self.seed}".encode(), digest_size=8).digest(), "little")
        rng = np.random.Generator(np.random.Philox(key=np.array([key, operator.index(step)], np.uint64)))
        free = ~self._kept[original]
        if batch.segments is not None:
            free &= batch.segments > 0
        chosen = (rng.random(original.shape, np.float32) < self.rate) & free
        if not chosen.any() and free.any():
            chosen.reshape(-1)[rng.choice(np.flatnonzero(free))] = True
        tokens = original.copy()
        at = np.flatnonzero(chosen)
        way = rng.random(len(at), np.float32)
        tokens.reshape(-1)[at[way < 0.8]] = self.mask
        drawn = at[(way >= 0.8) & (way < 0.9)]
        tokens.reshape(-1)[drawn] = rng.integers(0, self.vocab, len(drawn), np.int32)
        return Batch(tokens, original, chosen.astype(np.float32), batch.positions, batch.segments)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the batches, json-able."""
        own = {"rate": self.rate, "mask": self.mask, "vocab": self.vocab, "keep": list(self.keep)}
        return {"kind": "masked", **own, "of": self.source.describe()}


class Labelled:
    """Texts with a class each, a text per row as in `Rows`: `labelled(step)` -> Batch, a function of (seed, step).

    targets are the labels, (batch,) int32; weights (batch,) those of the texts' classes, where there are any; segments
    are 1 on a text and 0 on padding. Every text is seen once per epoch, each epoch in its own order.

    Args:
        rows: token ids of each text, with what stands around it. labels: of each text, from 0.
        batch: texts per step. length: of a row; longer texts are cut, the last token kept. pad: id of what fills rows.
        weights: one per class; None: all count the same. seed: of the order.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        labels: np.ndarray,
        *,
        batch: int,
        length: int,
        pad: int,
        weights: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.labels = np.asarray(labels, np.int32)
        if len(rows) != len(self.labels) or not len(rows):
            raise DataError(f"{len(rows)} texts and {len(self.labels)} labels: give one label per text, and some texts")
        if min(batch, length) < 1 or seed < 0:
            raise DataError(f"batch = {batch}, length = {length}, seed = {seed}: at least 1, 1 and 0")
        self.tokens, self.segments = padded(rows, length, pad)
        self.weights = None if weights is None else np.asarray(weights, np.float32)
        self.windows, self.batch, self.length, self.seed = len(rows), int(batch), int(length), int(seed)

    def indices(self, step: int) -> np.ndarray:
        """(batch,) numbers of the texts of a step."""
        return _row_numbers(self.windows, self.batch, self.seed, step)

    def epochs(self, step: int) -> float:
        """How many times the texts have been seen before this step."""
        return step * self.batch / self.windows

    def __call__(self, step: int) -> Batch:
        at = self.indices(step)
        labels = self.labels[at]
        weights = None if self.weights is None else self.weights[labels]
        return Batch(self.tokens[at], labels, weights, None, self.segments[at])


def padded(rows: Sequence[np.ndarray], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as (N, length) int32 tokens and segments, 1 on tokens and 0 on padding; a cut row keeps its last token."""
    tokens = np.full((len(rows), length), pad, np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for row, real, ids in zip(tokens, segments, rows, strict=True):
        size = min(len(ids), length)
        row[:size], real[:size] = ids[:size], 1
        if size:
            row[size - 1] = ids[-1]
    return tokens, segments


# --- from tokens and settings to batches -----------------------------------------------------------------------------

Batches = Callable[[int], Batch]


def require_fit(config: TrainConfig, model: ModelConfig) -> None:
    """Raise ConfigError unless this model can be trained so."""
    if config.length > model.context:
        raise ConfigError(f"TrainConfig.length = {config.length} is longer than the model's context of {model.context}")
    if config.objective == "classes":
        raise ConfigError('objective "classes" learns from labelled texts, not from tokens: use tinylm.classify')
    wanted = {"mlm": "an encoder", "next_token": "a decoder"}
    if wanted[config.objective].split()[1] != model.kind:
        other = next(name for name, kind in wanted.items() if kind.split()[1] == model.kind)
        raise ConfigError(
            f'objective "{config.objective}" needs {wanted[config.objective]}, and this model is {wanted[other]}: '
            f'take objective "{other}", or another model'
        )
    if model.head in ("classes", "none"):
        raise ConfigError(f'ModelConfig.head = "{model.head}" predicts no tokens: take "tied", "untied" or "mlm"')


def batches_of(tokens: Tokens, config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> Batches:
    """The batches that `config.objective` asks for, over `tokens`.

    Raises:
        ConfigError: the tokens do not fit the model or the tokenizer.
    """
    if tokens.vocab > model.vocab:
        raise ConfigError(
            f"the data uses {tokens.vocab} token ids, the model knows {model.vocab}; set vocab={tokens.vocab}"
        )
    if tokenizer is not None and tokens.tokenizer_sha256 not in ("", tokenizer.sha256):  # "" is not known
        raise ConfigError(
            "the data was made with another tokenizer than the model's; make the tokens again with this one"
        )
    require_fit(config, model)
    length = config.length or model.context
    windows = Windows(tokens, batch=config.batch, length=length, seed=config.seed, documents=config.documents)
    if config.objective == "next_token":
        return windows
    if tokenizer is None or tokenizer.mask is None:
        raise ConfigError('objective "mlm" needs a tokenizer with a mask token; give one to the model')
    keep = [i for i in (tokenizer.end, tokenizer.pad, tokenizer.cls, tokenizer.sep) if i is not None]
    return Masked(windows, rate=config.mask_rate, mask=tokenizer.mask, vocab=tokenizer.vocab, keep=keep)


def alike(one: Batch, other: Batch) -> bool:
    """Whether two batches have the same fields and shapes, so that they can go to the device together."""
    pairs = zip(one, other, strict=True)
    return all(a is b if a is None or b is None else np.shape(a) == np.shape(b) for a, b in pairs)
