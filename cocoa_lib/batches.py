"""Rows to training batches: the plan that fixes the order, and one collate function a stage.

The plan is drawn once, before training, from the seed: the order does not depend on workers, and a resumed run goes on
in it. The place in the plan (`draw`) seeds the corruption of that sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .attention import A, B
from .corruption import IGNORE, mask_cells, mask_text, maskable, patch_noise
from .inputs import Batch, Inputs
from .items import PLACEHOLDER
from .recipes import Stage1Recipe, Stage2Recipe


class Planned(torch.utils.data.Dataset):
    """Rows in the order of a plan fixed before training: item k is row plan[k], and `draw` = k seeds its corruption."""

    def __init__(self, rows, plan: np.ndarray) -> None:
        self.rows, self.plan = rows, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {**self.rows[int(self.plan[k])], "draw": k}


def index_plan(sizes: Sequence[int], n: int, *, seed: int, block: int = 0) -> np.ndarray:
    """The rows of a run, chosen once: (n,) indices into the concatenated subsets of the given sizes.

    Each subset is shuffled and gone through again when used up; subsets take turns in proportion to their size, row by
    row (block = 0), or in blocks of `block` rows of one subset, so that negatives are of the same task. No row of a
    subset comes a second time before all have come once. For the same sizes and seed a shorter plan is the beginning
    of a longer one; for other sizes nothing of the kind holds.
    """
    sizes_array = np.asarray(sizes)
    if not len(sizes_array) or sizes_array.min() < 1:
        raise ValueError(f"there is a subset without training rows (sizes {list(sizes)})")
    step = max(1, block)
    rng = np.random.default_rng([seed, 2])
    turns = rng.choice(len(sizes), size=math.ceil(n / step), p=sizes_array / sizes_array.sum()).repeat(step)[:n]
    plan = np.empty(n, dtype=np.int64)
    for subset, size in enumerate(sizes):
        places = np.flatnonzero(turns == subset)
        rng = np.random.default_rng([seed, 2, subset])
        rounds = [rng.permutation(size) for _ in range(math.ceil(len(places) / size))]
        order = np.concatenate(rounds)[: len(places)] if rounds else np.empty(0, dtype=np.int64)
        plan[places] = order + int(sizes_array[:subset].sum())
    return plan


def causal_batch(rows: list[dict[str, Any]], inputs: Inputs) -> Batch:
    """Next-token prediction: a picture, then turns "question answer" one a line, then EOS.

    Each row has `image` and `turns`, a list of (question, answer); a caption is an answer without a question. The loss is
    on answers and on the line break or EOS that ends them. Several questions share one picture because the vision tower
    costs more than the words.
    """
    pieces = [_turn_pieces(row["turns"]) for row in rows]
    items = [{"text": "".join(text for text, _ in row), "image": rows[i]["image"]} for i, row in enumerate(pieces)]
    batch = inputs.collate(items)
    labels = torch.full_like(batch["input_ids"], IGNORE)
    for i, row in enumerate(pieces):
        learned = [flag for text, flag in row for _ in inputs.text_ids(text)]
        at = inputs.text_places(batch["input_ids"][i, : batch["attention_mask"][i].sum()].tolist())  # and EOS's
        keep = torch.tensor([k for k, flag in zip(at, [*learned[: len(at) - 1], True], strict=True) if flag and k])
        labels[i, keep] = batch["input_ids"][i, keep]
    return batch | {"labels": labels}


def _turn_pieces(turns: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Turns -> (text, learned?) pieces; a piece starts at a space or line break, so each is tokenised as it is alone."""
    pieces = []
    for i, (question, answer) in enumerate(turns):
        pieces += [("\n", True)] * (i > 0) + [(question, False), (f" {answer}" if question else answer, True)]
    return pieces


def stage1_item(row: dict[str, Any]) -> dict[str, Any]:
    """What stage 1 reads of a row: its picture and all its text."""
    return {"text": f"{row['text']} {row['target']}".strip(), "image": row["image"]}


def stage1_batch(rows: list[dict[str, Any]], inputs: Inputs, recipe: Stage1Recipe, seed: int) -> Batch:
    """Image + caption, bidirectional; text tokens and image cells hidden."""
    batch = inputs.collate([stage1_item(row) for row in rows], eos=False)
    batch = _masked(batch, rows, inputs, recipe.text_mask_rate, seed, segment=A)
    return _with_hidden_cells(batch, rows, inputs, recipe, seed, segment=A)


def stage2_batch(rows: list[dict[str, Any]], inputs: Inputs, recipe: Stage2Recipe, seed: int) -> Batch:
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


def _masked(batch: Batch, rows: list[dict[str, Any]], inputs: Inputs, rate: float, seed: int, segment: int) -> Batch:
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


def pair_features(items: list[dict[str, Any]], inputs: Inputs, **_) -> Batch:
    """One column of (anchor, positive, negative?) items -> its features, and the `key` of each item."""
    return inputs.collate(items) | {"key": torch.tensor([item_key(item) for item in items])}


def item_key(item: dict[str, Any]) -> int:
    """A 63-bit key of an item's text and image path: equal items, equal keys."""
    digest = hashlib.sha256(f"{item.get('text') or ''}\0{item.get('image') or ''}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
