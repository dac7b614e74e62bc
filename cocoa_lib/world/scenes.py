"""Scenes of coloured objects: sampling, words, questions and answers, pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
CENTERS = (11, 32, 53)
HELD_OUT = frozenset({
    ("red", "star"), ("green", "cross"), ("blue", "triangle"), ("yellow", "diamond"),
    ("purple", "circle"), ("orange", "square"), ("cyan", "star"), ("white", "cross"),
})  # fmt: skip
COUNTS = ("no", "one", "two", "three", "four")
TRANSFORMS = (
    ("rotate", (-40, -30, 30, 40)),
    ("shear", (-0.6, 0.6)),
    ("thick", (1,)),
    ("invert", (1,)),
)
SEEN_RELATIONS, UNSEEN_RELATIONS = ("left of", "right of", "above"), ("below",)
Object = dict[str, Any]
Scene = list[Object]


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
    shapes, digits = (
        word + ("" if n == 1 else "s") for word, n in (("shape", n_shapes), ("digit", n_digits))
    )
    return f"{COUNTS[n_shapes]} {shapes} and {COUNTS[n_digits]} {digits}"


SCENE_TYPES = tuple(scene_type(n - d, d) for n in range(1, 5) for d in range(n + 1))
PHRASES = tuple(
    f"{s} {c} {k}" for s in SIDES for c in COLORS for k in KINDS if (c, k) not in HELD_OUT
)


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
        others = [
            obj if obj is not other else {**obj, "position": old["position"]} for obj in others
        ]
    edited = others if verb == "Remove" else [new, *others]
    return sorted(edited, key=lambda obj: POSITIONS.index(obj["position"]))


# Every question of this module and what it asks of the scene; groups of the pattern are passed on as strings.
QUESTIONS: dict[str, Callable[..., str]] = {
    r"Find the picture: (.+)": lambda scene, words: words,
    r"Describe the picture\.": lambda scene: caption(scene),
    r"How many shapes and digits are there\?": lambda scene: scene_type(*count_kinds(scene)),
    r"Which digit is in the picture\?": lambda scene: _only(
        o["kind"] for o in scene if o["kind"] in DIGITS
    ),
    r"What color is the object at the (.+)\?": lambda scene, at: _only(
        o["color"] for o in scene if o["position"] == at
    ),
    r"What color is the (small |large )?(\w+)\?": lambda scene, size, kind: _only(
        o["color"] for o in scene if o["kind"] == kind and (size or o["size"]).strip() == o["size"]
    ),
    r"(?:What is|Find the object) (left of|right of|above|below) the (\w+) (\w+)[?.]": lambda scene, relation, *name: (
        phrase(_only(related(scene, relation, _named(scene, *name))))
    ),
    r"Find the ((?:small|large) \w+ \w+)\.": lambda scene, words: _only(
        phrase(o) for o in scene if phrase(o) == words
    ),
    r"Where is the (\w+) (\w+)\?": lambda scene, *name: _named(scene, *name)["position"],
    r"What size is the (\w+) (\w+)\?": lambda scene, *name: _named(scene, *name)["size"],
    r"What is at the (.+)\?": lambda scene, at: phrase(
        _only(o for o in scene if o["position"] == at)
    ),
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


@cache
def _shape_mask(kind: str, side: int) -> Image.Image:
    """A shape as an L picture (side, side), 0 or 255."""
    v, u = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    if kind == "star":
        angles, radii = np.arange(10) * np.pi / 5, side * 4 * np.where(np.arange(10) % 2, 0.42, 1.0)
        points = zip(
            side * 4 + radii * np.sin(angles), side * 4.2 - radii * np.cos(angles), strict=True
        )
        image = Image.new("L", (side * 8, side * 8))
        ImageDraw.Draw(image).polygon(list(points), fill=255)
        return image.resize((side, side), Image.Resampling.BOX).point(
            lambda value: 255 * (value > 110)
        )
    inside = {
        "circle": u**2 + v**2 <= 1.02, "square": np.maximum(abs(u), abs(v)) <= 1, "diamond": abs(u) + abs(v) <= 1.01,
        "triangle": abs(u) <= (v + 1.1) / 2, "cross": np.minimum(abs(u), abs(v)) <= 0.27,
    }[kind]  # fmt: skip
    return Image.fromarray((inside * 255).astype(np.uint8))


def _digit_mask(obj: Object) -> Image.Image:
    """The handwritten digit as an L picture of the object's side, after its transformation, if it has one."""
    side = SIDES[obj["size"]]
    image = Image.fromarray(_handwriting()[0][obj["digit"]]).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    name, amount = obj.get("transform", (None, 0))
    if name == "rotate":  # degrees
        image = image.rotate(amount, Image.Resampling.BILINEAR)
    elif name == "shear":  # pixels sideways a pixel upwards
        matrix = (1, amount, -amount * side / 2, 0, 1, 0)
        image = image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
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
        mask = (
            _digit_mask(obj)
            if obj["kind"] in DIGITS
            else _shape_mask(obj["kind"], SIDES[obj["size"]])
        )
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
