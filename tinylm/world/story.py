"""The story program: a topic, an opening, a plot, an ending; and, where the world has them, facts about named people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from . import hearts, things
from .engine import Dist, Teller, Word
from .lexicon import GENERAL, TOPICS
from .scenes import evening, opening

PLOTS: dict[str, Callable[[Teller], None]] = {**things.PLOTS, **hearts.PLOTS}


def program(topics: Dist, plots: Dist, facts: Mapping[str, Dist] | None = None) -> Callable[[Teller], None]:
    """The program that tells one story.

    Args:
        topics: over names of TOPICS. plots: over names of PLOTS.
        facts: topic -> distribution over the Words of `facts.Fact`s; None tells no facts.
    """
    casts = {name: {**GENERAL, "hero": NAMES, **TOPICS[name].cast} for name in topics.options}

    def story(s: Teller) -> None:
        topic = s.choose(topics)
        s.labels["topic"] = topic
        s.cast.update(casts[topic])
        opening(s)
        if facts is not None:
            s.let(neighbour=facts[topic])
            s.say("[Not far away lived|Their neighbour was|Next door lived] {neighbour.full}.", feature="fact")
            s.say("{neighbour.fact}", feature="fact")
        plot = s.choose(plots)
        s.labels["plot"] = plot
        PLOTS[plot](s)
        evening(s)

    return story


def topic_dist(names: Sequence[str], weights: Sequence[float] | None) -> Dist:
    """A distribution over topics by name."""
    return Dist(names, weights)


from .lexicon import NAMES  # noqa: E402

__all__ = ["PLOTS", "Word", "program", "topic_dist"]
