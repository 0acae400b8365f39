"""How fast a .tlm file runs on this machine: what `tinylm bench engine` prints.

Comparisons with other engines, which need those installed, are in `tests/bench/engine.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinylm.engine import Engine

TOGETHER = 64  # texts side by side
READ = 256  # tokens of a text that is read


class Speed(NamedTuple):
    """Tokens per second with a number of threads; None for what an encoder does not do.

    Attributes:
        write: one text after another, a token at a time. guess: the same with guesses checked several at a time.
        together: `TOGETHER` texts side by side, all of them. read: a text of `READ` tokens at most, logits included.
        first: seconds from opening the file, which the operating system has in memory, to the first token.
    """

    threads: int
    write: float | None
    guess: float | None
    together: float | None
    read: float
    first: float | None


def measure(path: Any, *, threads: Sequence[int] = (), seconds: float = 1.0, **opening: Any) -> list[Speed]:
    """Run a file for about `seconds` per figure.

    Args:
        path: a .tlm file. threads: counts to try; none: 1, and as many as there are cores.
        opening: of `Engine`, such as `kernels` or `cache`.

    Raises:
        ValueError: what `Engine` raises; seconds that are not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds = {seconds!r}: must be above 0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [_measured(path, count, seconds, opening) for count in threads or sorted({1, cores})]


def _measured(path: Any, threads: int, seconds: float, opening: dict[str, Any]) -> Speed:
    begun = time.perf_counter()
    engine = Engine(path, threads=threads, **opening)
    facts = engine.facts
    known = range(3, facts.vocab) if facts.vocab > 8 else range(facts.vocab)
    text = [known[(7919 * i) % len(known)] for i in range(min(READ, facts.context))]  # any ids cost the same
    if facts.kind:  # an encoder
        return Speed(
            threads, None, None, None, _rate(lambda i: len(text) * bool(len(engine.embed(text))), seconds), None
        )
    start = [facts.begin if facts.begin >= 0 else known[0]]
    next(engine.ids(start, tokens=1))
    first = time.perf_counter() - begun
    plain = Engine(path, threads=threads, **{**opening, "speculate": 0})
    tokens = min(READ, facts.context - 1)

    def write(engine: Engine, seed: int) -> int:
        return sum(1 for _ in engine.ids(start, tokens=tokens, seed=seed))

    def together(seed: int) -> int:
        return sum(len(new) for _, new, _ in engine._write([start] * TOGETHER, tokens, TOGETHER, seed, {}))

    return Speed(
        threads,
        _rate(lambda i: write(plain, i), seconds),
        _rate(lambda i: write(engine, i), seconds),
        _rate(together, seconds),
        _rate(lambda i: len(engine.logits(text)), seconds),
        first,
    )


def _rate(job: Callable[[int], int], seconds: float) -> float:
    """What `job(0)`, `job(1)` and so on do per second, after one that does not count."""
    job(0)
    done, i, begun = 0, 1, time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds:
        done, i = done + job(i), i + 1
    return done / spent


def table(path: Any, speeds: Sequence[Speed]) -> list[list[str]]:
    """Rows of texts, names first."""
    size = f"{Path(path).stat().st_size / 1e6:.1f} MB"
    rows = [[size, "one text", "guessing", f"{TOGETHER} texts", "reading", "first token"]]
    for one in speeds:
        rates = ["" if x is None else f"{x:,.0f}/s" for x in one[1:5]]
        first = "" if one.first is None else f"{1000 * one.first:.1f} ms"
        rows.append([f"{one.threads} thread{'s' * (one.threads > 1)}", *rates, first])
    return rows
