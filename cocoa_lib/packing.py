"""Compute fewer padding tokens: several samples in one row, or rows of similar length together.

Packing needs attention that keeps samples apart, which the masks of every layout do (`sample_ids`).
Each sample keeps the 3-D positions it has alone, so loss and gradients are those of the padded
batch (ours; the idea is sequence packing as of Krell et al., 2021, arXiv 2107.02027).
"""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor
from torch.nn.utils.rnn import pad_sequence

from .corruption import IGNORE
from .inputs import Batch

NO_SAMPLE = -1  # `sample_ids` of padding
# Room of a row, in lengths of the longest sample: more holds less padding, and costs attention (ours).
ROOM = 1.5


def pack(batch: Batch, position_ids: LongTensor) -> Batch:
    """Put the samples of a padded batch (B, L) into fewer rows (R, L'), L' <= ROOM * L.

    position_ids: (3, B, L). Adds `position_ids` (3, R, L') and `sample_ids` (R, L'), the sample
    that a token belongs to. Pictures come in the order of their samples.
    """
    real = batch["attention_mask"].bool()
    rows = _first_fit(real.sum(1).tolist())
    # Where each token of the packed rows stands in the padded batch, flattened; -1 for padding.
    places = [
        torch.cat([real[i].nonzero().flatten() + i * real.shape[1] for i in row]) for row in rows
    ]
    source = pad_sequence(places, batch_first=True, padding_value=-1)  # (R, L')
    packed = batch | _take_pictures(batch, [sample for row in rows for sample in row])
    for name in ("input_ids", "segment_ids", "attention_mask", "mm_token_type_ids", "labels"):
        if name in batch:
            packed[name] = _take(batch[name], source, IGNORE if name == "labels" else 0)
    numbers = torch.arange(len(real), device=real.device)[:, None].expand(real.shape)
    packed["sample_ids"] = _take(numbers, source, NO_SAMPLE)
    packed["position_ids"] = torch.stack([_take(axis, source, 0) for axis in position_ids])
    return packed


def sort_longest_first(batch: Batch) -> tuple[Batch, LongTensor]:
    """A padded batch (B, L) -> the same with its longest rows first, and their order (B,).

    Row i of the result is row order[i] of the batch. What does not fit into memory fails at once.
    """
    order = batch["attention_mask"].sum(1).argsort(descending=True, stable=True)
    pictures = _take_pictures(batch, order.tolist())
    rows = {name: values[order] for name, values in batch.items() if name not in pictures}
    return rows | pictures, order


def _first_fit(lengths: list[int]) -> list[list[int]]:
    """Samples by row, longest first, each into the first row with room for it."""
    rows: list[list[int]] = []
    free: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((row for row, room in enumerate(free) if lengths[sample] <= room), len(rows))
        if at == len(rows):
            rows.append([])
            free.append(int(ROOM * max(lengths)))
        rows[at].append(sample)
        free[at] -= lengths[sample]
    return rows


def _take_pictures(batch: Batch, order: list[int]) -> Batch:
    """What belongs to these samples' pictures, in their order, as the model hands them out."""
    if "pixel_values" not in batch:
        return {}
    grids = batch["image_grid_thw"]
    numbers = torch.arange(len(grids), device=grids.device)
    of_sample = numbers.split(batch["num_images_per_sample"].tolist())
    images = torch.cat([of_sample[sample] for sample in order])
    moved = {
        "image_grid_thw": grids[images],
        "num_images_per_sample": batch["num_images_per_sample"][order],
    }
    for name in ("pixel_values", "hidden_cells"):  # one row a patch; one a merged cell
        if name in batch:
            each = grids.prod(-1) * len(batch[name]) // int(grids.prod(-1).sum())
            parts = batch[name].split(each.tolist())
            moved[name] = torch.cat([parts[image] for image in images.tolist()])
    return moved


def _take(values: Tensor, source: LongTensor, fill: int) -> Tensor:
    return values.flatten()[source.clamp(min=0)].masked_fill(source < 0, fill)
