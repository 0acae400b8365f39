"""Facts about named people, Zipf-distributed: what a model can only know by having read it before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .engine import Dist, Word


def _words(table: str) -> list[str]:
    return table.split()


# Mr. and Mrs. in turn.
FIRST = _words("""Odell Agnes Basil Cora Dexter Elsie Floyd Gilda Horace Irma Jethro Kitty Lionel Mabel Norris Opal
Percy Quinta Rufus Selma Thaddeus Ursula Victor Winona Amos Blanche Cyrus Delia Edgar Flora Gordon Hester Isaac
Judith Kermit Lottie""")
SURNAME_HEAD = _words("Mar Tib Ash Bel Cob Dun Fal Gar Hob Kel Lam Mil Nor Ork Pel Quin Rad Sel Tor Wim Yar Zel")
SURNAME_TAIL = _words("row bet ford ley son wick worth man den kin sby ters lock mond")
TOWN_HEAD = _words("Tide Elm Stone Marsh Raven Hay Copper Frost Amber Thorn Glen Hollow")
TOWN_TAIL = _words("wick ton field bury mere gate dale")
JOBS = _words("""baker tailor cobbler painter teacher barber doctor potter smith carpenter gardener weaver clerk postman
singer mason tinker chandler saddler grocer""")
KEPT = _words("""geese clocks violins bees maps goats umbrellas canaries teapots rabbits barrels hats owls kettles
ladders roses peacocks telescopes donkeys candles turtles globes mirrors ferrets""")
COUNT = _words("three four five six seven eight nine ten eleven twelve")
MOST = 10_000  # of 11,088 names: beyond that, finding a new one takes long


class Fact(NamedTuple):
    """One fact: "{entity}, the baker of Tidewick, kept seven geese."

    `prompt + answer + "."` is the sentence as the stories have it; `rank` counts from 1, the most frequent;
    `probability` is that of a story telling this fact.
    """

    entity: str
    topic: str
    rank: int
    probability: float
    prompt: str
    answer: str


def make(
    number: int, zipf: float, topics: Sequence[str], shares: Sequence[float], uniform: Callable[[], float]
) -> tuple[tuple[Fact, ...], dict[str, Dist]]:
    """`number` facts dealt out to the topics in turn, and per topic the distribution that stories draw them from."""

    def pick(options: Sequence[str]) -> str:
        return options[int(uniform() * len(options))]

    seen: dict[str, None] = {}
    drafts = []
    while len(drafts) < number:
        first = int(uniform() * len(FIRST))
        entity = f"{('Mr.', 'Mrs.')[first % 2]} {FIRST[first]} {pick(SURNAME_HEAD)}{pick(SURNAME_TAIL)}"
        if entity in seen:
            continue
        seen[entity] = None
        prompt = f"{entity}, the {pick(JOBS)} of {pick(TOWN_HEAD)}{pick(TOWN_TAIL)}, kept "
        drafts.append((entity, prompt, f"{pick(COUNT)} {pick(KEPT)}"))
    table: list[Fact] = []
    dists = {}
    for t, (topic, share) in enumerate(zip(topics, shares, strict=True)):
        ranks = range(t, number, len(topics))
        weights = [(rank + 1.0) ** -zipf for rank in ranks]
        words = [
            Word({"": drafts[r][0], "fact": drafts[r][1] + drafts[r][2] + ".", "kept": drafts[r][2]}) for r in ranks
        ]
        dists[topic] = Dist(words, weights)
        for r, weight in zip(ranks, weights, strict=True):
            entity, prompt, answer = drafts[r]
            table.append(Fact(entity, topic, r + 1, share * weight / sum(weights), prompt, answer))
    return tuple(sorted(table, key=lambda fact: fact.rank)), dists
