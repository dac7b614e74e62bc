"""Which drawings the benchmark uses, and which of them training may show.

A concept is a noun of the Unicode emoji list whose OpenMoji drawing can be named by eye at the
smallest size used. Its role says what training sees of it:

    paired     captions and contrastive pairs
    captioned  captions only: no contrastive pair shows it
    unknown    nothing: no picture and no text before the test

Near-copies form a family (same kind and head noun, or listed as look_alike in vocabulary.yaml),
and a family has one role.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import emoji

from .words import read_names, read_vocabulary

ROLES = ("unknown", "captioned", "paired")
EDGES = (0, 0.1, 0.25, 1)  # places of the families where each role begins and ends
SALT = "63 "  # orders the families; chosen so that large ones, such as cars and books, are paired
HELD_OUT = 8  # of so many paired concepts, one has a size that training never shows

# Names of one or two plain words; longer ones describe a state or a view ("locked with pen").
NAME = re.compile(r"[a-z]+(-[a-z]+)*( [a-z]+(-[a-z]+)*)?")
NO_NOUN = re.compile(r"\b(with|of|in|behind|over|at|and|without|on|to)\b|thirty")


@dataclass(frozen=True)
class Concept:
    """A drawing with a name.

    half: "dev" or "test", for tasks about concepts that no training pair shows.
    rank: place of its family among those of its role, 0 to 1; small sets of pairs have low ones.
    """

    emoji: str
    name: str
    group: str
    kind: str
    family: str
    role: str
    half: str
    rank: float


def read_name(char: str) -> str:
    """The CLDR's English name of an emoji: "red apple"."""
    return emoji.demojize(char).strip(":").replace("_", " ")


def is_usable(name: str) -> bool:
    """Whether a name is a plain noun of one or two words whose drawing can be told by eye."""
    excluded = read_names("not_things") | read_names("not_told_by_eye")
    return bool(NAME.fullmatch(name)) and not NO_NOUN.search(name) and name not in excluded


def find_family(name: str, kind: str) -> str:
    """What a drawing is a near-copy of: a line of look_alike, else its kind and head noun."""
    for members in read_vocabulary()["look_alike"]:
        if name in members.split(", "):
            return members.replace(", ", ",")
    return f"{kind}/{name.removesuffix(' face').split(' ')[-1]}"


def checksum(text: str) -> int:
    """A number of a text that is the same everywhere."""
    return crc32(text.encode())


@cache
def load_concepts() -> dict[str, Concept]:
    """Name -> concept, in Unicode's order."""
    named = [
        (char, read_name(char), group, kind)
        for group, kinds in read_vocabulary()["groups"].items()
        for kind, members in kinds.items()
        for char in members.split(" ")
        if is_usable(read_name(char))
    ]
    families = {name: find_family(name, kind) for _, name, _, kind in named}
    ordered = sorted(set(families.values()), key=lambda family: checksum(SALT + family))
    roles = {family: assign_role(k / len(ordered)) for k, family in enumerate(ordered)}
    return {
        name: Concept(char, name, group, kind, families[name], *roles[families[name]])
        for char, name, group, kind in named
    }


def assign_role(place: float) -> tuple[str, str, float]:
    """(role, half, rank within the role) of the family at `place`, 0 <= place < 1."""
    number = sum(place >= edge for edge in EDGES[1:])
    low, high = EDGES[number : number + 2]
    rank = (place - low) / (high - low)
    return ROLES[number], "dev" if rank < 0.5 else "test", rank


def select_names(role: str, half: str = "", share: float = 1.0) -> list[str]:
    """Names of a role, of one half or both (""), of the first `share` of its families."""
    return [
        concept.name
        for concept in load_concepts().values()
        if concept.role == role and half in ("", concept.half) and concept.rank < share
    ]


@cache
def held_out_size(name: str) -> str:
    """The size at which training never shows this concept: "small", "large", or "" for most."""
    number = checksum(f"size of {name}")
    if load_concepts()[name].role != "paired" or number % HELD_OUT:
        return ""
    return ("small", "large")[number // HELD_OUT % 2]


def list_families() -> list[list[str]]:
    """The groups of near-copies: every family of two or more, largest first."""
    families: dict[str, list[str]] = {}
    for concept in load_concepts().values():
        families.setdefault(concept.family, []).append(concept.name)
    return sorted((names for names in families.values() if len(names) > 1), key=len, reverse=True)
