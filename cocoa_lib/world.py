"""A small, generated counterpart of MMEB in MMEB's own file layout: twelve tasks over pictures of coloured objects.

A scene is a list of one to four objects, each a plain dict: kind ("circle", ..., or a digit "0".."9"), color, size
("small" | "large"), position (a cell of a 3 x 3 grid, "top left"), offset ([dx, dy] from the cell's centre), for a
digit also `digit` (its index in scikit-learn's real handwritten digits) and, out of distribution only, `transform`
([name, amount]).

Fixed so that "unseen" means unseen: handwriting is split by index; scenes are split by a checksum of their caption;
HELD_OUT colour and shape combinations appear in one OOD task and nowhere else. `answer` reads a question and a scene
and knows nothing of the rows, so `oracle` shows that every question has exactly one right candidate.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter

from .files import write_json
from .items import load_image
from .mmeb import CORPUS, EVAL, TRAIN, Task, finished, write_tables

GENERATOR_VERSION = 1  # raise it whenever the same arguments would give other rows or pixels
FEW = 4096  # items: of more, all cores make them
CANVAS, PLACEHOLDER = 64, "<|image_1|>"
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
DIGITS = tuple("0123456789")
KINDS = SHAPES + DIGITS
COLORS = {
    "red": (225, 35, 40), "green": (40, 175, 60), "blue": (75, 110, 250), "yellow": (240, 225, 50),
    "purple": (155, 60, 205), "orange": (245, 135, 25), "cyan": (55, 215, 225), "white": (240, 240, 240),
}  # fmt: skip
SIDES = {"small": 11, "large": 17}  # pixels an object
WINDOWS = {"small": 16, "large": 24}  # pixels a grounding crop
JITTER = {"small": 3, "large": 1}  # pixels off the cell's centre, at most: neighbours never touch
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CENTERS = (11, 32, 53)
HELD_OUT = frozenset({
    ("red", "star"), ("green", "cross"), ("blue", "triangle"), ("yellow", "diamond"),
    ("purple", "circle"), ("orange", "square"), ("cyan", "star"), ("white", "cross"),
})  # fmt: skip
COUNTS = ("no", "one", "two", "three", "four")
TRANSFORMS = (("rotate", (-40, -30, 30, 40)), ("shear", (-0.6, 0.6)), ("thick", (1,)), ("invert", (1,)))
SEEN_RELATIONS, UNSEEN_RELATIONS = ("left of", "right of", "above"), ("below",)

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
# Position in this list is the stream number of the random generator: append, never reorder.
STREAMS = tuple(f"train/{name}" for name in SUBSETS) + tuple(f"eval/{task.name}" for task in TASKS)
STREAMS += ("corpus/train", "corpus/heldout")

Object = dict[str, Any]
Scene = list[Object]


# ---- scenes and their words -----------------------------------------------------------------------------------------


def phrase(obj: Object) -> str:
    """What one object is called: "large red circle"."""
    return f"{obj['size']} {obj['color']} {obj['kind']}"


def caption(scene: Scene) -> str:
    """The objects in reading order: "a large red circle at the top left, a small blue 7 at the bottom"."""
    ordered = sorted(scene, key=lambda obj: POSITIONS.index(obj["position"]))
    return ", ".join(f"a {phrase(obj)} at the {obj['position']}" for obj in ordered)


def count_kinds(scene: Scene) -> tuple[int, int]:
    """(number of shapes, number of digits)."""
    n_digits = sum(obj["kind"] in DIGITS for obj in scene)
    return len(scene) - n_digits, n_digits


def scene_type(n_shapes: int, n_digits: int) -> str:
    """The label of the Counting task: "two shapes and one digit"."""
    shapes, digits = (word + ("" if n == 1 else "s") for word, n in (("shape", n_shapes), ("digit", n_digits)))
    return f"{COUNTS[n_shapes]} {shapes} and {COUNTS[n_digits]} {digits}"


SCENE_TYPES = tuple(scene_type(n - d, d) for n in range(1, 5) for d in range(n + 1))
PHRASES = tuple(f"{s} {c} {k}" for s in SIDES for c in COLORS for k in KINDS if (c, k) not in HELD_OUT)


@cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # a second to import: only where pictures are made

    digits = load_digits()
    return (digits.images * 15.9375).astype(np.uint8), digits.target


@cache
def digit_indices(digit: str, split: str) -> np.ndarray:
    """Indices of a digit's pictures in `load_digits`: every fifth is for evaluation, the others for training."""
    indices = np.flatnonzero(_handwriting()[1] == int(digit))
    return indices[(indices % 5 == 0) == (split == "eval")]


def belongs_to(scene: Scene) -> str:
    """The split a scene is for: an eighth of all captions, by checksum, is "eval", never shown in training."""
    return "eval" if crc32(caption(scene).encode()) % 8 == 0 else "train"


def _clear(scene: Scene, also: tuple[str, str] | None = None) -> bool:
    """Whether colour and kind name each object, each has its own cell, and no combination but `also` is held out."""
    names = {(obj["color"], obj["kind"]) for obj in scene}
    cells = {obj["position"] for obj in scene}
    return 1 <= len(scene) == len(names) == len(cells) and not (names - {also}) & HELD_OUT


def sample_scene(
    rng: np.random.Generator, split: str = "train", *, n_objects: int | None = None, n_digits: int | None = None,
    first: tuple[str, str] | None = None,
) -> Scene:  # fmt: skip
    """A random scene of the split, objects in reading order.

    n_objects: 1..4, random if None; n_digits: how many of them are digits, each with probability 0.35 if None;
    first: (color, kind) that one object must have, may be a held-out combination. Kinds and colours come from a
    palette of three a scene, so that objects often share one of the two and have to be told apart by the other.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    if n_objects is not None and not 1 <= n_objects <= 4:
        raise ValueError(f"n_objects must be in 1..4, got {n_objects}")
    while True:
        n = n_objects or int(rng.integers(1, 5))
        shapes, digits = rng.permutation(6)[:3], rng.permutation(10)[:2]
        colors = [list(COLORS)[i] for i in rng.permutation(8)[:3]]
        draws = rng.integers(0, 6, (n, 3)).tolist()  # colour, kind and size of each
        is_digit = rng.random(n) < 0.35 if n_digits is None else np.arange(n) < n_digits
        cells, offsets = rng.permutation(9), rng.integers(-3, 4, (n, 2))
        scene = []
        for i, (color, kind, size) in enumerate(draws):
            name = DIGITS[digits[kind % 2]] if is_digit[i] else SHAPES[shapes[kind % 3]]
            obj = {"kind": name, "color": colors[color % 3], "size": ("small", "large")[size % 2]}
            if first:  # one object has both, the others often one of the two
                obj["color"], obj["kind"] = first if i == 0 else (
                    first[0] if color > 3 else obj["color"], first[1] if kind > 3 else obj["kind"])  # fmt: skip
            if obj["kind"] in DIGITS:
                options = digit_indices(obj["kind"], split)
                obj["digit"] = int(options[rng.integers(len(options))])
            scene.append({**obj, "position": POSITIONS[cells[i]], "offset": offsets[i].tolist()})
        if _clear(scene, first) and belongs_to(scene) == split:
            return sorted(scene, key=lambda obj: POSITIONS.index(obj["position"]))


def related(scene: Scene, relation: str, to: Object) -> Scene:
    """The objects in a column left of (right of), or a row above (below), that of `to`."""
    row, column = divmod(POSITIONS.index(to["position"]), 3)
    test = {
        "left of": lambda r, c: c < column, "right of": lambda r, c: c > column,
        "above": lambda r, c: r < row, "below": lambda r, c: r > row,
    }[relation]  # fmt: skip
    return [obj for obj in scene if test(*divmod(POSITIONS.index(obj["position"]), 3))]


def _only(values: Iterable) -> Any:
    values = list(values)
    if len(values) != 1:
        raise ValueError(f"one answer expected, found {len(values)}: {values}")
    return values[0]


def _named(scene: Scene, color: str, kind: str) -> Object:
    return _only(obj for obj in scene if (obj["color"], obj["kind"]) == (color, kind))


def apply_edit(scene: Scene, instruction: str) -> Scene:
    """The scene after "Make|Turn|Move|Remove|Swap the red circle ..."; raises ValueError for another sentence."""
    found = re.fullmatch(r"(Make|Turn|Move|Remove|Swap) the (\w+) (\w+) ?(.*)\.", instruction)
    if not found:
        raise ValueError(f"not an edit instruction: {instruction!r}")
    verb, color, kind, rest = found.groups()
    old = _named(scene, color, kind)
    new, others = dict(old), [obj for obj in scene if obj is not old]
    if verb == "Make":
        new["size" if rest in SIDES else "color"] = rest
    elif verb == "Turn":
        new["kind"] = rest.removeprefix("into a ")
        new.pop("digit", None)
    elif verb == "Move":
        new["position"] = rest.removeprefix("to the ")
    elif verb == "Swap":
        other = _named(others, *rest.removeprefix("and the ").split())
        new["position"] = other["position"]
        others = [obj if obj is not other else {**obj, "position": old["position"]} for obj in others]
    edited = others if verb == "Remove" else [new, *others]
    return sorted(edited, key=lambda obj: POSITIONS.index(obj["position"]))


# Every question of this module and what it asks of the scene; groups of the pattern are passed on as strings.
QUESTIONS: dict[str, Callable[..., str]] = {
    r"Find the picture: (.+)": lambda scene, words: words,
    r"Describe the picture\.": lambda scene: caption(scene),
    r"How many shapes and digits are there\?": lambda scene: scene_type(*count_kinds(scene)),
    r"Which digit is in the picture\?": lambda scene: _only(o["kind"] for o in scene if o["kind"] in DIGITS),
    r"What color is the object at the (.+)\?": lambda scene, at: _only(
        o["color"] for o in scene if o["position"] == at
    ),
    r"What color is the (small |large )?(\w+)\?": lambda scene, size, kind: _only(
        o["color"] for o in scene if o["kind"] == kind and (size or o["size"]).strip() == o["size"]
    ),
    r"(?:What is|Find the object) (left of|right of|above|below) the (\w+) (\w+)[?.]": lambda scene, relation, *name: (
        phrase(_only(related(scene, relation, _named(scene, *name))))
    ),
    r"Find the ((?:small|large) \w+ \w+)\.": lambda scene, words: _only(phrase(o) for o in scene if phrase(o) == words),
    r"Where is the (\w+) (\w+)\?": lambda scene, *name: _named(scene, *name)["position"],
    r"What size is the (\w+) (\w+)\?": lambda scene, *name: _named(scene, *name)["size"],
    r"What is at the (.+)\?": lambda scene, at: phrase(_only(o for o in scene if o["position"] == at)),
    r"((?:Make|Turn|Move|Remove|Swap) .+)": lambda scene, text: caption(apply_edit(scene, text)),
}


def answer(text: str, scene: Scene) -> str:
    """What the text asks of the scene: a label, a short answer, a caption, or the phrase of the object to find.

    Raises ValueError for a text that is none of QUESTIONS and for a question without exactly one answer.
    """
    text = text.replace(PLACEHOLDER, "").strip()
    for pattern, read in QUESTIONS.items():
        if found := re.fullmatch(pattern, text):
            return read(scene, *found.groups())
    raise ValueError(f"not a question of this module: {text!r}")


# ---- pictures -------------------------------------------------------------------------------------------------------


@cache
def _shape_mask(kind: str, side: int) -> Image.Image:
    """A shape as an L picture (side, side), 0 or 255."""
    v, u = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    if kind == "star":
        angles, radii = np.arange(10) * np.pi / 5, side * 4 * np.where(np.arange(10) % 2, 0.42, 1.0)
        points = zip(side * 4 + radii * np.sin(angles), side * 4.2 - radii * np.cos(angles), strict=True)
        image = Image.new("L", (side * 8, side * 8))
        ImageDraw.Draw(image).polygon(list(points), fill=255)
        return image.resize((side, side), Image.Resampling.BOX).point(lambda value: 255 * (value > 110))
    inside = {
        "circle": u**2 + v**2 <= 1.02, "square": np.maximum(abs(u), abs(v)) <= 1, "diamond": abs(u) + abs(v) <= 1.01,
        "triangle": abs(u) <= (v + 1.1) / 2, "cross": np.minimum(abs(u), abs(v)) <= 0.27,
    }[kind]  # fmt: skip
    return Image.fromarray((inside * 255).astype(np.uint8))


def _digit_mask(obj: Object) -> Image.Image:
    """The handwritten digit as an L picture of the object's side, after its transformation, if it has one."""
    side = SIDES[obj["size"]]
    image = Image.fromarray(_handwriting()[0][obj["digit"]]).resize((side, side), Image.Resampling.BILINEAR)
    name, amount = obj.get("transform", (None, 0))
    if name == "rotate":  # degrees
        image = image.rotate(amount, Image.Resampling.BILINEAR)
    elif name == "shear":  # pixels sideways a pixel upwards
        matrix = (1, amount, -amount * side / 2, 0, 1, 0)
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    elif name == "thick":
        image = image.filter(ImageFilter.MaxFilter(3))
    elif name == "invert":  # a dark digit on a plate of its colour
        image = image.point(lambda value: 255 - value)
    return image


def _center(obj: Object) -> tuple[int, int]:
    row, column = divmod(POSITIONS.index(obj["position"]), 3)
    limit = JITTER[obj["size"]]
    dx, dy = (max(-limit, min(limit, d)) for d in obj["offset"])
    return CENTERS[column] + dx, CENTERS[row] + dy


def render(scene: Scene) -> Image.Image:
    """The scene as a 64 x 64 RGB picture on a dark, noisy background whose tint and noise follow from the scene."""
    rng = np.random.default_rng(crc32(json.dumps(scene, sort_keys=True).encode()))
    # Four-level noise, the same in all three channels, keeps the PNG files small.
    noise = rng.integers(0, 4, (CANVAS, CANVAS, 1), dtype=np.uint8) * np.uint8(5)
    image = Image.fromarray(noise + rng.integers(8, 40, 3, dtype=np.uint8))
    for obj in scene:
        mask = _digit_mask(obj) if obj["kind"] in DIGITS else _shape_mask(obj["kind"], SIDES[obj["size"]])
        x, y = _center(obj)
        shade = rng.uniform(0.85, 1.0)
        color = tuple(int(shade * channel) for channel in COLORS[obj["color"]])
        image.paste(color, (x - mask.width // 2, y - mask.height // 2), mask)
    return image


def crop(image: Image.Image, obj: Object) -> Image.Image:
    """The object with a margin: 16 x 16 pixels around a small, 24 x 24 around a large one, inside the picture."""
    side = WINDOWS[obj["size"]]
    left, top = (max(0, min(CANVAS - side, center - side // 2)) for center in _center(obj))
    return image.crop((left, top, left + side, top + side))


# ---- one example of a task ------------------------------------------------------------------------------------------


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
        scene = [{**obj, "transform": [name, _pick(rng, amounts)]} if "digit" in obj else obj for obj in scene]
    digit = _only(obj["kind"] for obj in scene if "digit" in obj)
    return _ask("Which digit is in the picture?", scene), Side(digit), [Side(d) for d in DIGITS if d != digit]


def _counting(rng, split) -> Example:
    shapes, digits = _pick(rng, [(n - d, d) for n in range(1, 5) for d in range(n + 1)])
    scene = sample_scene(rng, split, n_objects=shapes + digits, n_digits=digits)
    near = [(shapes + a, digits + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1))]
    wrong = [Side(scene_type(a, b)) for a, b in near if min(a, b) >= 0 and 1 <= a + b <= 4]
    return _ask("How many shapes and digits are there?", scene), Side(scene_type(shapes, digits)), wrong


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
    near = [p for p in PHRASES if sum(a != b for a, b in zip(p.split(), phrase(target).split(), strict=True)) == 1]
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
        if caption(edited) not in seen and _clear(edited) and (split == "eval" or belongs_to(edited) == "train"):
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
        if any((obj["color"] == target["color"]) != (obj["kind"] == target["kind"]) for obj in scene):
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


# ---- files ----------------------------------------------------------------------------------------------------------


class _Pictures:
    """Writes the pictures of one item, each once, and keeps what scenes.jsonl and the content hash need."""

    def __init__(self, root: Path, stem: str) -> None:
        self.root, self.stem = root, stem
        self.paths: dict[tuple[int, int], str] = {}
        self.scenes: list[dict[str, Any]] = []
        self.digest = hashlib.sha256()

    def path(self, side: Side, suffix: str) -> str:
        """The picture's path relative to root/images; "" for a side without one."""
        if side.scene is None:
            return ""
        identity = (id(side.scene), id(side.focus))
        if identity not in self.paths:
            image = render(side.scene)
            image = crop(image, side.focus) if side.focus else image
            path = self.paths[identity] = f"{self.stem}_{suffix}.png"
            image.save(self.root / "images" / path, compress_level=1)  # the fastest; these are small anyway
            self.digest.update(f"{image.size}".encode() + image.tobytes())
            self.scenes.append({"image": path, "scene": [side.focus] if side.focus else side.scene})
        return self.paths[identity]


def _make(root: Path, seed: int, stream: str, index: int) -> tuple[Any, list[dict], bytes]:
    """Item `index` of a stream: its row, the scenes of its pictures, its digest.

    A row of pairs is (query text, path, [(text, path, key) of the right candidate and of the hard negatives]); a row
    of the corpus is the list of its lines.
    """
    part, name = stream.split("/")
    rng = np.random.default_rng([seed, STREAMS.index(stream), index])
    folder = f"{stream}/{index // 1000:03d}"  # a thousand items a folder
    (root / "images" / folder).mkdir(parents=True, exist_ok=True)
    pictures = _Pictures(root, f"{folder}/{index % 1000:03d}")
    if part == "corpus":
        scene = sample_scene(rng, "train" if name == "train" else "eval")
        path = pictures.path(Side("", scene), "scene")
        row = [(path, "caption", "", caption(scene))] + [(path, "qa", *pair) for pair in _questions(rng, scene)]
    else:
        query, right, wrong = MAKERS[name](rng, part)
        wrong = [_pick(rng, wrong)] if part == "train" else wrong  # one hard negative a pair
        query_path = pictures.path(query, "query")
        row = (query.text, query_path, [
            (side.text, pictures.path(side, f"target{i}"), side.key) for i, side in enumerate([right, *wrong])
        ])  # fmt: skip
    pictures.digest.update(json.dumps(row).encode())
    return row, pictures.scenes, pictures.digest.digest()


def _eval_rows(task: Task, rows: list, seed: int) -> pd.DataFrame:
    """Rows of one task with their candidates: the right one, its hard negatives, then others that are not right."""
    labels = LABELS.get(task.name)
    pool = [(label, "", label) for label in labels or ()] or list(dict.fromkeys(c for row in rows for c in row[2]))
    size = task.n_candidates if labels else min(task.n_candidates, len(rows))
    rng = np.random.default_rng([seed, len(STREAMS), TASKS.index(task)])
    table = []
    for text, path, own in rows:
        chosen = dict.fromkeys(candidate[:2] for candidate in own)
        for i in rng.permutation(len(pool)):
            if len(chosen) >= size:
                break
            if pool[i][2] != own[0][2]:
                chosen.setdefault(pool[i][:2])
        table.append((text, path, *map(list, zip(*chosen, strict=True))))
    return pd.DataFrame(table, columns=EVAL)


def _write_tables(root: Path, rows: dict[str, list], seed: int) -> bytes:
    """All parquet files; returns a digest of their rows."""
    tables = {}
    for name in SUBSETS:
        pairs = [(text, path, *right[:2], *wrong[:2]) for text, path, (right, wrong) in rows[f"train/{name}"]]
        tables[f"train/{name}/original-00000-of-00001"] = pd.DataFrame(pairs, columns=TRAIN)
    for task in TASKS:
        tables[f"eval/{task.name}/test-00000-of-00001"] = _eval_rows(task, rows[f"eval/{task.name}"], seed)
    for split in ("train", "heldout"):
        lines = [line for scene in rows[f"corpus/{split}"] for line in scene]
        tables[f"corpus/{split}"] = pd.DataFrame(lines, columns=CORPUS)
    write_tables(root, tables)
    digest = hashlib.sha256()
    for name, table in tables.items():
        digest.update(json.dumps([name, table.values.tolist()]).encode())
    return digest.digest()


def _check_settings(settings: dict[str, int]) -> None:
    limits = {"seed": (0, 2**32), "n_pairs": (8, 10**7), "n_queries": (2, 10**5), "n_corpus": (1, 10**7)}
    for name, (low, high) in limits.items():
        if not low <= settings[name] <= high:
            raise ValueError(f"{name} must be in {low}..{high}, got {settings[name]}")
    if settings["n_pairs"] % len(SUBSETS):
        raise ValueError(f"n_pairs must be a multiple of {len(SUBSETS)}, one share a subset; got {settings['n_pairs']}")


def build(root: Path, *, seed: int = 0, n_pairs: int, n_queries: int, n_corpus: int) -> dict[str, Any]:
    """Write the benchmark into `root` and return its manifest; a finished build of the same settings is returned as is.

    n_pairs: training pairs in all, a multiple of 8; n_queries: a task; n_corpus: scenes of text for the backbone and
    for reconstruction. Item i depends on (seed, stream, i) alone: a smaller build is a prefix of a larger one.
    All cores make a large one. Raises ValueError for a bad argument and where `root` holds something else; nothing is
    ever overwritten.
    """
    root = Path(root)
    settings = {"seed": seed, "n_pairs": n_pairs, "n_queries": n_queries, "n_corpus": n_corpus}
    _check_settings(settings)
    wanted = {"generator": "world", "generator_version": GENERATOR_VERSION, "settings": settings}
    if (found := finished(root, wanted)) is not None:
        return found
    from sklearn.utils.parallel import Parallel, delayed  # here: it takes a second, and a finished build needs none

    lengths = {f"train/{name}": n_pairs // len(SUBSETS) for name in SUBSETS}
    lengths |= {f"eval/{task.name}": n_queries for task in TASKS}
    lengths |= {"corpus/train": n_corpus, "corpus/heldout": max(50, n_corpus // 20)}
    (root / "images").mkdir(parents=True)
    rows: dict[str, list] = {stream: [] for stream in lengths}
    content, n_images = hashlib.sha256(), 0
    items = [(stream, index) for stream, length in lengths.items() for index in range(length)]
    in_order = Parallel(n_jobs=-1 if len(items) > FEW else 1, return_as="generator", batch_size=64)
    with (root / "scenes.jsonl").open("w", encoding="utf-8") as scenes:
        made = in_order(delayed(_make)(root, seed, *item) for item in items)
        for (stream, _), (row, lines, digest) in zip(items, made, strict=True):
            rows[stream].append(row)
            scenes.writelines(json.dumps(line) + "\n" for line in lines)
            content.update(digest)
            n_images += len(lines)
    content.update(_write_tables(root, rows, seed))
    # Candidates a row really has: pools of pictures and captions cannot be larger than the number of queries.
    pools = {t.name: t.n_candidates if t.name in LABELS else min(t.n_candidates, n_queries) for t in TASKS}
    manifest = {
        **wanted, "n_images": n_images, "rows": lengths,
        "tasks": [[t.name, t.meta_task, t.in_distribution, pools[t.name]] for t in TASKS],
        "subsets": list(SUBSETS), "content_hash": content.hexdigest(),
    }  # fmt: skip
    write_json(root / "manifest.json", manifest)
    return manifest


# ---- reading --------------------------------------------------------------------------------------------------------


def read_scenes(root: Path) -> dict[str, Scene]:
    """Image path -> its scene; for a grounding crop, the one object it shows."""
    with (Path(root) / "scenes.jsonl").open(encoding="utf-8") as file:
        return {line["image"]: line["scene"] for line in map(json.loads, file)}


def oracle(task_name: str, row: dict[str, Any], scenes: dict[str, Scene]) -> int:
    """Index of the candidate that the question and the scenes make right, wherever it stands in the row's lists.

    Raises ValueError for an unknown task and unless exactly one candidate is right.
    """
    if task_name not in MAKERS:
        raise ValueError(f"no task {task_name!r}; tasks: {', '.join(MAKERS)}")
    wanted = answer(row["qry_text"], scenes.get(row["qry_img_path"], []))
    find = task_name.startswith("Grounding")  # candidates are crops, of one object each
    candidates = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
    keys = [text or (phrase(scenes[path][0]) if find else caption(scenes[path])) for text, path in candidates]
    right = [i for i, key in enumerate(keys) if key == wanted]
    if len(right) != 1:
        raise ValueError(f"{task_name}: {len(right)} candidates are {wanted!r} for {row['qry_text']!r}")
    return right[0]


def pixel_bow_embed(items: Sequence[dict[str, Any]], image_root: Path | str = "") -> np.ndarray:
    """The floor: no training, pixels and words only. Items {text, image}, image a path below image_root -> (N, 512).

    8 x 8 x 3 pixels, a 4 x 4 x 4 colour histogram, 256 hashed words; each block and the whole L2-normalised, float32.
    Raises ValueError for an item with neither text nor image.
    """
    blocks = (slice(0, 192), slice(192, 256), slice(256, 512))
    out = np.zeros((len(items), 512), dtype=np.float32)
    for row, item in zip(out, items, strict=True):
        words = re.findall(r"\w+", (item.get("text") or "").replace(PLACEHOLDER, "").lower())
        if not words and not item.get("image"):
            raise ValueError("an item needs text or an image")
        for word in words:
            row[256 + crc32(word.encode()) % 256] += 1
        if item.get("image"):
            image = load_image(Path(image_root) / item["image"])
            row[:192] = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32).ravel()
            bins = np.asarray(image).reshape(-1, 3) // 64 @ np.array([16, 4, 1])
            row[192:256] = np.bincount(bins, minlength=64)
        for block in blocks:
            row[block] /= max(np.linalg.norm(row[block]), 1e-12)
        row /= max(np.linalg.norm(row), 1e-12)
    return out
