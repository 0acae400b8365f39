"""Plots about friends: a race, a birthday, a newcomer, a warning, a quarrel, a false alarm."""

from __future__ import annotations

from .engine import Teller
from .scenes import day, glad, moral, sad, way


def contest(s: Teller) -> None:
    """Winning is given up for something better."""
    s.paragraph()
    s.say(
        "[At last the day of the great race had come|It was the day of the great race|Every summer there was a "
        "great race]: {place.to} and back. The first prize was {colour.a} {thing}.",
        feeling="excited",
    )
    s.say(
        "{hero} had [practiced|trained] for {number} weeks. {rival}, who was [very fast|the fastest of all], "
        "only [laughed|yawned].",
    )
    s.say('"[You will never beat me|I could win on one leg]," said {rival}.', speaker="rival")
    s.say("{adult.full}, [blew a whistle|waved a flag], and they were off!", place="place")
    s.say(
        "{hero} ran past {friend} and [soon there was only {rival} ahead|left all the others behind].",
        feeling="hopeful",
    )
    s.paragraph()
    s.say(
        "[Suddenly|Right at the turn], {rival} [stumbled|slipped] and fell [with a cry|on one knee].", feature="twist"
    )
    s.say(
        "[{hero} could see the finish. It was so near.|Nobody was in front of {hero} now.|The prize was only a "
        "few steps away.|{hero} heard them shout {his} name.]",
        feeling="unsure",
    )
    s.say(
        "But {he} [stopped|turned around|ran back] and [held out {his} hand|helped {rival} up|knelt down beside "
        "{rival}].",
        feeling="kind",
    )
    s.say(
        '"[Lean on me|Put your arm around me|Can you stand up? Hold on to me|Come, we will do it together]," '
        "said {hero}.",
        speaker="hero",
    )
    s.say('"[But you will lose!|Why do you do that?]" said {rival}.', speaker="rival")
    s.say(
        '"[There will be other races|A race is only a race|I do not like to run alone]," said {hero}.', speaker="hero"
    )
    s.say(
        "[Together they|Arm in arm, they] [limped|hobbled] over the line, [and {friend} came in first|long after "
        "{friend}, who had won].",
        holds={"thing": "friend"},
    )
    s.paragraph()
    s.say(
        "{friend} looked at the {colour} {thing} [for a while|in silence|from all sides]. Then {friend.he} "
        "[gave|handed] it to {hero}.",
        holds={"thing": "hero"},
        feature="twist",
    )
    s.say(
        '"[You are the real winner|This belongs to you|I only ran, but you did more]," said {friend}, and '
        "{rival} [clapped the loudest|nodded].",
        speaker="friend",
    )
    glad(s)
    moral(
        s,
        "kindness before winning",
        "[Winning is fine, but kindness is finer.|Some win by stopping.|The kindest runner is never last.]",
    )


def surprise(s: Teller) -> None:
    """Everybody seems to have forgotten a birthday."""
    s.paragraph()
    s.say(
        "[Tomorrow|The next day] {hero} would be {age.next} years old, but [nobody spoke of it|nobody seemed to know].",
        feeling="hopeful",
    )
    s.say(
        'In the morning, {elder} only said, "[Eat your breakfast|Hurry up, it is late]."',
        speaker="elder",
        feeling="disappointed",
    )
    s.say('"[Do you want to play|Shall we play] {place.at}?" {hero} asked {friend}.', speaker="hero")
    s.say(
        '"[I have no time|I am busy|I cannot play] today," said {friend} and [ran off|hid something {colour} '
        "behind {friend.his} back].",
        speaker="friend",
        feature="twist",
    )
    sad(s)
    s.say(
        "{hero} [walked|wandered] {place.to} alone and threw [stones|sticks] until {he} had counted {number}.",
        place="place",
        feeling="lonely",
    )
    way(s)
    s.paragraph()
    s.say("There {adult.full}, [found|met] {him}.")
    s.say(
        '"[Why so gloomy?|What a long face!] Could you carry this [big|wooden|round] box home for me?" said {adult}.',
        speaker="adult",
        holds={"box": "hero"},
    )
    s.say("{hero} [sighed|nodded] and carried it. It was [heavy|strangely light], and it [rustled|rattled a little].")
    s.say("{He} [pushed open|opened] the door, and the room was [dark|quiet]. Then it happened.")
    s.say(
        '"Surprise!" cried {elder} and {friend}[ and {rival}|].', speaker="elder", feature="twist", feeling="surprised"
    )
    s.say(
        "There was {treat.a} with {age.next} candles on it, and [paper stars hung everywhere|the whole room was "
        "full of {colour} ribbons].",
    )
    s.say(
        '"[Open what you carried|Look into what you carried]," said {friend}. "It is your present[ from all '
        'of us|, and you did not know it]!"',
        speaker="friend",
    )
    s.say(
        "Inside was {colour.a} {thing}, just what {he} had [wished for|dreamed of].",
        holds={"thing": "hero"},
        feeling="happy",
    )
    glad(s)
    s.paragraph()
    s.say(
        '"[So that is why you had no time|And I thought you had forgotten]," said {hero} to {friend}.',
        0.6,
        speaker="hero",
    )
    moral(
        s,
        "trust your friends",
        "[Those who love you do not forget you.|Sometimes silence is only a secret with a ribbon on it.|Friends "
        "can keep a secret, and they can keep a friend.]",
    )


def newcomer(s: Teller) -> None:
    """Somebody new, somebody strange, somebody lonely."""
    day(s)
    s.say("[A new family moved in next door|A wagon with a new family arrived]. They had a child called {friend}.")
    s.say(
        "{friend} [spoke with a strange accent|never said a word|wore odd clothes] and always carried {colour.a} "
        "{thing}.",
        holds={"thing": "friend"},
    )
    s.say(
        '"[What a strange child|I will not play with that one]," said {rival}, and the others [laughed|agreed].',
        speaker="rival",
    )
    s.say("{friend} sat alone {place.at}, day after day.", place="place")
    s.say("{hero} [saw it|watched for a while] and remembered how it [felt|hurts] to be alone.", feeling="sorry")
    s.paragraph()
    s.say("So {hero} took {food.a} and [walked over|sat down beside {friend}].", holds={"food": "hero"}, feeling="kind")
    s.say('"[I am|Hello! My name is] {hero}. Would you like some?" {he} asked.', speaker="hero")
    s.say("{friend} [nodded shyly|looked up with big eyes] and they ate it together.", holds={"food": "both"})
    s.say('"[Why do you always carry|Where did you get] that {thing}?" asked {hero}.', speaker="hero")
    s.say(
        '"My best friend gave it to me when we left," said {friend}. "[I miss my old home|It is all I have '
        'from home]."',
        speaker="friend",
        feature="twist",
    )
    s.say(
        "Then {friend} showed {him} [a game|a song|a trick|a dance] from far away, and [soon they were "
        "laughing|it was wonderful].",
    )
    glad(s)
    s.paragraph()
    s.say(
        'The next day, {rival} came and [asked|stammered], "May I [play|learn it] too?"',
        speaker="rival",
        feature="twist",
    )
    s.say(
        '"[The more, the merrier|Of course]!" said {friend}, and put the {colour} {thing} [into {hero}\'s '
        "hands|in the middle of the ring].",
        speaker="friend",
        holds={"thing": "hero"},
    )
    moral(
        s,
        "welcome others",
        "[A stranger is a friend you have not met yet.|One kind word can open a closed door.|It takes only one "
        "to make somebody less lonely.]",
    )


def warning(s: Teller) -> None:
    """A warning is not heeded; a friend runs for help."""
    day(s)
    s.say('"[You may go out, but|Listen, {hero}:] do not {danger}," said {elder}.', speaker="elder")
    s.say('"[Why not?|I am not a baby!]" said {hero}.', speaker="hero")
    s.say('"[It is dangerous|Because it is not safe]. [Promise me|Give me your word]."', speaker="elder")
    s.say('"[All right, I promise|I promise]," said {hero}[, with crossed fingers|].', speaker="hero")
    s.say(
        "{hero} and {friend} [played|ran about] {place.at} with {his} {thing}[ for a while|].",
        place="place",
        holds={"thing": "hero"},
        feeling="happy",
    )
    way(s)
    s.paragraph()
    s.say("But {danger.the} was so [tempting|interesting].", feeling="curious")
    s.say('"[{elder} said no|You promised|Remember what {elder} said]," [warned|said] {friend}.', speaker="friend")
    s.say(
        '"[Only for a minute|Nobody will know|Do not be such a baby]," said {hero}, and {he} {danger.did}.',
        speaker="hero",
    )
    s.say("[At once|In that moment], {danger.harm}!", feature="twist", feeling="scared")
    s.say('"Help!" [screamed|cried] {hero}.', speaker="hero")
    s.say("{friend} ran as fast as [{friend.he} could|the wind] and [fetched|brought] {adult.full}.")
    s.say(
        "[It took a long time, but|With strong hands and kind words,] {adult} made everything safe again.",
        feeling="relieved",
    )
    sad(s)
    s.paragraph()
    s.say(
        '"[I did not keep my promise|I broke my word|I did not listen]. I am sorry," {hero} told {elder} [that '
        "evening|at home].",
        speaker="hero",
        feeling="sorry",
    )
    s.say(
        '"[I did not forbid it to spoil your fun|I said it because I love you|I am only glad that you are '
        'safe]," said {elder} and [hugged {him}|held {him} close].',
        speaker="elder",
    )
    moral(
        s,
        "heed warnings",
        "[A warning is a kind of love.|Better to listen first than to be sorry later.|A promise should be kept "
        "even when nobody is looking.]",
    )


def quarrel(s: Teller) -> None:
    """Two friends, one thing, and a silence."""
    s.paragraph()
    s.say(
        "{hero} and {friend} were best friends. [Every day|Every afternoon] they met {place.at} to play with "
        "{friend}'s {colour} {thing}.",
        place="place",
        holds={"thing": "friend"},
        feeling="happy",
    )
    s.say("But [one day|one rainy day|on the last day of summer], both wanted it at the same time.", feature="twist")
    s.say('"[It is my turn|I had it first]!" [shouted|cried] {hero}.', speaker="hero", feeling="angry")
    s.say('"[It is mine|Give it back|Let go]," said {friend}, and pulled.', speaker="friend")
    s.say("[Rip|Crack|Snap]! The {thing} [broke in two|came apart].", feature="twist", feeling="shocked")
    s.say(
        '"[Now look what you did|I never want to see you again]!" said {friend}, and [walked away|went home].',
        speaker="friend",
    )
    s.paragraph()
    s.say("For {number} days they did not speak.", feeling="lonely")
    s.say("{hero} tried to play alone, but [it was no fun|{he} kept looking for {friend}].")
    sad(s)
    s.say(
        '"[Is it so important who was right|What is better, to be right or to have a friend]?" asked {elder}.',
        speaker="elder",
    )
    s.say(
        "{hero} [thought about it all night|lay awake for a long time]. In the morning {he} took [glue|string|a "
        "needle and thread] and went to {friend}'s house.",
        feeling="sorry",
    )
    s.say('"[I am sorry that I pulled|I miss you|I want to make up]," {he} said.', speaker="hero")
    s.say(
        '"[So am I|And I am sorry that I shouted]," said {friend}, and opened the door [wide|at once].',
        speaker="friend",
    )
    s.say(
        "They mended the {colour} {thing} together. It [looked a little crooked|had a scar now], but they [liked "
        "it even better|did not mind].",
        feeling="relieved",
    )
    glad(s)
    s.paragraph()
    moral(
        s,
        "make up",
        "[A friend is worth more than being right.|Sorry is a small word that mends big things.|A mended "
        "friendship is a strong one.]",
    )


def fib(s: Teller) -> None:
    """A false alarm too many."""
    day(s)
    s.say("{hero} was bored. [Watching the {animal.s} was dull|There was nobody to play with].", feeling="bored")
    s.say('"Help! A {beast}! {Place.at}!" {he} [shouted|screamed], just for fun.', speaker="hero", place="place")
    s.say(
        "{elder} came running with a broom, {adult.full}, came with a rope, and even {friend} dropped "
        "{friend.his} {thing}.",
    )
    s.say("{hero} [laughed|giggled] until {his} sides hurt.", feeling="amused")
    s.say('"[That was not funny|Shame on you|Do not do that again]," said {adult}.', speaker="adult")
    s.say("The next day {he} did it again, and again they came for nothing.", 0.7)
    s.paragraph()
    s.say(
        "But [on the third day|a week later], there was a real {beast}, with [yellow eyes|long teeth]!",
        feature="twist",
        feeling="scared",
    )
    s.say('"Help! A {beast}!" cried {hero}. [Nobody came.|This time nobody moved.]', speaker="hero")
    s.say('"[It is only {hero} again|The same old joke]," said {elder} and went on working.', speaker="elder")
    sad(s)
    s.say(
        'Only {friend} [looked up|listened]. "That sounds different," {friend.he} said, and [came|ran] with '
        "{colour.a} drum.",
        speaker="friend",
        holds={"drum": "friend"},
    )
    s.say(
        "{friend} beat the {colour} drum so loudly that the {beast} [ran away|turned around and fled].",
        feature="twist",
        feeling="relieved",
    )
    s.paragraph()
    s.say('"[Why did you believe me|Why did you come]?" asked {hero}.', speaker="hero")
    s.say(
        '"[I was not sure|I almost did not]," said {friend}. "[But a friend should look|But I heard that you '
        'were afraid]."',
        speaker="friend",
    )
    s.say("{hero} [never raised a false alarm|never cried {beast} for fun] again.", feeling="sorry")
    moral(
        s,
        "do not lie",
        "[Whoever lies for fun is not believed in need.|A lie wears out trust.|Trust is easy to lose and slow to "
        "mend.]",
    )


PLOTS = {f.__name__: f for f in (contest, surprise, newcomer, warning, quarrel, fib)}
