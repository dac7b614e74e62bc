"""Explorer: what a model restores of a picture and its caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..evaluate.restore import reconstruct, restored_words
from ..inputs import Batch, Inputs
from .figures import COLOURS
from .panel import _explorer, _img, _slider


def cells_image(pixels: Tensor, grid: Tensor, inputs: Inputs) -> np.ndarray:
    """Patches (patches, D), as the processor orders them, and grid (3,) of the first picture -> (H, W, 3) uint8."""
    processor = inputs.image_processor
    m, p = processor.merge_size, processor.patch_size
    t, h, w = grid.tolist()
    patches = (
        pixels[: t * h * w].float().reshape(t, h // m, w // m, m, m, 3, -1, p, p)[0, ..., 0, :, :]
    )  # frame 0
    image = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(h * p, w * p, 3)
    image = image * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return (image.clamp(0, 1) * 255).round().byte().numpy()


def reconstruction_html(
    batch: Batch, predicted: Sequence[int], patches: Mapping[str, Tensor], inputs: Inputs
) -> str:
    """Hidden words in place, each with what was predicted, and the first picture: original, seen, predicted."""
    words, right = [], 0
    for text, truth in restored_words(batch, predicted, inputs):
        if truth is None:
            words.append(escape(text))
            continue
        right += (hit := text == truth)
        colour, mark = (COLOURS[2], "&#10003;") if hit else (COLOURS[5], "&#10007;")
        was = "" if hit else f" <small>(was &ldquo;{escape(truth)}&rdquo;)</small>"
        words.append(
            f'<span style="border-bottom:3px solid {colour}"><b>{escape(text)}</b>{mark}{was}</span>'
        )
    pictures = ""
    for title, each in patches.items():
        image = Image.fromarray(cells_image(each, batch["image_grid_thw"][0], inputs))
        pictures += f'<figure style="margin:4px">{_img(image, title)}<figcaption>{title}</figcaption></figure>'
    return (
        f'<div style="display:flex;flex-wrap:wrap">{pictures}</div><p style="white-space:pre-wrap">{"".join(words)}</p>'
        f"<p>{right} of {len(predicted)} hidden tokens come back (&#10003;); in brackets: what stood there.</p>"
    )


def reconstruction_explorer(
    model, inputs: Inputs, rows: Sequence[dict[str, Any]], decoder: nn.Module | None = None, *,
    layout: str = "bidirectional", objective: str = "mntp", fill: Tensor | None = None,
) -> widgets.VBox:  # fmt: skip
    """Choose a sample and how much of it to hide, or type another caption for it: see what comes back.

    rows: {text, image, target}; decoder: the `PatchDecoder` trained with the model, or None to show words only.
    """
    stage1 = layout == "bidirectional"
    samples = [(f"{i + 1}: {str(row['target'])[:40]}", i) for i, row in enumerate(rows)]
    controls = {
        "sample": widgets.Dropdown(options=samples, description="sample"),
        "text_rate": _slider(0.2 if stage1 else 0.7, 0.0, 1.0, "words hidden", 0.05),
        "patch_rate": _slider(0.5 if stage1 else 0.0, 0.0, 1.0, "cells hidden", 0.05),
        "draw": _slider(0, 0, 20, "draw"),
        "words": widgets.Text(
            placeholder="your own caption", description="or type", continuous_update=False
        ),
    }
    controls["patch_rate"].disabled = not stage1  # stage 2 hides no cells

    def answer(sample: int, words: str, **how: Any) -> dict[str, str]:
        row = {**rows[sample], "target": words.strip() or rows[sample]["target"]}
        found = reconstruct(
            model,
            inputs,
            row,
            layout=layout,
            objective=objective,
            decoder=decoder,
            fill=fill,
            **how,
        )
        return {"reconstruction": reconstruction_html(*found, inputs)}

    return _explorer(controls, answer, ["reconstruction"])
