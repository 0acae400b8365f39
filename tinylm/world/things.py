"""Plots about things: lost, broken, traded, shared, found, built, grown."""

from __future__ import annotations

from .engine import Dist, Teller
from .scenes import day, glad, moral, sad, way

FINDERS = Dist(range(3))


def lost(s: Teller) -> None:
    """A treasured thing is missing; a friend thinks of the place where it was left."""
    s.paragraph()
    s.say(
        "{His} [greatest|dearest] treasure was {colour.a} {thing}, a gift from {his} {elder.kin}.",
        holds={"thing": "hero"},
    )
    s.say(
        "[But one|One] [morning|day|evening], the {thing} was [gone|not there|nowhere to be found]!",
        feeling="worried",
        holds={"thing": "nobody"},
        feature="twist",
    )
    s.say(
        "{hero} looked [under the bed|in every drawer|behind the door] and [in the basket|on the shelf|under the "
        "rug|in every pocket], but [it was not there|there was no {thing}|all {he} found was an old button].",
    )
    sad(s)
    s.paragraph()
    s.say("[Just then|Soon], {friend} [came by|knocked at the door|looked over the fence].")
    s.say('"[What is wrong|Why are you so sad|What happened]?" asked {friend}.', speaker="friend")
    s.say(
        '"[I have lost my {colour} {thing}|My {colour} {thing} is gone|I cannot find my {colour} {thing}]," '
        "said {hero}.",
        speaker="hero",
    )
    s.say(
        '"[Think hard|Let us think], {hero}. Where did you [play yesterday|see it last|have it last]?"',
        speaker="friend",
    )
    s.say('"{Place.at}," said {hero}[ slowly|].', speaker="hero")
    s.say("So they [ran|hurried|walked] {place.to} and [searched|looked] everywhere.", place="place", feeling="hopeful")
    if s.chance(0.4):
        s.say("They asked {adult.full}, but {adult.he} had seen nothing.")
    finder = s.draw(FINDERS)
    if finder == 0:
        s.say("At last, {friend} [bent down and looked|took a look] {spot}.")
        s.say(
            '"[Here it is|I see something {colour}]!" {friend} [called|shouted].',
            speaker="friend",
            holds={"thing": "friend"},
        )
        s.say("It was the {thing}, [a little dusty|a little wet|as good as new].", holds={"thing": "hero"})
    elif finder == 1:
        s.say(
            "[Suddenly|Then] they saw {animal.a} that was [playing with|sleeping on] something {colour}.",
            feature="twist",
        )
        s.say('"[Wait|Please], that is mine!" [called|cried] {hero}, and held out {food.a}.', speaker="hero")
        s.say(
            "The {animal} [sniffed|looked from one to the other], dropped the {thing}, and took the {food}.",
            holds={"thing": "hero"},
        )
    else:
        s.say("[But there was nothing|They found nothing], not even {spot}.")
        s.say(
            '"[Is this what you are looking for|Does this belong to you]?" somebody asked. It was {rival}, '
            "with the {thing}.",
            speaker="rival",
            holds={"thing": "rival"},
            feature="twist",
        )
        s.say(
            '"I found it {spot} and [wanted to know whose it was|kept it safe]," said {rival}.',
            speaker="rival",
            holds={"thing": "hero"},
        )
    glad(s)
    s.paragraph()
    if s.chance(0.5):
        s.say(
            "From then on, {hero} [always put|never forgot to put] the {colour} {thing} back [in its box|on its "
            "shelf].",
        )
    moral(
        s,
        "friends help",
        "[Two friends find more than one.|A good friend helps you look.|A loss is easier to bear with a friend "
        "like {friend}.]",
    )


def broken(s: Teller) -> None:
    """Something is broken in secret; the truth comes out and it is mended together."""
    day(s)
    s.say(
        "{His} {elder.kin} had {colour.a} {vessel}, [old and precious|the finest thing in the house].",
    )
    s.say('"[Please|You may look, but] do not touch it," {elder} [always|often] said.', speaker="elder")
    s.say(
        "But {hero} was playing with {his} {thing} [in the house|at the table], and [crash|bang]!",
        holds={"thing": "hero"},
        feature="twist",
    )
    s.say(
        "[The {vessel} lay on the floor in {number} pieces|{Number} {colour} pieces lay on the floor].",
        feeling="scared",
    )
    s.paragraph()
    s.say("{hero} hid the pieces {spot} and [said nothing|told nobody|kept very quiet].", feeling="guilty")
    s.say("All [day|afternoon], {he} [could not eat|could not play|had a stone in {his} stomach].")
    sad(s)
    s.say(
        '"You are so quiet," said {friend}, {his} friend. "[What is the matter|What happened]?"', 0.6, speaker="friend"
    )
    s.paragraph()
    s.say("At [supper|bedtime], {hero} [could bear it no longer|took a deep breath].")
    s.say(
        '"{elder}, [I broke the {vessel}|it was me]," {he} [whispered|said]. "I hid the pieces {spot}. [I am '
        'sorry|Please forgive me]."',
        speaker="hero",
        feeling="sorry",
    )
    s.say(
        "{elder} [was silent for a moment|looked at {him} for a long time|put down {elder.his} cup][, then took "
        "{his} hand|].",
    )
    s.say(
        '"[I am sad about it|It was dear to me], but I am glad that you told me [the truth|yourself]," said {elder}.',
        speaker="elder",
    )
    s.say(
        "Together they [glued the pieces|mended it with glue], [and only a thin line remained|though one small "
        "chip was missing].",
        feeling="relieved",
    )
    s.paragraph()
    moral(
        s,
        "tell the truth",
        "[The truth is hard to say, but a lie is harder to carry.|A mended thing is good, and a told truth is "
        "better.|It is never too late to tell the truth.]",
    )


def trade(s: Teller) -> None:
    """A trade that seemed good is regretted, and undone."""
    s.paragraph()
    s.say(
        "{hero} [owned|had] {colour.a} {thing}. It [had once belonged to|was a present from] {his} {elder.kin}.",
        holds={"thing": "hero"},
    )
    day(s)
    s.say(
        "{hero} met {friend} {place.at}, and {friend} had brought a [shiny|brand new|splendid] {thing2}.",
        place="place",
        holds={"thing2": "friend"},
    )
    s.say('"[Oh, how fine|I want one too]!" [cried|said] {hero}.', speaker="hero", feeling="jealous")
    s.say(
        '"[I will trade it for your {thing}|Give me your {colour} {thing}, and you can have it]," said {friend}.',
        speaker="friend",
    )
    s.say(
        "{hero} [did not think long|nodded at once], and they [shook hands|traded].",
        holds={"thing": "friend", "thing2": "hero"},
        feeling="happy",
    )
    s.paragraph()
    s.say(
        "[But by evening|But after an hour|But the next day], the {thing2} [was no fun|had lost its shine].",
        feeling="bored",
        feature="twist",
    )
    s.say("{hero} [kept thinking of|dreamed of|missed] the {colour} {thing}[ and of {elder}|].", feeling="sad")
    sad(s)
    s.say("{He} [ran|went|hurried] to [find {friend}|{friend}'s house].")
    s.say(
        '"[Please, c|C]an we trade back?" asked {hero}. "[I miss my {thing}|My {thing} is special to me]."',
        speaker="hero",
    )
    s.say("{friend} [thought for a moment|scratched one ear|looked at the {thing}].")
    s.say(
        '"[Of course|All right]," said {friend}. "I missed my {thing2} too."',
        speaker="friend",
        holds={"thing": "hero", "thing2": "friend"},
    )
    glad(s)
    s.say("[They played with both things|Then they built a house for both things] until [dark|supper].", 0.6)
    s.paragraph()
    moral(
        s,
        "value what you have",
        "[What shines is not always what we need.|{hero} learned to value what {he} had.|The best things are "
        "often the ones we already have.]",
    )


def sharing(s: Teller) -> None:
    """There is only one, and two are hungry."""
    day(s)
    s.say("{elder} [packed|gave {hero}] {food.a} for the way.", holds={"food": "hero"})
    s.say("{hero} [walked|skipped] {place.to}, [humming|thinking of lunch].", place="place")
    s.say("There sat {friend}, [all alone|with empty hands|looking at the ground].")
    s.say('"[What is wrong|Why so sad], {friend}?" asked {hero}.', speaker="hero")
    s.say(
        '"[I forgot my lunch|I dropped my lunch in the mud|{Animal.a} ate my lunch], and [I am so hungry|my '
        'stomach hurts]," said {friend}.',
        speaker="friend",
    )
    s.paragraph()
    s.say(
        "{hero} looked at the {food}. [It was the only one|It smelled so good], and {his} own stomach "
        "[rumbled|growled].",
        feeling="unsure",
    )
    if s.chance(0.4):
        s.say("For a moment, {he} wanted to hide it {spot}.", feeling="selfish")
    s.say(
        "[Then|But then] {he} [broke|cut|divided] it in [the middle|two equal parts].",
        holds={"food": "both"},
        feature="twist",
    )
    s.say('"Half for you, half for me," [{he} said|said {hero}].', speaker="hero", feeling="kind")
    s.say("{friend} [ate every crumb|took a big bite] and [smiled|laughed] [again|at last].")
    glad(s)
    s.paragraph()
    s.say(
        "[The next day|A week later], it was {hero} who [had forgotten {his} lunch|had nothing to eat].",
        feature="twist",
    )
    s.say("{friend} [came running with|brought] a [big |]bag. In it [was|lay] {treat.a}.", holds={"treat": "friend"})
    s.say('"Half for you, half for me," said {friend}.', speaker="friend", holds={"treat": "both"})
    moral(
        s,
        "share",
        "[Half of something shared tastes better than all of it alone.|Kindness comes back.|Those who share are "
        "never really hungry.]",
    )


def treasure(s: Teller) -> None:
    """A map, a spot marked with a cross, and something other than gold."""
    day(s)
    s.say(
        "[Between two old books|At the bottom of a drawer|In a bottle], {hero} found a [torn|yellow] map.",
        holds={"map": "hero"},
        feeling="excited",
    )
    s.say("There was a [red|black] cross {place.at}, and [below it|beside it] somebody had written: look {spot}.")
    s.say('"A treasure! [Come with me|Let us go], {friend}!" cried {hero}.', speaker="hero")
    s.say('"[Perhaps it is gold|I hope it is gold|Maybe it is a trap]," said {friend}.', speaker="friend")
    way(s)
    s.paragraph()
    s.say(
        "They [followed the map|ran all the way] {place.to}, and then they [dug|searched|looked] {spot}.", place="place"
    )
    s.say(
        "[First they found only dust|For a long time, there was nothing], but {hero} did not give up.",
        feeling="patient",
    )
    s.say("[At last|Finally], {friend} pulled out a small {colour} box[, tied with string|].", holds={"box": "friend"})
    s.say(
        "[Inside was no gold at all|There was no gold in it|It held no gold], but {thing.a} and a letter.",
        feature="twist",
        holds={"thing": "hero"},
        feeling="surprised",
    )
    s.say(
        "[The letter said|In the letter they read]: whoever finds this, [play with it|take good care of it|be "
        "happy with it] and hide something for [the next child|another finder].",
    )
    s.paragraph()
    s.say(
        '"[My {elder.kin} had {thing.a} like this|My {elder.kin} told me about such {thing.a}]!" [said|cried] {hero}.',
        speaker="hero",
    )
    s.say("At home, {elder} looked at the {thing} and [laughed|turned pink].")
    s.say('"I hid it {spot} when I was {age} years old," {elder.he} said.', speaker="elder", feature="twist")
    glad(s)
    s.say(
        "[The next day|A week later], {hero} and {friend} put {thing2.a} in the {colour} box and hid it "
        "[again|for the next child].",
        holds={"thing2": "box"},
    )
    s.paragraph()
    moral(
        s,
        "treasures are passed on",
        "[The best treasures are the ones we pass on.|A treasure grows when it is handed on.|Not all treasure is "
        "gold.]",
    )


def purse(s: Teller) -> None:
    """Something valuable is found, and its owner looked for."""
    day(s)
    s.say("On the way {place.to}, {hero} saw something [shine|glitter] {spot}.", place="place")
    s.say(
        "It was {colour.a} purse with {number} [gold|silver|copper] coins in it!",
        holds={"purse": "hero"},
        feeling="excited",
    )
    s.say('"[We are rich|You are rich]!" cried {friend}. "[Now we can buy|Buy us] {thing.a}!"', speaker="friend")
    s.say(
        "{hero} [turned the purse over|thought hard]. [Somebody must be very sad now|Such a purse belongs to "
        "somebody], {he} thought.",
        feeling="unsure",
    )
    s.paragraph()
    s.say(
        '"[We must find the owner|It is not ours|Let us find out whose it is]," {he} said.',
        speaker="hero",
        feeling="firm",
    )
    s.say("They asked {elder}, but {elder.he} still had {elder.his} own purse.", 0.5)
    s.say("They asked everyone {place.at}, but [nobody had lost anything|all shook their heads].", 0.7)
    s.say(
        "Then they met {adult.full}, who was [crawling on the ground|searching everywhere|close to tears].",
        feature="twist",
    )
    s.say('"[What did you lose|What are you looking for]?" asked {hero}.', speaker="hero")
    s.say('"My {colour} purse with {number} coins," {adult.he} [sighed|said].', speaker="adult")
    s.say(
        "{hero} held it out, and {adult} [counted the coins: all {number} were there|counted: {number} coins, "
        "not one was missing].",
        holds={"purse": "adult"},
        feeling="proud",
    )
    s.paragraph()
    s.say(
        '"[Honest children are rare|You have a good heart]," said {adult}. "[Take|Please take] one coin each."',
        speaker="adult",
    )
    glad(s)
    s.say("With the [coin|money], {hero} bought {treat.a} and shared it with {friend}.", 0.6)
    moral(
        s,
        "be honest",
        "[An honest heart is worth more than {number} coins.|Honesty is a treasure that nobody can lose.|What we "
        "give back, we keep in our hearts.]",
    )


def build(s: Teller) -> None:
    """Many hands build what one could not."""
    day(s)
    s.say(
        "{hero} wanted to build a [tower|house|bridge|castle] of {colour} [stones|boards|blocks] {place.at}.",
        place="place",
        feeling="eager",
    )
    s.say('"[May I help|Can I help]?" asked {friend}.', speaker="friend")
    s.say('"No, I [can do it alone|need no help]," said {hero}[, for {he} was a little proud|].', speaker="hero")
    s.say(
        "{He} worked [all morning|for hours], but [the wind blew it over|it leaned to one side and fell down].",
        feeling="angry",
        feature="twist",
    )
    s.say("{He} tried again, and again it [fell|broke].", 0.6)
    sad(s)
    s.paragraph()
    s.say("{adult.full}, [came by|stopped to watch].")
    s.say(
        '"One hand cannot clap," said {adult}. "[Who could hold the other side|How many friends do you have]?"',
        speaker="adult",
    )
    s.say("{hero} [blushed|looked down]. Then {he} went to {friend}.", feeling="sorry")
    s.say('"[I was wrong|I cannot do it alone|I am sorry]. Will you help me?" {he} asked.', speaker="hero")
    s.say(
        "{friend} [grinned|nodded] and brought {rival} along, and {rival} brought {thing.a}.", holds={"thing": "rival"}
    )
    s.say(
        "One held, one carried, and one [tied|hammered]. [Before sunset|By evening|After {number} hours], it "
        "stood firm.",
        feeling="proud",
    )
    s.say("On the very top they [put|placed] the {thing}[, for luck|].", holds={"thing": "nobody"})
    glad(s)
    s.paragraph()
    moral(
        s,
        "work together",
        "[Many hands make light work.|What one cannot do, three can.|Asking for help is also a kind of strength.]",
    )


def seed(s: Teller) -> None:
    """A seed needs more patience than a child has."""
    s.paragraph()
    s.say("{adult.full}, gave {hero} a [tiny|round|striped] seed.", holds={"seed": "hero"})
    s.say(
        '"[Plant it|Put it in the ground] and wait. It will bear {colour} flowers," said {adult}.',
        speaker="adult",
    )
    s.say(
        "{hero} planted it {place.at} and [poured water on it|gave it water].",
        place="place",
        holds={"seed": "nobody"},
        feeling="hopeful",
    )
    s.say(
        "[{He} looked after one hour. Nothing. {He} looked the next day. Nothing!|{He} looked at it {number} "
        "times a day, but nothing happened.]",
        feeling="impatient",
    )
    s.say('"It is a bad seed," [grumbled|said] {hero}.', speaker="hero")
    s.say('"[Shall we dig it up|Let us dig it up and see]?" said {friend}.', 0.5, speaker="friend")
    s.paragraph()
    s.say('"A seed works in the dark," said {elder}. "[Give it time|Wait a little longer]."', speaker="elder")
    s.say(
        "So {hero} [watered it every morning|sang to it every evening|pulled the weeds around it] for {number} weeks.",
        feeling="patient",
    )
    s.say(
        "Once {animal.a} came to [eat it|dig there], but {hero} [chased {animal.him} away gently|built a small fence].",
        0.6,
    )
    s.say(
        "And one [day|morning], [a green tip|two small leaves] stuck out of the ground!",
        feature="twist",
        feeling="surprised",
    )
    glad(s)
    s.say(
        "It grew up to {his} knee, and then up to {his} [belly|chin], and [at last|one day] it was covered with "
        "{colour} flowers.",
    )
    s.paragraph()
    s.say("{hero} [took|carried|brought] the [first|finest] one to {adult}.")
    s.say(
        '"It took {number} weeks," {he} said, "[and it was worth it|and I only grumbled once]."',
        speaker="hero",
        feeling="proud",
    )
    moral(
        s,
        "be patient",
        "[Good things grow slowly.|Patience is the best water.|Whoever can wait will see the flowers.]",
    )


PLOTS = {f.__name__: f for f in (lost, broken, trade, sharing, treasure, purse, build, seed)}
