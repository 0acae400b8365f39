"""One program, three handlers: how a story is told, scored and enumerated.

A program is a plain function of a `Teller`. Everything random goes through `Teller.draw`, everything written through
`Teller.emit`. `Sampler` draws at random; `Search` walks every sequence of draws that is consistent with a text (or,
with no text, every sequence there is) by running the program again from its start with the draws so far prescribed. So
a program needs no inverse, and a text that several sequences of draws write has its probability summed, not guessed.

Sentences are written in a small template language, read once and cached:

    {hero}            a name of the cast; {elder.kin} another form of it; {Thing.the} with a capital letter
    {he} {his} ...    short for {hero.he} {hero.his} ...
    [a|b|c{pet}]      an alternative, drawn uniformly; [a*3|b] gives a weight 3; alternatives nest

A name declared with `let(thing=TOYS)` is drawn when it is first spoken, so that its surface tells which option it was.
"""

from __future__ import annotations

import abc
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, no_type_check

PRONOUNS = ("he", "him", "his", "himself", "child")


class Word(dict):
    """A thing that can be spoken of: form -> surface. The form "" is its plain name. Hashed by identity."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __str__(self) -> str:
        return self[""]


class Dist:
    """A finite distribution over options, ready to be drawn from.

    Args:
        options: what is drawn.
        weights: positive and in proportion to the probabilities; None is uniform.

    Attributes:
        logp: natural log-probability of each option.
        cumulative: running sums without the last one, or None when uniform.
    """

    __slots__ = ("_surfaces", "_without", "cumulative", "logp", "members", "n", "options", "parent")

    def __init__(self, options: Sequence, weights: Sequence[float | int] | None = None) -> None:
        self.options, self.n = tuple(options), len(options)
        if not self.n:
            raise ValueError("a distribution needs at least one option")
        if weights is None or len(set(weights)) == 1:
            self.cumulative: list[float] | None = None
            self.logp = [-math.log(self.n)] * self.n
        else:
            if len(weights) != self.n or min(weights) <= 0:
                raise ValueError(f"{self.n} options need {self.n} positive weights, got {list(weights)}")
            total, running, self.cumulative = math.fsum(weights), 0.0, []
            for weight in weights[:-1]:
                running += weight / total
                self.cumulative.append(running)
            self.logp = [math.log(weight / total) for weight in weights]
        self.parent, self.members = self, tuple(range(self.n))
        self._surfaces: dict[str, list[str]] = {}
        self._without: dict[tuple[int, ...], Dist] = {}

    def without(self, taken: tuple[int, ...]) -> Dist:
        """The same distribution given that it is none of the options at these indices of `parent`."""
        rest = self._without.get(taken)
        if rest is None:
            left = [i for i, member in enumerate(self.members) if member not in taken]
            if len(left) == self.n:
                return self
            if len(self._without) > 4096:
                self._without.clear()
            weights = None if self.cumulative is None else [math.exp(self.logp[i]) for i in left]
            rest = self._without[taken] = Dist([self.options[i] for i in left], weights)
            rest.parent, rest.members = self.parent, tuple(self.members[i] for i in left)
        return rest

    def surfaces(self, form: str, capital: bool) -> list[str]:
        """How each option reads in a form."""
        key = f"{capital:d}{form}"
        if key not in self._surfaces:
            texts = [option[form] for option in self.options]
            self._surfaces[key] = [t[:1].upper() + t[1:] for t in texts] if capital else texts
        return self._surfaces[key]


class Slot(NamedTuple):
    """A place in a template where a name is spoken; `after` is the literal text that follows it."""

    name: str
    form: str
    capital: bool
    after: str


class Alt(NamedTuple):
    """An alternative in a template; `prefixes` is how each branch begins, as far as that is known beforehand."""

    dist: Dist
    branches: tuple[str | tuple, ...]
    prefixes: tuple[str, ...]


Node = str | Slot | Alt


@cache
def parse(template: str) -> tuple[Node, ...]:
    """Read a template. Raises ValueError for an unbalanced bracket, and for two equal alternatives."""
    nodes, end = _sequence(template, 0, "")
    if end != len(template):
        raise ValueError(f"unbalanced {template[end]!r} at {end} in template {template!r}")
    return _look_ahead(nodes, "")


def _sequence(text: str, at: int, stops: str) -> tuple[list, int]:
    """Raw nodes up to one of `stops`: a literal, a Slot, or a list of (weight, nodes)."""
    nodes: list = []
    literal = ""
    while at < len(text) and text[at] not in stops:
        if text[at] not in "{[":
            if text[at] in "]}":
                break
            literal, at = literal + text[at], at + 1
            continue
        if literal:
            nodes.append(literal)
            literal = ""
        if text[at] == "{":
            end = text.index("}", at)
            name, _, form = text[at + 1 : end].partition(".")
            lower = name[0].lower() + name[1:]
            slot = Slot("hero", lower, name != lower, "") if lower in PRONOUNS else Slot(lower, form, name != lower, "")
            nodes.append(slot)
            at = end + 1
        else:
            branches = []
            while text[at] in "[|":
                branch, at = _sequence(text, at + 1, "|]")
                if at >= len(text):
                    raise ValueError(f"unclosed '[' in template {text!r}")
                weight = 1.0
                if branch and isinstance(branch[-1], str) and "*" in branch[-1]:
                    head, _, number = branch[-1].rpartition("*")
                    weight, branch = float(number), [*branch[:-1], head]
                branches.append((weight, branch))
            at += 1
            nodes.append(branches)
    if literal:
        nodes.append(literal)
    return nodes, at


def _look_ahead(raw: list, after: str) -> tuple[Node, ...]:
    """Finish raw nodes from the right, so that each knows the literal that follows it."""
    nodes: list[Node] = []
    for item in reversed(raw):
        if isinstance(item, str):
            nodes.append(item)
            after = item
            continue
        if isinstance(item, Slot):
            nodes.append(item._replace(after=after))
        else:
            branches, prefixes = [], []
            for _, branch in item:
                inner = _look_ahead(branch, after)
                flat = "".join(inner) if all(isinstance(node, str) for node in inner) else None  # type: ignore[arg-type]
                branches.append(inner if flat is None else flat)
                prefixes.append(flat + after if flat is not None else inner[0] if isinstance(inner[0], str) else "")
            if len(set(map(str, branches))) < len(branches):
                raise ValueError(f"two equal alternatives in {[b for _, b in item]}")
            nodes.append(Alt(Dist(range(len(item)), [w for w, _ in item]), tuple(branches), tuple(prefixes)))
        after = ""
    return tuple(reversed(nodes))


@cache
def flip(chance: float) -> Dist:
    """The distribution over (False, True) with this chance of True."""
    return Dist((False, True), (1.0 - chance, chance))


class Dead(Exception):
    """This sequence of draws cannot write the text."""


class Said(NamedTuple):
    """What the program knew when it wrote text[start:end]; names are those of the cast."""

    start: int
    end: int
    place: str | None
    feeling: str | None
    holds: Mapping[str, str]
    speaker: str | None
    feature: str | None
    state: int | None = None


# Tellers are called a million times a second; types checked at every call, as in the tests, would cost 100 times more.
@no_type_check
class Teller(abc.ABC):
    """What a program is given: `draw` and `emit` from the handler, and on top of them words, names and sentences.

    Attributes:
        cast: name -> Word (decided) or Dist (declared, decided when first spoken).
        labels: what holds for the whole text. said: one `Said` per sentence. logprob: nats of the draws so far.
        left: draws that are still open; afterwards each takes its first option at no cost. -1 is no limit.
    """

    def __init__(self, left: int = -1) -> None:
        self.cast: dict[str, Any] = {}
        self.labels: dict[str, Any] = {}
        self.said: list[Said] = []
        self.used: dict[Dist, tuple[int, ...]] = {}
        self.logprob, self.left, self.length, self.gap = 0.0, left, 0, ""
        self.place: str | None = None
        self.feeling: str | None = None
        self.holds: Mapping[str, str] = {}
        self.out: list[str] = []
        self.emit: Callable[[str], Any] = self.out.append

    @abc.abstractmethod
    def draw(self, dist: Dist, surfaces: Sequence[str] | None = None, after: str = "") -> int:
        """The one primitive: the index of an option. `surfaces` tells what each option would write next, where known;
        `after` what follows it then."""

    def choose(self, options: Sequence | Dist, weights: Sequence[float | int] | None = None) -> Any:
        """Draw one of the options, with nothing written yet that would tell which."""
        dist = options if isinstance(options, Dist) else Dist(options, weights)
        return dist.options[self.draw(dist)]

    def chance(self, probability: float) -> bool:
        """Draw true with this probability."""
        return self.draw(flip(probability)) == 1

    def let(self, **names: Any) -> None:
        """Add to the cast: a Word, or a Dist to be drawn when first spoken (unlike what was drawn from it before)."""
        self.cast.update(names)

    def decide(self, name: str, form: str = "", capital: bool = False, after: str | None = None) -> Word:
        """Draw a declared name now; `after` None means that it is not spoken at once."""
        dist = self.cast[name]
        taken = self.used.get(dist.parent, ())
        if taken:
            dist = dist.without(taken)
        index = self.draw(dist, None if after is None else dist.surfaces(form, capital), after or "")
        self.used[dist.parent] = tuple(sorted((*taken, dist.members[index]))) if taken else (dist.members[index],)
        word = self.cast[name] = dist.options[index]
        return word

    def get(self, name: str) -> Word:
        """The word a name stands for, drawn now if it was not yet."""
        word = self.cast[name]
        return self.decide(name) if type(word) is Dist else word

    def knows(self, *names: str) -> bool:
        """Whether all of these names have been spoken of already."""
        return all(type(self.cast[name]) is not Dist for name in names)

    def write(self, nodes: Sequence[Node]) -> None:
        """Emit the nodes of a template."""
        emit, cast = self.emit, self.cast
        for node in nodes:
            if isinstance(node, str):
                emit(node)
            elif isinstance(node, Slot):
                name, form, capital, after = node
                word = cast[name]
                if type(word) is Dist:
                    word = self.decide(name, form, capital, after)
                text = word[form]
                emit(text[0].upper() + text[1:] if capital else text)
            else:
                branch = node.branches[self.draw(node.dist, node.prefixes)]
                if isinstance(branch, str):
                    emit(branch)
                else:
                    self.write(branch)

    def say(
        self,
        template: str,
        chance: float = 1.0,
        *,
        speaker: str | None = None,
        feeling: str | None = None,
        place: str | None = None,
        holds: Mapping[str, str] | None = None,
        feature: str | None = None,
    ) -> bool:
        """Write one sentence, with this chance; true if it was written.

        The labels name members of the cast: who speaks; what the hero feels and where, from here on; thing -> who has
        it (a change to what was known before); and what the sentence is for ("dialogue" where somebody speaks).
        """
        nodes = parse(template)
        gap = self.gap
        if chance < 1.0:
            lead = nodes[0] if type(nodes[0]) is str else ""
            if not self.draw(flip(chance), ("", gap + lead)):  # type: ignore[operator]
                return False
        if gap:
            self.emit(gap)
        out = self.out
        first = len(out)
        start = self.length + len(gap)
        self.write(nodes)
        self.length = end = start + sum(map(len, out[first:]))
        self.gap = " "
        if feeling is not None:
            self.feeling = feeling
        if place is not None:
            self.place = place
        if holds is not None:
            self.holds = {**self.holds, **holds}
        if speaker is not None and feature is None:
            feature = "dialogue"
        self.said.append(Said(start, end, self.place, self.feeling, self.holds, speaker, feature))
        return True

    def paragraph(self) -> None:
        """The next sentence begins a paragraph."""
        self.gap = "\n\n"


Program = Callable[[Teller], Any]


@no_type_check
class Sampler(Teller):
    """Draws at random. `choices` is the record of every draw."""

    def __init__(self, uniform: Callable[[], float], left: int = -1) -> None:
        super().__init__(left)
        self.uniform = uniform
        self.choices: list[int] = []

    def draw(self, dist: Dist, surfaces: Sequence[str] | None = None, after: str = "") -> int:
        n = dist.n
        if n == 1 or not self.left:
            return 0
        self.left -= 1
        if dist.cumulative is None:
            index = int(self.uniform() * n)
        else:
            index = bisect_right(dist.cumulative, self.uniform())
        self.logprob += dist.logp[index]
        self.choices.append(index)
        return index


@no_type_check
class Search(Teller):
    """Follows a path of prescribed draws, then the first draw that agrees with the text; the others go on the stack."""

    def __init__(self, text: str | None, path: list[int], stack: list[list[int]], left: int = -1, trace=None) -> None:
        super().__init__(left)
        self.text, self.path, self.stack, self.at, self.step, self.trace = text, path, stack, 0, 0, trace
        if text is not None:
            self.emit = self.match

    def match(self, piece: str) -> None:
        """Emit a piece that has to be what the text says next."""
        if not self.text.startswith(piece, self.at):  # type: ignore[union-attr]
            if self.trace is not None:
                self.trace(self.at, piece)
            raise Dead
        self.at += len(piece)
        self.out.append(piece)

    def draw(self, dist: Dist, surfaces: Sequence[str] | None = None, after: str = "") -> int:
        if dist.n == 1 or not self.left:
            return 0
        self.left -= 1
        path, step = self.path, self.step
        self.step += 1
        if step < len(path):
            index = path[step]
        else:
            text, at = self.text, self.at
            if surfaces is None or text is None:
                fits: Sequence[int] = range(dist.n)
            else:
                fits = [i for i, piece in enumerate(surfaces) if text.startswith(piece, at)]
                if after and len(fits) > 1:
                    fits = [i for i in fits if text.startswith(after, at + len(surfaces[i]))]
                if self.trace is not None:
                    for piece in surfaces:
                        self.trace(at, piece)
                if not fits:
                    raise Dead
            for other in fits[:0:-1]:
                self.stack.append([*path, other])
            index = fits[0]
            path.append(index)
        self.logprob += dist.logp[index]
        return index


def sample(program: Program, uniform: Callable[[], float], left: int = -1) -> Sampler:
    """Run the program once; `uniform` gives numbers in [0, 1)."""
    teller = Sampler(uniform, left)
    program(teller)
    return teller


def derivations(program: Program, text: str | None = None, left: int = -1, trace=None) -> Iterator[Search]:
    """Every finished run of the program, or only those that write `text`; each has `.logprob` in nats, `.out`, labels.

    Time grows with the number of partial runs that agree with the text for a while. `trace(position, piece)`, if given,
    hears of every piece that was considered.
    """
    stack: list[list[int]] = [[]]
    while stack:
        run = Search(text, stack.pop(), stack, left, trace)
        try:
            program(run)
        except Dead:
            continue
        if text is None or run.at == len(text):
            yield run
        elif trace is not None:
            trace(run.at, None)


def logsumexp(values: Sequence[float]) -> float:
    """log of the sum of exponentials; -inf for none."""
    if not values:
        return -math.inf
    top = max(values)
    return top if len(values) == 1 else top + math.log(math.fsum(math.exp(v - top) for v in values))


def logprob(program: Program, text: str, left: int = -1) -> float:
    """Exact natural log-probability of this text, all derivations summed; -inf if there is none."""
    return logsumexp([run.logprob for run in derivations(program, text, left)])


def explain(program: Program, text: str, left: int = -1) -> str:
    """Why the program cannot write a text: where the longest beginning it can write stops, and what may follow."""
    furthest, wanted = -1, []

    def trace(at: int, piece: str | None) -> None:
        nonlocal furthest, wanted
        if piece is None:
            place, rest = at, "the end of the text"
        else:
            same = 0
            while same < len(piece) and at + same < len(text) and piece[same] == text[at + same]:
                same += 1
            place, rest = at + same, piece[same:]
            if not rest:
                return
        if place > furthest:
            furthest, wanted = place, []
        if place == furthest and rest not in wanted:
            wanted.append(rest)

    if any(True for _ in derivations(program, text, left, trace)):
        return "the world can write this text"
    line = text.count("\n", 0, furthest) + 1
    found = repr(text[furthest : furthest + 24]) if furthest < len(text) else "the end of the text"
    options = ", ".join(w if w == "the end of the text" else repr(w[:24]) for w in wanted[:8])
    more = f" (or {len(wanted) - 8} others)" if len(wanted) > 8 else ""
    return (
        f"cannot be written beyond character {furthest} (line {line}): "
        f"after {text[max(0, furthest - 40) : furthest]!r} comes {found}, where the world allows {options}{more}"
    )


def stream(seed: int, index: int) -> Callable[[], float]:
    """Uniform numbers that depend on (seed, index) only: Mersenne Twister, whose `random()` no Python changes."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed = {seed}, index = {index}: both must be at least 0")
    return random.Random((seed << 64) + index).random
