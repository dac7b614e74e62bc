"""What a model restores of a picture and its text: side by side, and as an explorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from ..corruption import IGNORE, patch_noise
from ..evaluate.restore import Restored, cell_errors, count_right, reconstruct, restored_words
from ..inputs import Batch, Inputs
from ..recipes import Stage1Recipe, Stage2Recipe
from ..reconstruction import load_decoder
from .figures import COLOURS
from .panel import Explorer, ask_words, figure, img, wrap

GREY = Image.new("RGB", (64, 64), "grey")


def cells_image(pixels: Tensor, grid: Tensor, inputs: Inputs) -> Image.Image:
    """Turn patches (patches, D) back into the first picture; grid (3,) as the processor gives it."""
    processor = inputs.image_processor
    m, p = processor.merge_size, processor.patch_size
    t, h, w = grid.tolist()
    patches = pixels[: t * h * w].float().reshape(t, h // m, w // m, m, m, 3, -1, p, p)
    image = patches[0, ..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4).reshape(h * p, w * p, 3)
    image = image * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().numpy().astype(np.uint8))


def words_html(batch: Batch, predicted: Sequence[int], inputs: Inputs) -> str:
    """Write a text with its hidden tokens as restored: green if right, else crossed, then the truth."""
    parts, right = "", 0
    for text, truth in restored_words(batch, predicted, inputs):
        hit = text == truth
        right += hit
        if truth is None:
            parts += escape(text)
            continue
        mark = "&#10003;" if hit else f"&#10007; <small>({escape(truth.strip() or truth)})</small>"
        line = f"border-bottom:3px solid {COLOURS[2 if hit else 5]}"
        parts += f'<span style="{line}">{escape(text)}{mark}</span>'
    return (
        f'<p style="white-space:pre-wrap;max-width:200px;overflow-wrap:anywhere">{parts}</p>'
        f"<p><b>{right} of {len(predicted)}</b> hidden tokens are right</p>"
    )


def three_pictures(rows: Sequence[Mapping[str, Any]], i: int) -> dict[str, Any]:
    """Choose row i's own picture, the next row's, and a plain grey one."""
    wrong = rows[(i + 1) % len(rows)]["image"]
    return {"right picture": rows[i]["image"], "wrong picture": wrong, "grey picture": GREY}


def measure_door(
    models: Mapping[str, Any], inputs: Inputs, rows: Sequence[Mapping[str, Any]], **how: Any
) -> pd.DataFrame:
    """Measure how much of a hidden text comes back with the right, a wrong and a grey picture.

    models: name -> model; how: what `reconstruct` takes, with a layout of stage 2. Columns task (the
    model), label (the picture), value, low, high: percent of the hidden content words, 95 %
    bootstrap over rows, nan where there is none; content, hidden: how many content words are
    hidden, and tokens of any kind.
    """
    draws = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
    pictures, found = [three_pictures(rows, i) for i in range(len(rows))], []
    for name, model in models.items():
        for label in pictures[0]:
            counts = count_right(model, inputs, rows, [each[label] for each in pictures], **how)
            drawn = pd.DataFrame(counts[draws].sum(1))  # pandas: 0 of 0 is nan, and left out
            low, high = (100 * drawn[0] / drawn[1]).quantile([0.025, 0.975])
            right, content, hidden = counts.sum(0).tolist()
            value = 100 * right / content if content else np.nan
            found.append((name, label, value, low, high, content, hidden))
    names = ["task", "label", "value", "low", "high", "content", "hidden"]
    return pd.DataFrame(found, columns=names)


def summarise_gates(gates: pd.DataFrame) -> str:
    """Say in Markdown which of the two gates hold: `evaluate.restore.check_gates`."""
    reasons = (
        "squared error on hidden cells is {value:.2f}, that of the average patch {threshold:.2f}",
        "the right picture brings back {value:.1f} points more of the content words than a wrong "
        "one; at least {threshold:g} are asked",
    )
    said = ""
    for i, gate in enumerate(gates.to_dict("records")):
        verb = {"yes": "holds", "no": "**fails**"}.get(gate["passed"])
        reason = f"{verb}: {reasons[i].format(**gate)}" if verb else "does not apply"
        said += f"Gate {i + 1} {reason}. "
    return said.strip()


def pictures_html(batch: Batch, patches: Mapping[str, Tensor], inputs: Inputs) -> str:
    """Draw patches of the picture of a batch of one, each under its title."""
    grid = batch["image_grid_thw"][0]
    return "".join(
        figure(img(cells_image(each, grid, inputs), title), title)
        for title, each in patches.items()
    )


def compare_html(
    model, inputs: Inputs, row: Mapping[str, Any], pictures: Mapping[str, Any], **how: Any
) -> str:
    """Restore a row's text once with each picture and show the results side by side.

    row: {text, image, target}; how: what `reconstruct` takes, with a layout of stage 2.
    """
    parts = ""
    for title, picture in pictures.items():
        batch, predicted, patches = reconstruct(model, inputs, {**row, "image": picture}, **how)
        seen = pictures_html(batch, {title: patches["original"]}, inputs)
        parts += f"<div>{seen}{words_html(batch, predicted, inputs)}</div>"
    return wrap(parts)


def restored_html(
    batch: Batch, predicted: Sequence[int], patches: Mapping[str, Tensor], inputs: Inputs
) -> str:
    """Show what `reconstruct` found: the picture as it is, as seen and as restored, then the text."""
    return wrap(pictures_html(batch, patches, inputs) + words_html(batch, predicted, inputs))


def stage1_settings(
    folder: str | Path, model, inputs: Inputs, recipe: Stage1Recipe, seed: int
) -> dict[str, Any]:
    """Collect what `reconstruct` needs to hide and restore as a finished stage 1 did."""
    how = {"text_rate": recipe.text_mask_rate, "objective": recipe.objective}
    if recipe.image_weight == 0:
        return how
    decoder = load_decoder(folder, model)
    processor = inputs.image_processor
    size = 3 * processor.temporal_patch_size * processor.patch_size**2
    fills = {"noise": patch_noise(size, seed=seed), "zero": torch.zeros(size)}
    fill = fills.get(recipe.patch_fill, getattr(decoder, "fill", None))
    return {**how, "patch_rate": recipe.patch_mask_rate, "decoder": decoder, "fill": fill}


def stage2_settings(recipe: Stage2Recipe) -> dict[str, Any]:
    """Collect what `reconstruct` needs to ask EOS as a stage 2 did, always through the bottleneck."""
    layout = recipe.layout if recipe.layout.startswith("eos") else "eos_bridged"
    return {"text_rate": recipe.text_mask_rate, "objective": recipe.objective, "layout": layout}


def restore_all(
    model, inputs: Inputs, rows: Sequence[Mapping[str, Any]], **how: Any
) -> list[Restored]:
    """Restore every row with a draw of its own: what `reconstruct` returns, a row."""
    return [reconstruct(model, inputs, dict(row), draw=i, **how) for i, row in enumerate(rows)]


def summarise_stage1(found: Sequence[Restored], inputs: Inputs) -> str:
    """Say in Markdown how many hidden tokens and how much of hidden cells came back.

    found: what `reconstruct` returned. Baselines: always the commonest token, the average patch.
    """
    truth = torch.cat([batch["labels"][batch["labels"] != IGNORE] for batch, *_ in found])
    guesses = torch.tensor([guess for _, words, _ in found for guess in words])
    right = 100 * float((truth == guesses).double().mean())
    most = 100 * int((truth == truth.mode().values).sum()) / len(truth)
    said = (
        f"Of {len(truth)} hidden tokens **{right:.0f} %** come back; the commonest token alone would "
        f"be right for {most:.0f} %."
    )
    if any("hidden cells predicted" in patches for *_, patches in found):
        error, average = cell_errors(found, inputs.image_processor.merge_size)
        said += (
            f" Squared error on hidden cells: **{error:.3f}** by the decoder, {average:.3f} by the "
            "average patch of these pictures."
        )
    return said


def explore_restored(model, inputs: Inputs, rows: Sequence[dict[str, Any]], **how: Any) -> Explorer:
    """Choose a text and how much of it to hide, or type one: see what comes back with three pictures.

    rows: {text, image, target}; how: what `reconstruct` takes, with a layout of stage 2.
    """
    texts = [(f"{i + 1}: {row['target'][:40]}", i) for i, row in enumerate(rows)]
    controls = {
        "text": widgets.Dropdown(options=texts, description="text"),
        "hidden": widgets.FloatSlider(
            0.7, max=1, step=0.05, description="hidden", continuous_update=False
        ),
        "words": ask_words(),
    }

    def answer(text: int, hidden: float, words: str) -> str:
        row = {**rows[text], "target": words.strip() or rows[text]["target"]}
        pictures = three_pictures(rows, text)
        return compare_html(model, inputs, row, pictures, **{**how, "text_rate": hidden})

    rates = {"20 %": 0.2, "50 %": 0.5, "70 %": 0.7}
    return Explorer(controls, answer, {"text": dict(texts[:4]), "hidden": rates})
