"""Worlds without grammar: a random Markov chain over words (bigram) and a finite-state machine (fsm)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .engine import Dist, Said, Teller

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
MOST_WORDS = (len(CONSONANTS) * len(VOWELS)) ** 2


class Chain(NamedTuple):
    """A Markov chain that writes `length` symbols, joined by `gap`.

    `words` (states,) symbols; `start` (states,) and `table` (states, states) probabilities; `entropy` exact, in nats.
    """

    words: tuple[str, ...]
    start: np.ndarray
    table: np.ndarray
    length: int
    gap: str
    program: Callable[[Teller], None]
    entropy: float


def make(
    words: Sequence[str], rows: Sequence[tuple[Sequence[int], Sequence[float] | None]], length: int, gap: str
) -> Chain:
    """The chain that starts uniformly and goes from state i to the states rows[i][0] with the weights rows[i][1]."""
    start = Dist(range(len(words)))
    first = list(words)
    steps = [(Dist(successors, weights), [gap + words[j] for j in successors]) for successors, weights in rows]

    def program(s: Teller) -> None:
        state = s.draw(start, first)
        s.emit(words[state])
        at = len(words[state])
        s.said.append(Said(0, at, None, None, {}, None, None, state))
        for _ in range(length - 1):
            dist, surfaces = steps[state]
            index = s.draw(dist, surfaces)
            state = dist.options[index]
            s.emit(surfaces[index])
            begin, at = at + len(gap), at + len(surfaces[index])
            s.said.append(Said(begin, at, None, None, {}, None, None, state))

    table = np.zeros((len(words), len(words)))
    for i, (dist, _) in enumerate(steps):
        table[i, list(dist.options)] = np.exp(dist.logp)
    uniform = np.full(len(words), 1.0 / len(words))
    row_entropy = np.array([-sum(math.exp(p) * p for p in dist.logp) for dist, _ in steps])
    entropy, here = math.log(len(words)), uniform
    for _ in range(length - 1):
        entropy += float(here @ row_entropy)
        here = here @ table
    return Chain(tuple(words), uniform, table, length, gap, program, entropy)


def bigram(words: int, length: int, sharpness: float, uniform: Callable[[], float]) -> Chain:
    """A dense random table: row weights are (-log u) ** sharpness, so 1 is a flat Dirichlet and more is more peaked."""
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    order = shuffled(len(syllables) ** 2, uniform)[:words]
    names = [syllables[i // len(syllables)] + syllables[i % len(syllables)] for i in order]
    rows = [
        (range(words), [(-math.log(1.0 - uniform() * 0.999999)) ** sharpness + 1e-9 for _ in range(words)])
        for _ in range(words)
    ]
    return make(names, rows, length, " ")


def fsm(states: int, successors: int, length: int, uniform: Callable[[], float]) -> Chain:
    """TokFSM: every state has this many distinct random successors, equally likely; a state is written as two digits.

    Source: Tamkin, Taufeeque & Goodman, Codebook Features (2023), section on TokFSM: 100 states, 10 successors.
    """
    rows = [(shuffled(states, uniform)[:successors], None) for _ in range(states)]
    return make([f"{i:02d}" for i in range(states)], rows, length, "")


def shuffled(n: int, uniform: Callable[[], float]) -> list[int]:
    """A random order of range(n) (Fisher-Yates; `random.shuffle` is not promised to stay the same)."""
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(uniform() * (i + 1))
        order[i], order[j] = order[j], order[i]
    return order
