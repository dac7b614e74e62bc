"""English around the concepts: articles, plurals, places, lists; and the vocabulary file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

VOCABULARY = Path(__file__).with_name("vocabulary.yaml")
COUNTS = ("no", "one", "two", "three", "four")
VOWELS = ("a", "e", "i", "o", "um", "hour", "x-")  # beginnings that take "an"
NO_VOWELS = ("ewe", "one-")


@cache
def read_vocabulary() -> dict[str, Any]:
    """The sections of vocabulary.yaml."""
    return yaml.safe_load(VOCABULARY.read_text(encoding="utf-8"))


@cache
def read_names(section: str) -> frozenset[str]:
    """The names of a section that is a list in one line of text."""
    return frozenset(read_vocabulary()[section].split(", "))


def is_counted(name: str) -> bool:
    """Whether a name has a plural: "snake", not "grapes"."""
    return name not in read_names("uncounted")


def with_article(words: str) -> str:
    """Put "a", "an" or "some" before a name or a size and a name.

    "red apple" -> "a red apple"; "orange book" -> "an orange book"; "large grapes" -> "some large
    grapes".
    """
    if not is_counted(words.removeprefix("small ").removeprefix("large ")):
        return f"some {words}"
    vowel = words.startswith(VOWELS) and not words.startswith(NO_VOWELS)
    return f"{'an' if vowel else 'a'} {words}"


def pluralise(name: str) -> str:
    """The plural of a counted name: "wine glass" -> "wine glasses"."""
    if name in read_vocabulary()["plurals"]:
        return read_vocabulary()["plurals"][name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeo":
        return f"{name[:-1]}ies"
    return f"{name}s"


def say_count(name: str, count: int) -> str:
    """ "a snake", "two snakes", "some grapes" """
    if count == 1 or not is_counted(name):
        return with_article(name)
    return f"{COUNTS[count]} {pluralise(name)}"


def say_is(name: str) -> str:
    """ "is", or "are" of a name that is a plural already: "are" of "grapes", "is" of "bread"."""
    return "are" if name.endswith("s") and not is_counted(name) else "is"


def say_place(position: str) -> str:
    """ "at the top left", "on the left", "in the center" """
    word = {"center": "in", "left": "on", "right": "on"}.get(position, "at")
    return f"{word} the {position}"


def join_words(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c" """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
