"""What is hidden from the model: which text tokens, which image cells, drawn from a seed a sample.

Every draw comes from `numpy.random.default_rng([seed, draw, stream])`, where `draw` is the sample's
place in the training plan. So the corruption of a sample depends on neither its batch, its place in
it nor the workers, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import BoolTensor, LongTensor, Tensor

from .attention import A, B
from .inputs import Batch, Inputs
from .items import PLACEHOLDER

IGNORE = -100  # transformers' label of a position without loss
TEXT_STREAM, PATCH_STREAM = 0, 1


class Corruption(Protocol):
    """What the recipes of stages 1 and 2 say about hiding; their sources are in `recipes`."""

    text_mask_rate: float
    patch_mask_rate: float
    patch_fill: str  # noise, zero or learned
    image_weight: float  # 0: no cell is hidden


def maskable(batch: Batch, inputs: Inputs, segment: int) -> BoolTensor:
    """(B, L) bool: the ordinary text tokens of one segment.

    Special, image and padding tokens are never masked, nor is a row's first token: it has no
    predecessor to be predicted from.
    """
    ids = batch["input_ids"]
    vision = {inputs.vision_start_id, inputs.image_pad_id, inputs.vision_end_id}
    special = {*inputs.tokenizer.all_special_ids, *vision, inputs.eos_id}
    allowed = (batch["segment_ids"] == segment) & ~torch.isin(ids, torch.tensor(sorted(special)))
    first = batch["attention_mask"].argmax(1)  # (B,), the first that is not padding
    allowed[torch.arange(len(ids)), first] = False
    return allowed


def mask_text(
    input_ids: LongTensor,
    allowed: BoolTensor,
    *,
    rate: float,
    mask_token_id: int,
    seed: int,
    draws: Sequence[int],
) -> tuple[LongTensor, LongTensor]:
    """Replace allowed tokens by the mask token with probability `rate`.

    input_ids, allowed: (B, L); draws: one integer a row. Returns (masked ids, labels), labels = the
    original id where masked and -100 elsewhere. A row with any allowed token gets at least one
    masked one. Source: 0.2 in stage 1, 0.7 in stage 2 (script).
    """
    labels = torch.full_like(input_ids, IGNORE)
    masked = input_ids.clone()
    for row, draw in enumerate(draws):
        places = allowed[row].nonzero().flatten()
        if len(places) == 0 or rate == 0.0:
            continue
        rng = np.random.default_rng([seed, draw, TEXT_STREAM])
        hide = rng.random(len(places)) < rate
        hide[rng.integers(len(places))] |= not hide.any()
        chosen = places[torch.from_numpy(hide)]
        labels[row, chosen] = input_ids[row, chosen]
        masked[row, chosen] = mask_token_id
    return masked, labels


def mask_cells(
    image_grid_thw: LongTensor,
    num_images_per_sample: LongTensor,
    merge_size: int,
    *,
    rate: float,
    seed: int,
    draws: Sequence[int],
) -> BoolTensor:
    """Choose merged cells (merge_size x merge_size patches, one vision token), Bernoulli a cell.

    Returns (cells,) bool over all images of the batch in order, True = hidden. An image has at
    least one hidden cell when rate > 0. Source: mask unit and Bernoulli from MoCa; rate 0.5
    (figure), 0.3 (script).
    """
    cells = iter((image_grid_thw.prod(-1) // merge_size**2).tolist())
    hidden = [torch.zeros(0, dtype=torch.bool)]
    for draw, n_images in zip(draws, num_images_per_sample.tolist(), strict=True):
        rng = np.random.default_rng([seed, draw, PATCH_STREAM])
        for _ in range(n_images):
            hide = rng.random(next(cells)) < rate
            if rate > 0:
                hide[rng.integers(len(hide))] |= not hide.any()
            hidden.append(torch.from_numpy(hide))
    return torch.cat(hidden)


def patch_noise(dim: int, *, seed: int) -> Tensor:
    """The one Gaussian vector (dim,) that stands for every hidden patch (MoCa).

    MoCa draws it anew each batch. Here the run's seed fixes it, so that a sample's input does not
    depend on the batch it is in (ours).
    """
    rng = np.random.default_rng([seed, 0, PATCH_STREAM])
    return torch.from_numpy(rng.standard_normal(dim)).float()


def hide_cells(pixel_values: Tensor, hidden: BoolTensor, fill: Tensor, merge_size: int) -> Tensor:
    """Replace the patches of hidden cells by `fill` (D,) before the vision encoder.

    pixel_values: (patches, D), merge_size**2 consecutive rows a cell, as Qwen2-VL's image processor
    orders them. hidden: (cells,).
    """
    rows = hidden.repeat_interleave(merge_size**2)  # (patches,)
    return torch.where(rows[:, None], fill.to(pixel_values), pixel_values)


def stage1_item(row: dict[str, Any]) -> dict[str, Any]:
    """What stage 1 reads of a row: its picture and all its text."""
    return {"text": f"{row['text']} {row['target']}".strip(), "image": row["image"]}


def stage1_batch(
    rows: list[dict[str, Any]], inputs: Inputs, recipe: Corruption, seed: int
) -> Batch:
    """Image and caption, without EOS; text tokens and image cells hidden."""
    batch = inputs.collate([stage1_item(row) for row in rows], eos=False)
    return _corrupt(batch, rows, inputs, recipe, seed, segment=A)


def stage2_batch(
    rows: list[dict[str, Any]], inputs: Inputs, recipe: Corruption, seed: int
) -> Batch:
    """A = image and query, EOS, B = the text to reconstruct, masked.

    Where `image_weight` is above 0, B ends with a copy of A's picture with hidden cells, so that
    pixels too must come through EOS (ours). Its text stays first: EOS predicts its first token.
    """
    targets = [{"text": PLACEHOLDER.sub("", row["target"])} for row in rows]
    if recipe.image_weight > 0:
        for target, row in zip(targets, rows, strict=True):
            target["image"] = row["image"]
            target["text"] += "<|image_1|>" * bool(row["image"])
    batch = inputs.collate([{"text": row["text"], "image": row["image"]} for row in rows], targets)
    return _corrupt(batch, rows, inputs, recipe, seed, segment=B)


def _corrupt(
    batch: Batch,
    rows: list[dict[str, Any]],
    inputs: Inputs,
    recipe: Corruption,
    seed: int,
    segment: int,
) -> Batch:
    """Mask text and choose hidden cells, both in `segment` only.

    Masks `input_ids`; adds `labels` (B, L) and, where cells are hidden, `hidden_cells` (cells,) and
    what stands in for their patches, `patch_fill` (D,).
    """
    how = {"seed": seed, "draws": [row["draw"] for row in rows]}
    batch["input_ids"], batch["labels"] = mask_text(
        batch["input_ids"],
        maskable(batch, inputs, segment),
        rate=recipe.text_mask_rate,
        mask_token_id=mask_token_id(inputs),
        **how,
    )
    if "pixel_values" not in batch or recipe.patch_mask_rate == 0 or recipe.image_weight == 0:
        return batch
    hidden = mask_cells(
        batch["image_grid_thw"],
        batch["num_images_per_sample"],
        inputs.image_processor.merge_size,
        rate=recipe.patch_mask_rate,
        **how,
    )
    of_cell = batch["segment_ids"][batch["mm_token_type_ids"] == 1]  # (cells,)
    dim = batch["pixel_values"].shape[1]
    fill = patch_noise(dim, seed=seed) if recipe.patch_fill == "noise" else torch.zeros(dim)
    return batch | {"hidden_cells": hidden & (of_cell == segment), "patch_fill": fill}


def mask_token_id(inputs: Inputs) -> int:
    """The tokenizer's own mask token (`backbone.set_mask_token` gives it one), else
    `<|vision_pad|>`.

    Qwen's tokenizers have none, and no processor uses `<|vision_pad|>`: so the embedding table
    needs no new row (ours).
    """
    if inputs.tokenizer.mask_token_id is not None:
        return inputs.tokenizer.mask_token_id
    return inputs.tokenizer.convert_tokens_to_ids("<|vision_pad|>")
