"""What a reconstruction model restores: hidden cells and hidden words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone import hidden_states
from ..corruption import IGNORE, hide_cells, stage1_batch, stage2_batch
from ..inputs import Batch, Inputs
from ..recipes import make_recipe


@torch.no_grad()
def reconstruct(
    model, inputs: Inputs, row: dict[str, Any], *, text_rate: float, patch_rate: float = 0.0, draw: int = 0,
    layout: str = "bidirectional", objective: str = "mntp", decoder: nn.Module | None = None,
    fill: Tensor | None = None,
) -> tuple[Batch, list[int], dict[str, Tensor]]:  # fmt: skip
    """Hide words and cells of {text, image, target}: (batch, predicted ids of the hidden words, patches by title).

    `bidirectional` is stage 1's input, any other layout stage 2's (A, EOS, B). `fill` (D,) replaces the recipe's noise,
    for a stage-1 run with a learned one. Patches (patches, D): the original, what was seen, what the decoder predicts.
    """
    rows, rates = [{**row, "draw": draw}], {"text_mask_rate": text_rate}
    if layout == "bidirectional":
        batch = stage1_batch(
            rows, inputs, make_recipe("stage1", {**rates, "patch_mask_rate": patch_rate}), 0
        )
    else:
        batch = stage2_batch(rows, inputs, make_recipe("stage2", rates), 0)
    visible, patches, merge = dict(batch), {}, inputs.image_processor.merge_size
    if "pixel_values" in batch:
        patches["original"] = batch["pixel_values"]
    if "hidden_cells" in batch:
        fill = batch["patch_fill"] if fill is None else fill
        visible["pixel_values"] = hide_cells(
            batch["pixel_values"], batch["hidden_cells"], fill, merge
        )
        patches["seen by the model"] = visible["pixel_values"]
    hidden = hidden_states(model, visible, layout)
    places = (batch["labels"][0] != IGNORE).nonzero().flatten() - int(
        objective == "mntp"
    )  # MNTP: one before
    predicted = model.lm_head(hidden[0, places]).argmax(-1).tolist()
    if decoder is not None and "hidden_cells" in batch:
        guess = decoder(hidden, model, batch, layout).reshape(batch["pixel_values"].shape)
        at = batch["hidden_cells"].repeat_interleave(merge**2)[:, None]
        patches["hidden cells predicted"] = torch.where(at, guess, batch["pixel_values"])
    return batch, predicted, patches


def cell_errors(
    restored: Sequence[tuple[Batch, list[int], dict[str, Tensor]]], merge_size: int
) -> tuple[float, float]:
    """Mean squared error on hidden cells, in normalised pixels: of the decoder, and of the average patch of these pictures.

    restored: what `reconstruct` returns, with a decoder; merge_size x merge_size patches are a cell.
    """
    parts = [
        (batch["hidden_cells"].repeat_interleave(merge_size**2), each)
        for batch, _, each in restored
        if "hidden_cells" in batch
    ]
    at = torch.cat([hidden for hidden, _ in parts])
    truth, guess = (
        torch.cat([each[title] for _, each in parts])
        for title in ("original", "hidden cells predicted")
    )
    errors = [((truth - values) ** 2)[at].mean() for values in (guess, truth.mean(0))]
    return float(errors[0]), float(errors[1])


def count_right(
    model, inputs: Inputs, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Any], **how: Any
) -> np.ndarray:
    """Hidden tokens of each row that come back exactly with the given picture, and how many were hidden: (rows, 2) int.

    how: what `reconstruct` takes. The same tokens are hidden whatever the pictures are.
    """
    right = []
    for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        batch, words, _ = reconstruct(model, inputs, {**row, "image": picture}, draw=i, **how)
        truth = batch["labels"][batch["labels"] != IGNORE].tolist()
        right.append((sum(a == b for a, b in zip(words, truth, strict=True)), len(truth)))
    return np.array(right)


def restored_words(
    batch: Batch, predicted: Sequence[int], inputs: Inputs
) -> list[tuple[str, str | None]]:
    """The text of a batch of one, token by token: (as restored, what stood there), or (text, None) where nothing was hidden."""
    guesses, words = iter(predicted), []
    special = {*inputs.tokenizer.all_special_ids, inputs.image_pad_id}
    for token, label in zip(
        batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True
    ):
        if label != IGNORE:
            words.append(
                (inputs.tokenizer.decode([next(guesses)]), inputs.tokenizer.decode([label]))
            )
        elif token == inputs.eos_id:
            words.append((" [EOS] ", None))
        elif token not in special:
            words.append((inputs.tokenizer.decode([token]), None))
    return words
