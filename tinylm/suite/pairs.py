"""Minimal pairs: does a model find the acceptable one of two nearly equal texts more probable?

The form of BLiMP (Warstadt et al. 2020): json lines of `sentence_good`, `sentence_bad`, `UID` (the paradigm),
`linguistics_term` (the phenomenon) and `field`. `worldpairs` makes more of them from the embedded world.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm.evaluation import EvaluationError
from tinylm.suite.results import Result, digest, estimates
from tinylm.suite.scoring import Scorer

__all__ = ["Pair", "json_lines", "minimal_pairs", "read_pairs"]

LINES = (".jsonl", ".jsonl.gz")


class Pair(NamedTuple):
    """Two texts that differ in one point. `document`: pairs of one document are resampled together; -1 is its own."""

    good: str
    bad: str
    paradigm: str
    phenomenon: str = ""
    field: str = ""
    document: int = -1


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file line n", object) of a .jsonl or .jsonl.gz file, or of those in a folder, in the order of their names.

    Raises EvaluationError for a line that is no json object, FileNotFoundError.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(LINES) and not p.name.startswith("."))
        if not files:
            raise EvaluationError(f"{path} holds no {' or '.join(LINES)} file")
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        where, found = f"{file} line {number}", json.loads(line)
                        if type(found) is not dict:
                            raise EvaluationError(f"{where}: a json object is needed, not {line.strip()[:40]!r}")
                        yield where, found
            except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise EvaluationError(f"{file} cannot be read as json lines: {error}") from error


def read_pairs(path: str | Path, *, limit: int | None = None) -> list[Pair]:
    """The pairs of a file or folder in BLiMP's form; `limit`: the first so many of each paradigm.

    Without `UID` the paradigm is the file's name; without `linguistics_term` the phenomenon is the paradigm. Raises
    EvaluationError naming file and line.
    """
    pairs, seen = [], Counter()
    for where, row in json_lines(path):
        stem = Path(where.rpartition(" line ")[0]).name.removesuffix(".gz").removesuffix(".jsonl")
        paradigm = str(row.get("UID", stem))
        good, bad = row.get("sentence_good"), row.get("sentence_bad")
        if not (isinstance(good, str) and isinstance(bad, str) and good and bad):
            raise EvaluationError(f"{where}: needs 'sentence_good' and 'sentence_bad', two texts; it has {list(row)}")
        seen[paradigm] += 1
        if limit is None or seen[paradigm] <= limit:
            phenomenon = str(row.get("linguistics_term", paradigm))
            pairs.append(Pair(good, bad, paradigm, phenomenon, str(row.get("field", ""))))
    if not pairs:
        raise EvaluationError(f"{path} holds no pair")
    return pairs


def minimal_pairs(
    model: Any, pairs: Iterable[Pair], *, tokenizer: Any = None, batch: int = 16, seed: int = 0, name: str = "pairs"
) -> Result:
    """How often a decoder gives the good text the higher probability.

    Figures: `accuracy` compares the total log-probabilities, as BLiMP does; `accuracy_per_byte` divides them by the
    bytes of each text first, for pairs of unequal length; `margin` is the mean of log P(good) - log P(bad) in nats.
    A tie is a miss. `accuracy` is over all pairs, which is the mean of paradigms where they have equally many pairs.
    Groups: paradigm, phenomenon, field. Intervals over pairs, or over the documents that pairs come from.

    Args:
        model: a decoder. pairs: from `read_pairs` or `world_pairs`. tokenizer, batch: as in `Scorer`.
        seed: of the intervals. name: of the task.
    """
    pairs = list(pairs)
    if not pairs:
        raise EvaluationError("there is no pair to score")
    found = Scorer(model, tokenizer=tokenizer, batch=batch).texts([text for p in pairs for text in (p.good, p.bad)])
    sums = np.array([row.sum() for row in found]).reshape(-1, 2)
    sizes = np.array([[len(p.good.encode()), len(p.bad.encode())] for p in pairs])
    per_byte = sums / sizes
    items = {
        "accuracy": (sums[:, 0] > sums[:, 1]).astype(float),
        "accuracy_per_byte": (per_byte[:, 0] > per_byte[:, 1]).astype(float),
        "margin": sums[:, 0] - sums[:, 1],
    }
    documents = np.array([p.document if p.document >= 0 else -1 - i for i, p in enumerate(pairs)])
    groups = {}
    for kind in ("phenomenon", "paradigm", "field"):
        labels = np.array([getattr(p, kind) for p in pairs])
        if any(labels):
            groups[kind] = {
                str(label): estimates(
                    {k: v[labels == label] for k, v in items.items()}, documents=documents[labels == label], seed=seed
                )
                for label in sorted(set(labels))
            }
    return Result(
        task=name, figures=estimates(items, documents=documents, seed=seed), groups=groups, items=items,
        documents=documents, settings={"pairs": len(pairs), "seed": seed}, sha256=digest([list(p) for p in pairs]),
    )  # fmt: skip
