"""Items, before any model: `{"text": str, "image": None | path | PIL.Image | list of these}`.

Users' pictures are opened here, so that what is wrong with a file is said the same way everywhere.
Imports neither torch nor transformers: a table of pairs can be looked through at once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
VISION = VISION_START + IMAGE_PAD + VISION_END
PLACEHOLDER = re.compile(r"<\|image_\d+\|>|" + re.escape(VISION))
# No format that runs another program (EPS) or holds other files. Phones' MPO opens as JPEG.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 64_000_000  # of one picture: a 10,000 x 10,000 bomb is refused before it is decoded
MAX_RATIO = 200  # one side of a picture over the other: more, transformers refuses to resize


class InputError(ValueError):
    """An item that cannot be used: says which file or row, what is wrong and what to do.

    `item`: its place among the items given to `encode`, where that is known.
    """

    item: int | None = None


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Any picture -> RGB: upright by EXIF, first frame of an animation, transparency on white.

    Raises InputError naming a file that is missing, unreadable, over MAX_PIXELS or too narrow.
    """
    if not isinstance(source, (Image.Image, str, Path, io.IOBase)):
        raise InputError(f"image: expected a path or a PIL image, found {type(source).__name__}")
    name = str(source) if isinstance(source, (str, Path)) else "the given image"
    with _open(source, name) as image:
        return _to_rgb(image, name)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture file as stored, before EXIF turns it; reads only the header.

    Raises InputError as `load_image` does, as far as a header tells.
    """
    with _open(path, str(path)) as image:
        _check_header(image, str(path))
        return image.size


@contextmanager
def _open(source: str | Path | io.IOBase | Image.Image, name: str) -> Iterator[Image.Image]:
    """Open a picture's header; what PIL says of it or of its pixels becomes an InputError."""
    try:
        given = isinstance(source, Image.Image)  # its pixels may not be read yet
        with nullcontext(source) if given else Image.open(source, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise InputError(
            f"{name}: no such image file; check the path and the image folder"
        ) from None
    except InputError:
        raise
    except Exception as error:  # struct.error, IndexError, EOFError, zlib.error, ...
        raise InputError(
            f"{name}: not a readable image ({error}); replace or leave out this file"
        ) from error


def _check_header(image: Image.Image, name: str) -> None:
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{name}: {size} is over the limit of {MAX_PIXELS:,}; shrink it")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise InputError(f"{name}: of {size}, one side over {MAX_RATIO} times the other; cut it")
    if image.mode == "F":
        raise InputError(f"{name}: floating-point pixels have no agreed range; store 8 or 16 bits")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_header(image, name)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which `convert` would clip all above 255 to white
        grey = np.asarray(image)
        # Mode I: 16 bits as older readers of PNG give them, and 8 bits in a wide form.
        deep = image.mode != "I" or grey.max() > 255
        image = Image.fromarray((grey >> 8 if deep else grey).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def item_images(item: dict[str, Any]) -> list[Any]:
    """The pictures of an item as a list: none, one or several."""
    image = item.get("image")
    if image is None or (isinstance(image, str) and not image):
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def split_prompt(text: str, n_images: int) -> list[str | None]:
    """Text and number of pictures -> pieces in order, None standing for a picture.

    MMEB's `<|image_1|>` and a written-out vision triple mark where a picture goes; without a mark,
    pictures come first (ours: CoCoA's stage-1 form). A mark without a picture is dropped, as MoCa
    does. Raises InputError for text that is none, and when marks and pictures differ in number.
    """
    if not isinstance(text, str):
        raise InputError(f"text must be a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can hold
        raise InputError(
            f"the text is not valid Unicode ({error.reason}, place {error.start})"
        ) from None
    parts = PLACEHOLDER.split(text)
    n_marks = len(parts) - 1
    if n_images == 0:
        return ["".join(parts)]
    if n_marks == 0:
        return [None] * n_images + [text]
    if n_marks != n_images:
        raise InputError(f"text marks {n_marks} image(s) but {n_images} are given: {text[:80]!r}")
    return [piece for part in parts for piece in (None, part)][1:]
