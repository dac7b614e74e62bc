"""The twelve tasks: each makes a query, its right candidate, and wrong ones that are near.

Four tasks are out of distribution, each by another kind of unseen: concepts that captions show and
no contrastive pair does, concepts that nothing shows, a relation, and a composition (a concept at a
size it never had). A near candidate differs from the right one in one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from ..data.tables import Task
from .concepts import held_out_size, load_concepts, select_names
from .questions import (
    PLACEHOLDER,
    RELATIONS,
    UNSEEN_RELATION,
    apply_edit,
    find_related,
    name_kind,
    say_all,
)
from .scenes import (
    POSITIONS,
    STYLES,
    Drawn,
    Scene,
    describe,
    find_split,
    is_clear,
    sample_scene,
)
from .words import COUNTS, is_counted, pluralise, say_is, say_place, with_article

TASKS = (
    Task("Naming", "classification", True, 430),
    Task("Kinds", "classification", True, 47),
    Task("NamingUnpaired", "classification", False, 507),
    Task("Places", "vqa", True, 200),
    Task("CountsAndRelations", "vqa", True, 200),
    Task("RelationUnseen", "vqa", False, 200),
    Task("TextToPicture", "retrieval", True, 500),
    Task("PictureToText", "retrieval", True, 500),
    Task("EditToPicture", "retrieval", True, 500),
    Task("Grounding", "grounding", True, 200),
    Task("GroundingComposed", "grounding", False, 200),
    Task("GroundingUnknown", "grounding", False, 200),
)
SUBSETS = tuple(task.name for task in TASKS if task.in_distribution)
# Pairs below each number show only this first share of the paired concepts, so that a small set
# covers few and each is the beginning of the next.
PAIR_SHARES = ((500, 0.25), (2000, 0.5), (8000, 0.75), (10**9, 1.0))
NEAR = 3  # wrong names of the same kind among a row's candidates


@dataclass(frozen=True)
class Side:
    """A query or a candidate: text and/or the picture of a scene, or of one drawing of it."""

    text: str = ""
    scene: Scene | None = None
    focus: Drawn | None = None

    @property
    def truths(self) -> set[str]:
        """What is true of a candidate: it is right where `answer` gives one of these texts."""
        if self.text:
            return {self.text}
        return {self.focus.phrase} if self.focus else say_all(self.scene)


@dataclass(frozen=True)
class Source:
    """Where an example comes from: its split, and the concepts it may show."""

    rng: np.random.Generator
    split: str
    names: Sequence[str]
    known: frozenset[str]  # the same, to look one up

    @classmethod
    def open(cls, rng: np.random.Generator, split: str, place: int = 10**8) -> Source:
        """The source of pair number `place` of the training pairs, or of a query."""
        share = next(share for limit, share in PAIR_SHARES if place < limit)
        return cls(rng, split, paired_names(share), known_names(share))

    def scene(self, **wishes: Any) -> Scene:
        return sample_scene(self.rng, self.split, wishes.pop("names", self.names), **wishes)

    def pick(self, options: Sequence) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def some(self, options: Sequence, n: int) -> list:
        return [options[i] for i in self.rng.permutation(len(options))[:n]]

    def unseen(self, role: str) -> list[str]:
        """The concepts of a role that this split asks for; development and test share none."""
        return select_names(role, self.split)


Example = tuple[Side, Side, list[Side]]  # query, right candidate, hard negatives


@cache
def paired_names(share: float) -> list[str]:
    """The concepts that the pairs of the first share of the paired families may show."""
    return select_names("paired", share=share)


@cache
def known_names(share: float) -> frozenset[str]:
    """The same as a set."""
    return frozenset(paired_names(share))


@cache
def near_names(name: str, role: str = "paired") -> list[str]:
    """Other concepts of the same kind, those of the same family first."""
    concepts, own = load_concepts(), load_concepts()[name]
    same = [
        c for c in concepts.values() if c.kind == own.kind and c.name != name and c.role == role
    ]
    return [c.name for c in sorted(same, key=lambda c: c.family != own.family)]


def ask(text: str, scene: Scene) -> Side:
    """A question about a picture."""
    return Side(f"{PLACEHOLDER} {text}", scene)


def label_sides(right: str, wrong: Sequence[str]) -> tuple[Side, list[Side]]:
    """The right label, and the wrong ones without copies."""
    return Side(right), [Side(label) for label in dict.fromkeys(wrong) if label != right]


# ---- classification -----------------------------------------------------------------------------


def make_naming(source: Source, role: str = "paired") -> Example:
    """What a single drawing is called."""
    names = source.names if role == "paired" else source.unseen(role)
    scene = source.scene(n=1, names=names)
    name = scene.drawings[0].name
    near = [other for other in near_names(name, role) if role != "paired" or other in source.known]
    wrong = source.some(near, NEAR) or source.some(names, NEAR)
    return ask("What is in the picture?", scene), *label_sides(name, wrong)


def make_kinds(source: Source) -> Example:
    """The kind of a single drawing."""
    scene = source.scene(n=1)
    kind = name_kind(scene.drawings[0].name)
    return ask("What kind of thing is in the picture?", scene), *label_sides(
        kind, source.some(list_kinds(), NEAR + 1)
    )


# ---- questions ----------------------------------------------------------------------------------


def wrong_names(source: Source, scene: Scene, name: str) -> list[str]:
    """The other drawings' names, and some of the same kind."""
    near = [other for other in near_names(name) if other in source.known] or source.names
    return [one.name for one in scene.drawings] + source.some(near, NEAR)


def make_places(source: Source) -> Example:
    """What is at a place, or where a drawing is."""
    while True:
        scene = source.scene()
        one = source.pick(scene.drawings)
        if source.rng.random() < 0.5:
            wrong = wrong_names(source, scene, one.name)
            return ask(f"What is {say_place(one.position)}?", scene), *label_sides(one.name, wrong)
        if sum(other.name == one.name for other in scene.drawings) == 1:
            wrong = [say_place(position) for position in POSITIONS]
            question = ask(f"Where {say_is(one.name)} the {one.name}?", scene)
            return question, *label_sides(say_place(one.position), wrong)


def point(source: Source, relations: Sequence[str]) -> tuple[Scene, str, Drawn]:
    """A scene and "left of the snake" such that exactly one drawing is there, and it is of no
    second one's phrase.
    """
    while True:
        scene = source.scene(n=int(source.rng.integers(2, 5)))
        relation, to = source.pick(relations), source.pick(scene.drawings)
        found = find_related(scene, relation, to)
        names = [one.name for one in scene.drawings]
        if len(found) == 1 and names.count(to.name) == names.count(found[0].name) == 1:
            return scene, f"{relation} the {to.name}", found[0]


def make_relations(source: Source, relations: Sequence[str]) -> Example:
    """What is left of something."""
    scene, words, target = point(source, relations)
    return ask(f"What is {words}?", scene), *label_sides(
        target.name, wrong_names(source, scene, target.name)
    )


def make_counts(source: Source) -> Example:
    """How many drawings of a concept there are."""
    countable = [name for name in source.names if is_counted(name)]
    while True:
        scene = source.scene(names=countable, repeat=0.6)
        name = source.pick(scene.drawings).name
        count = sum(one.name == name for one in scene.drawings)
        if count > 1 or source.rng.random() < 0.4:
            question = ask(f"How many {pluralise(name)} are there?", scene)
            return question, *label_sides(COUNTS[count], COUNTS[1:])


def make_counts_and_relations(source: Source) -> Example:
    """Half of each."""
    if source.rng.random() < 0.5:
        return make_counts(source)
    return make_relations(
        source, [relation for relation in RELATIONS if relation != UNSEEN_RELATION]
    )


# ---- retrieval ----------------------------------------------------------------------------------


def write_edit(source: Source, scene: Scene) -> str:
    """Write an instruction that changes one thing of a scene whose names differ, or swaps two."""
    one, *rest = source.some(scene.drawings, 2)
    near = [other for other in near_names(one.name) if other in source.known] or source.names
    options = [
        f"Make the {one.name} {'small' if one.size == 'large' else 'large'}.",
        f"Turn the {one.name} into {with_article(source.pick(near))}.",
        f"Move the {one.name} to the {source.pick(POSITIONS)}.",
    ]
    if rest:
        options += [f"Remove the {one.name}.", f"Swap the {one.name} and the {rest[0].name}."]
    return source.pick(options)


def make_edits(source: Source, n: int) -> tuple[Scene, list[tuple[str, Scene]]]:
    """Make a scene and n edits (instruction, edited scene), all of the split, no two alike."""
    while True:
        scene = source.scene()
        if len({one.name for one in scene.drawings}) < len(scene):
            continue
        seen, found = {describe(scene)}, []
        for _ in range(20 * n):
            text = write_edit(source, scene)
            edited = apply_edit(scene, text)
            if describe(edited) not in seen and is_clear(edited) and _fits(source, edited):
                seen.add(describe(edited))
                found.append((text, edited))
            if len(found) == n:
                return scene, found


def _fits(source: Source, scene: Scene) -> bool:
    """Whether a scene made from another may be shown: training and queries share none."""
    return (find_split(scene) == "train") == (source.split == "train")


def make_text_to_picture(source: Source) -> Example:
    """The scene that a caption describes."""
    scene, edits = make_edits(source, 2)
    caption = source.pick(STYLES)(scene)
    return (
        Side(f"Find the picture: {caption}"),
        Side("", scene),
        [Side("", edited) for _, edited in edits],
    )


def make_picture_to_text(source: Source) -> Example:
    """The caption of a scene, among captions in the same style."""
    scene, edits = make_edits(source, 3)
    style = source.pick(STYLES)
    wrong = [Side(style(edited)) for _, edited in edits]
    return ask("Describe the picture.", scene), Side(style(scene)), wrong


def make_edit_to_picture(source: Source) -> Example:
    """A scene after an edit, among the scene itself and another edit of it."""
    scene, ((text, edited), (_, other)) = make_edits(source, 2)
    return ask(text, scene), Side("", edited), [Side("", scene), Side("", other)]


# ---- grounding ----------------------------------------------------------------------------------


def find(scene: Scene, words: str, target: Drawn) -> Example:
    """Find one drawing of a scene among its crops."""
    wrong = [Side("", scene, one) for one in scene.drawings if one.phrase != target.phrase]
    return ask(f"Find the {words}.", scene), Side("", scene, target), wrong


def make_grounding(source: Source) -> Example:
    """By phrase or by relation."""
    if source.rng.random() < 0.5:
        scene, words, target = point(
            source, [relation for relation in RELATIONS if relation != UNSEEN_RELATION]
        )
        return find(scene, f"drawing {words}", target)
    return _find_phrase(source, lambda: source.scene(n=int(source.rng.integers(2, 5))))


def make_grounding_composed(source: Source) -> Example:
    """A concept at the size that it never has in training, beside the same at its usual size."""

    def draw_scene() -> Scene:
        name = source.pick(composed_names(source.split))
        size = held_out_size(name)
        usual = "small" if size == "large" else "large"
        return source.scene(
            n=int(source.rng.integers(2, 5)), first=((name, size), (name, usual)), repeat=0
        )

    return _find_phrase(source, draw_scene, lambda one: one.size == held_out_size(one.name))


def make_grounding_unknown(source: Source) -> Example:
    """A concept that nothing shows, beside known ones."""
    names = source.unseen("unknown")

    def draw_scene() -> Scene:
        first = (source.pick(names), source.pick(("small", "large")))
        return source.scene(n=int(source.rng.integers(2, 5)), first=(first,))

    return _find_phrase(source, draw_scene, lambda one: one.name in names)


def _find_phrase(
    source: Source,
    draw_scene: Callable[[], Scene],
    wanted: Callable[[Drawn], bool] = lambda one: True,
) -> Example:
    """Find a wanted drawing whose phrase no second one has."""
    while True:
        scene = draw_scene()
        phrases = [one.phrase for one in scene.drawings]
        targets = [one for one in scene.drawings if wanted(one) and phrases.count(one.phrase) == 1]
        if targets and len(set(phrases)) > 1:
            target = source.pick(targets)
            return find(scene, target.phrase, target)


@cache
def composed_names(split: str) -> list[str]:
    """Concepts with a held-out size; development and test queries take turns."""
    names = [name for name in paired_names(1.0) if held_out_size(name)]
    return names[("dev", "test").index(split) :: 2]


@cache
def list_kinds() -> list[str]:
    """The kinds of the paired concepts."""
    return sorted({name_kind(name) for name in paired_names(1.0)})


MAKERS: dict[str, Callable[[Source], Example]] = {
    "Naming": make_naming,
    "Kinds": make_kinds,
    "NamingUnpaired": partial(make_naming, role="captioned"),
    "Places": make_places,
    "CountsAndRelations": make_counts_and_relations,
    "RelationUnseen": partial(make_relations, relations=[UNSEEN_RELATION]),
    "TextToPicture": make_text_to_picture,
    "PictureToText": make_picture_to_text,
    "EditToPicture": make_edit_to_picture,
    "Grounding": make_grounding,
    "GroundingComposed": make_grounding_composed,
    "GroundingUnknown": make_grounding_unknown,
}


@cache
def list_labels() -> dict[str, list[str]]:
    """Tasks whose candidates are labels; the others draw candidates from each other's rows."""
    names, places = paired_names(1.0), [say_place(position) for position in POSITIONS]
    return {
        "Naming": names,
        "Kinds": list_kinds(),
        "NamingUnpaired": names + select_names("captioned"),
        "Places": names + places,
        "CountsAndRelations": names + list(COUNTS[1:]),
        "RelationUnseen": names,
    }
