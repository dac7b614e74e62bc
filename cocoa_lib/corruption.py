"""What is hidden from the model: which text tokens, which image cells, drawn from a seed a sample.

Every draw comes from `numpy.random.default_rng([seed, draw, stream])`, where `draw` is the sample's place in the
training plan: the corruption of a sample does not depend on its batch, on its place in it or on workers, and a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import BoolTensor, LongTensor, Tensor

from .attention import A, B
from .inputs import Batch, Inputs
from .items import PLACEHOLDER
from .recipes import Stage1Recipe, Stage2Recipe

IGNORE = -100  # transformers' label of a position without loss
TEXT_STREAM, PATCH_STREAM = 0, 1


def maskable(batch: Batch, inputs: Inputs, segment: int) -> BoolTensor:
    """(B, L) bool: ordinary text tokens of one segment. Special, image and padding tokens are never masked, nor is
    a row's first token, which has no predecessor to be predicted from."""
    ids = batch["input_ids"]
    special = torch.tensor(sorted({*inputs.tokenizer.all_special_ids, inputs.vision_start_id, inputs.image_pad_id,
                                   inputs.vision_end_id, inputs.eos_id}))  # fmt: skip
    allowed = (batch["segment_ids"] == segment) & ~torch.isin(ids, special)
    allowed[torch.arange(len(ids)), batch["attention_mask"].argmax(1)] = (
        False  # the first that is not padding
    )
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

    input_ids, allowed: (B, L); draws: one integer a row. Returns (masked ids, labels), labels = the original id where
    masked and -100 elsewhere. A row with any allowed token gets at least one masked one. Source: 0.2 in stage 1, 0.7
    in stage 2 (script). Raises ValueError for a rate outside [0, 1].
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"text mask rate must lie in [0, 1], got {rate}")
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
    image_grid_thw: LongTensor, num_images_per_sample: LongTensor, merge_size: int,
    *, rate: float, seed: int, draws: Sequence[int],
) -> BoolTensor:  # fmt: skip
    """Choose merged cells (merge_size x merge_size patches, one vision token each), Bernoulli a cell.

    Returns (cells,) bool over all images of the batch in order, True = hidden; an image has at least one hidden cell
    when rate > 0. Source: mask unit and Bernoulli from MoCa; rate 0.5 (fig), 0.3 (script).
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"patch mask rate must lie in [0, 1], got {rate}")
    cells = (image_grid_thw.prod(-1) // merge_size**2).tolist()
    hidden, image = [], 0
    for draw, count in zip(draws, num_images_per_sample.tolist(), strict=True):
        rng = np.random.default_rng([seed, draw, PATCH_STREAM])
        for _ in range(count):
            hide = rng.random(cells[image]) < rate
            if rate > 0:
                hide[rng.integers(len(hide))] |= not hide.any()
            hidden.append(torch.from_numpy(hide))
            image += 1
    return torch.cat(hidden) if hidden else torch.zeros(0, dtype=torch.bool)


def patch_noise(dim: int, *, seed: int) -> Tensor:
    """The one Gaussian vector (dim,) that stands for every hidden patch (MoCa: shared by all masked rows).

    MoCa draws it anew each batch; here it is fixed by the run's seed, so that a sample's input does not depend on the
    batch it is in (ours).
    """
    return torch.from_numpy(
        np.random.default_rng([seed, 0, PATCH_STREAM]).standard_normal(dim)
    ).float()


def hide_cells(pixel_values: Tensor, hidden: BoolTensor, fill: Tensor, merge_size: int) -> Tensor:
    """Replace the patches of hidden cells by `fill` (D,) before the vision encoder.

    pixel_values: (patches, D), merge_size**2 consecutive rows a cell, as Qwen2-VL's image processor orders them.
    """
    rows = hidden.repeat_interleave(merge_size**2)
    return torch.where(rows[:, None], fill.to(pixel_values), pixel_values)


def stage1_item(row: dict[str, Any]) -> dict[str, Any]:
    """What stage 1 reads of a row: its picture and all its text."""
    return {"text": f"{row['text']} {row['target']}".strip(), "image": row["image"]}


def stage1_batch(
    rows: list[dict[str, Any]], inputs: Inputs, recipe: Stage1Recipe, seed: int
) -> Batch:
    """Image + caption, bidirectional; text tokens and image cells hidden."""
    batch = inputs.collate([stage1_item(row) for row in rows], eos=False)
    batch = _masked(batch, rows, inputs, recipe.text_mask_rate, seed, segment=A)
    return _with_hidden_cells(batch, rows, inputs, recipe, seed, segment=A)


def stage2_batch(
    rows: list[dict[str, Any]], inputs: Inputs, recipe: Stage2Recipe, seed: int
) -> Batch:
    """A = image and query, EOS, B = text to reconstruct, masked; where `image_weight` is above 0, B ends with a copy of
    A's picture, cells of it hidden, so that pixels too must come through EOS (ours). Text first: its first token is
    then predicted from EOS, as without the picture."""
    targets = [{"text": PLACEHOLDER.sub("", row["target"])} for row in rows]
    if recipe.image_weight > 0:
        for target, row in zip(targets, rows, strict=True):
            target["image"] = row["image"]
            target["text"] += "<|image_1|>" * bool(row["image"])
    batch = inputs.collate([{"text": row["text"], "image": row["image"]} for row in rows], targets)
    batch = _masked(batch, rows, inputs, recipe.text_mask_rate, seed, segment=B)
    return _with_hidden_cells(batch, rows, inputs, recipe, seed, segment=B)


def _with_hidden_cells(
    batch: Batch,
    rows: list[dict[str, Any]],
    inputs: Inputs,
    recipe: Stage1Recipe | Stage2Recipe,
    seed: int,
    segment: int,
) -> Batch:
    """Adds `hidden_cells` (cells,), True only in pictures of `segment`, and what stands in for them, `patch_fill` (D,)."""
    if "pixel_values" not in batch or recipe.patch_mask_rate == 0 or recipe.image_weight == 0:
        return batch
    hidden = mask_cells(
        batch["image_grid_thw"], batch["num_images_per_sample"], inputs.image_processor.merge_size,
        rate=recipe.patch_mask_rate, seed=seed, draws=[row["draw"] for row in rows],
    )  # fmt: skip
    hidden &= batch["segment_ids"][batch["mm_token_type_ids"] == 1] == segment
    dim = batch["pixel_values"].shape[1]
    fill = patch_noise(dim, seed=seed) if recipe.patch_fill == "noise" else torch.zeros(dim)
    return batch | {"hidden_cells": hidden, "patch_fill": fill}


def _masked(
    batch: Batch, rows: list[dict[str, Any]], inputs: Inputs, rate: float, seed: int, segment: int
) -> Batch:
    ids, labels = mask_text(
        batch["input_ids"], maskable(batch, inputs, segment), rate=rate, mask_token_id=mask_token_id(inputs), seed=seed,
        draws=[row["draw"] for row in rows],
    )  # fmt: skip
    return batch | {"input_ids": ids, "labels": labels}


def mask_token_id(inputs: Inputs) -> int:
    """The tokenizer's own mask token (`backbone.set_mask_token` gives it one), or, for Qwen's, which has none,
    `<|vision_pad|>`, of which no processor makes use: no new row in the embedding table is then needed (ours)."""
    if inputs.tokenizer.mask_token_id is not None:
        return inputs.tokenizer.mask_token_id
    return inputs.tokenizer.convert_tokens_to_ids("<|vision_pad|>")
