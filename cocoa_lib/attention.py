"""Who may look at whom: every attention layout is one predicate; masks and pictures derive from it.

A sequence is labelled by segment ids (B, L): PAD for padding, A for the input (image, instruction), EOS for the
one token that becomes the embedding, B for the text that is reconstructed from it. A layout is a function of the
segments and positions of a query and a key. `dense_mask` evaluates it for SDPA and eager attention, `block_mask`
hands the same function to FlexAttention, `reachability` asks what can have flowed where after n layers.

Source: overview figure of arXiv 2603.01471 (`causal`, `bidirectional`, `eos_bridged`); `eos_bridged_strict` is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import BoolTensor, LongTensor, Tensor

PAD, A, EOS, B = 0, 1, 2, 3
SEGMENT_NAMES = ("PAD", "A", "EOS", "B")
Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """Each token sees itself and what stands before it: the generative checkpoint's own layout."""
    return pos_k <= pos_q


def bidirectional(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """Every token sees every token (stage 1, stage 3, inference)."""
    return (pos_k <= pos_q) | (pos_k > pos_q)


def eos_bridged(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """A and B see themselves and EOS, never each other; EOS sees all (stage 2, overview figure)."""
    return (seg_q == seg_k) | (seg_q == EOS) | (seg_k == EOS)


def eos_bridged_strict(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    """As `eos_bridged`, but EOS sees A and itself only, as it must at inference where there is no B (ours)."""
    return (seg_q == seg_k) | ((seg_q == EOS) & (seg_k == A)) | (seg_k == EOS)


LAYOUTS: dict[str, Predicate] = {
    "causal": causal,
    "bidirectional": bidirectional,
    "eos_bridged": eos_bridged,
    "eos_bridged_strict": eos_bridged_strict,
}


def layout_predicate(layout: str) -> Predicate:
    """The named layout with padding handled: nobody attends to padding.

    A padding *query* may attend to every real token, whatever the layout: its state is read by nobody, and a row
    without any key would be NaN in eager attention. Raises ValueError for an unknown name.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown attention layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    rule = LAYOUTS[layout]

    def allowed(seg_q: Tensor, seg_k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        return (seg_k != PAD) & ((seg_q == PAD) | rule(seg_q, seg_k, pos_q, pos_k))

    return allowed


def same_sample(seg_q: Tensor, sample_q: Tensor, sample_k: Tensor) -> Tensor:
    """In a row that holds several samples, each sees itself only; padding, read by nobody, may see all."""
    return (seg_q == PAD) | (sample_q == sample_k)


def dense_mask(
    layout: str, segment_ids: LongTensor, sample_ids: LongTensor | None = None
) -> BoolTensor:
    """The layout as a dense 4-D mask for SDPA (and, made additive, for eager attention).

    segment_ids: (B, L) of PAD, A, EOS, B = 0, 1, 2, 3. sample_ids: (B, L), which sample a token belongs to, where rows
    hold several (`packing.pack`). Returns (B, 1, L, L) bool, True = may attend.
    Raises ValueError for an unknown layout, another shape, or a row that is padding only (nothing to attend to).
    """
    allowed = layout_predicate(layout)
    if segment_ids.ndim != 2:
        raise ValueError(f"segment_ids must be (B, L), got shape {tuple(segment_ids.shape)}")
    if empty := (segment_ids == PAD).all(dim=1).nonzero().flatten().tolist():
        raise ValueError(
            f"row(s) {empty} of segment_ids are padding only: there is no token to attend to"
        )
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    mask = allowed(
        segment_ids[:, :, None],
        segment_ids[:, None, :],
        position[None, :, None],
        position[None, None, :],
    )
    if sample_ids is not None:
        mask &= same_sample(segment_ids[:, :, None], sample_ids[:, :, None], sample_ids[:, None, :])
    return mask[:, None]


def block_mask(layout: str, segment_ids: LongTensor, sample_ids: LongTensor | None = None):
    """The layout as a FlexAttention `BlockMask` of shape (B, 1, L, L), from the same predicate as `dense_mask`."""
    from torch.nn.attention.flex_attention import create_block_mask

    allowed = layout_predicate(layout)
    batch, length = segment_ids.shape

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = allowed(segment_ids[b, q], segment_ids[b, k], q, k)
        return (
            seen
            if sample_ids is None
            else seen & same_sample(segment_ids[b, q], sample_ids[b, q], sample_ids[b, k])
        )

    return create_block_mask(mask_mod, batch, None, length, length, device=str(segment_ids.device))


def additive(mask: BoolTensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) bool -> the same in `dtype`: 0 where True, the lowest finite number where False (for eager)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(dtype).min
    )
