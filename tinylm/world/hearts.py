"""Plots about hearts: fear, kindness, pride, quarrels, surprises, wishes, and what is learned from them."""

from __future__ import annotations

from .engine import Teller
from .scenes import day, glad, moral, sad


def fear(s: Teller) -> None:
    """Something frightening has to be faced for somebody's sake."""
    s.paragraph()
    s.say("{hero} was [not afraid of many things|brave about most things], but {he} was afraid of {fear}.", feeling="afraid")
    s.say('"[Everybody is afraid of something|One day you will laugh about it], {hero}," {elder} [used to say|always said].', 0.6, speaker="elder")
    s.say("One [evening|day], {animal.a} was [in trouble|crying for help], and {hero} was the only one who [heard|knew].", feature="twist")
    s.say("But [to help|on the way], {he} had to face {his} fear: {fear.sight}.")
    s.say("{He} [wanted to run home|closed {his} eyes|could not move].")
    s.say("Then {fear.worse}, and {his} knees [shook|turned to jelly].", 0.6)
    s.paragraph()
    if s.knows("garment") and s.chance(0.5):
        s.say("{He} pulled {his} {hue} {garment} tight and [counted to {number}|thought of {elder}].", feeling="determined")
    else:
        s.say("{He} counted to {number}, [slowly and aloud|just as {elder} had taught {him}].", feeling="determined")
    s.say('"[I am afraid, but I am going|One step, and then one more]," {he} [whispered|told {himself}].', speaker="hero")
    s.say("And step by step, {he} went on, until {fear.calm}.", feeling="brave")
    s.say("The {animal} was [shaking|so glad], and {hero} [carried {animal.him} home|held {animal.him} close].", holds={"animal": "hero"})
    s.say("[It was strange|How odd]: {fear.truth}.")
    glad(s)
    s.paragraph()
    s.say('"Were you not afraid?" asked {friend} [the next day|later].', speaker="friend")
    s.say('"I was," said {hero}, "[all the time|from head to toe]. But the {animal} was more afraid than I was."', speaker="hero", feeling="proud")
    moral(s, "courage", "[To be brave is to be afraid and go on.|Courage grows one step at a time.|A brave heart may still beat fast.]")


def animal(s: Teller) -> None:
    """A hurt animal is nursed, named, and let go."""
    day(s)
    s.say("{Place.at}, {hero} heard a [faint|sad|thin] sound. It came from {animal.a} with a [hurt leg|thorn in one foot|cut on its side].", place="place", feeling="worried")  # fmt: skip
    s.say('"[Poor little thing|Oh, you poor dear]!" said {hero}. "[I will not hurt you|Let me help you]."', speaker="hero")
    s.say("The {animal} [trembled|tried to get away], but {hero} [spoke softly|waited until {animal.he} was calm].")
    s.say("{He} wrapped {animal.him} in {his} {hue} {garment} and [carried {animal.him}|took {animal.him}] home.", holds={"animal": "hero"}, feeling="caring")
    s.paragraph()
    s.say("{elder} [washed|looked at] the wound and tied a bandage around it.")
    s.say('"[{Animal.he} needs rest|Give {animal.him} time] and {food.a} now and then," said {elder}.', speaker="elder")
    s.say("{hero} named {animal.him} {newname} and made a bed of straw {spot}.")
    s.say("Every [morning|day], {friend} came to [help|see {newname}] and brought {treat.a}.", 0.5)
    s.say("After {number} days, {newname} could [walk|stand] again[, first slowly, then fast|].", feeling="happy")
    glad(s)
    s.paragraph()
    s.say("But {newname} looked [out of the window|at the door] more and more.", feature="twist", feeling="sad")
    s.say('"[{Animal.he} misses {animal.his} home|{newname} belongs out there]," said {elder} [gently|quietly].', speaker="elder")
    s.say("So {hero} carried {newname} back {place.to}, took off the bandage, and [opened {his} arms|stepped back].", holds={"animal": "nobody"})
    s.say("The {animal} looked back once and [was gone|ran off].")
    sad(s)
    s.say("[In the spring|Some weeks later], {animal.a} waited {place.at} and was not shy at all: it was {newname}!", feeling="happy", feature="twist")
    moral(s, "love lets go", "[To love somebody is also to let them go.|A kindness is never forgotten.|Wild friends are still friends.]")


def contest(s: Teller) -> None:
    """Winning is given up for something better."""
    day(s)
    s.say("It was the day of the great race {place.to} and back. The first prize was {colour.a} {thing}.", feeling="excited")
    s.say("{hero} had [practiced|trained] for {number} weeks. {rival}, who was [very fast|the fastest of all], only [laughed|yawned].")
    s.say('"[You will never beat me|I could win on one leg]," said {rival}.', speaker="rival")
    s.say("{adult.full}, [blew a whistle|waved a flag], and they were off!", place="place")
    s.say("{hero} ran past {friend} and [soon there was only {rival} ahead|left all the others behind].", feeling="hopeful")
    s.paragraph()
    s.say("[Suddenly|Right at the turn], {rival} [stumbled|slipped] and fell [with a cry|on one knee].", feature="twist")
    s.say("{hero} could see the finish. [It was so near|Nobody was in front of {him} now].", feeling="unsure")
    s.say("But {he} [stopped|turned around] and [held out {his} hand|helped {rival} up].", feeling="kind")
    s.say('"[Lean on me|Put your arm around me]," said {hero}.', speaker="hero")
    s.say('"[But you will lose!|Why do you do that?]" said {rival}.', speaker="rival")
    s.say('"[There will be other races|A race is only a race]," said {hero}.', speaker="hero")
    s.say("Together they [limped|hobbled] over the line, and {friend} came in first.", holds={"thing": "friend"})
    s.paragraph()
    s.say("{friend} looked at the {colour} {thing} [for a while|in silence]. Then {friend.he} [gave|handed] it to {hero}.", holds={"thing": "hero"}, feature="twist")
    s.say('"You are the real winner," said {friend}, and {rival} [clapped the loudest|nodded].', speaker="friend")
    glad(s)
    moral(s, "kindness before winning", "[Winning is fine, but kindness is finer.|Some win by stopping.|The kindest runner is never last.]")


def storm(s: Teller) -> None:
    """A storm, a missing creature, and a light."""
    day(s)
    s.say("But in the [evening|night], a storm came up. The wind [howled|roared] and the [sky turned black|shutters banged].", feeling="uneasy")
    s.say("{hero} sat by the fire with {elder} and [listened|watched the flames].")
    s.say('"Where is {newname}?" {he} asked suddenly. {newname} was their {animal}[, and {animal.he} was not in {animal.his} basket|].', speaker="hero", feature="twist", feeling="worried")
    s.say('"{Animal.he} must be {place.at}," said {elder}. "[I saw {animal.him} there at noon|{Animal.he} often plays there]."', speaker="elder")
    s.paragraph()
    s.say("{elder} lit a {colour} lantern, and hand in hand they [went out|stepped into the storm].", holds={"lantern": "elder"})
    s.say("They called [again and again|at the top of their voices], but the wind [carried their words away|was louder].", feeling="afraid")
    sad(s)
    s.say('"[Hold the light high|Take the lantern]," said {elder}, "and {animal.he} will see it."', speaker="elder", holds={"lantern": "hero"})
    s.say("{hero} [climbed on a stone|stood on {his} toes] and lifted the {colour} lantern with [both hands|all {his} strength].", feeling="determined", place="place")
    s.say("For a long time nothing happened. Then something moved {spot}!", feature="twist")
    s.say("It was {newname}, wet [and cold|from nose to tail]. {hero} tucked {animal.him} under {his} {hue} {garment}.", holds={"animal": "hero"}, feeling="relieved")
    s.paragraph()
    s.say("At home there was {food.a} for everyone, and {newname} [slept by the fire|would not leave {his} lap].")
    glad(s)
    s.say("From that night on, the {colour} lantern hung in the window whenever the wind [rose|blew hard].", 0.7)
    moral(s, "be a light", "[In the dark, even a small light is large.|Hold up a light for those who are out in the storm.|No storm lasts forever.]")


def surprise(s: Teller) -> None:
    """Everybody seems to have forgotten a birthday."""
    s.paragraph()
    s.say("[Tomorrow|The next day] {hero} would be {age.next} years old, but [nobody spoke of it|nobody seemed to know].", feeling="hopeful")
    s.say("In the morning, {elder} only said, \"[Eat your breakfast|Hurry up, it is late].\"", speaker="elder", feeling="disappointed")
    s.say('"[Do you want to play|Shall we play] {place.at}?" {hero} asked {friend}.', speaker="hero")
    s.say('"I have no time today," said {friend} and [ran off|hid something {colour} behind {friend.his} back].', speaker="friend", feature="twist")
    sad(s)
    s.say("{hero} [walked|wandered] {place.to} alone and threw [stones|sticks] until {he} had counted {number}.", place="place", feeling="lonely")
    s.paragraph()
    s.say("There {adult.full}, [found|met] {him}.")
    s.say('"[Why so gloomy?|What a long face!] Could you carry this [sack|box] home for me?" said {adult}.', speaker="adult", holds={"box": "hero"})
    s.say("{hero} [sighed|nodded] and carried it. It was [heavy|strangely light], and it rustled.")
    s.say("{He} [pushed open|opened] the door, and the room was [dark|quiet]. Then...")
    s.say('"Surprise!" cried {elder} and {friend}[ and {rival}|].', speaker="elder", feature="twist", feeling="surprised")
    s.say("There was {treat.a} with {age.next} candles on it, and [paper stars hung everywhere|the whole room was full of {colour} ribbons].")
    s.say('"Open what you carried," said {friend}. "It is your present from all of us!"', speaker="friend")
    s.say("Inside was {colour.a} {thing}, just what {he} had [wished for|dreamed of].", holds={"thing": "hero"}, feeling="happy")
    glad(s)
    s.paragraph()
    s.say('"So that is why you had no time," said {hero} to {friend}.', 0.6, speaker="hero")
    moral(s, "trust your friends", "[Those who love you do not forget you.|Sometimes silence is only a secret with a ribbon on it.|Friends can keep a secret, and they can keep a friend.]")


def newcomer(s: Teller) -> None:
    """Somebody new, somebody strange, somebody lonely."""
    day(s)
    s.say("[A new family moved in next door|A wagon with a new family arrived]. They had a child called {friend}.")
    s.say("{friend} [spoke with a strange accent|never said a word|wore odd clothes] and always carried {colour.a} {thing}.", holds={"thing": "friend"})
    s.say('"[What a strange child|I will not play with that one]," said {rival}, and the others [laughed|agreed].', speaker="rival")
    s.say("{friend} sat alone {place.at}, day after day.", place="place")
    s.say("{hero} [saw it|watched for a while] and remembered how it [felt|hurts] to be alone.", feeling="sorry")
    s.paragraph()
    s.say("So {hero} took {food.a} and [walked over|sat down beside {friend}].", holds={"food": "hero"}, feeling="kind")
    s.say('"[I am|Hello! My name is] {hero}. Would you like some?" {he} asked.', speaker="hero")
    s.say("{friend} [nodded shyly|looked up with big eyes] and they ate it together.", holds={"food": "both"})
    s.say('"[Why do you always carry|Where did you get] that {thing}?" asked {hero}.', speaker="hero")
    s.say('"My best friend gave it to me when we left," said {friend}. "[I miss my old home|It is all I have from home]."', speaker="friend", feature="twist")
    s.say("Then {friend} showed {him} [a game|a song|a trick] from far away, and [soon they were laughing|it was wonderful].")
    glad(s)
    s.paragraph()
    s.say("The next day, {rival} came and [asked|stammered], \"May I [play|learn it] too?\"", speaker="rival", feature="twist")
    s.say('"[The more, the merrier|Of course]!" said {friend}, and put the {colour} {thing} [into {hero}\'s hands|in the middle of the ring].', speaker="friend", holds={"thing": "hero"})
    moral(s, "welcome others", "[A stranger is a friend you have not met yet.|One kind word can open a closed door.|It takes only one to make somebody less lonely.]")


def skill(s: Teller) -> None:
    """Many failures and one success."""
    s.paragraph()
    s.say("More than anything, {hero} wanted to learn to {skill}[, because {rival} could do it|, just like {elder}|].", feeling="eager")
    s.say("{He} tried it [at once|in secret], but {he} {skill.fail}.", feeling="frustrated", feature="twist")
    s.say('"[Ha ha|Look at that]! [You will never learn it|Give up]," [said|called] {rival}.', speaker="rival")
    sad(s)
    s.say('"I [will never try again|am not good at anything]!" said {hero} and [stamped {his} foot|sat down in a corner].', speaker="hero")
    s.paragraph()
    s.say("{elder} [sat down next to {him}|put an arm around {him}].")
    s.say('"Do you know how often I failed at {skill.ing}?" asked {elder}. "{Number} [times|times a day]!"', speaker="elder")
    s.say('"[Really|You]?" {hero} [laughed|looked up].', speaker="hero", feeling="hopeful")
    s.say('"[Practice a little every day|Go slowly, and breathe]," said {elder}, "[and do not look at the others|and start again after each mistake]."', speaker="elder")
    s.say("So {hero} practiced every [morning|evening], [in sun and in rain|even when {he} was tired]. {friend} [counted the tries|cheered].", feeling="determined")
    s.say("The first week was hard, the second was [easier|not so hard].", 0.5)
    s.say("And after {number} tries, {hero} {skill.did}!", feature="twist", feeling="proud")
    glad(s)
    s.paragraph()
    s.say("Even {rival} [came closer|was amazed]. \"Can you teach me?\" {rival.he} asked.", speaker="rival")
    s.say('"Yes," said {hero}, "but you must fail {number} times first."', speaker="hero")
    moral(s, "practice", "[Nobody is born a master.|Every mistake is a small step.|Whoever tries once more has not failed.]")


def warning(s: Teller) -> None:
    """A warning is not heeded; a friend runs for help."""
    day(s)
    s.say('"[You may go out, but|Listen, {hero}:] do not {danger}," said {elder}.', speaker="elder")
    s.say('"[Why not?|I am not a baby!]" said {hero}.', speaker="hero")
    s.say('"[It is dangerous|Because it is not safe]. [Promise me|Give me your word]."', speaker="elder")
    s.say('"[All right, I promise|I promise]," said {hero}[, with crossed fingers|].', speaker="hero")
    s.say("{hero} and {friend} [played|ran about] {place.at} with {his} {thing}[ for a while|].", place="place", holds={"thing": "hero"}, feeling="happy")
    s.paragraph()
    s.say("But {danger.the} was so [tempting|interesting].", feeling="curious")
    s.say('"{elder} said no," [warned|said] {friend}.', speaker="friend")
    s.say('"[Only for a minute|Nobody will know]," said {hero}, and {he} {danger.did}.', speaker="hero")
    s.say("[At once|In that moment], {danger.harm}!", feature="twist", feeling="scared")
    s.say('"Help!" [screamed|cried] {hero}.', speaker="hero")
    s.say("{friend} ran as fast as [{friend.he} could|the wind] and [fetched|brought] {adult.full}.")
    s.say("[It took a long time|With strong hands and kind words], but {adult} [made everything safe|put things right] again.", feeling="relieved")
    sad(s)
    s.paragraph()
    s.say('"I did not keep my promise. I am sorry," {hero} told {elder} [that evening|at home].', speaker="hero", feeling="sorry")
    s.say('"I did not forbid it to spoil your fun," said {elder} and [hugged {him}|held {him} close].', speaker="elder")
    moral(s, "heed warnings", "[A warning is a kind of love.|Better to listen first than to be sorry later.|A promise should be kept even when nobody is looking.]")


def quarrel(s: Teller) -> None:
    """Two friends, one thing, and a silence."""
    s.paragraph()
    s.say("{hero} and {friend} were best friends. [Every day|Every afternoon] they met {place.at} to play with {friend}'s {colour} {thing}.", place="place", holds={"thing": "friend"}, feeling="happy")
    s.say("But one day, both wanted it at the same time.", feature="twist")
    s.say('"[It is my turn|I had it first]!" [shouted|cried] {hero}.', speaker="hero", feeling="angry")
    s.say('"It is mine," said {friend}, and pulled.', speaker="friend")
    s.say("[Rip|Crack|Snap]! The {thing} [broke in two|came apart].", feature="twist", feeling="shocked")
    s.say('"[Now look what you did|I never want to see you again]!" said {friend}, and [walked away|went home].', speaker="friend")
    s.paragraph()
    s.say("For {number} days they did not speak.", feeling="lonely")
    s.say("{hero} tried to play alone, but [it was no fun|{he} kept looking for {friend}].")
    sad(s)
    s.say('"[Is it so important who was right|What is better, to be right or to have a friend]?" asked {elder}.', speaker="elder")
    s.say("{hero} thought about it all night. In the morning {he} took [glue|string|a needle and thread] and went to {friend}'s house.", feeling="sorry")
    s.say('"I am sorry that I pulled," {he} said.', speaker="hero")
    s.say('"[So am I|And I am sorry that I shouted]," said {friend}, and opened the door [wide|at once].', speaker="friend")
    s.say("They mended the {colour} {thing} together. It [looked a little crooked|had a scar now], but they [liked it even better|did not mind].", feeling="relieved")
    glad(s)
    s.paragraph()
    moral(s, "make up", "[A friend is worth more than being right.|Sorry is a small word that mends big things.|A mended friendship is a strong one.]")


def wish(s: Teller) -> None:
    """A wish is granted, and taken back."""
    day(s)
    s.say("{Place.at}, {hero} [freed|helped] {animal.a} that was caught [in a net|under a branch].", place="place", feeling="kind")
    s.say('"You may make a wish," said the {animal}. [Yes, {animal.he} could speak!|It was a magic {animal}!]', speaker="animal", feature="twist", feeling="surprised")
    s.say('"I wish {wish}!" said {hero} [at once|without thinking].', speaker="hero", feeling="excited")
    s.say('"[So be it|As you like]," said the {animal}[, and winked|].', speaker="animal")
    s.say("[There was a puff of {colour} smoke|A cloud of {colour} smoke rose], and {hero} {wish.came}.", feeling="happy")
    s.say("[At first|For {number} hours], it was [wonderful|the best thing in the world].")
    s.paragraph()
    s.say("But {wish.but}.", feature="twist", feeling="sad")
    s.say("{He} [saw|thought of] {friend}, who was {pastime} [as always|without {him}].")
    sad(s)
    s.say("{hero} [went|hurried] back {place.to} and called for the {animal}.")
    s.say('"[Please, m|M]ay I have one more wish?" {he} asked. "I only want to {wish.back}."', speaker="hero", feeling="sorry")
    s.say('"[That is the wisest wish|Most people ask for that]," said the {animal}, and [nodded|blew softly].', speaker="animal")
    s.say("[There was {colour} smoke|The {colour} smoke rose] once more, and everything was [as before|as it should be].", feeling="relieved")
    s.say("{friend} [waved|came running]. \"Where have you been?\"", speaker="friend")
    glad(s)
    s.paragraph()
    moral(s, "be content", "[Be careful what you wish for.|Sometimes we wish for what we already have.|The best wish is to be yourself.]")


def fib(s: Teller) -> None:
    """A false alarm too many."""
    day(s)
    s.say("{hero} was bored. [Watching the {animal.s} was dull|There was nobody to play with].", feeling="bored")
    s.say('"Help! A {beast}! {Place.at}!" {he} [shouted|screamed], just for fun.', speaker="hero", place="place")
    s.say("{elder} came running with a broom, {adult.full}, came with a rope, and even {friend} dropped {friend.his} {thing}.")
    s.say("{hero} [laughed|giggled] until {his} sides hurt.", feeling="amused")
    s.say('"That was not funny," said {adult}.', speaker="adult")
    s.say("The next day {he} did it again, and again they came for nothing.", 0.7)
    s.paragraph()
    s.say("But [on the third day|a week later], there was a real {beast}, with [yellow eyes|long teeth]!", feature="twist", feeling="scared")
    s.say('"Help! A {beast}!" cried {hero}. [Nobody came.|This time nobody moved.]', speaker="hero")
    s.say('"[It is only {hero} again|The same old joke]," said {elder} and went on working.', speaker="elder")
    sad(s)
    s.say("Only {friend} [looked up|listened]. \"That sounds different,\" {friend.he} said, and [came|ran] with {colour.a} drum.", speaker="friend", holds={"drum": "friend"})
    s.say("{friend} beat the {colour} drum so loudly that the {beast} [ran away|turned around and fled].", feature="twist", feeling="relieved")
    s.paragraph()
    s.say('"Why did you believe me?" asked {hero}.', speaker="hero")
    s.say('"[I was not sure|I almost did not]," said {friend}. "[But a friend should look|But I heard that you were afraid]."', speaker="friend")
    s.say("{hero} [never raised a false alarm|never cried {beast} for fun] again.", feeling="sorry")
    moral(s, "do not lie", "[Whoever lies for fun is not believed in need.|A lie wears out trust.|Trust is easy to lose and slow to mend.]")


PLOTS = {f.__name__: f for f in (fear, animal, contest, storm, surprise, newcomer, skill, warning, quarrel, wish, fib)}
