"""The patches that Qwen2-VL's image processor makes of pictures, for many of one size at once."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MERGE, FRAMES = 2, 2  # patches a side of a cell; frames that a still picture is repeated to
MEAN, STD = (np.array(values, dtype=np.float32) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
EQUAL_PICTURES = "flash_equal_pictures"  # from such a name the tower passes all pictures at once


def cut_patches(pictures: np.ndarray, patch: int) -> tuple[Tensor, Tensor]:
    """Cut (N, S, S, 3) uint8 into what `Qwen2VLImageProcessorPil` gives where it need not resize.

    Returns pixel_values (N * (S / patch)^2, 3 * 2 * patch^2) float32 and image_grid_thw (N, 3).
    S must be a multiple of 2 * patch.
    """
    n, side = len(pictures), pictures.shape[1]
    grid, cells = side // patch, side // (patch * MERGE)
    values = (pictures.astype(np.float32) / 255 - MEAN) / STD
    values = values.reshape(n, cells, MERGE, patch, cells, MERGE, patch, 3)
    values = values.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3, 1, patch * patch)
    values = np.broadcast_to(values, (len(values), 3, FRAMES, patch * patch)).reshape(
        len(values), -1
    )
    return torch.from_numpy(values), torch.tensor([[1, grid, grid]]).repeat(n, 1)


def attend_equal_pictures(module, query, key, value, attention_mask=None, cu_seq_lens_q=None, **_):
    """Attend inside pictures of one size, as one batch.

    (1, heads, N * patches, D) -> (1, N * patches, heads, D). The tower's own way goes through them
    one by one, which takes longer on a CPU and gives the same.
    """
    n, (heads, _, width) = len(cu_seq_lens_q) - 1, query.shape[1:]
    parts = (part[0].view(heads, n, -1, width).transpose(0, 1) for part in (query, key, value))
    out = F.scaled_dot_product_attention(*parts)
    return out.transpose(1, 2).reshape(1, -1, heads, width), None


AttentionInterface.register(EQUAL_PICTURES, attend_equal_pictures)
