"""Scenes that every story shares: how it opens, what a day is like, how the hero feels, and how it ends."""

from __future__ import annotations

from itertools import permutations

from .engine import Dist, Teller
from .lexicon import BOYS, GIRLS

MANNER = Dist(range(7), (3, 2, 2, 2, 3, 2, 2))


def opening(s: Teller) -> None:
    """Who the story is about. What is told here (age, garment, pet, pastime) may matter again many sentences later."""
    manner = s.draw(MANNER)
    if manner == 0:
        s.say("[Once upon a time,|Long ago,|Once,] there was {trait.a} [child|little one] named {hero}[ who lived {home}|, and {he} lived {home}].")
    elif manner == 1:
        s.say("{Home} lived {trait.a} child called {hero}.")
    elif manner == 2:
        s.let(hero=GIRLS)
        s.say("There [was once|once was] a [little |]girl [named|called] {hero}. She lived {home}.")
    elif manner == 3:
        s.let(hero=BOYS)
        s.say("There [was once|once was] a [little |]boy [named|called] {hero}. He lived {home}.")
    elif manner == 4:
        s.say("{hero} [was {age} years old and |]lived {home} with {his} [family|{elder.kin}].")
    elif manner == 5:
        s.say("[Everyone|Everybody] knew {hero}, the {trait} {child} who lived {home}.")
    else:
        s.say("This is [a|the] story [about|of] {hero}, who lived {home}.")
    if not s.knows("trait"):
        s.say("{He} was {trait.a} {child}[, and very fond of stories| with quick feet| with many questions|].", 0.6)
    if not s.knows("age"):
        s.say("{He} was {age} years old[, almost {age.next}|].", 0.6)
    for habit in s.choose(HABITS):
        habit(s)


def pastime(s: Teller) -> None:
    s.say("{He} [loved {pastime}|liked {pastime} more than anything|was happiest when {he} was {pastime}].")


def garment(s: Teller) -> None:
    s.say("{He} [always|nearly always] wore {hue.a} {garment}[ that {his} {elder.kin} had made|, even to bed|].")


def pet(s: Teller) -> None:
    s.say("{He} had {pet.a} [named|called] {petname}[, and the two were always together|].")


# Every order that can be told apart: an order drawn first and sentences dropped later would make one text two derivations.
HABITS = Dist([(), *([h] for h in (pastime, garment, pet)), *permutations((pastime, garment, pet), 2), (pastime, garment, pet)])


def day(s: Teller) -> None:
    """The morning on which it happens."""
    s.paragraph()
    s.say(
        "[One|One fine|One windy|One bright|One cool|One quiet] [morning|afternoon|day], [{sight}|the whole family was busy"
        "|{hero} woke up with a tickle of excitement|there was nothing to do at home|{hero} finished {his} chores early].",
        feeling="calm",
    )


def sad(s: Teller) -> None:
    """The hero is unhappy, in the hero's own way."""
    if s.knows("garment") and s.chance(0.5):
        s.say("{hero} [wiped {his} eyes with|hid {his} face in|pulled at] {his} {hue} {garment}.", feeling="sad")
    else:
        s.say("[A tear ran down {hero}'s cheek|{hero}'s lip began to tremble|{hero}'s heart felt as heavy as a stone|{hero} felt very small].", feeling="sad")
    if s.knows("pet"):
        s.say("{petname} {pet.worried}.", 0.6)


def glad(s: Teller) -> None:
    """The hero is happy, in the hero's own way."""
    s.say(
        "[{hero} laughed out loud|{hero} jumped for joy|{hero} felt warm all over|{hero}'s heart beat with joy|{hero} smiled from ear to ear].",
        feeling="happy",
    )
    if s.knows("pet"):
        s.say("{petname} {pet.glad}[ too|].", 0.6)


def moral(s: Teller, key: str, template: str) -> None:
    """What the story teaches: `key` is its label."""
    s.labels["moral"] = key
    s.say(template, feature="moral")


def evening(s: Teller) -> None:
    """A last look back, at something that was told at the beginning."""
    s.paragraph()
    done = False
    if s.knows("pet"):
        done = s.say("That [night|evening], {petname} the {pet} [slept at the foot of {his} bed|curled up beside {him}].", 0.5)
    if not done and s.knows("garment"):
        done = s.say("At bedtime, {hero} hung {his} {hue} {garment} [by the door|over a chair] and [smiled|yawned happily].", 0.5)
    if not done and s.knows("pastime"):
        done = s.say("The next day, {hero} was {pastime} again[, just as before|, happier than ever|].", 0.5)
    if not done:
        s.say("[That night, {hero} slept soundly.|That evening, the stars looked brighter than ever.|{hero} went to bed with a smile.]", 0.7)

