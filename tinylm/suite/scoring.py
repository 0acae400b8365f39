"""Log-probabilities of texts, and of continuations of texts, in batches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.evaluation import EvaluationError, Window, batches, matching, token_logprobs
from tinylm.yardsticks import check_ids

__all__ = ["Continued", "Scorer"]


class Continued(NamedTuple):
    """How a model continues a text: nats of the whole continuation, its tokens, and whether each was the most likely.

    `cut`: tokens of the context that did not fit before the continuation, and were dropped from the left.
    """

    logprob: float
    tokens: int
    greedy: bool
    cut: int = 0


class Scorer:
    """A decoder and its tokenizer, ready to score texts. Texts begin after the begin token, as in `evaluate`.

    The end token is not part of a score: pairs and clozes are sentences, not documents.
    """

    def __init__(self, model: Any, *, tokenizer: Any = None, batch: int = 16) -> None:
        """`tokenizer`: default the model's; `batch`: windows of full context per call.

        Raises EvaluationError for an encoder, a tokenizer that is missing or another model's, or one without an id that
        begins or ends a text.
        """
        if model.config.kind != "decoder":
            raise EvaluationError("an encoder gives a text no probability: this task needs a decoder")
        self.tokenizer = matching(model, tokenizer)
        start = getattr(self.tokenizer, "begin", None)
        start = getattr(self.tokenizer, "end", None) if start is None else start
        if start is None:
            raise EvaluationError("the tokenizer has neither a begin nor an end token, so no text can begin")
        self.start, self.batch, self.context, self.vocab = int(start), batch, model.config.context, model.config.vocab
        self.known = min(self.vocab, getattr(self.tokenizer, "vocab", self.vocab))
        self._parts = nnx.split(model)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Bytes that each id of the tokenizer stands for: (vocab,) int64."""
        return np.array([len(self.tokenizer.decode_bytes([i])) for i in range(self.known)], np.int64)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`start, tokens...` of each text."""
        many = getattr(self.tokenizer, "encode_batch", None) or (lambda t: [self.tokenizer.encode(x) for x in t])
        framed = [np.concatenate(([self.start], ids)).astype(np.int32) for ids in many(list(texts))]
        check_ids(framed, self.known)
        return framed

    def texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Natural log-probability of every token of each text: float64 arrays, windows of the context where it is long.

        Raises EvaluationError for a text without tokens and for values that are not finite.
        """
        framed = self.encode(texts)
        for number, ids in enumerate(framed):
            if len(ids) < 2:
                raise EvaluationError(f"text {number} ({texts[number]!r:.40}) has no token to score")
        with jax.default_matmul_precision("float32"):
            found = token_logprobs(framed, lambda x, y: self._scores(x, y)[0], context=self.context, batch=self.batch)
        for number, row in enumerate(found):
            if not np.isfinite(row).all():
                raise EvaluationError(f"text {number}: a log-probability is not finite; is the model damaged?")
        return found

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continued]:
        """Score each (context, continuation), read as one text; an empty context is the begin token alone.

        Word boundaries belong to the continuation ("The", " end"). A token that holds bytes of both counts as one of
        the continuation. Where both do not fit into the model's context the oldest tokens are dropped.

        Raises EvaluationError for an empty continuation, one that alone exceeds the context, and a tokenizer that does
        not give the text back.
        """
        windows, rows, first = [], self.encode([a + b for a, b in pairs]), []
        prefix = len(getattr(self.tokenizer, "prefix", b""))
        for number, (ids, (before, text)) in enumerate(zip(rows, pairs, strict=True)):
            ends = self.sizes[ids[1:]].cumsum()
            border = prefix + len(before.encode()) if before else 0
            if not text or not len(ends) or ends[-1] != prefix + len((before + text).encode()):
                what = "does not come back from the tokenizer" if text else "is empty"
                raise EvaluationError(f"continuation {number} ({text!r:.40}) {what}: it cannot be scored")
            first.append(int(np.searchsorted(ends, border, side="right")))  # its tokens are ids[1 + first:]
            length = min(len(ids) - 1, self.context)
            if len(ids) - 1 - first[-1] > length:
                raise EvaluationError(
                    f"continuation {number} ({text!r:.40}) has {len(ids) - 1 - first[-1]} tokens, the context "
                    f"{self.context}: score it as a text"
                )
            windows.append(Window(number, len(ids) - 1 - length, length, 0))
        found: list[Any] = [None] * len(pairs)
        for group, height, size in batches(windows, self.context, self.batch):
            tokens, targets = np.zeros((2, height, size), np.int32)
            for row, (number, begin, length, _) in enumerate(group):
                tokens[row, :length] = rows[number][begin : begin + length]
                targets[row, :length] = rows[number][begin + 1 : begin + length + 1]
            with jax.default_matmul_precision("float32"):
                logp, best = (np.asarray(x) for x in self._scores(tokens, targets))
            for row, (number, begin, length, _) in enumerate(group):
                mine = slice(first[number] - begin, length)
                total = float(logp[row, mine].astype(np.float64).sum())
                if not np.isfinite(total):
                    raise EvaluationError(f"continuation {number}: log-probability {total}; is the model damaged?")
                found[number] = Continued(total, length - mine.start, bool(best[row, mine].all()), begin)
        return found

    def _scores(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return _scores(self._parts[0], self._parts[1], tokens, targets, self.known)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _scores(graphdef: Any, state: Any, tokens: Any, targets: Any, known: int) -> tuple[jax.Array, jax.Array]:
    """(B, T) log-probability of each target, float32, and whether it is the likeliest id that has a text."""
    logits = nnx.merge(graphdef, state)(tokens).astype(jnp.float32)
    logp = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return logp, jnp.argmax(logits[..., :known], axis=-1) == targets
