"""How good a model is on a text: bits per byte, an interval over documents, differences, the floor, diversity.

Bits per byte is the headline because it compares across tokenizers. The account (see `yardsticks`): a document is
`begin, tokens..., end`; every token and the closing `end` is predicted once and its bits are summed; the raw UTF-8
bytes of the text divide. A document longer than the context is read in windows that overlap: each starts `stride`
tokens after the one before and scores what no window scored yet, from at least context - stride + 1 tokens.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.text import TextError
from tinylm.text import documents as read_documents
from tinylm.yardsticks import EvaluationError, KneserNey, baselines, check_ids, frame

__all__ = [
    "Difference", "Evaluation", "EvaluationError", "KneserNey", "baselines", "compare", "diversity", "evaluate",
    "evaluate_floor", "evaluation", "excess", "score", "token_logprobs",
]  # fmt: skip

RESAMPLES = 2000
PADDED_VOCAB = 128  # a model may have this many ids more than the tokenizer: embeddings are often padded


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """A score of one text.

    Attributes:
        bits_per_byte: all bits / all bytes. ci95: its 95 percent interval over documents, None for a single one; it
            says how far another sample of such documents could be, not how far another training seed.
        nats_per_token: mean loss; compares only between models that share a tokenizer. None where there are no tokens.
        bytes, tokens (predicted ones: each document's tokens and one end), documents: totals.
        document_bits, document_bytes: the same per document, (documents,) arrays.
        text_sha256: of the documents; two scores compare only when it is the same.
        context, stride: of the windows, in tokens; None for what is not read in windows.
        lossy: the tokenizer loses information, so the figure is too low.
    """

    bits_per_byte: float
    ci95: tuple[float, float] | None
    nats_per_token: float | None
    bytes: int
    tokens: int | None
    documents: int
    document_bits: np.ndarray
    document_bytes: np.ndarray
    text_sha256: str
    context: int | None = None
    stride: int | None = None
    lossy: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The figures without the arrays, ready for json."""
        named = {name: value for name, value in vars(self).items() if not name.startswith("document_")}
        named["ci95"] = None if self.ci95 is None else list(self.ci95)
        return named | ({"ci95_reason": self.ci95_reason} if self.ci95 is None else {})

    @property
    def ci95_reason(self) -> str | None:
        """Why there is no interval."""
        return "an interval needs at least two documents; this text is one" if self.ci95 is None else None

    def __repr__(self) -> str:
        span = f"[{self.ci95[0]:.4f}, {self.ci95[1]:.4f}]" if self.ci95 else "no interval: one document"
        per_token = "" if self.nats_per_token is None else f", {self.nats_per_token:.4f} nats/token"
        size = f"{self.bytes:,} bytes, {self.documents:,} document{'s' * (self.documents > 1)}"
        return f"{self.bits_per_byte:.4f} bits/byte {span}{per_token}, {size}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Bits per byte of one score minus another on the same documents; `ci95` resamples them in pairs."""

    bits_per_byte: float
    ci95: tuple[float, float] | None
    documents: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0. Seeds add noise of their own: repeat the training before claiming a gain."""
        return self.ci95 is not None and not self.ci95[0] <= 0 <= self.ci95[1]


# --- scoring a model --------------------------------------------------------------------------------------------------


def evaluate(
    model: Any,
    source: str | os.PathLike | Iterable[str],
    *,
    tokenizer: Any = None,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 16,
    limit: int | None = None,
    seed: int = 0,
    lossy: bool = False,
) -> Evaluation:
    """Score a decoder on a text.

    Args:
        model: a `Transformer`; scored as it is, without dropout.
        source: what `text.documents` reads: a file, a folder, a data set id, or an iterable of texts.
        tokenizer: default the model's own.
        context: tokens per window, default the model's. stride: default half of it; smaller is better and slower.
        batch: windows per call, of full length; shorter ones go more at a time. It bounds memory, not the result.
        limit: the first so many documents. seed: of the interval. lossy: see `yardsticks.frame`.

    Raises:
        EvaluationError: an encoder, a tokenizer that is not the model's, a source that is missing, empty or cannot be
            read, or a setting out of range.
    """
    config = model.config
    if config.kind != "decoder":
        raise EvaluationError(
            "an encoder sees both sides of a token, so it gives a text no probability and has no bits per byte: "
            "use its loss on masked tokens (`train(..., valid=Masked(...))`) or the accuracy of a classifier on it"
        )
    tokenizer = matching(model, tokenizer)
    context = config.context if context is None else context
    if context > config.context:
        raise EvaluationError(f"context = {context} is longer than the model's {config.context}; leave it out")
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("float32"):  # a GPU would take TF32, three digits
        return _evaluation(
            _read(source, limit), tokenizer, functools.partial(_model_logprobs, graphdef, state),
            context=context, stride=stride, batch=batch, seed=seed, lossy=lossy, most=config.vocab,
        )  # fmt: skip


def score(
    documents: Iterable[str],
    tokenizer: Any,
    logits: Callable[[np.ndarray], Any],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 16,
    seed: int = 0,
    start: int | None = None,
    end: int | None = None,
    lossy: bool = False,
) -> Evaluation:
    """Score any causal model, from whatever library, on exactly the bytes `evaluate` would score.

    Args:
        documents: texts. tokenizer, start, end, lossy: as in `yardsticks.frame`.
        logits: tokens (B, T) int32 -> logits (B, T, V), an array of any library that NumPy reads; padded right with 0.
        context, stride, batch, seed: as in `evaluate`.
    """

    def logprobs(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        found = np.asarray(logits(tokens))
        if found.ndim != 3 or found.shape[:2] != tokens.shape:
            raise EvaluationError(f"logits of tokens {tokens.shape} must be (B, T, V), not {found.shape}")
        if targets.max() >= found.shape[2]:
            raise EvaluationError(
                f"id {targets.max()} has no logit among {found.shape[2]}: this is not the model's tokenizer"
            )
        picked = np.empty(tokens.shape)
        for row, (x, y) in enumerate(zip(found, targets, strict=True)):  # by row: float64 logits of a batch are large
            x = x.astype(np.float64)
            top = x.max(axis=-1)
            picked[row] = np.take_along_axis(x, y[:, None], -1)[:, 0] - top - np.log(np.exp(x - top[:, None]).sum(-1))
        return picked

    return _evaluation(
        list(documents), tokenizer, logprobs,
        context=context, stride=stride, batch=batch, seed=seed, start=start, end=end, lossy=lossy,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _model_logprobs(graphdef: Any, state: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability (B, T) of each target, float32; the logits never leave the device."""
    logits = nnx.merge(graphdef, state)(tokens).astype(jnp.float32)
    return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def matching(model: Any, tokenizer: Any) -> Any:
    """The tokenizer to score with: the model's own, or the given one. Raises EvaluationError unless they agree."""
    own, vocab = getattr(model, "tokenizer", None), model.config.vocab
    if tokenizer is None and own is None:
        raise EvaluationError("the model carries no tokenizer: pass tokenizer=, the one it was trained with")
    if tokenizer is None or tokenizer == own:
        return own
    if own is not None:
        raise EvaluationError(
            "the model was trained with another tokenizer: leave tokenizer= out to use the model's own"
        )
    if not 0 <= vocab - tokenizer.vocab < PADDED_VOCAB:
        raise EvaluationError(
            f"the tokenizer has {tokenizer.vocab} ids, the model {vocab}: pass the one it was trained with"
        )
    return tokenizer


def _read(source: str | os.PathLike | Iterable[str], limit: int | None) -> list[str]:
    try:
        texts = list(read_documents(source, limit=limit))
    except (TextError, OSError) as error:
        raise EvaluationError(str(error)) from error
    if not texts:
        raise EvaluationError(f"there is no text to score in {source!r:.80}")
    return texts


# --- windows ----------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Inputs `ids[begin : begin + length]` of one document; the first `skip` predictions were scored before."""

    document: int
    begin: int
    length: int
    skip: int


def token_logprobs(
    framed: Sequence[np.ndarray],
    logprobs: Callable[[np.ndarray, np.ndarray], Any],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 16,
) -> list[np.ndarray]:
    """Natural log-probability of every token but the first of each document: float64 arrays of length len - 1.

    `logprobs(tokens, targets)` scores (B, T) int32 windows, padded on the right with 0; a causal model's earlier
    positions cannot see the padding, so no mask is needed. Few different shapes come, so that few are compiled.
    """
    stride = max(1, context // 2) if stride is None else stride
    if context < 1 or not 1 <= stride <= context or batch < 1:
        raise EvaluationError(f"need 1 <= stride <= context and batch >= 1, not {stride=}, {context=}, {batch=}")
    found = [np.full(len(ids) - 1, np.nan) for ids in framed]

    def keep(windows: list[Window], result: Any) -> None:
        for (document, begin, length, skip), row in zip(windows, np.asarray(result, np.float64), strict=False):
            found[document][begin + skip : begin + length] = row[skip:length]

    waiting: tuple = ([], np.empty((0, 0)))
    for windows, rows, size in batches(list(_windows(framed, context, stride)), context, batch):
        tokens, targets = np.zeros((2, rows, size), np.int32)
        for row, (document, begin, length, _) in enumerate(windows):
            tokens[row, :length] = framed[document][begin : begin + length]
            targets[row, :length] = framed[document][begin + 1 : begin + length + 1]
        result = logprobs(tokens, targets)
        keep(*waiting)  # the one before, while the device works on this one
        waiting = (windows, result)
    keep(*waiting)
    return found


def _windows(framed: Sequence[np.ndarray], context: int, stride: int) -> Iterator[Window]:
    for document, ids in enumerate(framed):
        predictions = len(ids) - 1
        for k in range(1 + max(0, -(-(predictions - context) // stride))):
            yield Window(document, k * stride, min(context, predictions - k * stride), context - stride if k else 0)


def batches(windows: list[Window], context: int, batch: int) -> Iterator[tuple[list[Window], int, int]]:
    """Windows of similar length, with the shape (rows, size) to pad them to: sizes 32, 64, ... and the context.

    About batch * context tokens each. A size too rare to fill a batch joins the next one, if there is any.
    """
    windows = sorted(windows, key=lambda window: -window.length)
    sizes = [1 << k for k in range(5, context.bit_length()) if 1 << k < context] + [context]
    held: list[Window] = []
    for size in sizes:
        while windows and windows[-1].length <= size:
            held.append(windows.pop())
        rows = max(1, batch * context // size)
        if held and (len(held) >= rows or not windows):
            rows = min(rows, 1 << (len(held) - 1).bit_length())
            for i in range(0, len(held), rows):
                yield held[i : i + rows], rows, size
            held = []


def _evaluation(
    texts, tokenizer, logprobs, *, context, stride, batch, seed, start=None, end=None, lossy=False, most=None
) -> Evaluation:
    framed, _ = frame(texts, tokenizer, start=start, end=end, lossy=lossy)
    check_ids(framed, most)
    stride = max(1, context // 2) if stride is None else stride
    found = token_logprobs(framed, logprobs, context=context, stride=stride, batch=batch)
    for number, logp in enumerate(found):
        if not np.isfinite(logp).all():
            at = int(np.flatnonzero(~np.isfinite(logp))[0])
            raise EvaluationError(
                f"document {number}, prediction {at}: log-probability {logp[at]}; are the logits finite?"
            )
    bits = np.array([-logp.sum() / math.log(2) for logp in found])
    tokens = sum(len(logp) for logp in found)
    return evaluation(texts, bits, tokens=tokens, seed=seed, context=context, stride=stride, lossy=lossy)


# --- figures ----------------------------------------------------------------------------------------------------------


def evaluation(
    documents: Sequence[str],
    bits: np.ndarray | Sequence[float],
    *,
    tokens: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Evaluation:
    """An `Evaluation` from bits per document, whoever computed them (`KneserNey.bits`, a world, another program)."""
    raw = [text.encode() for text in documents]
    sizes = np.array([len(r) for r in raw])
    bits = np.asarray(bits, np.float64)
    if bits.shape != sizes.shape or not len(raw) or not sizes.all():
        raise EvaluationError(f"bits {bits.shape} for {len(raw)} documents: need one each, and no empty document")
    digest = hashlib.sha256()
    for r in raw:
        digest.update(len(r).to_bytes(8, "little") + r)
    return Evaluation(
        bits_per_byte=float(bits.sum() / sizes.sum()),
        ci95=bootstrap(bits, sizes, seed=seed),
        nats_per_token=float(bits.sum() * math.log(2) / tokens) if tokens else None,
        bytes=int(sizes.sum()), tokens=tokens, documents=len(raw),
        document_bits=bits, document_bytes=sizes, text_sha256=digest.hexdigest(), **settings,
    )  # fmt: skip


def bootstrap(
    above: np.ndarray, below: np.ndarray, *, seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Interval for sum(above) / sum(below) over resampled documents; None for fewer than two.

    The percentiles are expanded as in Hesterberg 2015 (section 4.2: Student's t and n / (n - 1)), since plain ones are
    too narrow for few documents.
    """
    from scipy.special import ndtr, stdtrit

    n = len(above)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    at_once = max(1, 2**20 // n)
    ratios = []
    for i in range(0, RESAMPLES, at_once):
        drawn = rng.integers(n, size=(min(at_once, RESAMPLES - i), n))
        ratios.append(above[drawn].sum(1) / below[drawn].sum(1))
    tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - level) / 2))
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def compare(a: Evaluation, b: Evaluation, *, seed: int = 0) -> Difference:
    """Bits per byte of `a` minus `b`, documents resampled in pairs. Raises EvaluationError when the texts differ."""
    if a.text_sha256 != b.text_sha256:
        raise EvaluationError(
            f"the scores are of different texts ({a.documents} documents, {a.bytes} bytes; {b.documents}, {b.bytes}), "
            "or of the same in another order: score both on one list"
        )
    gap = a.document_bits - b.document_bits
    interval = bootstrap(gap, a.document_bytes, seed=seed)
    return Difference(bits_per_byte=float(gap.sum() / a.bytes), ci95=interval, documents=a.documents)


def evaluate_floor(world: Any, stories: Iterable[Any], *, seed: int = 0) -> Evaluation:
    """What the best possible model would score: the world's own exact probability of its stories.

    `world.logprob(text)` is in nats, the end of the story included, as it is for a model. `stories` are texts, or
    carry one as `.text`. Raises EvaluationError for a text that the world cannot tell.
    """
    texts = [getattr(story, "text", story) for story in stories]
    bits = np.array([-world.logprob(text) / math.log(2) for text in texts])
    if not np.isfinite(bits).all():
        number = int(np.flatnonzero(~np.isfinite(bits))[0])
        raise EvaluationError(f"this world cannot tell story {number} ({texts[number][:60]!r}...), so it has no floor")
    return evaluation(texts, bits, seed=seed)


def excess(score: Evaluation, floor: Evaluation, *, seed: int = 0) -> Difference:
    """Bits per byte above the floor. Clearly below 0 is no triumph: the model saw these stories, or it looks ahead."""
    return compare(score, floor, seed=seed)


def diversity(texts: Iterable[str], *, words: int | None = None) -> dict[str, float | int | None]:
    """How varied samples are: distinct-1..4 (Li et al. 2016) and the share of repeated 4-grams.

    Words are lower-cased runs of letters and digits, with inner apostrophes; punctuation is not counted. distinct-n is
    different n-grams / all n-grams over all texts; repeated_4gram is the share of 4-grams that occurred before in the
    same text (0: never; a loop: towards 1). None where no text is long enough.

    Like every type-token ratio distinct-n falls as texts get longer and more: compare only equally many texts of one
    length, which `words` (only the first so many words of each text) makes sure of.
    """
    split = [re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())[:words] for text in texts]
    figures: dict[str, float | int | None] = {"texts": len(split), "words": sum(map(len, split))}
    for n in range(1, 5):
        grams = [list(zip(*(text[i:] for i in range(n)), strict=False)) for text in split]
        total = sum(map(len, grams))
        figures[f"distinct_{n}"] = len(set().union(*grams)) / total if total else None
    figures["repeated_4gram"] = 1 - sum(len(set(g)) for g in grams) / total if total else None
    return figures
