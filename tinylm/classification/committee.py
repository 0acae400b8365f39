"""Committees: several classifiers, usually shallow and trained apart, that decide together.

    members = train_many(preset("bert-1", ...), [masked_texts(...), ...], config.grid(seed=range(5)))
    list(members)
    committee = Committee.of(classify_many(members.models, train_set))
    committee.evaluate(test_set)
    committee.save("runs/committee"); Committee.load("runs/committee"); committee.export("engine/committee")

Members of one shape run as one program. The rule of "Tiny language models" (Gross et al. 2025) is the sum of the
members' output fields; that it is the logits, before the softmax, is not verified, so all the rules can be had.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.checkpoint import load, save
from tinylm.classification.metrics import Classified, classified, probabilities
from tinylm.classification.scoring import scores
from tinylm.classification.sets import Dataset, SetError
from tinylm.config import suggest
from tinylm.engine import Engine
from tinylm.engine.export import export
from tinylm.model import Transformer
from tinylm.reading import regular
from tinylm.store import write_bytes

__all__ = ["COMBINE", "Committee", "EngineCommittee", "combined", "learned_weights"]

FILE = "committee.json"
FORMAT = 1
MEMBER = re.compile(r"member-(\d{3,})(\.tlm)?")


# --- the rules --------------------------------------------------------------------------------------------------------


def _votes(logits: np.ndarray) -> np.ndarray:
    """Log of the shares of votes; ties go to the larger sum of logits, which is added as a nothing."""
    picks = np.eye(logits.shape[-1])[logits.argmax(-1)].mean(-3)
    total = logits.mean(-3)
    order = total.argsort(-1).argsort(-1) / logits.shape[-1]  # 0 to below 1: never as much as a vote
    return np.log(picks + 1e-3 * order / len(logits) + 1e-9)


COMBINE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "logits": lambda logits: logits.sum(-3),
    "probs": lambda logits: np.log(np.maximum(probabilities(logits).mean(-3), 1e-300)),
    "vote": _votes,
}


def combined(logits: np.ndarray, combine: str = "logits", weights: Sequence[float] | None = None) -> np.ndarray:
    """The committee's scores (N, C) from its members' logits (K, N, C); the largest is its choice.

    Args:
        combine: "logits", their sum; "probs", the log of the mean probability; "vote", the log of the share of votes, a
            tie broken by the sum of logits.
        weights: of the members, (K,), for the sum of logits.

    Raises SetError for another rule, or weights that do not fit.
    """
    logits = np.asarray(logits, np.float64)
    if combine not in COMBINE:
        raise SetError(f"combine = {combine!r}{suggest(combine, COMBINE)}")
    if logits.ndim != 3:
        raise SetError(f"logits of shape {logits.shape}: must be (members, texts, classes)")
    if weights is not None and not np.isfinite(np.asarray(weights, np.float64)).all():
        raise SetError(f"weights = {list(weights)}: must be finite")
    if weights is None:
        return COMBINE[combine](logits)
    if combine != "logits" or len(weights) != len(logits):
        raise SetError(
            f'{len(weights)} weights for {len(logits)} members and combine = {combine!r}: one each, "logits"'
        )
    return np.einsum("k,knc->nc", np.asarray(weights, np.float64), logits)


def learned_weights(logits: np.ndarray, labels: np.ndarray, *, steps: int = 300) -> np.ndarray:
    """(K,) weights of the sum of logits with the least cross-entropy on (K, N, C) logits and labels (N,).

    The loss is convex in them; plain gradient descent with halved steps, from 1 / K each. Take validation texts.
    """
    z, labels = np.asarray(logits, np.float64), np.asarray(labels, int)
    n = np.arange(len(labels))

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        p = probabilities(np.einsum("k,knc->nc", w, z))
        nll = -np.log(np.maximum(p[n, labels], 1e-300)).mean()
        p[n, labels] -= 1
        return float(nll), np.einsum("knc,nc->k", z, p) / len(n)

    w, rate = np.full(len(z), 1 / len(z)), 1.0
    value, slope = loss(w)
    for _ in range(steps):
        new = w - rate * slope
        found, steeper = loss(new)
        if found <= value:
            w, value, slope, rate = new, found, steeper, rate * 1.5
        else:
            rate /= 2
        if rate < 1e-12:
            break
    return w


# --- the committee ----------------------------------------------------------------------------------------------------


class Committee:
    """Classifiers that decide together; a model like any other: `logits`, `predict`, `evaluate`, `save`, `export`.

    Args:
        members: models with a "classes" head of as many classes and one tokenizer; a shape may differ.
        names: of the classes. combine, weights: see `combined`.

    Raises SetError: no members, or members that do not fit together.
    """

    def __init__(
        self,
        members: Sequence[Transformer],
        names: Sequence[str] = (),
        *,
        combine: str = "logits",
        weights: Sequence[float] | None = None,
    ) -> None:
        self.members = list(members)
        if not self.members:
            raise SetError("a committee needs at least one member")
        wrong = [i for i, m in enumerate(self.members) if m.config.head != "classes"]
        if wrong:
            raise SetError(f"member {wrong[0]} has a {self.members[wrong[0]].config.head!r} head: see classify")
        lead = self.members[0]
        for i, member in enumerate(self.members):
            if member.config.classes != lead.config.classes or member.tokenizer != lead.tokenizer:
                raise SetError(f"member {i} has other classes or another tokenizer than member 0")
        self.names = tuple(map(str, names or range(lead.config.classes)))
        if len(self.names) != lead.config.classes:
            raise SetError(f"{len(self.names)} names for {lead.config.classes} classes")
        combined(np.zeros((len(self.members), 1, 2)), combine, weights)  # refused now, not at first use
        self.combine, self.weights = combine, None if weights is None else tuple(map(float, weights))

    @classmethod
    def of(cls, tuned: Sequence[Any], **settings: Any) -> Committee:
        """A committee of what `classify_many` gave."""
        return cls([one.model for one in tuned], tuned[0].names if tuned else (), **settings)

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return f"Committee of {len(self)} by {self.combine}: {self.members[0].config.layers} layers of width " + (
            f"{self.members[0].config.width}, {len(self.names)} classes"
        )

    @property
    def tokenizer(self) -> Any:
        """The members' tokenizer."""
        return self.members[0].tokenizer

    def member_logits(self, texts: Sequence[str | Sequence[int]]) -> np.ndarray:
        """(K, N, C) scores of the members, members of one shape in one program."""
        return scores(self.members, texts)

    def logits(self, texts: Sequence[str | Sequence[int]]) -> np.ndarray:
        """(N, C) scores of the committee on texts or token ids: by default the sum of its members' logits."""
        return combined(self.member_logits(texts), self.combine, self.weights)

    def predict(self, texts: Sequence[str | Sequence[int]]) -> list[str]:
        """The class of each text, by name."""
        return [self.names[i] for i in self.logits(texts).argmax(-1)]

    def evaluate(self, dataset: Dataset, *, seed: int = 0) -> Classified:
        """Accuracy, macro-F1, calibration, confusion on a set, whose classes are matched by name.

        Raises SetError for a class that was not learned.
        Probabilities are those of the mean logits, not of their sum, whose softmax is K times too sure.
        """
        dataset = dataset.numbered_as(self.names)
        found = self.logits(dataset.texts)
        found = found / len(self) if self.combine == "logits" and self.weights is None else found
        said = {"members": len(self), "combine": self.combine}
        return classified(found, dataset.labels, dataset.names, texts=dataset.texts, settings=said, seed=seed)

    def fitted(self, dataset: Dataset) -> Committee:
        """The same members with weights learned on a set, which should be no member's training texts."""
        dataset = dataset.numbered_as(self.names)
        weights = learned_weights(self.member_logits(dataset.texts), dataset.labels)
        return Committee(self.members, self.names, weights=weights.tolist())

    # - files -

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the committee: committee.json, and each member as a saved model of its own: member-000, member-001, ...

        A committee that was there stays whole until the new one is: new members get new names, and the file that lists
        them comes last. Raises FileExistsError: the folder holds something else.
        """
        names = _fresh(folder, len(self))
        for name, member in zip(names, self.members, strict=True):
            save(member, Path(folder) / name)
        return self._list(folder, names)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Committee:
        """The committee that `save` wrote. Raises SetError, and what `tinylm.load` raises of its members."""
        said, folder = _read(folder), Path(folder)
        members = [load(folder / name) for name in said["members"]]
        return cls(members, said["names"], combine=said["combine"], weights=said["weights"])

    def export(self, folder: str | os.PathLike, bits: str = "int8", **settings: Any) -> EngineCommittee:
        """Write one .tlm file per member for the engine, and committee.json beside them; see `tinylm.export`.

        Over another committee as `save`. Raises FileExistsError: the folder holds something else.
        """
        names = [f"{name}.tlm" for name in _fresh(folder, len(self))]
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, member in zip(names, self.members, strict=True):
            export(member, Path(folder) / name, bits, **settings)
        return EngineCommittee(self._list(folder, names))

    def _list(self, folder: str | os.PathLike, members: list[str]) -> Path:
        """Make the committee in a folder these members, and remove those that it had before."""
        folder = Path(folder)
        about = {"combine": self.combine, "weights": self.weights, "names": self.names, "members": members}
        write_bytes(folder / FILE, json.dumps({"format": FORMAT, **about}, indent=2).encode())
        for old in folder.glob("member-*"):
            if MEMBER.fullmatch(old.name) and old.name not in members:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        return folder


class EngineCommittee:
    """A committee in the engine: Python around one `Engine` per member, which take their turns; nothing is shared yet.

    Args:
        folder: from `Committee.export`. settings: of `Engine`.
    """

    def __init__(self, folder: str | os.PathLike, **settings: Any) -> None:
        said = _read(folder)
        self.names, self.combine, self.weights = tuple(said["names"]), said["combine"], said["weights"]
        self.engines = [Engine(Path(folder) / name, **settings) for name in said["members"]]

    def member_logits(self, texts: Sequence[str | Sequence[int]]) -> np.ndarray:
        """(K, N, C) scores of the members."""
        most = min(engine.facts.context for engine in self.engines)
        lead = self.engines[0]
        rows = [lead._ids(text) for text in texts]
        rows = [row if len(row) <= most else [*row[: most - 1], row[-1]] for row in rows]  # cut as in training
        return np.stack([engine.classify(rows) for engine in self.engines])

    def logits(self, texts: Sequence[str | Sequence[int]]) -> np.ndarray:
        """(N, C) scores of the committee."""
        return combined(self.member_logits(texts), self.combine, self.weights)

    def predict(self, texts: Sequence[str | Sequence[int]]) -> list[str]:
        """The class of each text, by name."""
        return [self.names[i] for i in self.logits(texts).argmax(-1)]


def _fresh(folder: str | os.PathLike, count: int) -> list[str]:
    """Names of new members, beside those that are there. The folder must be new, empty or a committee's."""
    folder = Path(folder)
    there = [path.name for path in folder.iterdir()] if folder.exists() else []
    numbers = [int(found[1]) for name in there if (found := MEMBER.fullmatch(name))]
    if there and FILE not in there and len(numbers) < len(there):  # members alone: what an interrupted save left
        raise FileExistsError(f"{folder} holds something that is no committee: save into another folder")
    first = max(numbers, default=-1) + 1
    return [f"member-{i:03d}" for i in range(first, first + count)]


def _read(folder: str | os.PathLike) -> dict[str, Any]:
    path = Path(folder) / FILE
    if not path.is_file():
        raise SetError(f"{folder} is no committee: there is no {FILE} in it")
    try:
        said = json.loads(regular(path))
        names, members = said["names"], said["members"]
        plain = all(isinstance(n, str) and Path(n).name == n and n not in ("", ".", "..") for n in members)
        if said["format"] != FORMAT or not plain or not isinstance(names, list):
            raise ValueError(f"format {said['format']}")
        return {"combine": said["combine"], "weights": said["weights"], "names": names, "members": members}
    except (KeyError, TypeError, ValueError) as error:
        raise SetError(f"{path} is damaged or of another version ({error})") from None
