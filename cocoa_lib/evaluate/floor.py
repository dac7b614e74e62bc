"""The floor: pixels and words, no training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

from ..items import PLACEHOLDER, load_image


def pixel_bow_embed(items: Sequence[dict[str, Any]], image_root: Path | str = "") -> np.ndarray:
    """Embed items {text, image path below image_root} by pixels and words alone -> (N, 512) float32.

    8 x 8 x 3 pixels, a 4 x 4 x 4 colour histogram, 256 hashed words; each block and the whole
    L2-normalised. Raises ValueError for an item with neither text nor image.
    """
    blocks = (slice(0, 192), slice(192, 256), slice(256, 512))
    out = np.zeros((len(items), 512), dtype=np.float32)
    for row, item in zip(out, items, strict=True):
        words = re.findall(r"\w+", PLACEHOLDER.sub("", item.get("text") or "").lower())
        if not words and not item.get("image"):
            raise ValueError("an item needs text or an image")
        for word in words:
            row[256 + crc32(word.encode()) % 256] += 1
        if item.get("image"):
            image = load_image(Path(image_root) / item["image"])
            small = image.resize((8, 8), Image.Resampling.BOX)
            row[:192] = np.asarray(small, dtype=np.float32).ravel()
            bins = np.asarray(image).reshape(-1, 3) // 64 @ np.array([16, 4, 1])
            row[192:256] = np.bincount(bins, minlength=64)
        for block in blocks:
            row[block] /= max(np.linalg.norm(row[block]), 1e-12)
        row /= max(np.linalg.norm(row), 1e-12)
    return out
