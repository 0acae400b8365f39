"""The words of the story world: who lives there, what they own, and eight topics with their places and things.

Tables are text: entries separated by ";", the fields of an entry by ":". `Word`s are made from them once, at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .engine import Dist, Word


def article(noun: str) -> str:
    """A noun phrase with "a" or "an" before it."""
    silent = ("hour", "honest", "heir")
    return ("an " if noun[0] in "aeiou" or noun.startswith(silent) else "a ") + noun


def plural(noun: str) -> str:
    """The regular plural of a noun (irregular ones are given in the tables)."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def split(table: str) -> list[list[str]]:
    """The entries of a table, each a list of its fields."""
    return [[field.strip() for field in entry.split(":")] for entry in table.split(";") if entry.strip()]


def nouns(table: str) -> list[Word]:
    """`name` or `name:plural`, with forms "", a, the, s."""
    return [
        Word({"": e[0], "a": article(e[0]), "the": f"the {e[0]}", "s": e[1] if len(e) > 1 else plural(e[0])})
        for e in split(table)
    ]


def adjectives(table: str) -> list[Word]:
    """`word`, with forms "" and a ("a red", "an orange")."""
    return [Word({"": e[0], "a": article(e[0])}) for e in split(table)]


PRONOUNS = {
    "f": {"he": "she", "him": "her", "his": "her", "himself": "herself", "child": "girl"},
    "m": {"he": "he", "him": "him", "his": "his", "himself": "himself", "child": "boy"},
}


def people(table: str, sex: str, **forms: Any) -> list[Word]:
    """Names of one sex, with pronouns."""
    return [Word({"": e[0], **PRONOUNS[sex], **forms}) for e in split(table)]


def phrases(table: str, *forms: str) -> Dist:
    """Entries whose fields are the given forms, in order."""
    return Dist([Word(zip(forms, entry, strict=True)) for entry in split(table)])


GIRLS_TABLE = """Lily;Mia;Anna;Rosa;Nora;Ella;Ivy;Clara;Zoe;Hana;Lucy;Maya;Tess;
Ruby;Greta;Olive;Sara;Emma;Wanda;June;Pia;
Alma;Dora;Fern;Leila;Nina;Edith;Bella;Yuki;Kate;Molly;Ada;Holly;Vera;Lena;Amara"""
BOYS_TABLE = """Tom;Ben;Max;Leo;Sam;Finn;Hugo;Oscar;Jack;Theo;Milo;Noah;Omar;Peter;Felix;Emil;Anton;Ravi;Kofi;Luke;Otto;
Ned;Jonas;Carl;Dan;Eric;Gus;Henry;Ivan;Jasper;Louis;Mark;Paul;Simon;Toby;Will"""
_girls, _boys = people(GIRLS_TABLE, "f"), people(BOYS_TABLE, "m")
NAMES = Dist(_girls + _boys)
GIRLS = NAMES.without(tuple(range(len(_girls), NAMES.n)))
BOYS = NAMES.without(tuple(range(len(_girls))))

FAMILY = Dist(
    [
        Word({"": name, "kin": kin, **PRONOUNS[sex]})
        for name, kin, sex in split(
            """Mother:mother:f;Father:father:m;Grandma:grandmother:f;Grandpa:grandfather:m;
            Aunt Bess:aunt:f;Uncle Joe:uncle:m"""
        )
    ]
)

PETS = Dist(
    [
        Word({"": kind, "a": article(kind), "the": f"the {kind}", "glad": glad, "worried": worried, **PRONOUNS[sex]})
        for kind, sex, glad, worried in split(
            """brown dog:m:wagged his tail:whined softly;
            black puppy:m:barked and jumped:put his tail between his legs;
            gray cat:f:purred:flicked her tail;
            white kitten:f:rolled on her back:mewed;
            spotted rabbit:m:wiggled his nose:laid back his ears;
            green parrot:f:whistled a tune:ruffled her feathers;
            fat hen:f:clucked:ran in circles;
            small goat:m:danced about:stamped his feet;
            tame duck:f:quacked:tucked in her head"""
        )
    ]
)
PET_NAMES = Dist(
    [
        Word({"": e[0]})
        for e in split(
            """Biscuit;Pepper;Button;Socks;Muffin;Ginger;Pickle;Dusty;Snowball;Patch;Cookie;Bramble;Nutmeg;Tumble;
            Marble;Waffle;Clover;Pebble;Mango;Toffee;Acorn;Whisper;Bubbles;Sparky"""
        )
    ]
)

COLOURS = Dist(adjectives("red;blue;green;yellow;orange;purple;white;silver;pink;golden;brown;gray"))
GARMENTS = Dist(nouns("scarf:scarves;cap;hat;coat;jacket;sweater;shirt;hood"))
AGES = phrases("four:five;five:six;six:seven;seven:eight;eight:nine;nine:ten", "", "next")
NUMBERS = phrases("two;three;four;five;six;seven;eight;nine;ten;twelve", "")
TRAITS = Dist(
    adjectives(
        "curious;cheerful;clever;gentle;quiet;stubborn;patient;careful;lively;dreamy;friendly;polite;funny;helpful"
    )
)

TOYS = nouns(
    """ball;kite;drum;whistle;doll;top;wooden horse;wagon;hoop;puppet;flute;music box;teddy bear;toy train;picture book;
    paper boat;marble;jump rope;magnet;spyglass;pocket mirror;bell;paintbrush;yo-yo;puzzle;lantern;compass"""
)
FOODS = nouns(
    "cake;apple;plum pie;pancake;sandwich:sandwiches;muffin;honey bun;pear;cookie;gingerbread man:gingerbread men"
)
TREATS = Dist(nouns("lemon cake;apple pie;cherry tart;nut cake;plum cake;carrot cake;berry pie;honey cake"))

FEARS = phrases(
    """the dark:the attic was as black as ink:the little lamp went out:a warm light came on:
      the dark was only the day asleep;
    thunder:the sky growled like a bear:a great clap shook the window:the last rumble rolled away:
      thunder was only the clouds talking;
    deep water:the water looked cold and green:a big wave splashed up:the waves grew calm:
      the water could carry a child;
    high places:the ladder looked as tall as a tower:the ladder gave a wobble:
      the ladder stood still:the view from the top was lovely;
    spiders:a long web hung across the door:a fat spider ran down its thread:
      the spider went back to its corner:a spider was only a busy little weaver;
    big dogs:a large dog sat by the gate:the dog gave a deep bark:the dog lay down:the dog only wanted a friend;
    strangers:a tall stranger stood at the door:the stranger spoke in a loud voice:
      the stranger smiled:a stranger could have kind eyes""",
    "",
    "sight",
    "worse",
    "calm",
    "truth",
)

SKILLS = Dist(
    [
        Word({"": base, "ing": gerund, "did": past, "fail": fail})
        for base, gerund, past, fail in split(
            """ride a bicycle:riding a bicycle:rode down the whole lane:fell into a bush;
            swim:swimming:swam ten strokes without help:swallowed a lot of water;
            play the fiddle:playing the fiddle:played a merry song:made the cat run away;
            juggle:juggling:kept three balls in the air:dropped a ball on one toe;
            bake bread:baking bread:baked a round brown loaf:burned the crust black;
            skip stones:skipping stones:made a stone skip six times:watched each stone sink;
            whistle:whistling:whistled like a blackbird:blew only air;
            tie a knot:tying knots:tied a knot as strong as a sailor's:pulled and saw the rope fall apart;
            climb a rope:climbing ropes:climbed right up to the beam:slid down with hot hands;
            read:reading:read a whole page aloud:mixed up all the letters;
            draw a horse:drawing horses:drew a horse that seemed to gallop:drew something like a potato with legs;
            sew:sewing:sewed a neat little bag:pricked a thumb with the needle"""
        )
    ]
)

WISHES = phrases(
    """to fly like a bird:flew up over the roofs:the wind was icy and nobody up there could play:land;
    to be as tall as a tree:grew until the clouds were near:
      no door was big enough and no bed was long enough:be small again;
    to be invisible:faded away like smoke:nobody answered and nobody looked around:be seen again;
    to talk with animals:heard every mouse and sparrow speak:
      they all talked at once and never stopped:have a little silence;
    to eat sweets all day:found sweets in every pocket and every shoe:
      soon the sweets tasted of nothing:eat plain soup again;
    to be a grown-up:woke up with long legs and a deep voice:
      there was only work and no time to play:be a child again""",
    "",
    "came",
    "but",
    "back",
)


@dataclass(frozen=True)
class Topic:
    """One corner of the world. Its cast joins every story that is set there."""

    name: str
    cast: dict[str, Dist]


def _topic(name: str, homes: str, places: str, spots: str, toys: str, animals: str, foods: str, adults: str,
           pastimes: str, sights: str, dangers: str) -> Topic:  # fmt: skip
    spoken = []
    for place, prep in split(places):
        spoken.append(Word({"": place, "the": f"the {place}", "at": f"{prep} the {place}", "to": f"to the {place}"}))
    creatures = [Word({**word, **PRONOUNS["fm"[i % 2]]}) for i, word in enumerate(nouns(animals))]
    grown = [
        Word({"": n, "full": f"{n}, the {role}", "role": f"the {role}", **PRONOUNS[s]}) for n, role, s in split(adults)
    ]
    things = Dist(TOYS + nouns(toys))
    where = Dist(spoken)
    return Topic(
        name,
        {
            "home": phrases(homes, ""),
            "place": where,
            "place2": where,
            "spot": phrases(spots, ""),
            "thing": things,
            "thing2": things,
            "animal": Dist(creatures),
            "food": Dist(FOODS + nouns(foods)),
            "adult": Dist(grown),
            "pastime": phrases(pastimes, ""),
            "sight": phrases(sights, ""),
            "danger": phrases(dangers, "", "the", "did", "harm"),
        },
    )


TOPICS = {
    topic.name: topic
    for topic in (
        _topic(
            "farm",
            "on a farm;on a small farm with a red barn;in a farmhouse among the wheat fields;"
            "on a dairy farm at the end of the road",
            "barn:in;orchard:in;duck pond:at;hay loft:in;cow shed:in;corn field:in;hen house:in",
            "under the hay;behind the milk cans;inside an old boot;beside the horse trough;under the tractor;"
            "in an empty egg basket",
            "straw doll;cow bell;horseshoe;milk bucket",
            "lamb;calf:calves;duckling;piglet;foal;chick",
            "boiled egg;cheese roll;ear of corn:ears of corn;jug of milk:jugs of milk",
            "Mr. Brown:farmer:m;Mrs. Hill:dairy maid:f;Mr. Fenn:shepherd:m;Mrs. Oates:miller:f",
            "feeding the hens;riding on the hay cart;picking apples;brushing the ponies;chasing the geese",
            "the hay smelled sweet;the rooster crowed on the fence;the cows walked slowly to the field;"
            "bees hummed in the clover",
            "climb on the old hay cart:the old hay cart:climbed onto the old hay cart:a board broke with a crack;"
            "go near the angry goose:the angry goose:crept up to the angry goose:the goose hissed and bit hard;"
            "open the gate of the pig pen:the gate of the pig pen:opened the gate of the pig pen:nine pigs ran out",
        ),
        _topic(
            "sea",
            "in a fishing village by the sea;in a white house above the beach;beside a lighthouse;"
            "on a houseboat in the harbor",
            "beach:on;harbor:in;lighthouse:at;pier:on;rock pool:at;sand dunes:in;boat house:in",
            "under a fishing net;behind a lobster pot;inside a big shell;beneath an upturned boat;"
            "between two wet rocks;in a coil of rope",
            "shell necklace;toy sailboat;sand bucket;little anchor",
            "seal pup;gull chick;turtle;puffin;otter pup;sandpiper",
            "fish cake;bowl of clam soup:bowls of clam soup;salty pretzel;coconut",
            "Captain Reed:ferry captain:m;Mrs. Shore:lighthouse keeper:f;Mr. Finley:fisherman:m;Mrs. Gill:net maker:f",
            "collecting shells;building sand castles;watching the ships;racing the waves;digging for clams",
            "the waves whispered on the sand;gulls cried above the masts;the air tasted of salt;"
            "far away a ship blew its horn",
            "walk on the slippery rocks:the slippery rocks:walked out on the slippery rocks:a big wave rushed in;"
            "untie the little boat:the little boat:untied the little boat:the tide pulled the boat away from the shore;"
            "poke the big crab:the big crab:poked the big crab with a stick:the crab snapped its claw shut",
        ),
        _topic(
            "forest",
            "in a cottage at the edge of the forest;in a log cabin under the pines;"
            "in a tree house deep in the woods;near an old oak forest",
            "clearing:in;hollow oak:at;fern valley:in;mossy bridge:on;berry patch:in;fox hill:on;pine grove:in",
            "under a pile of leaves;inside a hollow log;behind a tall fern;between the roots of a tree;"
            "under a flat stone;in an empty nest",
            "wooden owl;acorn necklace;little bow;walking stick",
            "fawn;squirrel;baby owl;hedgehog;fox cub;badger",
            "bowl of blackberries:bowls of blackberries;mushroom pie;roasted chestnut;jar of honey:jars of honey",
            "Mr. Woods:forester:m;Mrs. Moss:herb woman:f;Mr. Birch:woodcutter:m;Mrs. Wren:bird watcher:f",
            "climbing trees;listening to the owls;picking berries;looking for mushrooms;following deer tracks",
            "sunlight fell through the leaves;a woodpecker knocked on a trunk;the moss was soft and wet;"
            "the pines smelled fresh",
            "leave the forest path:the forest path:left the forest path:soon every tree looked the same;"
            "touch the wasp nest:the wasp nest:touched the wasp nest with a twig:a cloud of wasps buzzed out;"
            "eat the shiny red berries:the shiny red berries:ate three of the shiny red berries:a bad tummy ache began",
        ),
        _topic(
            "town",
            "in a busy town;in a tall brick house in the city;above a bakery in the middle of town;"
            "on a narrow street full of shops",
            "park:in;library:in;bakery:at;train station:at;market square:in;museum:in;school yard:in",
            "under a park bench;behind a flower pot;inside a mail box;under the stairs;between two books;"
            "behind the bakery door",
            "toy bus;library card;roller skate;tin robot",
            "stray dog;pigeon;alley cat;lost puppy:lost puppies;sparrow;mouse:mice",
            "jam roll;slice of pizza:slices of pizza;cinnamon bun;cup of cocoa:cups of cocoa",
            "Mr. Baker:bread seller:m;Mrs. Page:librarian:f;Officer Stone:policeman:m;Mrs. Lane:bus driver:f",
            "counting the buses;reading in the library;drawing with chalk;feeding the pigeons;looking in shop windows",
            "a tram rang its bell;the smell of fresh bread filled the street;people hurried by with bags;"
            "the clock tower struck the hour",
            "run across the busy street:the busy street:ran across the busy street:a bicycle stopped with a screech;"
            "press the red button:the red button:pressed the red button:a loud alarm began to ring;"
            "play ball near the shop window:the shop window:kicked a ball near the shop window:the glass broke to bits",
        ),
        _topic(
            "mountain",
            "in a stone hut high on a mountain;in a mountain village;in a wooden house below the snowy peaks;"
            "at an inn on a mountain road",
            "high meadow:on;cave:in;waterfall:at;rope bridge:on;stone tower:at;goat path:on;cable car:in",
            "under a gray rock;behind the waterfall;inside a climbing boot;in a crack of the wall;"
            "beneath a blanket;under the wooden steps",
            "alpine horn;sled;crystal;climbing rope",
            "mountain goat;marmot;baby eagle;snow hare;pony;lamb",
            "piece of cheese:pieces of cheese;bowl of barley soup:bowls of barley soup;dried apricot;potato dumpling",
            "Mr. Stein:mountain guide:m;Mrs. Alp:innkeeper:f;Mr. Crag:goat herder:m;Mrs. Frost:clock maker:f",
            "calling to the echo;watching the eagles;rolling in the grass;counting the peaks;sledding down the slope",
            "the peaks shone in the sun;cow bells rang far below;a cold wind came down from the snow;"
            "an eagle circled over the valley",
            "shout below the snow slope:the snow slope:shouted below the snow slope:a heap of snow came sliding down;"
            "cross the shaky bridge:the shaky bridge:ran onto the shaky bridge:a plank dropped into the river below;"
            "go into the deep cave:the deep cave:crawled into the deep cave:the candle went out",
        ),
        _topic(
            "castle",
            "in an old castle;in a kingdom behind seven hills;in a little house below the castle wall;"
            "in the tower of a royal palace",
            "throne room:in;rose garden:in;castle kitchen:in;high tower:in;stable:in;great hall:in;drawbridge:on",
            "behind a suit of armor;under the throne;inside a copper pot;behind a painted shield;"
            "under a velvet pillow;in a dusty chest",
            "toy crown;wooden sword;silver key;tiny harp",
            "swan;peacock;little dragon;pony;frog;falcon",
            "marzipan star;roast turnip;sugar rose;royal pudding",
            "Mr. Grey:gardener:m;Lady Maud:harp player:f;Sir Rupert:knight:m;Mrs. Crumb:royal cook:f",
            "riding the pony;hiding in the great hall;dancing at the balls;watching the knights;making daisy crowns",
            "flags waved on the towers;trumpets sounded from the gate;the roses were in bloom;"
            "guards marched over the drawbridge",
            "ring the great bell:the great bell:rang the great bell:the whole army came running out in nightshirts;"
            "feed the dragon pepper:the dragon:fed the dragon pepper:the dragon sneezed and set fire to a curtain;"
            "try on the queen's crown:the queen's crown:tried on the queen's crown:the crown got stuck",
        ),
        _topic(
            "river",
            "in a mill by the river;in a green house near the river;on a barge;in a cabin beside a slow brown river",
            "old mill:at;river bank:on;reed bed:in;fishing dock:on;willow tree:under;stepping stones:on;ferry:on",
            "among the reeds;under a lily pad;inside a rusty can;behind the mill wheel;beneath the dock;"
            "under a willow root",
            "toy raft;fishing rod;little paddle;cork boat",
            "otter;frog;beaver;heron;water rat;baby swan",
            "fried trout:fried trout;watercress roll;bag of walnuts:bags of walnuts;rhubarb tart",
            "Mr. Wade:boatman:m;Mrs. Brook:mill owner:f;Mr. Rudd:angler:m;Mrs. Willows:basket weaver:f",
            "floating leaf boats;catching tadpoles;rowing to the bend;fishing from the dock;jumping over puddles",
            "dragonflies darted over the water;the mill wheel turned slowly;a fish jumped with a plop;"
            "the reeds bent in the breeze",
            "play on the mill wheel:the mill wheel:jumped onto the mill wheel:the wheel began to turn;"
            "take the raft out alone:the raft:took the raft out alone:the current spun the raft like a leaf;"
            "swing from the dead branch:the dead branch:swung from the dead branch:the branch snapped in two",
        ),
        _topic(
            "north",
            "in the far north;in a snow-covered village;in a warm cabin near the frozen lake;at the edge of the ice",
            "frozen lake:on;snow fort:in;fish smokehouse:in;reindeer pen:at;ice cave:in;village well:at;hot spring:at",
            "under a snow drift;inside a fur mitten;behind the wood pile;under a reindeer skin;"
            "between two blocks of ice;in an empty barrel",
            "ice skate;snow globe;bone whistle;fur mitten",
            "husky puppy:husky puppies;baby seal;penguin;polar bear cub;reindeer calf:reindeer calves;snowy owl",
            "bowl of hot stew:bowls of hot stew;smoked fish:smoked fish;cup of berry tea:cups of berry tea;"
            "butter biscuit",
            "Mr. Olsen:sled driver:m;Mrs. Berg:storyteller:f;Mr. Nils:ice fisher:m;Mrs. Saga:reindeer herder:f",
            "skating on the lake;building snow forts;watching the northern lights;throwing snowballs;"
            "feeding the reindeer",
            "snow lay on every roof;blue shadows lay on the snow;icicles sparkled in the sun;"
            "smoke rose from every chimney",
            "walk on the thin ice:the thin ice:stepped onto the thin ice:the ice cracked like glass;"
            "lick the frozen pump:the frozen pump:licked the frozen pump:one tongue stuck fast to the iron;"
            "drive the dog sled alone:the dog sled:jumped on the dog sled alone:the dogs ran off like the wind",
        ),
    )
}

GENERAL: dict[str, Any] = {
    "hero": NAMES,
    "friend": NAMES,
    "rival": NAMES,
    "elder": FAMILY,
    "pet": PETS,
    "petname": PET_NAMES,
    "newname": PET_NAMES,
    "colour": COLOURS,
    "hue": COLOURS,
    "garment": GARMENTS,
    "age": AGES,
    "number": NUMBERS,
    "trait": TRAITS,
    "treat": TREATS,
    "fear": FEARS,
    "skill": SKILLS,
    "wish": WISHES,
    "vessel": Dist(nouns("vase;jug;bowl;lamp;clock;teapot;mirror;plate")),
    "beast": Dist(nouns("wolf:wolves;bear;wild boar;mad bull;lion")),
}
