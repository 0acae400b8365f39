"""Classification sets with a chosen number of classes, whose best reachable accuracy is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..config import ConfigError, suggest
from .chains import shuffled
from .engine import sample, stream
from .lexicon import NAMES

if TYPE_CHECKING:
    from . import World

THINGS = ["ball", "kite", "drum", "doll", "bell", "flute", "cup", "hat"]
PLACES = ["box", "basket", "drawer", "bag", "barrel", "chest", "bucket", "jar"]
TASKS = ("topic", "plot", "feeling", "where")


class Classification(NamedTuple):
    """`texts` (n,) with integer `labels` (n,) that index `names`; each class occurs n / len(names) times, rounded.

    `bayes_accuracy`: the accuracy of the best possible classifier; None where it is not known in closed form.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    bayes_accuracy: float | None


def classification(world: World, task: str, classes: int, n: int, seed: int, noise: float) -> Classification:
    """A balanced classification set.

    Args:
        task: "topic" or "plot" of a whole story (the text always tells which: its places, its events); "feeling" the
            hero comes to in one sentence out of its story (ambiguous: some sentences go with several feelings); "where"
            a thing is in the end, after it was moved about ("ball in box": 8 things x 8 places; the text always tells).
        classes: 2 to 8 (topic), to the number of plots (plot), to 12 (feeling), to 64 (where).
        noise: share of the labels that are replaced by a class drawn uniformly; the best accuracy is then
            1 - noise + noise / classes where the text determines the class.

    Raises ConfigError for an unknown task or an impossible number of classes.
    """
    if task not in TASKS:
        raise ConfigError(f"task = {task!r}{suggest(task, TASKS)}")
    if world.mode != "stories":
        raise ConfigError(f"World.mode = {world.mode!r}: classification needs mode='stories'")
    most = {
        "topic": len(world.topic_names),
        "plot": len(world.plot_names),
        "feeling": 12,
        "where": len(THINGS) * len(PLACES),
    }[task]
    if not 2 <= classes <= most:
        raise ConfigError(f"classes = {classes}: task {task!r} has from 2 to {most}")
    if not 0 <= noise <= 1:
        raise ConfigError(f"noise = {noise}: must be from 0 to 1")
    uniform = stream(seed, 1 << 62)
    order = shuffled(n, uniform)
    labels = np.array([i % classes for i in order], int)
    if task == "feeling":
        texts, names = _feelings(world, labels, classes, seed)
    elif task == "where":
        texts, names = _where(labels, classes, uniform)
    else:
        names = (world.topic_names if task == "topic" else world.plot_names)[:classes]
        # The same world with its topic, or its plot, held fast: told by the program itself.
        programs = [world.narrowed(**{task: name}) for name in names]
        runs = (sample(programs[label], stream(seed, index), world.small or -1) for index, label in enumerate(labels))
        texts = ["".join(run.out) for run in runs]
    known = None if task == "feeling" else 1.0 - noise + noise / classes
    if noise:
        labels = np.array([int(uniform() * classes) if uniform() < noise else label for label in labels])
    return Classification(tuple(texts), labels, tuple(names), known)


def _feelings(world: World, labels: np.ndarray, classes: int, seed: int) -> tuple[list[str], tuple[str, ...]]:
    """Sentences at which the hero's feeling changes, for the most frequent feelings of this world."""
    found: dict[str, list[str]] = {}
    ranked: list[str] = []
    for index, story in enumerate(world.stories(seed=seed)):
        before = None
        for sentence in story.sentences:
            now = sentence.labels["feeling"]
            if now is not None and now != before:
                found.setdefault(now, []).append(sentence.text)
            before = now
        if index == 399:
            ranked = sorted(found, key=lambda feeling: (-len(found[feeling]), feeling))[:classes]
            if len(ranked) < classes:
                raise ConfigError(f"classes = {classes}: this world has only {len(ranked)} feelings")
        if index >= 399 and all(len(found[name]) >= math.ceil(len(labels) / classes) for name in ranked):
            break
    used = [0] * classes
    texts = []
    for label in labels:
        texts.append(found[ranked[label]][used[label]])
        used[label] += 1
    return texts, tuple(ranked)


def _where(labels: np.ndarray, classes: int, uniform: Callable[[], float]) -> tuple[list[str], tuple[str, ...]]:
    """Who puts what where: three things, a few moves, and a question about one of them."""
    places = min(len(PLACES), max(2, math.ceil(math.sqrt(classes))))
    pairs = [(thing, place) for thing in range(len(THINGS)) for place in range(places)][:classes]

    def pick(n: int) -> int:
        return int(uniform() * n)

    texts = []
    for label in labels:
        asked, final = pairs[label]
        things = [asked, *(t for t in shuffled(len(THINGS), uniform) if t != asked)][:3]
        people = [str(NAMES.options[i]) for i in shuffled(NAMES.n, uniform)[:3]]
        where = {thing: pick(places) for thing in things}
        lines = [
            f"{people[pick(3)]} put the {THINGS[t]} in the {PLACES[where[t]]}."
            for t in (things[i] for i in shuffled(3, uniform))
        ]
        for step in range(2 + pick(3)):
            thing = things[pick(3)] if step else asked
            to = (where[thing] + 1 + pick(places - 1)) % places
            where[thing] = to
            lines.append(f"{people[pick(3)]} moved the {THINGS[thing]} to the {PLACES[to]}.")
        if where[asked] != final:
            lines.append(f"{people[pick(3)]} moved the {THINGS[asked]} to the {PLACES[final]}.")
        texts.append(" ".join(lines) + f" Where is the {THINGS[asked]}?")
    return texts, tuple(f"{THINGS[t]} in {PLACES[p]}" for t, p in pairs)
