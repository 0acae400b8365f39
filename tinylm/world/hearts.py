"""Plots about one's own heart: fear, kindness, failure, a wish, a storm, a stage, a sleepless night."""

from __future__ import annotations

from .engine import Teller
from .scenes import day, glad, moral, sad, way


def fear(s: Teller) -> None:
    """Something frightening has to be faced for somebody's sake."""
    s.paragraph()
    s.say(
        "{hero} was [not afraid of many things|brave about most things], but {he} was afraid of {fear}.",
        feeling="afraid",
    )
    s.say(
        '"[Everybody is afraid of something|One day you will laugh about it], {hero}," {elder} [used to '
        "say|always said].",
        0.6,
        speaker="elder",
    )
    s.say(
        "One [evening|day], {animal.a} was [in trouble|crying for help], and {hero} was the only one who [heard|knew].",
        feature="twist",
    )
    s.say("But [to help|on the way], {he} had to face {his} fear: {fear.sight}.")
    s.say("{He} [wanted to run home|closed {his} eyes|could not move].")
    s.say("Then {fear.worse}, and {his} knees [shook|turned to jelly].", 0.6)
    s.paragraph()
    if s.knows("garment") and s.chance(0.5):
        s.say(
            "{He} pulled {his} {hue} {garment} tight and [counted to {number}|thought of {elder}].",
            feeling="determined",
        )
    else:
        s.say("{He} counted to {number}, [slowly and aloud|just as {elder} had taught {him}].", feeling="determined")
    s.say(
        '"[I am afraid, but I am going|One step, and then one more]," {he} [whispered|told {himself}].', speaker="hero"
    )
    s.say("And step by step, {he} went on, until {fear.calm}.", feeling="brave")
    s.say(
        "The {animal} was [shaking|so glad], and {hero} [carried {animal.him} home|held {animal.him} close].",
        holds={"animal": "hero"},
    )
    s.say("[It was strange|How odd]: {fear.truth}.")
    glad(s)
    s.paragraph()
    s.say('"Were you not afraid?" asked {friend} [the next day|later].', speaker="friend")
    s.say(
        '"[I was|Very much|Of course]," said {hero}, "[all the time|from head to toe]. But the {animal} was '
        'more afraid than I was."',
        speaker="hero",
        feeling="proud",
    )
    moral(
        s,
        "courage",
        "[To be brave is to be afraid and go on.|Courage grows one step at a time.|A brave heart may still beat fast.]",
    )


def animal(s: Teller) -> None:
    """A hurt animal is nursed, named, and let go."""
    day(s)
    s.say(
        "{Place.at}, {hero} heard a [faint|sad|thin] sound. It came from {animal.a} with a [hurt leg|thorn in "
        "one foot|cut on {animal.his} side].",
        place="place",
        feeling="worried",
    )
    s.say(
        '"[Poor little thing|Oh, you poor dear]!" said {hero}. "[I will not hurt you|Let me help you]."', speaker="hero"
    )
    s.say("The {animal} [trembled|tried to get away], but {hero} [spoke softly|waited until {animal.he} was calm].")
    s.say(
        "{He} [wrapped|bundled] {animal.him} in {his} {hue} {garment} and [carried {animal.him}|took "
        "{animal.him}] home.",
        holds={"animal": "hero"},
        feeling="caring",
    )
    s.paragraph()
    s.say("{elder} [washed|looked at|cleaned] the wound and [tied a bandage around it|put a clean cloth on it].")
    s.say('"[{Animal.he} needs rest|Give {animal.him} time] and {food.a} now and then," said {elder}.', speaker="elder")
    s.say("{hero} named {animal.him} {newname} and made a bed of straw {spot}.")
    s.say("Every [morning|day], {friend} came to [help|see {newname}] and brought {treat.a}.", 0.5)
    s.say("After {number} days, {newname} could [walk|stand] again[, first slowly, then fast|].", feeling="happy")
    glad(s)
    s.paragraph()
    s.say("But {newname} looked [out of the window|at the door] more and more.", feature="twist", feeling="sad")
    s.say(
        '"[{Animal.he} misses {animal.his} home|{newname} belongs out there]," said {elder} [gently|quietly].',
        speaker="elder",
    )
    s.say(
        "So {hero} carried {newname} back {place.to} and [opened {his} arms|stepped back].", holds={"animal": "nobody"}
    )
    s.say("The {animal} looked back once and [was gone|ran off].")
    sad(s)
    s.say(
        "[In the spring|Some weeks later], {animal.a} waited {place.at} and was not shy at all: it was {newname}!",
        feeling="happy",
        feature="twist",
    )
    moral(
        s,
        "love lets go",
        "[To love somebody is also to let them go.|A kindness is never forgotten.|Wild friends are still friends.]",
    )


def skill(s: Teller) -> None:
    """Many failures and one success."""
    s.paragraph()
    s.say(
        "More than anything, {hero} wanted to learn to {skill}[, because {rival} could do it|, just like {elder}|].",
        feeling="eager",
    )
    s.say("{He} tried it [at once|in secret], but {he} {skill.fail}.", feeling="frustrated", feature="twist")
    s.say('"[Ha ha|Look at that]! [You will never learn it|Give up]," [said|called] {rival}.', speaker="rival")
    sad(s)
    s.say(
        '"I [will never try again|am not good at anything]!" said {hero} and [stamped {his} foot|sat down in a '
        "corner].",
        speaker="hero",
    )
    s.paragraph()
    s.say("{elder} [sat down next to {him}|put an arm around {him}].")
    s.say(
        '"Do you know how often I failed at {skill.ing}?" asked {elder}. "{Number} [times|times a day]!"',
        speaker="elder",
    )
    s.say('"[Really|You]?" {hero} [laughed|looked up].', speaker="hero", feeling="hopeful")
    s.say(
        '"[Practice a little every day|Go slowly, and breathe]," said {elder}, "[and do not look at the '
        'others|and start again after each mistake]."',
        speaker="elder",
    )
    s.say(
        "So {hero} practiced every [morning|evening], [in sun and in rain|even when {he} was tired]. {friend} "
        "[counted the tries|cheered].",
        feeling="determined",
    )
    s.say("The first [week|day] was hard, the second was [easier|not so hard].", 0.5)
    s.say("And after {number} tries, {hero} {skill.did}!", feature="twist", feeling="proud")
    glad(s)
    s.paragraph()
    s.say(
        'Even {rival} [came closer|was amazed]. "[Can you teach me|How did you do it|Will you show me]?" '
        "{rival.he} asked.",
        speaker="rival",
    )
    s.say('"[Yes|Of course|Come here]," said {hero}, "but you must fail {number} times first."', speaker="hero")
    moral(
        s,
        "practice",
        "[Nobody is born a master.|Every mistake is a small step.|Whoever tries once more has not failed.]",
    )


def wish(s: Teller) -> None:
    """A wish is granted, and taken back."""
    day(s)
    s.say(
        "{Place.at}, {hero} [freed|helped] {animal.a} that was caught [in a net|under a branch].",
        place="place",
        feeling="kind",
    )
    s.say(
        '"[You may make a wish|Thank you! One wish is yours|For that I grant you one wish]," said the '
        "{animal}. [Yes, {animal.he} could speak!|It was a magic {animal}!]",
        speaker="animal",
        feature="twist",
        feeling="surprised",
    )
    s.say('"I wish {wish}!" said {hero} [at once|without thinking].', speaker="hero", feeling="excited")
    s.say('"[So be it|As you like]," said the {animal}[, and winked|].', speaker="animal")
    s.say(
        "[There was a puff of {colour} smoke|A cloud of {colour} smoke rose], and {hero} {wish.came}.", feeling="happy"
    )
    s.say("[At first|For {number} hours], it was [wonderful|the best thing in the world].")
    s.paragraph()
    s.say("But {wish.but}.", feature="twist", feeling="sad")
    s.say("{He} [saw|thought of] {friend}, who was {pastime} [as always|without {him}].")
    sad(s)
    way(s)
    s.say("{hero} [went|hurried] back {place.to} and called for the {animal}.")
    s.say(
        '"[Please, m|M]ay I have one more wish?" {he} asked. "I only want to {wish.back}."',
        speaker="hero",
        feeling="sorry",
    )
    s.say(
        '"[That is the wisest wish|Most people ask for that]," said the {animal}, and [nodded|blew softly].',
        speaker="animal",
    )
    s.say(
        "[There was {colour} smoke|The {colour} smoke rose] once more, and everything was [as before|as it should be].",
        feeling="relieved",
    )
    s.say(
        '{friend} [waved|came running]. "[Where have you been|There you are! Shall we play|I was looking for '
        'you, where were you]?"',
        speaker="friend",
    )
    glad(s)
    s.paragraph()
    moral(
        s,
        "be content",
        "[Be careful what you wish for.|Sometimes we wish for what we already have.|The best wish is to be yourself.]",
    )


def storm(s: Teller) -> None:
    """A storm, a missing creature, and a light."""
    day(s)
    s.say(
        "But in the [evening|night], a storm came up. The wind [howled|roared] and the [sky turned "
        "black|shutters banged].",
        feeling="uneasy",
    )
    s.say("{hero} sat by the fire with {elder} and [listened|watched the flames].")
    s.say(
        '"Where is {petname}?" {he} asked suddenly. {petname} the {pet} was not [in {pet.his} basket|on '
        "{pet.his} blanket|under the table].",
        speaker="hero",
        feature="twist",
        feeling="worried",
    )
    s.say(
        '"{Pet.he} must be {place.at}," said {elder}. "[I saw {pet.him} there at noon|{Pet.he} often plays there]."',
        speaker="elder",
    )
    s.paragraph()
    s.say(
        "{elder} lit {colour.a} lantern, and hand in hand they [went out|stepped into the storm].",
        holds={"lantern": "elder"},
    )
    s.say(
        "They called {petname} [again and again|at the top of their voices|until they were hoarse], but the wind "
        "[carried their words away|was louder].",
        feeling="afraid",
    )
    sad(s)
    s.say(
        '"[Hold the light high|Take the lantern]," said {elder}, "and {pet.he} will see it."',
        speaker="elder",
        holds={"lantern": "hero"},
    )
    s.say(
        "{hero} [climbed on a stone|stood on {his} toes] and lifted the {colour} lantern with [both hands|all "
        "{his} strength].",
        feeling="determined",
        place="place",
    )
    s.say(
        "[For a long time nothing happened|They waited and waited|First they heard only the wind]. Then "
        "something moved {spot}!",
        feature="twist",
    )
    s.say(
        "It was {petname}, wet [and cold|from head to tail]. {hero} tucked {pet.him} under {his} {hue} {garment}.",
        holds={"pet": "hero"},
        feeling="relieved",
    )
    s.paragraph()
    s.say("At home there was {food.a} for everyone, and {petname} [slept by the fire|would not leave {his} lap].")
    glad(s)
    s.say("From that night on, the {colour} lantern hung in the window whenever the wind [rose|blew hard].", 0.7)
    moral(
        s,
        "be a light",
        "[In the dark, even a small light is large.|Hold up a light for those who are out in the storm.|No storm "
        "lasts forever.]",
    )


def stage(s: Teller) -> None:
    """Words are forgotten before everybody."""
    s.paragraph()
    s.say(
        "In {number} days there would be a play {place.at}, and {hero} was to be the [moon|king of mice|wise "
        "owl|north wind].",
        feeling="nervous",
    )
    s.say(
        "{friend} had [sewn|made] {him} {colour.a} costume, and {rival} would [beat the drum|play the fiddle].",
        holds={"costume": "hero"},
    )
    s.say("Every evening {he} practiced with {elder}, until {he} knew each [line|word] by heart.")
    s.say('"[What if I forget everything|What if they laugh at me]?" asked {hero}.', speaker="hero", feeling="afraid")
    s.say(
        '"Then [take a breath and look at me|begin again]," said {elder}. "I will sit in the [first|second] row."',
        speaker="elder",
    )
    s.paragraph()
    s.say(
        "The great evening came. {adult.full}, [pulled up the curtain|lit the lamps], and it grew quiet.", place="place"
    )
    s.say(
        "{hero} stepped out in {his} {colour} costume, [opened {his} mouth|looked at all the faces], and every "
        "word was gone.",
        feature="twist",
        feeling="scared",
    )
    s.say("Somebody [coughed|giggled]. {rival} stopped playing.")
    sad(s)
    s.say("Then {he} [saw|found] {elder}, who [nodded|put a hand on {elder.his} heart].", feeling="hopeful")
    s.say(
        '"[I have forgotten my words|My words have flown away]," said {hero} aloud, "[so I will tell you a '
        'story instead|so let us call them back together]!"',
        speaker="hero",
        feature="twist",
    )
    s.say(
        "Everyone laughed, but it was a [warm|friendly] laugh, and [one by one|little by little] the words came back.",
        feeling="brave",
    )
    s.say("At the end they clapped so [long|loudly] that {hero} had to bow {number} times.", feeling="proud")
    glad(s)
    s.paragraph()
    s.say(
        '"[I liked the part|The best part was] where you forgot," said {friend}. "[It was so real|I felt it too]."',
        0.7,
        speaker="friend",
    )
    moral(
        s,
        "mistakes may be seen",
        "[A mistake is only a pause in the play.|Whoever can laugh about a mistake has already mended it.|Nobody "
        "has to be perfect to be loved.]",
    )


def sleepless(s: Teller) -> None:
    """One who cannot sleep finds out who else is awake."""
    s.paragraph()
    s.say(
        "One [night|warm night|cold night], {hero} could not sleep. [The bed was too hot|The clock ticked too "
        "loudly|The moon was too bright].",
        feeling="restless",
    )
    s.say("{He} counted to {number} [hundred|hundred and back again], and {he} was still wide awake.")
    s.say("{He} [put on|slipped into] {his} {hue} {garment} and tiptoed to {elder}.")
    s.say('"I cannot sleep," {he} [whispered|said].', speaker="hero")
    s.say(
        '"Then let us see who is awake as well," said {elder}, and took {colour.a} lamp.',
        speaker="elder",
        holds={"lamp": "elder"},
        feeling="curious",
    )
    s.paragraph()
    s.say("They [walked|went] {place.to}. There {animal.a} was looking for food.", place="place")
    s.say('"[{Animal.he} sleeps all day|{Animal.he} is hungry]," {elder} [whispered|explained].', speaker="elder")
    s.say("A light was on at one window, and behind it sat {adult.full}.")
    s.say(
        '"[I am baking for the morning|I am writing to my son|I am mending a coat]," {adult} called.',
        speaker="adult",
        feature="twist",
    )
    s.say(
        "[High above|Over the roofs] a shooting star fell, and {hero} made a wish[, but {he} told nobody what it "
        "was|].",
        feeling="amazed",
    )
    s.say(
        "On the way back {he} held the {colour} lamp, and {his} steps became slower and slower.",
        holds={"lamp": "hero"},
        feeling="tired",
    )
    s.say(
        '"[So many are awake|The night is never empty]," {he} [mumbled|yawned]. "[Then I can rest|They will '
        'watch over us]."',
        speaker="hero",
        feeling="calm",
    )
    s.say(
        "{elder} carried {him} the last few steps, and before the lamp was out, {he} was [asleep|dreaming].",
        holds={"lamp": "elder"},
    )
    s.paragraph()
    s.say("In the morning, {friend} asked why {he} was [so tired|yawning so much].")
    s.say(
        '"I [met the night|visited the night]," said {hero}, "and it had {colour.a} lamp."',
        speaker="hero",
        feeling="proud",
    )
    moral(
        s,
        "the night is a friend",
        "[Whoever knows the night need not fear it.|Sleep comes when we stop chasing it.|Even at night, nobody "
        "is alone.]",
    )


PLOTS = {f.__name__: f for f in (fear, animal, skill, wish, storm, stage, sleepless)}
