"""Where each token stands: the 3-D rotary positions of Qwen-VL, of a whole batch at once."""

from __future__ import annotations

import torch
from torch import LongTensor
from transformers import PreTrainedModel

from .inputs import Batch


def position_ids(model: PreTrainedModel, batch: Batch) -> LongTensor:
    """3-D rotary positions (3, B, L): time, height and width; 0 at padding.

    A word takes one place. A cell stands at its row and column behind the words before its picture,
    and the words after it go on behind its longer side. The values are those of transformers'
    `get_rope_index`, which goes through rows and pictures one by one. A packed batch brings its own.
    """
    if "position_ids" in batch:
        return batch["position_ids"]
    mask = batch["attention_mask"]
    if not len(batch.get("image_grid_thw", ())):  # text alone: the tokens, counted
        return ((mask.cumsum(1) - 1) * mask).expand(3, -1, -1)
    n_time, height, width = batch["image_grid_thw"].T  # (images,) each, in patches
    merge = model.config.vision_config.spatial_merge_size
    height, width = height // merge, width // merge
    n_cells = n_time * height * width
    image = torch.arange(len(n_cells), device=mask.device).repeat_interleave(n_cells)  # (cells,)
    number = torch.arange(len(image), device=mask.device) - (n_cells.cumsum(0) - n_cells)[image]
    frame, cell = number // (height * width)[image], number % (height * width)[image]
    inside = torch.stack([frame, cell // width[image], cell % width[image]])  # (3, cells)
    last = number == n_cells[image] - 1
    takes = mask.clone()  # (B, L): places that a token takes
    cells = batch["mm_token_type_ids"] == 1
    takes[cells] = torch.maximum(height, width)[image] * last
    positions = (takes.cumsum(1) - takes).expand(3, -1, -1).clone()
    positions[:, cells] += inside
    return positions * mask
