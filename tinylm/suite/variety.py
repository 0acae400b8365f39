"""How alike the texts of a model are: self-BLEU (Zhu et al. 2018) beside distinct-n."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tinylm.evaluation import EvaluationError, diversity
from tinylm.suite.overlap import ngrams
from tinylm.suite.results import Estimate, Result, digest, estimates

__all__ = ["self_bleu", "variety"]

TOKEN = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|[^\w\s]")
SMOOTH = 0.1  # a numerator of 0 counts as this (Chen and Cherry 2014, their first smoothing)


def self_bleu(texts: Iterable[str | Sequence[str]], *, order: int = 4) -> np.ndarray:
    """BLEU of each text with all others as its references, (texts,) float64: 1 for copies, 0 for nothing in common.

    Tokens are lower-cased words and marks, or the given lists. Sentence BLEU (Papineni et al. 2002) of uniform weights
    up to `order`, clipped by the reference that has most of an n-gram, brevity against the reference nearest in length
    (the shorter of two), zeros smoothed to 0.1 as NLTK's `method1`. Rises with the number of texts and with their
    length: compare equally many, of one length.

    Raises EvaluationError for fewer than two texts.
    """
    split = [TOKEN.findall(text.lower()) if isinstance(text, str) else list(text) for text in texts]
    if len(split) < 2:
        raise EvaluationError(f"self-BLEU compares texts with each other: {len(split)} is too few")
    sizes = np.array([len(one) for one in split])
    logs = np.zeros(len(split))
    none = np.zeros(len(split), bool)  # not one word in common: 0, whatever the smoothing
    for n in range(1, order + 1):
        counts = [ngrams(one, n) for one in split]
        most, owner, second = {}, {}, Counter()  # the largest count of any text, whose it is, and the next largest
        for i, own in enumerate(counts):
            for gram, c in own.items():
                if c > most.get(gram, 0):
                    second[gram], most[gram], owner[gram] = most.get(gram, 0), c, i
                elif c > second[gram]:
                    second[gram] = c
        for i, own in enumerate(counts):
            hits = sum(min(c, second[g] if owner[g] == i else most[g]) for g, c in own.items())
            none[i] |= n == 1 and not hits
            logs[i] += math.log((hits or SMOOTH) / max(1, own.total())) / order
    ordered = np.sort(sizes)
    scores = np.zeros(len(split))
    for i, size in enumerate(sizes.tolist()):
        at = int(np.searchsorted(ordered, size))
        others = np.delete(ordered, at)
        nearest = int(others[np.lexsort((others, np.abs(others - size)))[0]])
        brevity = 1.0 if size > nearest else math.exp(1 - nearest / size) if size else 0.0
        scores[i] = 0.0 if none[i] or not size else brevity * math.exp(logs[i])
    return scores


def variety(texts: Iterable[str], *, words: int | None = 100, seed: int = 0, name: str = "variety") -> Result:
    """Self-BLEU and distinct-n of texts that a model made, over the first `words` words of each.

    The interval of self_bleu is over texts, their references held fixed. distinct-n (see `evaluation.diversity`) has
    none: drawing texts twice would lower it by itself.
    """
    texts = list(texts)
    short = [TOKEN.findall(text.lower())[:words] for text in texts]
    items = {"self_bleu": self_bleu(short)}
    counted = diversity(texts, words=words)
    plain = {k: Estimate(float(v), None, len(texts)) for k, v in counted.items() if "_" in k and v is not None}
    return Result(
        task=name, figures=estimates(items, seed=seed) | plain, items=items, sha256=digest(texts),
        settings={"texts": len(texts), "words": words, "seed": seed},
    )  # fmt: skip
