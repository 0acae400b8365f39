"""Plots about the people around a child: an errand, a pot of soup, a new baby, a letter, a riddle."""

from __future__ import annotations

from .engine import Teller
from .scenes import day, glad, moral, sad, way


def errand(s: Teller) -> None:
    """A basket has to arrive full, and there are many who would like some."""
    day(s)
    s.say(
        '"Will you [please |]take these {number} {food.s} to {adult.full}?" said {elder}.',
        speaker="elder",
        holds={"food": "hero"},
    )
    s.say(
        '"[{Adult.he} is waiting|{Adult.he} is ill and cannot go out|It is a present for {adult.him}], so do '
        'not [stop|eat any]."',
        speaker="elder",
    )
    s.say("{hero} [took the basket|put on {his} shoes] and [set off|went on {his} way].", feeling="proud")
    s.paragraph()
    way(s)
    s.say("The way led {place.to}. There stood {friend}.", place="place")
    s.say('"[Mmm|Oh], {food.s}! [Give me one|Just one for me]," said {friend}.', speaker="friend")
    s.say('"[I cannot|Not today|No, I promised]. They are for {adult}," said {hero}.', speaker="hero", feeling="firm")
    s.say("Next, {hero} met {animal.a} [with hungry eyes|that sniffed at the basket].", 0.6)
    s.say("{His} own mouth watered[, but {he} walked faster|, but {he} counted all {number} and walked on].")
    s.say(
        "[Suddenly|Then] {he} tripped, and the basket [flew through the air|tipped over]!",
        feature="twist",
        feeling="scared",
    )
    s.say(
        "{friend} [had followed and caught it|jumped forward and caught it] [just in time|before it hit the ground].",
        holds={"food": "friend"},
    )
    s.say(
        '"[Thank you|You saved them], {friend}!" said {hero}.',
        speaker="hero",
        feeling="thankful",
        holds={"food": "hero"},
    )
    s.paragraph()
    s.say(
        "{adult} [opened the door|was at the window|sat by the stove] and counted: {number} {food.s}, [not one "
        "less|and nothing was missing].",
        holds={"food": "adult"},
    )
    s.say(
        '"[Such a|What a] faithful helper!" said {adult}. "[Now sit down, both of you, and eat with me|Come '
        'in, both of you, there is enough for three]."',
        speaker="adult",
    )
    glad(s)
    s.paragraph()
    moral(
        s,
        "keep your word",
        "[A promise is a thing to be carried carefully.|Whoever keeps a promise is trusted with more.|{hero} had "
        "kept {his} word, and that tasted best of all.]",
    )


def soup(s: Teller) -> None:
    """Everybody has a little; together it is a feast."""
    s.paragraph()
    s.say("It had been a hard year, and the pot [at {hero}'s house|on the stove] was empty.", feeling="hungry")
    s.say('"I only have [one onion|a handful of salt|a cup of beans]," sighed {elder}.', speaker="elder")
    s.say(
        "{hero} took the big {colour} pot, carried it {place.to}, and lit a fire under it.",
        holds={"pot": "hero"},
        place="place",
    )
    s.say('"[What are you cooking|What is in the pot|Is there anything to eat]?" asked {friend}.', speaker="friend")
    s.say(
        '"[Feast soup|Friendship soup|The best soup in the world]," said {hero}. "[It only needs a carrot|A '
        'potato would make it perfect]."',
        speaker="hero",
        feeling="sly",
    )
    s.paragraph()
    s.say("{friend} ran home and came back with {number} [carrots|potatoes].", feature="twist")
    s.say("{adult.full}, [smelled the smoke|saw the fire] and brought [a piece of butter|a bunch of herbs|a cabbage].")
    s.say("Then {rival} came, who [never shared anything|was a bit of a miser], and {hero} held {his} breath.", 0.6)
    s.say(
        "Soon the {colour} pot was full to the brim, and [it smelled wonderful|the steam rose up to the sky].",
        feeling="hopeful",
    )
    s.say('"[Who put in the most|Whose soup is it]?" asked {adult}.', speaker="adult")
    s.say('"[Nobody and everybody|All of us]," said {hero}, [stirring|laughing].', speaker="hero")
    s.say(
        "They ate [and sang |]until [the moon rose|nobody could eat any more], and {elder} had {treat.a} for dessert.",
        holds={"treat": "elder"},
    )
    glad(s)
    s.paragraph()
    moral(
        s,
        "everyone gives a little",
        "[A little from everyone is enough for all.|An empty pot fills up when everyone gives.|Hunger is small "
        "where many sit at one table.]",
    )


def baby(s: Teller) -> None:
    """A new baby takes everything, and gives something back."""
    s.paragraph()
    s.say("{hero} had a new baby [brother|sister], so tiny that it slept in a basket.", feeling="curious")
    s.say("[All day long|From morning to night], everyone said how [sweet|lovely] the baby was.")
    s.say("Nobody [asked {hero} to play|looked at {hero}'s drawings|had time for a story] any more.", feeling="jealous")
    s.say('"[Not now|Later], {hero}," said {elder} again and again. "The baby is [hungry|sleeping]."', speaker="elder")
    sad(s)
    s.say(
        "One [afternoon|day], {he} packed {his} {colour} {thing} and {food.a} and ran away {place.to}.",
        holds={"thing": "hero"},
        place="place",
        feature="twist",
    )
    s.paragraph()
    s.say("There {he} met {adult.full}, [mending a net|sweeping the steps|resting on a bench].")
    s.say('"Where are you going with that {thing}?" asked {adult}.', speaker="adult")
    s.say(
        '"[Away|To the end of the world|I do not know]. At home they only need the baby," said {hero}.',
        speaker="hero",
        feeling="angry",
    )
    s.say(
        '"[Hm|Well, well]," said {adult}. "And who will show the baby [how to laugh|how to play|all the '
        'hiding places]?"',
        speaker="adult",
    )
    s.say("{hero} [had not thought of that|was silent|scratched {his} head].", 0.7)
    s.say(
        "{He} [walked|ran] home. [The baby was crying|From far away {he} heard the baby cry], and nobody could "
        "calm it.",
        feeling="unsure",
    )
    s.say(
        "{hero} held up the {colour} {thing} and [made a funny face|sang a little song], and the baby "
        "[stopped|laughed for the very first time]!",
        feature="twist",
        feeling="surprised",
    )
    s.say(
        '"{hero} [can do what none of us can|is the best of us all|knows how it is done]," said {elder}.',
        speaker="elder",
    )
    glad(s)
    s.paragraph()
    s.say("The {thing} stayed beside the basket from then on.", holds={"thing": "baby"})
    moral(
        s,
        "love is not divided",
        "[Love does not get smaller when it is shared.|There is always room for one more.|A big heart has many rooms.]",
    )


def letter(s: Teller) -> None:
    """A letter for somebody who gets none."""
    day(s)
    s.say("{hero} saw {adult.full}, [standing at the mail box|looking into an empty mail box].", feeling="curious")
    s.say('"[Nothing again|Nobody writes to me]," {adult} [murmured|sighed].', speaker="adult")
    s.say("{hero} [could not forget it|thought about it all through supper].", feeling="sorry")
    s.say(
        "So {he} took {colour.a} [pencil|pen] and wrote: [you are the best neighbor in the world|I am glad that "
        "you live here|your smile makes me happy], from a secret friend.",
        holds={"letter": "hero"},
    )
    s.say(
        "At night {he} [crept|tiptoed] out and put the letter [into the mail box|under the door].",
        holds={"letter": "adult"},
        feeling="excited",
    )
    s.paragraph()
    s.say(
        "The next morning, {adult} [whistled|walked about with a smile] and greeted everyone {place.at}.",
        place="place",
        feature="twist",
    )
    s.say('"[Somebody likes me|I have a secret friend]!" {adult.he} told {friend}.', speaker="adult")
    s.say('"Who could it be?" {friend} asked {hero}.', speaker="friend")
    s.say('"[Who knows|No idea]!" said {hero} and [looked at the sky|bit {his} lip].', speaker="hero", feeling="amused")
    s.say("{Number} more letters followed, [each with a drawing|each a little longer than the last].")
    s.say(
        "But then {hero} [caught a cold|hurt {his} foot] and had to stay in bed, and there were no more letters.",
        feature="twist",
        feeling="lonely",
    )
    sad(s)
    s.paragraph()
    s.say(
        "[On the third day|One gray morning|After {number} days], something [slid under the door|rustled at the "
        "window]. It was a letter!",
        holds={"letter": "hero"},
        feeling="surprised",
    )
    s.say(
        "It said: get well soon, secret friend. I know your {colour} writing. Beside it lay {treat.a}.",
        holds={"treat": "hero"},
    )
    glad(s)
    s.paragraph()
    moral(
        s,
        "kind words",
        "[A kind word costs nothing and is worth a lot.|Whoever sends joy will find it in the mail.|A few kind "
        "lines can warm a whole winter.]",
    )


def riddle(s: Teller) -> None:
    """A gate, a riddle, and somebody who listens."""
    day(s)
    s.say(
        "{hero} and {friend} wanted to go {place.to}, but {animal.a} [sat|stood] in the middle of the way.",
        feeling="curious",
    )
    s.say(
        '"[Nobody may pass|Stop]," said the {animal}, "unless you [solve my riddle|answer me]."',
        speaker="animal",
        feature="twist",
        feeling="surprised",
    )
    question, answer, hint = s.choose(RIDDLES)
    s.say(f'"{question}"', speaker="animal")
    s.say('"[A cloud|A ghost|A dream]!" [cried|guessed] {friend}.', speaker="friend")
    s.say('"[Wrong|No], and you have only one more try," said the {animal}.', speaker="animal", feeling="worried")
    s.paragraph()
    s.say("{hero} sat down on {colour.a} stone and [thought for a long time|closed {his} eyes].", feeling="thoughtful")
    s.say('"[We should go home|It is too hard]," [whispered|said] {friend}.', 0.6, speaker="friend")
    s.say(f"Then {{he}} remembered something that {{his}} {{elder.kin}} had shown {{him}}: {hint}.")
    s.say(f'"I know it! It is {answer}!" [cried|called] {{hero}}.', speaker="hero", feature="twist", feeling="excited")
    s.say("The {animal} [bowed low|laughed|blinked], and in the very next moment the way was free.")
    s.say(
        "{Place.at}, under another {colour} stone, lay {thing.a} and a note: for those who think.",
        place="place",
        holds={"thing": "hero"},
    )
    glad(s)
    s.paragraph()
    s.say(
        '"How did you know?" asked {friend}. "[I listen to {elder}|{elder} told me long ago]," said {hero}.',
        speaker="hero",
        feeling="proud",
    )
    s.say(f"In the evening, {{hero}} asked {{elder}} the same riddle, and {{elder.he}} said at once: {answer}.", 0.6)
    moral(
        s,
        "think before you speak",
        "[A quiet minute can open a gate.|Whoever listens well can answer well.|Think first, and then speak.]",
    )


RIDDLES = (
    ("What follows you all day and is gone at night?", "a shadow", "how a hand can make a rabbit on the wall"),
    ("What has teeth and never bites?", "a comb", "how to get the knots out of long hair"),
    ("What gets wetter the more it dries?", "a towel", "how to dry a muddy dog"),
    ("What goes up and never comes down?", "your age", "the marks on the door for every birthday"),
    ("What has a neck and no head?", "a bottle", "how to blow a tune on an old jug"),
    ("What can you catch and not throw?", "a cold", "how to drink hot tea with honey"),
    ("What has hands and cannot clap?", "a clock", "how to wind up the little wheels"),
    ("What is full of holes and still holds water?", "a sponge", "how to wash the windows in spring"),
)


PLOTS = {f.__name__: f for f in (errand, soup, baby, letter, riddle)}
