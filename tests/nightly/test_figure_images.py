"""Every figure looks as it looked when somebody last looked at it.

The pictures in `baseline/` are figures shrunk eight times, so that a font's hinting does not count and a
missing bar does. After a change that is meant: `python tests/nightly/test_figure_images.py` writes them anew.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from figure_cases import CASES  # noqa: E402

DRAWN_BY = "3.11"  # matplotlib, whose versions differ in where text and axes come to lie
BASELINE = Path(__file__).parent / "baseline"


def shrink(figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=150)
    image = Image.open(file).convert("RGB")
    return image.resize((image.width // 8, image.height // 8), Image.Resampling.BOX)


@pytest.mark.skipif(
    not matplotlib.__version__.startswith(DRAWN_BY), reason=f"drawn by matplotlib {DRAWN_BY}"
)
@pytest.mark.parametrize("name", CASES)
def test_it_looks_as_it_did(name):
    now, then = shrink(CASES[name]()), Image.open(BASELINE / f"{name}.png")
    assert now.size == then.size
    difference = np.abs(np.asarray(now, dtype=int) - np.asarray(then, dtype=int))
    assert (difference.max(-1) > 64).mean() < 0.005


if __name__ == "__main__":
    for each, draw in CASES.items():
        shrink(draw()).save(BASELINE / f"{each}.png")
