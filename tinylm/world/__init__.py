"""The embedded world: an endless supply of small stories with exact probabilities and an answer key.

    world = World()
    print(world.story(0).text)
    world.logprob(text)        # nats, exact; -inf if the world cannot write it: world.explain(text) says why
    world.floor(1000)          # bits per byte that no model can beat

Dials: topics and plots, Zipf-distributed facts, classification tasks, a bigram mode and a finite-state mode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from ..config import Config, ConfigError, suggest
from . import chains, engine, facts
from .chains import Chain
from .engine import Dist, Program, Said, Word
from .facts import Fact
from .lexicon import TOPICS
from .story import PLOTS, program
from .tasks import Classification, classification

__all__ = ["PLOTS", "TOPICS", "Chain", "Classification", "Fact", "Floor", "Sentence", "Story", "World", "WorldTooLarge"]

Mode = Literal["stories", "bigram", "fsm"]
CONSTANTS = 1 << 63  # the stream index that a world's own tables are drawn from: no story has it


class WorldTooLarge(ValueError):
    """There are more texts than may be enumerated; the message names the limit and the remedy."""


class Sentence(NamedTuple):
    """text[start:end] of a story, with what was true when it was said.

    Story labels: topic, plot, place, feeling (the hero's), holds {thing: holder}, speaker, feature ("dialogue",
    "twist", "moral", "fact" or None). Chain labels: state (int).
    """

    start: int
    end: int
    text: str
    labels: dict[str, Any]


@dataclass(frozen=True)
class Story:
    """One text, the natural log-probability of the draws that made it, and its labels.

    `labels`: topic, plot, moral, hero, and cast {role: name}. `choices`: the index taken at every draw.
    """

    text: str
    logprob: float
    sentences: tuple[Sentence, ...]
    labels: dict[str, Any]
    choices: tuple[int, ...]

    def __str__(self) -> str:
        return self.text


class Floor(NamedTuple):
    """The entropy of a world in bits per byte of text, the ends of the texts included.

    A ratio of means over `stories` texts; its standard error is the delta method's (zero where it is a closed form).
    """

    bits_per_byte: float
    standard_error: float
    bytes: int
    stories: int


@dataclass(frozen=True, kw_only=True)
class World(Config):
    """A source of texts whose probabilities are known exactly.

    Attributes:
        seed: fixes the world's own constants (facts, bigram table, successors), not which stories are drawn.
        mode: "stories", "bigram" (words from a random Markov chain) or "fsm" (TokFSM, a finite-state machine).
        topics, plots: names of those that occur; () is all. topic_weights: in proportion to the topics; () is uniform.
        facts: number of named people about whom stories state a fact; 0 is off. zipf: rank r is told ~ r ** -zipf.
        small: only the first `small` draws of a text are open, later ones take their first option; 0: all are open.
        words, sharpness: of the bigram mode: vocabulary, and how peaked its rows are (1 is a flat Dirichlet).
        states, successors: of the fsm mode. length: words or states per text, in the bigram and fsm modes.
    """

    seed: int = 0
    mode: Mode = "stories"
    topics: tuple[str, ...] = ()
    topic_weights: tuple[float, ...] = ()
    plots: tuple[str, ...] = ()
    facts: int = 0
    zipf: float = 1.0
    small: int = 0
    words: int = 64
    sharpness: float = 3.0
    states: int = 100
    successors: int = 10
    length: int = 63

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, known in (("topics", TOPICS), ("plots", PLOTS)):
            for name in getattr(self, field):
                if name not in known:
                    raise ConfigError(f"World.{field} holds {name!r}{suggest(name, known)}")
            self._require(len(set(getattr(self, field))) == len(getattr(self, field)), field, "names one twice")
        for field, low, high in (
            ("seed", 0, 1 << 63),
            ("facts", 0, facts.MOST),
            ("small", 0, 1 << 30),
            ("words", 2, chains.MOST_WORDS),
            ("states", 2, 100),
            ("successors", 1, self.states),
            ("length", 1, 1 << 20),
        ):
            self._require(low <= getattr(self, field) <= high, field, f"must be from {low} to {high}")
        self._require(self.zipf >= 0 and self.sharpness > 0, "zipf", "must be at least 0, and sharpness above 0")
        weights, names = self.topic_weights, self.topic_names
        self._require(
            not weights or len(weights) == len(names), "topic_weights", f"needs one for each of {len(names)} topics"
        )
        self._require(all(w > 0 for w in weights), "topic_weights", "must be above 0")
        self._require(
            not self.facts or self.facts >= len(names), "facts", f"must be at least {len(names)}, one per topic"
        )

    @property
    def topic_names(self) -> tuple[str, ...]:
        """The topics that occur, in order."""
        return self.topics or tuple(TOPICS)

    @property
    def plot_names(self) -> tuple[str, ...]:
        """The plots that occur, in order."""
        return self.plots or tuple(PLOTS)

    @cached_property
    def _topic_dist(self) -> Dist:
        return Dist(self.topic_names, self.topic_weights or None)

    @cached_property
    def _facts(self) -> tuple[tuple[Fact, ...], dict[str, Dist]]:
        shares = [math.exp(p) for p in self._topic_dist.logp]
        return facts.make(self.facts, self.zipf, self.topic_names, shares, engine.stream(self.seed, CONSTANTS))

    @property
    def fact_table(self) -> tuple[Fact, ...]:
        """Every fact with its rank, probability, cloze prompt and answer; empty when facts = 0."""
        return self._facts[0] if self.facts else ()

    @cached_property
    def chain(self) -> Chain:
        """Words, start and transition probabilities of the bigram or fsm mode. Raises ConfigError for stories."""
        uniform = engine.stream(self.seed, CONSTANTS)
        if self.mode == "bigram":
            return chains.bigram(self.words, self.length, self.sharpness, uniform)
        self._require(self.mode == "fsm", "mode", "only bigram and fsm worlds have a chain")
        return chains.fsm(self.states, self.successors, self.length, uniform)

    @cached_property
    def successor_table(self) -> np.ndarray:
        """(states, successors) int: where each state of the fsm leads."""
        return np.array([np.flatnonzero(row) for row in self.chain.table])

    @cached_property
    def program(self) -> Program:
        """The program that writes one text of this world, for the handlers in `world.engine`."""
        if self.mode != "stories":
            return self.chain.program
        return self.narrowed()

    def narrowed(self, topic: str = "", plot: str = "") -> Program:
        """The program of this story world given its topic, or its plot, or both: facts and all else stay the same."""
        topics = Dist((topic,)) if topic else self._topic_dist
        return program(topics, Dist((plot,) if plot else self.plot_names), self._facts[1] if self.facts else None)

    @property
    def _left(self) -> int:
        return self.small or -1

    def story(self, index: int, seed: int = 0) -> Story:
        """Text number `index` of stream `seed`: a pure function of (world, seed, index)."""
        teller = engine.sample(self.program, engine.stream(seed, index), self._left)
        return _finish(teller)

    def stories(self, n: int | None = None, seed: int = 0, start: int = 0) -> Iterator[Story]:
        """Texts start, start + 1, ... of stream `seed`; endless when n is None."""
        for index in itertools.count(start) if n is None else range(start, start + n):
            yield self.story(index, seed)

    def texts(self, n: int | None = None, seed: int = 0, start: int = 0) -> Iterator[str]:
        """The texts of `stories`, faster: no labels are kept."""
        for index in itertools.count(start) if n is None else range(start, start + n):
            yield "".join(engine.sample(self.program, engine.stream(seed, index), self._left).out)

    def corpus(self, size: int, seed: int = 0, start: int = 0) -> list[str]:
        """Texts of stream `seed` until they hold at least `size` bytes."""
        texts, held = [], 0
        for text in self.texts(None, seed, start):
            if held >= size:
                break
            texts.append(text)
            held += len(text.encode())
        return texts

    def logprob(self, text: str) -> float:
        """Natural log-probability that this world writes exactly this text, all ways summed; -inf if it cannot."""
        return engine.logprob(self.program, text, self._left)

    def explain(self, text: str) -> str:
        """Where and why a text leaves what the world can write, and what it would allow there."""
        return engine.explain(self.program, text, self._left)

    def posterior(self, text: str, of: str = "topic") -> dict[str, float]:
        """The exact probability of every value of a story label (topic, plot, moral, hero) given the text."""
        runs = [(_labels(run)[of], run.logprob) for run in engine.derivations(self.program, text, self._left)]
        if not runs:
            raise ValueError(f"the world cannot write this text: {self.explain(text)}")
        total = engine.logsumexp([p for _, p in runs])
        masses: dict[str, list[float]] = {}
        for value, p in runs:
            masses.setdefault(value, []).append(math.exp(p - total))
        return {value: math.fsum(parts) for value, parts in masses.items()}

    def floor(self, stories: int | Sequence[str] = 1000, seed: int = 0) -> Floor:
        """Bits per byte that no model can beat on average, from the exact probabilities of n texts, or of these.

        Raises ValueError for fewer than 2 texts, and for one that the world cannot write, with the reason.
        """
        texts = list(self.texts(stories, seed)) if isinstance(stories, int) else list(stories)
        if len(texts) < 2:
            raise ValueError(f"a floor needs at least 2 texts, got {len(texts)}")
        bits = np.array([-self.logprob(text) / math.log(2) for text in texts])
        for i in np.flatnonzero(np.isinf(bits))[:1].tolist():
            raise ValueError(f"the world cannot write text {i}: {self.explain(texts[i])}")
        size = np.array([len(text.encode()) for text in texts], float)
        ratio = bits.sum() / size.sum()
        n = len(texts)
        error = math.sqrt(((bits - ratio * size) ** 2).sum() / (n * (n - 1))) / size.mean()
        return Floor(float(ratio), float(error), int(size.sum()), n)

    def exact_floor(self) -> Floor:
        """The floor of a bigram or fsm world in closed form (all texts have equally many bytes)."""
        chain = self.chain
        size = chain.length * len(chain.words[0]) + (chain.length - 1) * len(chain.gap)
        return Floor(chain.entropy / math.log(2) / size, 0.0, size, 1)

    def enumerate(self, limit: int = 100_000) -> dict[str, float]:
        """Every text of the world with its natural log-probability. Raises WorldTooLarge beyond `limit` derivations."""
        found: dict[str, list[float]] = {}
        for count, run in enumerate(engine.derivations(self.program, None, self._left)):
            if count >= limit:
                raise WorldTooLarge(
                    f"more than limit = {limit} derivations: set small=3 or so, choose fewer plots, or raise limit"
                )
            found.setdefault("".join(run.out), []).append(run.logprob)
        return {text: engine.logsumexp(parts) for text, parts in found.items()}

    def classification(
        self, task: str = "topic", classes: int = 2, n: int = 1000, seed: int = 0, noise: float = 0.0
    ) -> Classification:
        """A balanced classification set drawn from this world: see `world.tasks.classification`."""
        return classification(self, task, classes, n, seed, noise)


def _labels(teller: engine.Teller) -> dict[str, Any]:
    cast = {name: str(word) for name, word in teller.cast.items() if type(word) is Word}
    return {**teller.labels, "hero": cast.get("hero"), "cast": cast}


def _finish(teller: engine.Sampler) -> Story:
    text = "".join(teller.out)
    labels = _labels(teller)
    names = labels["cast"]
    sentences = tuple(
        Sentence(s.start, s.end, text[s.start : s.end], _sentence_labels(s, labels, names)) for s in teller.said
    )
    return Story(text, teller.logprob, sentences, labels if teller.labels else {}, tuple(teller.choices))


def _sentence_labels(said: Said, labels: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    if said.state is not None:
        return {"state": said.state}
    return {
        "topic": labels["topic"],
        "plot": labels["plot"],
        "place": names.get(said.place) if said.place else None,
        "feeling": said.feeling,
        "holds": {names.get(thing, thing): names.get(who, who) for thing, who in said.holds.items()},
        "speaker": names.get(said.speaker, said.speaker) if said.speaker else None,
        "feature": said.feature,
    }
