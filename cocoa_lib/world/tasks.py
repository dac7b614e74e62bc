"""The twelve tasks of the built-in benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.tables import Task
from .scenes import (
    COLORS,
    DIGITS,
    HELD_OUT,
    KINDS,
    PHRASES,
    PLACEHOLDER,
    POSITIONS,
    SCENE_TYPES,
    SEEN_RELATIONS,
    SHAPES,
    SIDES,
    TRANSFORMS,
    UNSEEN_RELATIONS,
    Object,
    Scene,
    _clear,
    _named,
    _only,
    answer,
    apply_edit,
    belongs_to,
    caption,
    phrase,
    related,
    sample_scene,
    scene_type,
)

TASKS = (
    Task("Digits", "classification", True, 10),
    Task("Counting", "classification", True, 14),
    Task("DigitsTransformed", "classification", False, 10),
    Task("ColorQA", "vqa", True, 33),
    Task("SpatialQA", "vqa", True, 200),
    Task("RelationOOD", "vqa", False, 200),
    Task("TextToImage", "retrieval", True, 500),
    Task("ImageToText", "retrieval", True, 500),
    Task("EditToImage", "retrieval", True, 500),
    Task("Grounding", "grounding", True, 200),
    Task("GroundingCombos", "grounding", False, 200),
    Task("GroundingRelations", "grounding", False, 200),
)
SUBSETS = tuple(task.name for task in TASKS if task.in_distribution)


@dataclass(frozen=True)
class Side:
    """A query or a candidate: text and/or the picture of a scene, or of one object of it."""

    text: str = ""
    scene: Scene | None = None
    focus: Object | None = None

    @property
    def key(self) -> str:
        """What `answer` must say for this candidate to be right."""
        return self.text or (phrase(self.focus) if self.focus else caption(self.scene))


Example = tuple[Side, Side, list[Side]]  # query, right candidate, hard negatives


def _ask(text: str, scene: Scene) -> Side:
    return Side(f"{PLACEHOLDER} {text}", scene)


def _pick(rng: np.random.Generator, options: Sequence) -> Any:
    return options[int(rng.integers(len(options)))]


def _some(rng: np.random.Generator, options: Sequence, n: int) -> list:
    return [options[i] for i in rng.permutation(len(options))[:n]]


def _digits(rng, split, transformed=False) -> Example:
    scene = sample_scene(rng, split, n_objects=int(rng.integers(1, 4)), n_digits=1)
    while not any("digit" in obj and obj["size"] == "large" for obj in scene):
        scene = sample_scene(rng, split, n_objects=len(scene), n_digits=1)
    if transformed:
        name, amounts = _pick(rng, TRANSFORMS)
        scene = [
            {**obj, "transform": [name, _pick(rng, amounts)]} if "digit" in obj else obj
            for obj in scene
        ]
    digit = _only(obj["kind"] for obj in scene if "digit" in obj)
    return (
        _ask("Which digit is in the picture?", scene),
        Side(digit),
        [Side(d) for d in DIGITS if d != digit],
    )


def _counting(rng, split) -> Example:
    shapes, digits = _pick(rng, [(n - d, d) for n in range(1, 5) for d in range(n + 1)])
    scene = sample_scene(rng, split, n_objects=shapes + digits, n_digits=digits)
    near = [
        (shapes + a, digits + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1))
    ]
    wrong = [Side(scene_type(a, b)) for a, b in near if min(a, b) >= 0 and 1 <= a + b <= 4]
    return (
        _ask("How many shapes and digits are there?", scene),
        Side(scene_type(shapes, digits)),
        wrong,
    )


def _color_question(rng, scene) -> tuple[str, Object]:
    obj = _pick(rng, scene)
    same = [other for other in scene if other["kind"] == obj["kind"]]
    if len(same) == 1:
        return f"What color is the {obj['kind']}?", obj
    if sum(other["size"] == obj["size"] for other in same) == 1:
        return f"What color is the {obj['size']} {obj['kind']}?", obj
    return f"What color is the object at the {obj['position']}?", obj


def _color_qa(rng, split) -> Example:
    scene = sample_scene(rng, split)
    question, obj = _color_question(rng, scene)
    wrong = [color for color in {other["color"]: 0 for other in scene} if color != obj["color"]]
    wrong = wrong or _some(rng, [color for color in COLORS if color != obj["color"]], 2)
    return _ask(question, scene), Side(obj["color"]), [*map(Side, wrong)]


def _pointed(rng, split, relations) -> tuple[Scene, str, Object]:
    """A scene and "left of the red circle" such that exactly one object is there."""
    while True:
        scene = sample_scene(rng, split, n_objects=int(rng.integers(2, 5)))
        relation, to = _pick(rng, relations), _pick(rng, scene)
        found = related(scene, relation, to)
        if len(found) == 1:
            return scene, f"{relation} the {to['color']} {to['kind']}", found[0]


def _spatial_qa(rng, split, relations=SEEN_RELATIONS) -> Example:
    scene, words, target = _pointed(rng, split, relations)
    wrong = [phrase(obj) for obj in scene if obj is not target]
    near = [
        p
        for p in PHRASES
        if sum(a != b for a, b in zip(p.split(), phrase(target).split(), strict=True)) == 1
    ]
    wrong += _some(rng, [p for p in near if p not in wrong], 3)
    return _ask(f"What is {words}?", scene), Side(phrase(target)), [*map(Side, wrong)]


def _instruction(rng, scene) -> str:
    name, *other = (f"the {obj['color']} {obj['kind']}" for obj in _some(rng, scene, 2))
    return _pick(rng, [
        f"Make {name} {_pick(rng, list(COLORS))}.", f"Turn {name} into a {_pick(rng, SHAPES)}.",
        f"Make {name} {_pick(rng, list(SIDES))}.", f"Move {name} to the {_pick(rng, POSITIONS)}.",
        *(text for text in (f"Remove {name}.", f"Swap {name} and {''.join(other)}.") if other),
    ])  # fmt: skip


def _edits(rng, scene, split, n) -> list[tuple[str, Scene]]:
    """n edits (instruction, edited scene), different from each other and from the scene; of the split in training."""
    seen, found = {caption(scene)}, []
    while len(found) < n:
        text = _instruction(rng, scene)
        edited = apply_edit(scene, text)
        if (
            caption(edited) not in seen
            and _clear(edited)
            and (split == "eval" or belongs_to(edited) == "train")
        ):
            seen.add(caption(edited))
            found.append((text, edited))
    return found


def _text_to_image(rng, split) -> Example:
    scene = sample_scene(rng, split)
    wrong = [Side("", edited) for _, edited in _edits(rng, scene, split, 2)]
    return Side(f"Find the picture: {caption(scene)}"), Side("", scene), wrong


def _image_to_text(rng, split) -> Example:
    scene = sample_scene(rng, split)
    wrong = [Side(caption(edited)) for _, edited in _edits(rng, scene, split, 3)]
    return _ask("Describe the picture.", scene), Side(caption(scene)), wrong


def _edit_to_image(rng, split) -> Example:
    scene = sample_scene(rng, split)
    (text, target), (_, other) = _edits(rng, scene, split, 2)
    return _ask(text, scene), Side("", target), [Side("", scene), Side("", other)]


def _find(scene: Scene, words: str, target: Object) -> Example:
    wrong = [Side("", scene, obj) for obj in scene if obj is not target]
    return _ask(f"Find the {words}.", scene), Side("", scene, target), wrong


def _grounding(rng, split, combos=False) -> Example:
    """Another object of the scene shares the target's kind or colour."""
    while True:
        first = _pick(rng, sorted(HELD_OUT)) if combos else None
        scene = sample_scene(rng, split, n_objects=int(rng.integers(2, 5)), first=first)
        target = _named(scene, *first) if first else _pick(rng, scene)
        if any(
            (obj["color"] == target["color"]) != (obj["kind"] == target["kind"]) for obj in scene
        ):
            return _find(scene, phrase(target), target)


def _grounding_relations(rng, split) -> Example:
    scene, words, target = _pointed(rng, split, SEEN_RELATIONS)
    return _find(scene, f"object {words}", target)


MAKERS: dict[str, Callable[..., Example]] = {
    "Digits": _digits, "Counting": _counting, "DigitsTransformed": lambda rng, split: _digits(rng, split, True),
    "ColorQA": _color_qa, "SpatialQA": _spatial_qa,
    "RelationOOD": lambda rng, split: _spatial_qa(rng, split, UNSEEN_RELATIONS),
    "TextToImage": _text_to_image, "ImageToText": _image_to_text, "EditToImage": _edit_to_image,
    "Grounding": _grounding, "GroundingCombos": lambda rng, split: _grounding(rng, split, True),
    "GroundingRelations": _grounding_relations,
}  # fmt: skip
# Tasks with a fixed set of answers; the other tasks draw candidates from each other's rows.
LABELS: dict[str, tuple[str, ...]] = {
    "Digits": DIGITS, "DigitsTransformed": DIGITS, "Counting": SCENE_TYPES, "SpatialQA": PHRASES,
    "RelationOOD": PHRASES, "ColorQA": (*COLORS, *KINDS, *POSITIONS),
}  # fmt: skip


def _questions(rng, scene: Scene) -> list[tuple[str, str]]:
    """Three different (question, answer) about a scene, for the corpus; the relations include the unseen one."""
    obj, digits = _pick(rng, scene), sum("digit" in other for other in scene)
    name = f"{obj['color']} {obj['kind']}"
    texts = [
        _color_question(rng, scene)[0], "How many shapes and digits are there?", f"Where is the {name}?",
        f"What size is the {name}?", f"What is at the {obj['position']}?",
        *["Which digit is in the picture?"] * (digits == 1),
    ]  # fmt: skip
    pointers = [
        f"What is {relation} the {name}?" for relation in (*SEEN_RELATIONS, *UNSEEN_RELATIONS)
        if len(related(scene, relation, obj)) == 1
    ]  # fmt: skip
    chosen = _some(rng, pointers, 1) + _some(rng, texts, 3)
    return [(text, answer(text, scene)) for text in chosen[:3]]


def oracle(task_name: str, row: dict[str, Any], scenes: dict[str, Scene]) -> int:
    """Index of the candidate that the question and the scenes make right, wherever it stands in the row's lists.

    Raises ValueError for an unknown task and unless exactly one candidate is right.
    """
    if task_name not in MAKERS:
        raise ValueError(f"no task {task_name!r}; tasks: {', '.join(MAKERS)}")
    wanted = answer(row["qry_text"], scenes.get(row["qry_img_path"], []))
    find = task_name.startswith("Grounding")  # candidates are crops, of one object each
    candidates = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
    keys = [
        text or (phrase(scenes[path][0]) if find else caption(scenes[path]))
        for text, path in candidates
    ]
    right = [i for i, key in enumerate(keys) if key == wanted]
    if len(right) != 1:
        raise ValueError(
            f"{task_name}: {len(right)} candidates are {wanted!r} for {row['qry_text']!r}"
        )
    return right[0]
