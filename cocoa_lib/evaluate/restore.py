"""What a reconstruction model restores, hidden cells and hidden words, and the gates on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..backbone import hidden_states
from ..corruption import IGNORE, hide_cells, stage1_batch, stage2_batch
from ..inputs import Batch, Inputs
from ..recipes import make_recipe

# The grammar of captions, which the words around a gap give away without the picture.
FUNCTION_WORDS = frozenset("a an the some and at in on of to with there is are".split())
MIN_GAIN = 10  # points that the right picture must add, over a wrong one, to the words restored

Restored = tuple[Batch, list[int], dict[str, Tensor]]  # what `reconstruct` returns


@torch.no_grad()
def reconstruct(
    model,
    inputs: Inputs,
    row: dict[str, Any],
    *,
    text_rate: float,
    patch_rate: float = 0.0,
    draw: int = 0,
    layout: str = "bidirectional",
    objective: str = "mntp",
    decoder: nn.Module | None = None,
    fill: Tensor | None = None,
) -> Restored:
    """Hide words and cells of {text, image, target}, and restore them.

    `bidirectional` is stage 1's input, any other layout stage 2's (A, EOS, B). `fill` (D,) replaces
    the recipe's noise, for a stage-1 run with a learned one. Returns the batch, the predicted ids of
    the hidden words, and patches (patches, D) by title: the original, what was seen, what the
    decoder predicts.
    """
    recipe, rows = {"text_mask_rate": text_rate}, [{**row, "draw": draw}]
    if layout == "bidirectional":
        recipe["patch_mask_rate"] = patch_rate
        batch = stage1_batch(rows, inputs, make_recipe("stage1", recipe), 0)
    else:
        batch = stage2_batch(rows, inputs, make_recipe("stage2", recipe), 0)
    visible, patches, merge = dict(batch), {}, inputs.image_processor.merge_size
    if "pixel_values" in batch:
        patches["original"] = batch["pixel_values"]
    if "hidden_cells" in batch:
        fill = batch["patch_fill"] if fill is None else fill
        seen = hide_cells(batch["pixel_values"], batch["hidden_cells"], fill, merge)
        visible["pixel_values"] = patches["seen by the model"] = seen
    hidden = hidden_states(model, visible, layout)
    places = (batch["labels"][0] != IGNORE).nonzero().flatten()
    places -= int(objective == "mntp")  # which predicts from the state before
    predicted = model.lm_head(hidden[0, places]).argmax(-1).tolist()
    if decoder is not None and "hidden_cells" in batch:
        guess = decoder(hidden, model, batch, layout).reshape(batch["pixel_values"].shape)
        at = batch["hidden_cells"].repeat_interleave(merge**2)[:, None]
        patches["hidden cells predicted"] = torch.where(at, guess, batch["pixel_values"])
    return batch, predicted, patches


def cell_errors(restored: Sequence[Restored], merge_size: int) -> tuple[float, float]:
    """Measure the mean squared error on hidden cells, in normalised pixels.

    Of the decoder, and of the average patch of these pictures. restored: what `reconstruct` returns,
    with a decoder; merge_size x merge_size patches are a cell.
    """
    parts = [(batch, each) for batch, _, each in restored if "hidden_cells" in batch]
    at = torch.cat([batch["hidden_cells"] for batch, _ in parts]).repeat_interleave(merge_size**2)
    truth = torch.cat([each["original"] for _, each in parts])
    guess = torch.cat([each["hidden cells predicted"] for _, each in parts])
    errors = [((truth - values) ** 2)[at].mean() for values in (guess, truth.mean(0))]
    return float(errors[0]), float(errors[1])


def is_content(token: str) -> bool:
    """Tell whether a decoded token is (a piece of) a content word: a letter, no function word."""
    word = token.strip().lower()
    return any(map(str.isalpha, word)) and word not in FUNCTION_WORDS


def count_right(
    model, inputs: Inputs, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Any], **how: Any
) -> np.ndarray:
    """Count each row's hidden content words that come back with the given picture: (rows, 3) int.

    Columns: content words restored, content words hidden, tokens of any kind hidden. how: what
    `reconstruct` takes. The same tokens are hidden whatever the pictures are.
    """
    counts = []
    for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        batch, words, _ = reconstruct(model, inputs, {**row, "image": picture}, draw=i, **how)
        truth = batch["labels"][batch["labels"] != IGNORE]
        texts = inputs.tokenizer.batch_decode(truth[:, None])
        content = torch.tensor([is_content(text) for text in texts], dtype=torch.bool)
        right = (torch.tensor(words) == truth) & content
        counts.append((int(right.sum()), int(content.sum()), len(truth)))
    return np.array(counts)


def check_gates(found: Sequence[Restored], door: pd.DataFrame, merge_size: int) -> pd.DataFrame:
    """Check what both stages must do before contrastive learning counts: a row a gate.

    Gate 1: stage 1's squared error on hidden cells is below the average patch's. Gate 2: the right
    picture brings back at least MIN_GAIN points more of the content words than a wrong one.

    found: what `reconstruct` returned of stage 1; door: `show.restored.measure_door`, its last model
    is stage 2's. Columns gate, value, threshold, passed: "yes", "no", or "not applicable" where
    stage 1 hid no cells or stage 2 no content word.
    """
    cells = any("hidden cells predicted" in patches for *_, patches in found)
    error, average = cell_errors(found, merge_size) if cells else (np.nan, np.nan)
    after = door[door["task"] == door["task"].iloc[-1]].set_index("label")["value"]
    gain = after["right picture"] - after["wrong picture"]
    gates = [
        ("squared error on hidden cells", error, average, error < average),
        ("content words, right minus wrong picture, points", gain, MIN_GAIN, gain >= MIN_GAIN),
    ]
    table = pd.DataFrame(gates, columns=["gate", "value", "threshold", "passed"])
    passed = table["passed"].map({True: "yes", False: "no"})
    return table.assign(passed=passed.mask(table["value"].isna(), "not applicable"))


def restored_words(
    batch: Batch, predicted: Sequence[int], inputs: Inputs
) -> list[tuple[str, str | None]]:
    """List the text of a batch of one, token by token: (as restored, what stood there).

    The second is None where nothing was hidden.
    """
    guesses, words, decode = iter(predicted), [], inputs.tokenizer.decode
    special = {*inputs.tokenizer.all_special_ids, inputs.image_pad_id}
    tokens = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True)
    for token, label in tokens:
        if label != IGNORE:
            words.append((decode([next(guesses)]), decode([label])))
        elif token == inputs.eos_id:
            words.append((" [EOS] ", None))
        elif token not in special:
            words.append((decode([token]), None))
    return words
