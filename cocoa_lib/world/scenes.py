"""A scene: one to four drawings on a plain background; what it looks like and how it is described.

Drawings stand near nine named positions, off by a few pixels. Scenes are split by a checksum of
their description, so that no scene of the development or test queries is ever trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from .concepts import checksum, held_out_size, load_concepts
from .pictures import draw, paste
from .words import join_words, say_count, say_place, with_article

CANVAS = 80  # pixels a side
SIDES = {"small": 24, "large": 34}  # pixels of a drawing's longer side
WINDOW = 40  # pixels a side of a crop around one drawing
JITTER = 2  # pixels off the named position, at most
OVERLAP = 3  # pixels by which the boxes of two drawings may overlap
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
CENTERS = (14, 40, 66)  # pixels: of the rows and of the columns
LIGHT = ((255, 255, 255), (238, 238, 232), (214, 232, 246), (224, 242, 216), (250, 230, 214))
BACKGROUNDS = (*LIGHT, (236, 222, 242), (98, 106, 126), (118, 106, 92))
SPLITS = {"test": (0,), "dev": (1,), "train": tuple(range(2, 8))}  # remainders of the checksum by 8


@dataclass(frozen=True)
class Drawn:
    """One drawing of a scene: its concept, "small" or "large", its named position, its left and top
    pixel.
    """

    name: str
    size: str
    position: str
    left: int
    top: int

    @property
    def phrase(self) -> str:
        """ "large red apple" """
        return f"{self.size} {self.name}"

    @property
    def picture(self) -> np.ndarray:
        return draw(load_concepts()[self.name].emoji, SIDES[self.size])


@dataclass(frozen=True)
class Scene:
    """Drawings in reading order, and the number of a background."""

    drawings: tuple[Drawn, ...]
    background: int = 0

    def __len__(self) -> int:
        return len(self.drawings)

    def to_json(self) -> dict[str, Any]:
        return {"drawings": [vars(one) for one in self.drawings], "background": self.background}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Scene:
        return cls(tuple(Drawn(**one) for one in read["drawings"]), read["background"])


def make_scene(drawings: Sequence[Drawn], background: int) -> Scene:
    """A scene with its drawings put into reading order."""
    order = sorted(drawings, key=lambda one: POSITIONS.index(one.position))
    return Scene(tuple(order), background)


# ---- making -------------------------------------------------------------------------------------


def place(rng: np.random.Generator, name: str, size: str, position: str) -> Drawn:
    """A drawing near its named position, wholly on the canvas."""
    height, width = draw(load_concepts()[name].emoji, SIDES[size]).shape[:2]
    row, column = divmod(POSITIONS.index(position), 3)
    down, across = rng.integers(-JITTER, JITTER + 1, 2).tolist()
    top = min(max(CENTERS[row] + down - height // 2, 0), CANVAS - height)
    left = min(max(CENTERS[column] + across - width // 2, 0), CANVAS - width)
    return Drawn(name, size, position, left, top)


def overlaps(one: Drawn, other: Drawn) -> bool:
    """Whether the boxes of two drawings overlap by more than OVERLAP pixels both ways."""
    (h1, w1), (h2, w2) = one.picture.shape[:2], other.picture.shape[:2]
    across = min(one.left + w1, other.left + w2) - max(one.left, other.left)
    down = min(one.top + h1, other.top + h2) - max(one.top, other.top)
    return min(across, down) > OVERLAP


def is_clear(scene: Scene, allowed: str = "") -> bool:
    """True if no drawings share a position or overlap, and none has its held-out size.

    allowed: a concept that may have it.
    """
    drawings = scene.drawings
    if not 1 <= len(drawings) <= 4 or len({one.position for one in drawings}) < len(drawings):
        return False
    if any(one.size == held_out_size(one.name) and one.name != allowed for one in drawings):
        return False
    pairs = ((a, b) for i, a in enumerate(drawings) for b in drawings[:i])
    return not any(overlaps(a, b) for a, b in pairs)


def find_split(scene: Scene) -> str:
    """Find the split that a scene is for: by a checksum, of eight one test, one dev, six train."""
    remainder = checksum(describe(scene)) % 8
    return next(split for split, remainders in SPLITS.items() if remainder in remainders)


def sample_scene(
    rng: np.random.Generator,
    split: str,
    names: Sequence[str],
    *,
    n: int | None = None,
    first: Sequence[tuple[str, str]] = (),
    repeat: float = 0.15,
) -> Scene:
    """A random scene of a split.

    names: what it may show; n: how many drawings, 1 to 4, random if None; first: (name, size) of
    the first ones, sizes may be held out; repeat: how often a drawing is of the same concept as the
    one before.
    """
    allowed = first[0][0] if first else ""
    count = n or int(rng.integers(1, 5))
    while True:
        chosen = list(first)
        while len(chosen) < count:
            name = names[int(rng.integers(len(names)))]
            if chosen and rng.random() < repeat:
                name = chosen[-1][0]
            chosen.append((name, ("small", "large")[int(rng.integers(2))]))
        spots = [POSITIONS[spot] for spot in rng.permutation(len(POSITIONS))[:count]]
        background = int(rng.integers(len(BACKGROUNDS)))
        plan = make_scene(
            [Drawn(*one, spot, 0, 0) for one, spot in zip(chosen, spots, strict=True)], background
        )
        if find_split(plan) != split:  # known before anything is placed
            continue
        placed = [place(rng, one.name, one.size, one.position) for one in plan.drawings]
        scene = Scene(tuple(placed), background)
        if is_clear(scene, allowed):
            return scene


# ---- words --------------------------------------------------------------------------------------


def describe(scene: Scene) -> str:
    """All that is said of a scene: "a large snake at the top left, a small red apple at the
    bottom".
    """
    return ", ".join(
        f"{with_article(one.phrase)} {say_place(one.position)}" for one in scene.drawings
    )


def _place_first(scene: Scene) -> str:
    return ", ".join(
        f"{say_place(one.position)} {with_article(one.phrase)}" for one in scene.drawings
    )


def _sentence(scene: Scene) -> str:
    return f"There is {join_words(describe(scene).split(', '))}."


def _list(scene: Scene) -> str:
    return "; ".join(f"{one.position}: {one.phrase}" for one in scene.drawings)


def list_names(scene: Scene) -> str:
    """What is there, without sizes and places: "two snakes and a red apple"."""
    counts = Counter(one.name for one in scene.drawings)
    return join_words([say_count(name, count) for name, count in counts.items()])


# Each says all of a scene, in other words; a caption is not decided by its first ones.
STYLES: tuple[Callable[[Scene], str], ...] = (describe, _place_first, _sentence, _list)


# ---- pixels -------------------------------------------------------------------------------------


def render(scene: Scene) -> np.ndarray:
    """(CANVAS, CANVAS, 3) uint8."""
    canvas = np.empty((CANVAS, CANVAS, 3), dtype=np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    for one in scene.drawings:
        paste(canvas, one.picture, one.left, one.top)
    return canvas


def center(drawing: np.ndarray, side: int) -> Image.Image:
    """A drawing (height, width, 4) uint8 in the middle of white, `side` pixels square."""
    canvas = np.full((side, side, 3), 255, dtype=np.uint8)
    height, width = drawing.shape[:2]
    paste(canvas, drawing, (side - width) // 2, (side - height) // 2)
    return Image.fromarray(canvas)


def draw_alone() -> dict[str, Image.Image]:
    """Every concept by name: its large drawing alone, in the middle of a white picture."""
    return {
        name: center(draw(concept.emoji, SIDES["large"]), CANVAS)
        for name, concept in load_concepts().items()
    }


def crop(picture: np.ndarray, one: Drawn) -> np.ndarray:
    """(WINDOW, WINDOW, 3): a drawing and what is around it, inside the picture."""
    height, width = one.picture.shape[:2]
    top = min(max(one.top + height // 2 - WINDOW // 2, 0), CANVAS - WINDOW)
    left = min(max(one.left + width // 2 - WINDOW // 2, 0), CANVAS - WINDOW)
    return picture[top : top + WINDOW, left : left + WINDOW]


def move(rng: np.random.Generator, one: Drawn, **changes: str) -> Drawn:
    """A drawing with another name, size or position, put in its place anew."""
    new = replace(one, **changes)
    return place(rng, new.name, new.size, new.position)
