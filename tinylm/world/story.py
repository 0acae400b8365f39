"""The story program: a topic, an opening, a plot, an ending; and, if the world has them, facts about named people."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import friends, hearts, things, village
from .engine import Dist, Teller
from .lexicon import GENERAL, TOPICS
from .scenes import evening, opening

PLOTS: dict[str, Callable[[Teller], None]] = {**things.PLOTS, **hearts.PLOTS, **friends.PLOTS, **village.PLOTS}


def program(topics: Dist, plots: Dist, facts: Mapping[str, Dist] | None = None) -> Callable[[Teller], None]:
    """The program that tells one story.

    Args:
        topics: over names of TOPICS. plots: over names of PLOTS.
        facts: topic -> distribution over the Words of `facts.Fact`s; None tells no facts.
    """
    casts = {name: {**GENERAL, **TOPICS[name].cast} for name in topics.options}

    def story(s: Teller) -> None:
        topic = s.choose(topics)
        s.labels["topic"] = topic
        s.cast.update(casts[topic])
        opening(s)
        if facts is not None:
            s.let(neighbour=facts[topic])
            s.say("{neighbour.fact}", feature="fact")
        plot = s.choose(plots)
        s.labels["plot"] = plot
        PLOTS[plot](s)
        evening(s)
        if facts is not None:
            s.say("Even {neighbour}'s {neighbour.kept} were [asleep|quiet|at rest] by then.", 0.25, feature="fact")

    return story
