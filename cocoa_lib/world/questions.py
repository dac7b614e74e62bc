"""What can be asked of a scene, and the true answers. Knows nothing of any table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

from .concepts import checksum, load_concepts
from .scenes import POSITIONS, STYLES, Drawn, Scene, describe, make_scene, move
from .words import COUNTS, is_counted, pluralise, say_is, say_place

RELATIONS = ("left of", "right of", "above", "below")
UNSEEN_RELATION = "below"  # captions of the corpus know it, no contrastive pair asks for it
PLACEHOLDER = "<|image_1|>"
EDIT = re.compile(
    r"(?P<verb>Make|Turn|Move|Remove|Swap) the (?P<name>.+?)"
    r"( (?P<size>small|large)| into (?:an?|some) (?P<new>.+)| to the (?P<place>.+)"
    r"| and the (?P<other>.+))?\."
)


def get_only(values: Iterable) -> Any:
    """The one value. Raises ValueError if there are none or several."""
    values = list(values)
    if len(values) != 1:
        raise ValueError(f"one answer expected, found {len(values)}: {values}")
    return values[0]


def get_named(scene: Scene, name: str) -> Drawn:
    """The one drawing of this concept. Raises ValueError if there are none or several."""
    return get_only(one for one in scene.drawings if one.name == name)


def find_related(scene: Scene, relation: str, to: Drawn) -> list[Drawn]:
    """The drawings in a column left of (right of), or in a row above (below), that of `to`."""
    row, column = divmod(POSITIONS.index(to.position), 3)
    test = {
        "left of": lambda r, c: c < column,
        "right of": lambda r, c: c > column,
        "above": lambda r, c: r < row,
        "below": lambda r, c: r > row,
    }[relation]
    return [one for one in scene.drawings if test(*divmod(POSITIONS.index(one.position), 3))]


def name_kind(name: str) -> str:
    """The Unicode subgroup of a concept, in words: "snake" -> "reptile"."""
    return load_concepts()[name].kind


@cache
def singular() -> dict[str, str]:
    """Plural -> name of every concept that can be counted."""
    return {pluralise(name): name for name in load_concepts() if is_counted(name)}


def apply_edit(scene: Scene, instruction: str) -> Scene:
    """The scene after "Make|Turn|Move|Remove|Swap the snake ...". The same call puts drawings on
    the same pixels.

    Raises ValueError for another sentence, and where it does not name exactly one drawing.
    """
    found = EDIT.fullmatch(instruction)
    if not found:
        raise ValueError(f"not an edit instruction: {instruction!r}")
    rng = np.random.default_rng(checksum(describe(scene) + instruction))
    old = get_named(scene, found["name"])
    others = [one for one in scene.drawings if one is not old]
    if found["verb"] == "Remove":
        return make_scene(others, scene.background)
    if found["verb"] == "Swap":
        other = get_named(scene, found["other"])
        others = [one for one in others if one is not other] + [
            move(rng, other, position=old.position)
        ]
        changes = {"position": other.position}
    else:
        wanted = {"size": found["size"], "name": found["new"], "position": found["place"]}
        changes = {key: value for key, value in wanted.items() if value}
    return make_scene([*others, move(rng, old, **changes)], scene.background)


def _count(scene: Scene, words: str) -> set[str]:
    drawings = scene.drawings
    n = (
        len(drawings)
        if words == "drawings"
        else sum(one.name == singular()[words] for one in drawings)
    )
    return {COUNTS[n]}


def _compare(scene: Scene, relation: str, name: str) -> Drawn:
    return get_only(find_related(scene, relation, get_named(scene, name)))


def _at(scene: Scene, place: str) -> Drawn:
    return get_only(one for one in scene.drawings if say_place(one.position) == place)


def _phrase(scene: Scene, phrase: str) -> Drawn:
    return get_only(one for one in scene.drawings if one.phrase == phrase)


def say_all(scene: Scene) -> set[str]:
    """Every caption that says all of a scene."""
    return {style(scene) for style in STYLES}


# Every question of this package and the texts that answer it; groups of the pattern are passed on.
QUESTIONS: dict[str, Callable[..., set[str]]] = {
    r"Find the picture: (.+)": lambda scene, words: {words},
    r"Describe the picture\.": say_all,
    r"What is in the picture\?": lambda scene: {get_only(scene.drawings).name},
    r"What kind of thing is in the picture\?": lambda scene: {
        name_kind(get_only(scene.drawings).name)
    },
    r"What kind of thing (?:is|are) the (.+)\?": lambda scene, name: {
        name_kind(get_named(scene, name).name)
    },
    r"What is ((?:at|on|in) the .+)\?": lambda scene, place: {_at(scene, place).name},
    r"Where (?:is|are) the (.+)\?": lambda scene, name: {
        say_place(get_named(scene, name).position)
    },
    r"(?:Is|Are) the (.+) small or large\?": lambda scene, name: {get_named(scene, name).size},
    r"How many (.+) are there\?": _count,
    r"What is (left of|right of|above|below) the (.+)\?": lambda scene, *words: {
        _compare(scene, *words).name
    },
    r"Find the drawing (left of|right of|above|below) the (.+)\.": lambda scene, *words: {
        _compare(scene, *words).phrase
    },
    r"Find the ((?:small|large) .+)\.": lambda scene, phrase: {_phrase(scene, phrase).phrase},
    r"((?:Make|Turn|Move|Remove|Swap) .+)": lambda scene, text: say_all(apply_edit(scene, text)),
}


def answer(text: str, scene: Scene) -> set[str]:
    """Read the answers off a scene: a name, a place, a count, captions, or the phrase to find.

    Raises ValueError for a text that is none of QUESTIONS, and where there is not one answer.
    """
    text = text.replace(PLACEHOLDER, "").strip()
    for pattern, read in QUESTIONS.items():
        if found := re.fullmatch(pattern, text):
            return read(scene, *found.groups())
    raise ValueError(f"not a question of this package: {text!r}")


def list_questions(scene: Scene) -> list[str]:
    """List the questions about a scene that have one answer, the unseen relation among them."""
    texts = ["How many drawings are there?"]
    if len(scene) == 1:
        texts += ["What is in the picture?", "What kind of thing is in the picture?"]
    for one in scene.drawings:
        texts.append(f"What is {say_place(one.position)}?")
        count = sum(other.name == one.name for other in scene.drawings)
        if (
            is_counted(one.name)
            and (text := f"How many {pluralise(one.name)} are there?") not in texts
        ):
            texts.append(text)
        if count > 1:
            continue
        verb = say_is(one.name)
        texts += [
            f"Where {verb} the {one.name}?",
            f"{verb.capitalize()} the {one.name} small or large?",
            f"What kind of thing {verb} the {one.name}?",
        ]
        related = [
            relation for relation in RELATIONS if len(find_related(scene, relation, one)) == 1
        ]
        texts += [f"What is {relation} the {one.name}?" for relation in related]
    return texts
