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
        s.say(
            "[Once upon a time,|Long ago,|Once,] there was {trait.a} [child|little one] named {hero}[ who lived "
            "{home}|, and {he} lived {home}].",
        )
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
    """What the hero likes to do."""
    s.say("{He} [loved {pastime}|liked {pastime} more than anything|was happiest when {he} was {pastime}].")


def garment(s: Teller) -> None:
    """What the hero wears."""
    s.say("{He} [always|nearly always] wore {hue.a} {garment}[ that {his} {elder.kin} had made|, even at breakfast|].")


def pet(s: Teller) -> None:
    """Who goes with the hero."""
    s.say("{He} had {pet.a} [named|called] {petname}[, and the two were always together|].")


# Every order that can be told apart: to draw an order first and drop sentences later would write one text in two ways.
HABITS = Dist(
    [(), *([h] for h in (pastime, garment, pet)), *permutations((pastime, garment, pet), 2), (pastime, garment, pet)]
)


def day(s: Teller) -> None:
    """The morning on which it happens."""
    s.paragraph()
    s.say(
        "[One|One fine|One windy|One bright|One cool|One quiet] [morning|afternoon|day], "
        "[{sight}|the whole family was busy"
        "|{hero} woke up with a tickle of excitement|there was nothing to do at home|{hero} finished {his} "
        "chores early|{hero} looked out of the window|the kettle sang on the stove|{hero} could not find {his} "
        "left shoe|the neighbors were hanging out the wash].",
        feeling="calm",
    )


def way(s: Teller) -> None:
    """A moment on the way, or none: it has no part in the plot."""
    moment = s.choose(MOMENTS)
    if moment:
        s.say(moment)


# Each begins differently, so that the text soon tells which it is.
MOMENTS = Dist(
    (
        "",
        "{Colour.a} [butterfly|beetle|feather] [landed on {hero}'s sleeve|sailed by].",
        "[Clouds|Big white clouds] drifted over the hills, and one of them looked just like {animal.a}.",
        "Far off, somebody was [singing|calling a dog|chopping wood].",
        "There was a rock shaped like {treat.a}[, and it made {hero} hungry|].",
        "Somebody [on a bench|with a stick] lifted {hue.a} cap and wished {hero} a good day.",
        "Two crows were [fighting over|playing with] {hue.a} ribbon.",
        "{hero} counted {number} [snails|ants|puddles|crows] on the way.",
    ),
    (6, 1, 1, 1, 1, 1, 1, 1),
)


def sad(s: Teller) -> None:
    """The hero is unhappy, in the hero's own way."""
    if s.knows("garment") and s.chance(0.5):
        s.say(
            "{hero} [wiped {his} eyes with|hid {his} face in|pulled at|chewed on|buried {his} nose in] {his} "
            "{hue} {garment}.",
            feeling="sad",
        )
    else:
        s.say(
            "[A tear ran down {hero}'s cheek|Big tears rolled down {hero}'s face|{hero} swallowed hard|{hero} "
            "wanted to cry|{hero}'s lip began to tremble|{hero}'s heart felt as heavy as a stone|{hero} felt "
            "very small|{hero} stared at the ground|A lump sat in {hero}'s throat].",
            feeling="sad",
        )
    if s.knows("pet"):
        s.say("{petname} {pet.worried}.", 0.6)


def glad(s: Teller) -> None:
    """The hero is happy, in the hero's own way."""
    s.say(
        "[{hero} laughed out loud|{hero} jumped for joy|{hero} felt warm all over|{hero}'s heart beat with "
        "joy|{hero} smiled from ear to ear|{hero} could have hugged the whole world|{hero} spun around "
        "twice|{hero}'s eyes were shining|{hero} hummed a happy tune|What a happy moment it was].",
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
        done = s.say(
            "That [night|evening], {petname} the {pet} [slept at the foot of {his} bed|curled up beside {him}].", 0.5
        )
    if not done and s.knows("garment"):
        done = s.say(
            "At bedtime, {hero} hung {his} {hue} {garment} [by the door|over a chair] and [smiled|yawned happily].", 0.5
        )
    if not done and s.knows("pastime"):
        done = s.say("The next day, {hero} was {pastime} again[, just as before|, happier than ever|].", 0.5)
    if not done:
        s.say(
            "[That night, {hero} slept soundly.|That evening, the stars looked brighter than ever.|{hero} went "
            "to bed with a smile.|And {hero} told the story again and again.|Even years later, {hero} liked to "
            "think of that day.|When {hero} was grown up, {he} still remembered it.]",
            0.7,
        )
