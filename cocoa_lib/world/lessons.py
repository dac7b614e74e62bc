"""What the small backbone learns from: drawings, scenes with a label a cell, conversations.

Nothing is read from files. A batch depends on the random generator it is given and is
never seen twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .concepts import load_concepts, select_names
from .pictures import draw, paste
from .questions import answer, list_questions, name_kind
from .scenes import (
    BACKGROUNDS,
    CANVAS,
    POSITIONS,
    SIDES,
    STYLES,
    WINDOW,
    Drawn,
    Scene,
    list_names,
    render,
    sample_scene,
)
from .words import with_article

CELL = 20  # pixels a side: what the language model sees as one token
COVERED, EMPTY = (
    0.25,
    0.03,
)  # ink on a cell: from here on it is labelled with the drawing; up to here as background
BACKGROUND, IGNORE = 0, -100
QUESTIONS_A_SCENE = 4
SINGLE = 0.4  # share of the readings about a single drawing
SPOTS = len(POSITIONS) * len(SIDES)

Turns = list[tuple[str, str]]  # question and answer; a caption has no question


@dataclass(frozen=True)
class Lesson:
    """A batch before any model sees it.

    pictures: (N, S, S, 3) uint8; cells: (N, cells) int64, the concept on each; spots: the same of
    position and size, IGNORE where there is no drawing; turns: what is said; readings: talks about
    a text, without a picture.
    """

    pictures: np.ndarray
    cells: np.ndarray
    spots: np.ndarray
    turns: list[Turns]
    readings: list[Turns] = field(default_factory=list)


def known_concepts() -> list[str]:
    """Names that the backbone learns: all but the unknown. Label k + 1 of a cell is name k."""
    return select_names("paired") + select_names("captioned")


def label_cells(drawings: Sequence[Drawn], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Label each cell with what covers it: its concept and its spot, (cells,) int64 each, in the
    merger's order.
    """
    labels = {name: label for label, name in enumerate(known_concepts(), 1)}
    count = side // CELL
    shares = np.zeros((len(drawings), count * count), dtype=np.float32)
    for row, one in zip(shares, drawings, strict=True):
        ink, alpha = np.zeros((side, side), dtype=np.float32), one.picture[..., 3]
        ink[one.top : one.top + alpha.shape[0], one.left : one.left + alpha.shape[1]] = alpha > 127
        row[:] = ink.reshape(count, CELL, count, CELL).mean((1, 3)).ravel()
    most = shares.max(0)
    owners, thin = shares.argmax(0), shares.argmax(1)
    owners[thin] = range(len(drawings))  # thin drawings cover no cell enough
    most[thin] = 1
    names, spots = zip(*((labels[one.name], number_spot(one)) for one in drawings), strict=True)
    beside = np.where(most <= EMPTY, BACKGROUND, IGNORE)
    return (
        np.where(most >= COVERED, np.array(names)[owners], beside),
        np.where(most >= COVERED, np.array(spots)[owners], IGNORE),
    )


def number_spot(one: Drawn) -> int:
    """Position and size of a drawing as one number below SPOTS."""
    return POSITIONS.index(one.position) * len(SIDES) + list(SIDES).index(one.size)


def make_crops(rng: np.random.Generator, n: int, names: Sequence[str]) -> Lesson:
    """Single drawings anywhere on a picture of the size of a crop."""
    pictures, cells, turns = np.empty((n, WINDOW, WINDOW, 3), dtype=np.uint8), [], []
    for picture in pictures:
        name, size = names[int(rng.integers(len(names)))], ("small", "large")[int(rng.integers(2))]
        height, width = draw(load_concepts()[name].emoji, SIDES[size]).shape[:2]
        top, left = int(rng.integers(WINDOW - height + 1)), int(rng.integers(WINDOW - width + 1))
        one = Drawn(name, size, "center", left, top)
        picture[:] = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
        paste(picture, one.picture, left, top)
        cells.append(label_cells([one], WINDOW)[0])
        turns.append(talk_about_crop(rng, one))
    cells = np.stack(cells)
    return Lesson(pictures, cells, np.full_like(cells, IGNORE), turns)  # a crop has no places


def make_scenes(
    rng: np.random.Generator,
    n: int,
    names: Sequence[str],
    *,
    split: str = "train",
    count: int | None = None,
) -> Lesson:
    """Scenes of one to four drawings, or of `count`."""
    scenes = [sample_scene(rng, split, names, n=count) for _ in range(n)]
    cells, spots = zip(*(label_cells(scene.drawings, CANVAS) for scene in scenes), strict=True)
    return Lesson(
        np.stack([render(scene) for scene in scenes]),
        np.stack(cells),
        np.stack(spots),
        [talk_about_scene(rng, scene) for scene in scenes],
    )


def talk_about_crop(rng: np.random.Generator, one: Drawn) -> Turns:
    """The drawing's name, as a caption and as an answer, and its kind."""
    scene = Scene((one,))
    options = [
        ("", list_names(scene)),
        ("What is in the picture?", one.name),
        ("What kind of thing is in the picture?", name_kind(one.name)),
    ]
    return [options[i] for i in rng.permutation(3)[:2]]


def talk_about_scene(rng: np.random.Generator, scene: Scene) -> Turns:
    """A caption, or some questions with their answers."""
    if rng.random() < 0.5:
        style = (*STYLES, list_names)[int(rng.integers(len(STYLES) + 1))]
        return [("", style(scene))]
    texts = list_questions(scene)
    chosen = [texts[i] for i in rng.permutation(len(texts))[:QUESTIONS_A_SCENE]]
    return [(text, min(answer(text, scene))) for text in chosen]


def make_readings(
    rng: np.random.Generator, n: int, names: Sequence[str], split: str = "train"
) -> list[Turns]:
    """Talks about captions in place of pictures: the same questions with the same answers."""
    counts = [1 if rng.random() < SINGLE else None for _ in range(n)]
    return [read_about(rng, sample_scene(rng, split, names, n=count)) for count in counts]


def read_about(rng: np.random.Generator, scene: Scene) -> Turns:
    """A caption, and questions that it answers; the first question follows it."""
    texts = list_questions(scene)
    if len(scene) == 1 and rng.random() < 0.5:
        one = scene.drawings[0]
        options = [one.name, one.phrase, with_article(one.name), with_article(one.phrase)]
        caption = options[int(rng.integers(len(options)))]
        texts = ["What is in the picture?", "What kind of thing is in the picture?"]
    else:
        style = (*STYLES, list_names)[int(rng.integers(len(STYLES) + 1))]
        caption = style(scene)
        if style is list_names:  # which says neither places nor sizes
            texts = [text for text in texts if text.startswith(("How many", "What kind"))]
    chosen = [texts[i] for i in rng.permutation(len(texts))[:QUESTIONS_A_SCENE]]
    (first, reply), *others = [(text, min(answer(text, scene))) for text in chosen]
    return [(f"{caption}\n{first}", reply), *others]


def sample_texts(n: int) -> list[str]:
    """Captions and questions of training scenes, for the tokenizer."""
    rng, names = np.random.default_rng([0, 1]), known_concepts()
    texts = []
    for _ in range(n):
        scene = sample_scene(rng, "train", names)
        texts += [f"{question} {reply}".strip() for question, reply in talk_about_scene(rng, scene)]
    return texts
