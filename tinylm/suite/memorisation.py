"""Does a model copy what it was trained on? An audit after TinyStories (Eldan and Li 2023), with a control.

The model continues beginnings of training texts, and of held-out ones. What it writes, and the held-out texts' own ends
(which nobody copied), are compared with the training text by the same measures, over equally many words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tinylm.evaluation import EvaluationError
from tinylm.suite.completions import complete
from tinylm.suite.overlap import Corpus, rouge_l, rouge_n, words
from tinylm.suite.results import Result, digest, estimates
from tinylm.text import clean, sample

__all__ = ["halves", "memorisation", "overlap"]

LEAST = 20  # words of an end that is worth comparing
COPIED = 0.5  # a text is called copied when one shared run is at least this share of its words


def overlap(texts: Sequence[str], corpus: Corpus | Iterable[str]) -> dict[str, np.ndarray]:
    """What each text shares with a corpus, (texts,) float64 each.

    new_1 ... new_5: share of its n-grams that no document holds. longest: words of the longest shared run;
    longest_share: as a share of its words; copied: 1 where that is at least half. nearest_rouge2: the largest share of
    its bigrams that one document holds (Rouge-2 precision without clipping); nearest_rougeL: ROUGE-L f of the text with
    that document.
    NaN where a text is too short.
    """
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    split = [words(text) for text in texts]
    size = np.array([len(one) or np.nan for one in split], float)
    found = {f"new_{n}": corpus.unseen(split, n) for n in range(1, 6)}
    found["longest"] = np.array([run.length for run in corpus.longest(split)], float)
    found["longest_share"] = found["longest"] / size
    found["copied"] = np.where(np.isnan(size), np.nan, found["longest_share"] >= COPIED)
    near = corpus.nearest(split)
    found["nearest_rouge2"] = np.array([share for _, share in near])
    found["nearest_rougeL"] = np.array(
        [rouge_l(one, corpus.split[at]).f if at >= 0 else np.nan for one, (at, _) in zip(split, near, strict=True)]
    )
    return found


def halves(text: str, share: float = 0.4) -> tuple[str, str]:
    """A text's first `share` of words, and the rest with the space before it."""
    places = [found.end() for found in re.finditer(r"\S+", text)]
    cut = places[max(1, round(share * len(places))) - 1] if places else 0
    return text[:cut], text[cut:]


def memorisation(
    model: Any,
    train: Iterable[str],
    held_out: Iterable[str],
    *,
    count: int = 100,
    share: float = 0.4,
    tokens: int = 256,
    seed: int = 0,
    name: str = "memorisation",
    **sampling: Any,
) -> Result:
    """Audit a model against its training text.

    Figures, all of what it makes of training texts' beginnings: those of `overlap`; `end_rouge2`, the Rouge-2 f-measure
    of its end with the real one; `twin_rouge2`, the largest Rouge-2 f-measure with another of its texts. Groups under
    "source": the same for `training` and `held-out` beginnings, and for `real`, the held-out texts' own ends: copying
    shows as training above held-out (longest, nearest, end_rouge2) and far above real. Made and real ends of one
    beginning are cut to equally many words.

    Args:
        model: a decoder with a tokenizer. train: its training text, or as much as is at hand, some MB.
        held_out: texts of the same kind; those that occur in `train` (see `text.contamination`) are dropped first.
        count: beginnings of each kind, chosen by hash. share: of the words that are given.
        tokens, sampling: of the completions; default the model's own distribution. seed: of all choices.

    Raises EvaluationError where there are too few texts, GenerateError.
    """
    train = list(train)
    fresh, report = clean(held_out, train)
    sources = {"training": train, "held-out": fresh}
    corpus, items, prompts = Corpus(train), {}, []
    for source, texts in sources.items():
        fit = [text for text in texts if len(words(halves(text, share)[1])) >= LEAST]
        chosen = sample(fit, count, seed=seed)
        if len(chosen) < 2:
            raise EvaluationError(f"only {len(chosen)} {source} texts are long enough to audit: give more")
        begun = [halves(text, share) for text in chosen]
        made = complete(model, [start for start, _ in begun], tokens=tokens, seed=seed, **sampling)
        ends, real = [], []
        for one, (_, end) in zip(made, begun, strict=True):
            a, b = words(one.text), words(end)
            size = min(len(a), len(b))
            ends.append(a[:size])
            real.append(b[:size])
        items[source] = overlap([" ".join(end) for end in ends], corpus) | {
            "end_rouge2": np.array([rouge_n(a, b, clip=False).f for a, b in zip(ends, real, strict=True)]),
            "twin_rouge2": _twins(ends),
        }
        if source == "held-out":
            items["real"] = overlap([" ".join(end) for end in real], corpus)
        prompts += begun
    notes = (f"{len(report.flagged)} of {report.documents} held-out texts occur in the training text: left out",)
    return Result(
        task=name,
        figures=estimates(items["training"], seed=seed),
        groups={"source": {source: estimates(values, seed=seed) for source, values in items.items()}},
        items=items["training"],
        settings={"count": count, "share": share, "tokens": tokens, "seed": seed, "documents": len(train)} | sampling,
        sha256=digest([list(one) for one in prompts]),
        notes=notes if report.flagged else (),
    )


def _twins(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """For each text the largest Rouge-2 f-measure with another one."""
    best = np.zeros(len(texts))
    for i, a in enumerate(texts):
        for j in range(i):
            f = rouge_n(a, texts[j], clip=False).f
            best[i], best[j] = max(best[i], f), max(best[j], f)
    return best
