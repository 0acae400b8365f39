"""How good class scores are: accuracy, macro-F1, calibration, the confusion matrix, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinylm import show
from tinylm.evaluation import EvaluationError
from tinylm.suite.results import Estimate, Result, digest, estimate

__all__ = ["Classified", "calibration", "classified", "confusion_matrix", "macro_f1", "probabilities", "wilson"]

BINS = 15  # of the calibration error (Guo et al. 2017)
RESAMPLES = 2000
CELLS = 2**22  # of confusion matrices held at a time: 32 MB


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Classified(Result):
    """Scores of one classifier on one set: `figures` accuracy, macro_f1, nll (nats), ece; `groups["class"]` accuracies.

    Attributes:
        logits: (N, C) scores; softmax makes probabilities of them. labels: (N,). names: of the classes.
        confusion: (C, C) counts, [true, predicted].
    """

    logits: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    confusion: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """(N,) classes with the highest score."""
        return self.logits.argmax(-1)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    z = np.asarray(logits, np.float64)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) counts: row the true class, column the predicted one."""
    cells = np.asarray(labels, int) * classes + np.asarray(predicted, int)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean of the classes' F1 = 2 tp / (2 tp + fp + fn), of (..., C, C) counts; a class that occurs nowhere counts 0.

    The same as scikit-learn's `f1_score(average="macro", labels=range(C), zero_division=0)`.
    """
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(-1) + confusion.sum(-2)
    return np.where(both > 0, 2 * hit / np.maximum(both, 1), 0.0).mean(-1)


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927) of the share of `hits` in n >= 1."""
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    centre, spread = hits / n + z * z / (2 * n), z * math.sqrt(hits / n * (1 - hits / n) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def calibration(probs: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015): the mean gap between confidence and accuracy, over equal bins.

    Confidence is the largest probability; bins are (i / bins, (i + 1) / bins].
    """
    sure, right = probs.max(-1), probs.argmax(-1) == labels
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, sure - right, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def classified(
    logits: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    texts: Sequence[str] = (),
    settings: dict | None = None,
    seed: int = 0,
) -> Classified:
    """All figures of (N, C) scores against (N,) labels; Wilson's interval of accuracy, a bootstrap's of macro-F1.

    Raises EvaluationError for scores that are not finite or do not fit the labels.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, int)
    n, classes = logits.shape
    if n != len(labels) or not n or classes != len(names) or labels.max() >= classes or labels.min() < 0:
        raise EvaluationError(f"scores {logits.shape}, {len(labels)} labels, {len(names)} names: they do not fit")
    if not np.isfinite(logits).all():
        raise EvaluationError("scores that are not finite: the classifier has diverged")
    probs, predicted = probabilities(logits), logits.argmax(-1)
    right, confusion = predicted == labels, confusion_matrix(labels, predicted, classes)
    nll = -np.log(np.maximum(probs[np.arange(n), labels], 1e-300))
    draw, again = np.random.default_rng(seed), []
    for part in np.array_split(np.arange(RESAMPLES), -(-RESAMPLES * classes**2 // CELLS)):  # texts drawn anew, by cell
        drawn = draw.multinomial(n, confusion.ravel() / n, len(part))
        again.append(macro_f1(drawn.reshape(-1, classes, classes)))
    low, high = np.quantile(np.concatenate(again), [0.025, 0.975])
    hits = int(right.sum())
    figures = {
        "accuracy": Estimate(hits / n, wilson(hits, n) if n > 1 else None, n),
        "macro_f1": Estimate(float(macro_f1(confusion)), (float(low), float(high)) if n > 1 else None, n),
        "nll": estimate(nll, seed=seed),
        "ece": Estimate(calibration(probs, labels), None, n),
    }
    by_class = {}
    for c in np.flatnonzero(confusion.sum(1)).tolist():
        own = int(confusion[c].sum())
        by_class[names[c]] = {
            "accuracy": Estimate(float(confusion[c, c] / own), wilson(int(confusion[c, c]), own), own)
        }
    return Classified(
        task="classes", figures=figures, groups={"class": by_class},
        items={"accuracy": right.astype(float), "nll": nll},
        settings=settings or {}, sha256=digest([list(pair) for pair in zip(texts, labels.tolist(), strict=False)]),
        logits=logits, labels=labels, names=tuple(names), confusion=confusion,
    )  # fmt: skip


def reliability(probs: np.ndarray, labels: np.ndarray, bins: int = BINS) -> show.Picture:
    """The bins of the calibration error as a table: confidence, accuracy, texts."""
    sure, right = probs.max(-1), probs.argmax(-1) == labels
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    rows = [
        [f"{i / bins:.2f} to {(i + 1) / bins:.2f}", float(sure[place == i].mean()), float(right[place == i].mean()),
         int((place == i).sum())]
        for i in range(bins) if (place == i).any()
    ]  # fmt: skip
    return show.table(rows, ["confidence", "mean", "accuracy", "texts"])
