"""Who may look at whom. Each layout is one predicate; every mask derives from it.

A sequence carries segment ids (B, L): PAD for padding, A for the input (image, instruction), EOS
for the one token that becomes the embedding, B for the text that is reconstructed from it. A layout
decides from the segments and the positions of a query and a key. `dense_mask` evaluates it for SDPA
and eager attention, `block_mask` hands the same function to FlexAttention.

To add a layout, write its predicate and put it into LAYOUTS: recipes, masks and figures then know
it.

Source: overview figure of arXiv 2603.01471 (`causal`, `bidirectional`, `eos_bridged`);
`eos_bridged_strict` is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import BoolTensor, LongTensor, Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

PAD, A, EOS, B = 0, 1, 2, 3
SEGMENT_NAMES = ("PAD", "A", "EOS", "B")
Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """Each token sees itself and what stands before it: the generative checkpoint's own layout."""
    return pos_k <= pos_q


def bidirectional(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """Every token sees every token (stage 1, stage 3, inference)."""
    return (pos_q >= 0) & (pos_k >= 0)


def eos_bridged(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """A and B see themselves and EOS, never each other; EOS sees all (stage 2, overview figure)."""
    return (seg_q == seg_k) | (seg_q == EOS) | (seg_k == EOS)


def eos_bridged_strict(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """As `eos_bridged`, but EOS sees A and itself only, as at inference, without a B (ours)."""
    return (seg_q == seg_k) | ((seg_q == EOS) & (seg_k == A)) | (seg_k == EOS)


LAYOUTS: dict[str, Predicate] = {
    rule.__name__: rule for rule in (causal, bidirectional, eos_bridged, eos_bridged_strict)
}


def mask_function(
    layout: str, segment_ids: LongTensor, sample_ids: LongTensor | None = None
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """Return FlexAttention's `mask_mod(b, h, q, k)`: may query q of row b attend to key k?

    Nobody attends to padding. A padding query may attend to every real token: nobody reads its
    state, and a row without any key would be NaN in eager attention. `sample_ids` (B, L) keeps the
    samples of a packed row apart. Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown attention layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    rule = LAYOUTS[layout]

    def may_attend(b: Tensor, h: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        seg_q, seg_k = segment_ids[b, q], segment_ids[b, k]
        allowed = rule(seg_q, seg_k, q, k)
        if sample_ids is not None:
            allowed = allowed & (sample_ids[b, q] == sample_ids[b, k])
        return (seg_k != PAD) & ((seg_q == PAD) | allowed)

    return may_attend


def dense_mask(
    layout: str, segment_ids: LongTensor, sample_ids: LongTensor | None = None
) -> BoolTensor:
    """Evaluate the layout as a dense 4-D mask for SDPA (and, made additive, for eager attention).

    segment_ids: (B, L) of PAD, A, EOS, B = 0, 1, 2, 3. sample_ids: (B, L), the sample of each token
    where rows hold several (`packing.pack`). Returns (B, 1, L, L) bool, True = may attend. Raises
    ValueError for an unknown layout, another shape, or a row of padding only.
    """
    may_attend = mask_function(layout, segment_ids, sample_ids)
    if segment_ids.ndim != 2:
        raise ValueError(f"segment_ids must be (B, L), got shape {tuple(segment_ids.shape)}")
    if empty := (segment_ids == PAD).all(dim=1).nonzero().flatten().tolist():
        raise ValueError(f"row(s) {empty} of segment_ids are padding only: nothing to attend to")
    row = torch.arange(segment_ids.shape[0], device=segment_ids.device)
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return may_attend(row[:, None, None], None, place[:, None], place)[:, None]


def block_mask(
    layout: str, segment_ids: LongTensor, sample_ids: LongTensor | None = None
) -> BlockMask:
    """Give the layout as FlexAttention's `BlockMask` (B, 1, L, L), from the same predicate."""
    batch, length = segment_ids.shape
    may_attend = mask_function(layout, segment_ids, sample_ids)
    device = str(segment_ids.device)
    return create_block_mask(may_attend, batch, None, length, length, device=device)


def make_additive(mask: BoolTensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) bool -> 0 where True, the lowest finite number where False (for eager)."""
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)
