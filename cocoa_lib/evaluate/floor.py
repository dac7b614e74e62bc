"""The floor: pixels and words, no training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

from ..items import PLACEHOLDER, load_image


def hash_words(item: dict[str, Any], n: int) -> list[int]:
    """Hash the words of an item, without the mark of its picture, into 0 to n - 1."""
    words = re.findall(r"\w+", PLACEHOLDER.sub("", item.get("text") or "").lower())
    return [crc32(word.encode()) % n for word in words]


def pixel_bow_embed(items: Sequence[dict[str, Any]]) -> np.ndarray:
    """Embed items {text, image path} by pixels and words alone -> (N, 512) float32.

    8 x 8 x 3 pixels, a 4 x 4 x 4 colour histogram, 256 hashed words; each block and the whole
    L2-normalised.
    """
    blocks = (slice(0, 192), slice(192, 256), slice(256, 512))
    out = np.zeros((len(items), 512), dtype=np.float32)
    for row, item in zip(out, items, strict=True):
        row[256:] = np.bincount(hash_words(item, 256), minlength=256)
        if item.get("image"):
            image = load_image(item["image"])
            small = image.resize((8, 8), Image.Resampling.BOX)
            row[:192] = np.asarray(small, dtype=np.float32).ravel()
            bins = np.asarray(image).reshape(-1, 3) // 64 @ np.array([16, 4, 1])
            row[192:256] = np.bincount(bins, minlength=64)
        for block in blocks:
            row[block] /= max(np.linalg.norm(row[block]), 1e-12)
        row /= max(np.linalg.norm(row), 1e-12)
    return out
