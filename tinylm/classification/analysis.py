"""What a committee is worth: accuracy against K, diversity, FLOPs, cascades, and where a larger model helps.

Everything works on logits, (K, N, C) of members and (N, C) of a larger model on the same texts, and labels (N,).
"Deep" is the larger model throughout. Sources: Gross et al. 2025 (2507.14871); Kondratyuk et al. 2020, When ensembling
smaller models is more efficient; Predicting on the edge; TinySaver.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinylm.classification.committee import combined
from tinylm.classification.metrics import probabilities
from tinylm.classification.sets import Dataset, SetError
from tinylm.config import ModelConfig
from tinylm.presets import size

__all__ = [
    "Cascade", "Decile", "Diversity", "Point", "cascade", "cost", "coverage", "curve", "diversity", "frontier",
    "only_committee", "select_texts", "uncertainty", "where_larger_helps",
]  # fmt: skip

MOST = 200  # subsets of a size that are looked at; more are sampled


class Point(NamedTuple):
    """Committees of `k` members: mean accuracy over `subsets` of them, and the 2.5th and 97.5th percentile.

    Subsets share members and texts, so the span says how much it matters who sits on it, not how far another test set
    or other members could be.
    """

    k: int
    accuracy: float
    low: float
    high: float
    subsets: int


def curve(
    logits: np.ndarray, labels: np.ndarray, *, combine: str = "logits", ks: Iterable[int] = (), most: int = MOST, seed=0
) -> list[Point]:
    """Accuracy against the number of members: over all subsets of each size, or `most` drawn ones where there are more.

    Args:
        ks: sizes; default 1 to all members. combine: see `combined`.
    """
    members, found, draw = len(logits), [], np.random.default_rng(seed)
    for k in list(ks) or range(1, members + 1):
        if not 1 <= k <= members:
            raise SetError(f"k = {k}: the committee has {members} members")
        if math.comb(members, k) <= most:
            subsets: Any = itertools.combinations(range(members), k)
        else:
            subsets = (draw.permutation(members)[:k] for _ in range(most))
        right = [float((combined(logits[list(s)], combine).argmax(-1) == labels).mean()) for s in subsets]
        low, high = np.quantile(right, [0.025, 0.975])
        found.append(Point(k, float(np.mean(right)), float(low), float(high), len(right)))
    return found


class Diversity(NamedTuple):
    """How differently members decide.

    disagreement: (K, K) share of texts on which two differ. correlation: (K, K) of their errors (phi), NaN where a
    member makes none. mean_disagreement, mean_correlation: over pairs. any_right: share of texts that some member gets
    right. all_right: that all do.
    """

    disagreement: np.ndarray
    correlation: np.ndarray
    mean_disagreement: float
    mean_correlation: float
    any_right: float
    all_right: float


def diversity(logits: np.ndarray, labels: np.ndarray) -> Diversity:
    """Disagreement and correlation of errors of (K, N, C) logits."""
    picks = logits.argmax(-1)
    wrong = (picks != labels).astype(float)
    apart = (picks[:, None] != picks[None]).mean(-1)
    centred = wrong - wrong.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        together = (centred[:, None] * centred[None]).mean(-1) / (spread[:, None] * spread[None])
    pairs = np.triu_indices(len(picks), 1)
    known = together[pairs][np.isfinite(together[pairs])]
    return Diversity(
        apart, together, float(apart[pairs].mean()) if len(pairs[0]) else 0.0,
        float(known.mean()) if len(known) else math.nan, float((wrong.min(0) == 0).mean()),
        float((wrong.max(0) == 0).mean()),
    )  # fmt: skip


def only_committee(logits: np.ndarray, labels: np.ndarray, deep: np.ndarray | None = None) -> np.ndarray:
    """Places of texts that the committee gets right and most of its members (and the deep model, if given) wrong."""
    right = combined(logits).argmax(-1) == labels
    members = (logits.argmax(-1) == labels).mean(0)
    alone = right & (members <= 0.5)
    return np.flatnonzero(alone if deep is None else alone & (deep.argmax(-1) != labels))


# --- cost -------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one text: `flops` in all; `critical` along the longest path, members side by side; `depth` in layers."""

    flops: float
    critical: float
    depth: int


def cost(configs: ModelConfig | Sequence[ModelConfig], tokens: int) -> Cost:
    """What one text of so many tokens costs a model, or a committee of them: 2 FLOPs per multiply-add.

    Attention is counted at this length. The front end's convolutions count as a layer each.
    """
    every = [configs] if isinstance(configs, ModelConfig) else list(configs)

    def one(config: ModelConfig) -> float:
        c = config.replace(context=tokens)
        head = 2 * (c.width * c.width * c.pooler + c.width * c.classes)
        return size(c).flops * tokens + head

    each = [one(config) for config in every]
    return Cost(sum(each), max(each), max(c.layers + c.convs for c in every))


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of (FLOPs, accuracy) points that no other beats in both, cheapest first."""
    best, kept = -math.inf, []
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            best = accuracy
            kept.append(name)
    return kept


# --- when to ask the larger model -------------------------------------------------------------------------------------


def uncertainty(logits: np.ndarray, kind: str = "margin") -> np.ndarray:
    """(N,) how unsure scores are, larger is less sure.

    Args:
        logits: (N, C), or (K, N, C) of a committee, whose mean logits count.
        kind: "margin" (1 minus the gap between the two largest probabilities), "largest" (1 minus the largest),
            "entropy" (nats), or "disagreement" (share of members that do not pick the committee's class; K needed).
    """
    mean = logits.mean(0) if logits.ndim == 3 else logits
    p = probabilities(mean)
    if kind == "disagreement":
        if logits.ndim != 3:
            raise SetError("disagreement needs the members' logits, (K, N, C)")
        return (logits.argmax(-1) != mean.argmax(-1)).mean(0)
    top = np.sort(p, axis=-1)
    kinds = {
        "margin": lambda: 1 - (top[:, -1] - top[:, -2]),
        "largest": lambda: 1 - top[:, -1],
        "entropy": lambda: -(p * np.log(np.maximum(p, 1e-300))).sum(-1),
    }
    if kind not in kinds:
        raise SetError(f"kind = {kind!r}: must be one of {', '.join([*kinds, 'disagreement'])}")
    return kinds[kind]()


class Cascade(NamedTuple):
    """Accuracy when a share of the texts goes on to the deep model, which is asked after the small one.

    share: (P,) of texts deferred. flops: (P,) mean per text, the small model's always counted. accuracy: (P,) most
    unsure first. random: (P,) in expectation. oracle: (P,) texts first that only the deep model gets right.
    recovered: area between accuracy and random, as a share of that between oracle and random; 1 is as good as the
    oracle, 0 as chance.
    """

    share: np.ndarray
    flops: np.ndarray
    accuracy: np.ndarray
    random: np.ndarray
    oracle: np.ndarray
    recovered: float


def cascade(
    small: np.ndarray,
    deep: np.ndarray,
    labels: np.ndarray,
    costs: tuple[float, float] = (0.0, 1.0),
    kind: str = "margin",
) -> Cascade:
    """What it gives to ask the deep model only where the small one, or the committee, is unsure.

    Args:
        small: (N, C), or (K, N, C) of a committee that sums. deep: (N, C). costs: FLOPs per text of the small and the
            deep one. kind: of `uncertainty`.
    """
    whole = combined(small) if small.ndim == 3 else small
    mine, theirs = (x.argmax(-1) == labels for x in (whole, deep))
    gain = theirs.astype(float) - mine
    n = len(labels)

    def sums(order: np.ndarray) -> np.ndarray:
        return mine.mean() + np.concatenate([[0.0], np.cumsum(gain[order])]) / n

    share = np.arange(n + 1) / n
    found = sums(np.argsort(-uncertainty(small, kind), kind="stable"))
    best, chance = sums(np.argsort(-gain, kind="stable")), mine.mean() + share * gain.mean()
    room = (best - chance).sum()
    recovered = float((found - chance).sum() / room) if room > 0 else 0.0
    return Cascade(share, costs[0] + share * costs[1], found, chance, best, recovered)


class Decile(NamedTuple):
    """Texts of about equal uncertainty: how unsure the small model is, both accuracies, and the gain in nats."""

    uncertainty: float
    small: float
    deep: float
    gain: float
    texts: int


def where_larger_helps(
    small: np.ndarray, deep: np.ndarray, labels: np.ndarray, *, bins: int = 10, kind: str = "margin"
) -> list[Decile]:
    """Texts from the surest to the least sure, in `bins` parts: what the deep model adds in each.

    gain is NLL of the small minus NLL of the deep model; below zero the larger one is worse.
    """
    mean = small.mean(0) if small.ndim == 3 else small
    nll = [-np.log(np.maximum(probabilities(x)[np.arange(len(labels)), labels], 1e-12)) for x in (mean, deep)]
    unsure = uncertainty(small, kind)
    found = []
    for part in np.array_split(np.argsort(unsure, kind="stable"), bins):
        if len(part):
            one, two = (float((x[part].argmax(-1) == labels[part]).mean()) for x in (mean, deep))
            gain = float((nll[0][part] - nll[1][part]).mean())
            found.append(Decile(float(unsure[part].mean()), one, two, gain, len(part)))
    return found


# --- overlap of pretraining and classification texts ------------------------------------------------------------------


def coverage(texts: Sequence[str], dataset: Dataset, tokenizer: Any, *, first: int = 128) -> np.ndarray:
    """(N,) share of each text's first tokens that occur in the set, each token type weighed by its rarity there.

    A type that is in every text tells nothing, so a token counts log(N / texts of the set with it); types that the set
    lacks count 0. The mean over a text's tokens: more is closer to the set.
    """
    inside = [np.unique(ids) for ids in tokenizer.encode_batch(dataset.texts)]
    seen = np.bincount(np.concatenate(inside), minlength=tokenizer.vocab)
    value = np.where(seen > 0, np.log(len(inside) / np.maximum(seen, 1)), 0.0)
    return np.array([value[ids[:first]].mean() if len(ids) else 0.0 for ids in tokenizer.encode_batch(texts)])


def select_texts(
    texts: Sequence[str], dataset: Dataset, tokenizer: Any, count: int, *, most: bool = True, first: int = 128
) -> list[str]:
    """The `count` texts that overlap most, or least, with a set, in their own order (the token-overlap experiment)."""
    if not 1 <= count <= len(texts):
        raise SetError(f"count = {count}: there are {len(texts)} texts")
    found = coverage(texts, dataset, tokenizer, first=first)
    order = np.argsort(-found if most else found, kind="stable")[:count]
    return [texts[int(i)] for i in np.sort(order)]
