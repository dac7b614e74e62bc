"""Which drawings the benchmark uses, what they are called, and which of them training may show.

A concept is a noun of the Unicode emoji list with a drawing that can be named by eye at the smallest size used. Its
role says what training sees of it:

    paired     captions and contrastive pairs
    captioned  captions only: no contrastive pair shows it
    unknown    nothing: no picture and no text before the test

Near-copies form a family (same head noun within a subgroup, or listed in LOOK_ALIKE), and a family has one role.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zlib import crc32

import emoji

SUBGROUPS = Path(__file__).with_name("subgroups.txt")
ROLES = ("paired", "captioned", "unknown")
# Shares of the families, in the order of a checksum of their name.
UNKNOWN_SHARE, CAPTIONED_SHARE = 0.1, 0.15
SALT = "63 "  # chosen so that families of five and more, such as cars and books, are paired

# Names of one or two plain words. Longer ones describe a state or a view ("locked with pen").
NAME = re.compile(r"[a-z]+(-[a-z]+)*( [a-z]+(-[a-z]+)*)?")
NO_NOUN = re.compile(r"\b(with|of|in|behind|over|at|and|without|on|to)\b|thirty")
EXCLUDED = frozenset(
    # no thing, or a state, a view or a use of one
    "cooking,pouring liquid,clinking glasses,camping,wedding,foggy,fog,construction,locked,unlocked,tennis,bowling,"
    "lacrosse,badminton,ping pong,cricket game,field hockey,ice hockey,performing arts,airplane departure,"
    "airplane arrival,low battery,muted speaker,incoming envelope,chart increasing,chart decreasing,high voltage,"
    "hourglass done,building construction,guide dog,service dog,hatching chick,linked paperclips,oncoming taxi,"
    "oncoming automobile,broken chain,round pushpin,closed umbrella,tear-off calendar,spiral calendar,hot springs,"
    # not named by eye at 24 pixels, or not told from a neighbour
    "pig nose,paw prints,wing,microbe,white flower,rosette,wilted flower,blossom,hibiscus,herb,fallen leaf,salt,"
    "leafy green,root vegetable,stuffed flatbread,tamale,oden,curry rice,rice cracker,falafel,steaming bowl,"
    "shaved ice,custard,hot beverage,sake,tumbler glass,beverage box,mate,tropical drink,classical building,"
    "houses,derelict house,love hotel,convenience store,department store,office building,cityscape,motorway,"
    "light rail,station,mountain railway,articulated lorry,bus stop,seat,mountain cableway,suspension railway,"
    "aerial tramway,timer clock,new moon,full moon,glowing star,wind face,milky way,cyclone,tanabata tree,"
    "pine decoration,carp streamer,confetti ball,admission tickets,joker,briefs,sari,level slider,control knobs,"
    "musical score,musical notes,pager,computer disk,optical disk,film frames,diya lamp,ledger,bookmark tabs,label,"
    "e-mail,outbox tray,inbox tray,memo,card index,white cane,link,chains,mouse trap,lotion bottle,placard,hamsa,"
    "identification card,nazar amulet,prayer beads,thong sandal,clutch bag,hair pick,mount fuji,kaaba,"
    "national park,moai,pick,sparkles,reminder ribbon,small airplane,amphora,funeral urn,wood,alembic,flying disc,"
    "bullet train,tram car,postal horn,videocassette,euro banknote,pound banknote,yen banknote".split(",")
)
# Families that the names do not show.
LOOK_ALIKE = (
    "automobile,taxi,police car,racing car,pickup truck,delivery truck,ambulance,fire engine,minibus",
    "bus,oncoming bus,trolleybus",
    "train,high-speed train,tram,metro,monorail,railway car,locomotive",
    "ship,ferry,passenger ship,motor boat,speedboat",
    "ox,cow,cow face,bison,water buffalo",
    "ram,ewe,goat",
    "horse,horse face,donkey,unicorn",
    "mouse,mouse face,rat,hamster",
    "cat,cat face,black cat",
    "tiger,tiger face,leopard",
    "dog,dog face,poodle",
    "elephant,mammoth",
    "chicken,rooster,baby chick",
    "goose,swan",
    "bird,black bird,eagle",
    "baseball,softball",
    "american football,rugby football",
    "melon,watermelon",
    "lemon,lime",
    "onion,garlic",
    "closed book,open book,green book,blue book,orange book,books,notebook",
    "telephone,telephone receiver",
    "running shoe,hiking boot,flat shoe,ballet shoes,high-heeled shoe",
    "desktop computer,television,laptop",
    "alarm clock,stopwatch,mantelpiece clock",
    "mountain,snow-capped mountain,volcano",
    "glasses,sunglasses,goggles",
    "guitar,violin,banjo",
    "pen,fountain pen,black nib,paintbrush,crayon,pencil",
    "sunrise,sunset",
    "mosque,hindu temple,synagogue",
    "crescent moon,ringed planet",
    "star,shooting star,comet",
)
# Names that take "some" and no plural of their own.
UNCOUNTED = frozenset(
    "grapes,cherries,blueberries,peanuts,beans,pancakes,bread,baguette bread,bacon,french fries,popcorn,butter,"
    "spaghetti,sushi,cooked rice,chopsticks,ice,fire,fireworks,skis,glasses,sunglasses,goggles,jeans,gloves,socks,"
    "shorts,ballet shoes,maracas,books,scissors,soap,bubbles,shopping bags,thread,yarn,garlic,broccoli,coral,"
    "canned food,green salad,candy,bubble tea,nesting dolls,luggage,dna,ginger root,fried shrimp,railway track,"
    "crossed swords".split(",")
)
PLURALS = {
    "mouse": "mice", "goose": "geese", "ox": "oxen", "fish": "fish", "tropical fish": "tropical fish",
    "blowfish": "blowfish", "jellyfish": "jellyfish", "deer": "deer", "moose": "moose", "bison": "bison",
    "shrimp": "shrimp", "squid": "squid", "wolf": "wolves", "maple leaf": "maple leaves",
    "kitchen knife": "kitchen knives", "scarf": "scarves", "cactus": "cactuses", "octopus": "octopuses",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes",
    "water buffalo": "water buffaloes", "computer mouse": "computer mice", "tornado": "tornadoes",
    "mosquito": "mosquitoes", "snowman": "snowmen", "game die": "game dice",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """A drawing with a name. `half`: "dev" or "test", for tasks about concepts that training pairs do not show."""

    emoji: str
    name: str
    group: str
    subgroup: str
    family: str
    role: str
    half: str
    rank: float  # of its family among those of its role, from 0 to 1: a smaller set of pairs has the lower ones


def read_subgroups() -> list[tuple[str, str, list[str]]]:
    """(Unicode's group, the subgroup in words, its emoji), in Unicode's order."""
    lines = SUBGROUPS.read_text(encoding="utf-8").splitlines()
    parts = [line.split(" | ") for line in lines if not line.startswith("#")]
    return [(group, label, members.split(" ")) for group, _, label, members in parts]


def read_name(char: str) -> str:
    """The CLDR's English name of an emoji: "red apple"."""
    return emoji.demojize(char).strip(":").replace("_", " ")


def is_usable(name: str) -> bool:
    """Whether a name is a plain noun of one or two words whose drawing can be told by eye."""
    return bool(NAME.fullmatch(name)) and not NO_NOUN.search(name) and name not in EXCLUDED


def find_family(name: str, subgroup: str) -> str:
    """What a drawing is a near-copy of: a line of LOOK_ALIKE, else subgroup and head noun."""
    for line in LOOK_ALIKE:
        if name in line.split(","):
            return line
    return f"{subgroup}/{name.removesuffix(' face').split(' ')[-1]}"


def checksum(text: str) -> int:
    """A number of a text that is the same everywhere."""
    return crc32(text.encode())


@cache
def load_concepts() -> dict[str, Concept]:
    """Name -> concept, in Unicode's order."""
    named = [
        (char, read_name(char), group, label)
        for group, label, members in read_subgroups()
        for char in members
        if is_usable(read_name(char))
    ]
    families = {name: find_family(name, label) for _, name, _, label in named}
    ranked = sorted(set(families.values()), key=lambda family: checksum(SALT + family))
    places = {family: place / len(ranked) for place, family in enumerate(ranked)}
    return {
        name: Concept(char, name, group, label, families[name], *_assign(places[families[name]]))
        for char, name, group, label in named
    }


def _assign(place: float) -> tuple[str, str, float]:
    """(role, half, rank within the role) of a family at `place`, 0 to 1, in the order of checksums."""
    edges = (0, UNKNOWN_SHARE, UNKNOWN_SHARE + CAPTIONED_SHARE, 1)
    for role, low, high in zip(reversed(ROLES), edges, edges[1:], strict=False):
        if place < high:
            rank = (place - low) / (high - low)
            return role, "dev" if rank < 0.5 else "test", rank
    raise ValueError(f"place must be in [0, 1), got {place}")


def select_names(role: str, half: str = "", share: float = 1.0) -> list[str]:
    """Names of a role, of one half ("dev", "test") or both (""), of the first `share` of its families."""
    return [
        concept.name
        for concept in load_concepts().values()
        if concept.role == role and half in ("", concept.half) and concept.rank < share
    ]


@cache
def held_out_size(name: str) -> str:
    """The size, "small" or "large", at which training never shows this concept; "" for most concepts."""
    number = checksum(f"size of {name}")
    if load_concepts()[name].role != "paired" or number % 8:
        return ""
    return ("small", "large")[number // 8 % 2]


def with_article(words: str) -> str:
    """ "red apple" -> "a red apple"; "large hourglass" -> "a large hourglass"; "grapes" -> "some grapes"."""
    if words.removeprefix("small ").removeprefix("large ") in UNCOUNTED:
        return f"some {words}"
    vowel = words[0] in "aeio" or words.startswith(("um", "hour", "x-"))
    return f"{'an' if vowel and not words.startswith(('ewe', 'one-')) else 'a'} {words}"


def pluralise(name: str) -> str:
    """The plural of a countable name: "wine glass" -> "wine glasses"."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeo":
        return f"{name[:-1]}ies"
    return f"{name}s"
