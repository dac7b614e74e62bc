"""Open a Qwen2-VL, Qwen2.5-VL or Qwen3-VL and give its attention the layout that is asked for.

The models are transformers' own classes; `kernels` swaps a few of their parts for faster ones with
the same weights and values. Three things are set from outside: whether the language model is
causal, which mask a forward pass uses, and the 3-D rotary positions (computed here from the 2-D
mask, because they cannot be derived from a 4-D one). A probe checks that the causal switch took
before anything trains.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from .attention import EOS, PAD, A, block_mask, dense_mask, make_additive
from .inputs import Batch, Inputs
from .items import IMAGE_PAD, VISION_END, VISION_START, InputError
from .kernels import fuse_norms, multiply_patches, use_flex, use_picture_kernel
from .positions import position_ids

logger = logging.getLogger(__name__)


def language_model(model: PreTrainedModel) -> nn.Module:
    """The text decoder: `.layers`, `.norm`, `.rotary_emb`, `.embed_tokens`."""
    return model.model.language_model


def set_bidirectional(model: PreTrainedModel, bidirectional: bool) -> PreTrainedModel:
    """Switch the language model between causal and bidirectional attention, in place.

    `config.is_causal`, which is saved with the model, decides the mask under SDPA and eager;
    flash-attention reads `self_attn.is_causal` of each layer.
    """
    text = language_model(model)
    text.config.is_causal = not bidirectional
    for layer in text.layers:
        layer.self_attn.is_causal = not bidirectional
    return model


def open_backbone(
    source: str | Path,
    *,
    bidirectional: bool,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Open a local folder or hub name with the wanted attention, probed; comes back on the CPU.

    attn_implementation: "sdpa", "eager", "flash_attention_2" or "flex_attention". Flex is set on
    the language model only, since Qwen2-VL does not declare it; SDPA takes its place where it does
    not run. safetensors only, never remote code. Raises RuntimeError if the probe fails.
    """
    flex, flash = attn_implementation == "flex_attention", attn_implementation.startswith("flash")
    model = AutoModelForImageTextToText.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation="sdpa" if flex else attn_implementation,
        use_safetensors=True,
        trust_remote_code=False,
    )
    set_bidirectional(model, bidirectional)
    multiply_patches(model.model.visual)
    fuse_norms(language_model(model))
    if attn_implementation in ("sdpa", "flex_attention"):
        use_picture_kernel(model.model.visual)
    if (flex or flash) and torch.accelerator.is_available():  # no such kernels on a CPU
        model.to(torch.accelerator.current_accelerator())
    if flex:
        use_flex(language_model(model), lambda: _train_a_little(model))
    half = flash and dtype == torch.float32  # flash-attention takes no float32
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        probe_attention(model, bidirectional)
    return model.to("cpu").eval()


def _train_a_little(model: PreTrainedModel) -> None:
    """Run a tiny forward and backward pass through all layers, without gradients of all weights."""
    ids = torch.tensor([[5, 6, 7, 8]], device=model.device)
    with torch.enable_grad():
        hidden = hidden_states(model, _text_batch(ids, torch.full_like(ids, A)))
        torch.autograd.grad(hidden.sum(), language_model(model).embed_tokens.weight)


@torch.no_grad()
def probe_attention(model: PreTrainedModel, bidirectional: bool) -> None:
    """Change the last token and look at the first one's state, without and with padding.

    Raises RuntimeError when a bidirectional model does not notice, or a causal one does. llm2vec
    and others have shipped models whose switch was silently off for some backend or a batch of one.
    """
    was_training = model.training
    model.eval()
    for n_pad in (0, 2):
        pad = [0] * n_pad
        ids = torch.tensor([[5, 6, 7, 8, *pad], [5, 6, 7, 9, *pad]], device=model.device)
        segments = torch.full_like(ids, A)
        segments[:, 4:] = PAD
        first, second = (
            hidden_states(model, _text_batch(ids[i : i + 1], segments[i : i + 1]))[0, 0]
            for i in (0, 1)
        )
        if torch.equal(first, second) == bidirectional:
            wanted, got = ("bidirectional", "causal")[:: 1 if bidirectional else -1]
            kernel = language_model(model).config._attn_implementation
            raise RuntimeError(
                f"the attention switch did not take: {wanted} attention was asked for, but "
                f"{type(model).__name__} with {kernel!r} attends like a {got} model"
            )
    model.train(was_training)


def _text_batch(input_ids: LongTensor, segment_ids: LongTensor) -> Batch:
    return {
        "input_ids": input_ids,
        "segment_ids": segment_ids,
        "attention_mask": (segment_ids != PAD).long(),
        "mm_token_type_ids": torch.zeros_like(input_ids),
    }


def layout_mask(model: PreTrainedModel, batch: Batch, layout: str) -> Any:
    """The layout as the model's attention takes it: bool, additive or BlockMask, each (B, 1, L, L).

    Raises ValueError for flash-attention, which takes none.
    """
    implementation = language_model(model).config._attn_implementation
    segments, samples = batch["segment_ids"], batch.get("sample_ids")  # samples: of packed rows
    if implementation == "flex_attention":
        return block_mask(layout, segments, samples)
    if implementation.startswith("flash_attention"):
        raise ValueError(
            f"{implementation} cannot express the layout {layout!r}, or packed rows; use sdpa"
        )
    mask = dense_mask(layout, segments, samples)
    return make_additive(mask, model.dtype) if implementation == "eager" else mask


def hidden_states(model: PreTrainedModel, batch: Batch, layout: str | None = None) -> Tensor:
    """One forward pass without logits: final, normed hidden states (B, L, H) under the given
    layout.

    `layout=None` is the model's own mode, which needs the 2-D mask alone. The language-model head
    is left out: 152 k x L numbers a sample, which stage 3 and inference do not read.
    """
    text = language_model(model).config
    own = "bidirectional" if getattr(text, "is_causal", True) is False else "causal"
    flex = text._attn_implementation == "flex_attention"
    plain = layout in (None, own) and "sample_ids" not in batch and not flex
    mask = batch["attention_mask"] if plain else layout_mask(model, batch, layout or own)
    pictures = ("pixel_values", "image_grid_thw")  # a chunk of GradCache's may have none
    output = model.model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=position_ids(model, batch),
        use_cache=False,
        **{name: batch[name] for name in pictures if len(batch.get(name, ()))},
    )
    return output.last_hidden_state


def pool(hidden: Tensor, batch: Batch, pooling: str = "eos") -> Tensor:
    """(B, L, H) -> (B, H), not normalised: the state at EOS (script) or the mean over tokens
    (MoCa); of packed rows (R, L, H) one state a sample, in the samples' order.

    The EOS position comes from segment_ids, so padding side and padding token play no part.
    Raises ValueError for another `pooling`.
    """
    if pooling not in ("eos", "mean"):
        raise ValueError(f"unknown pooling {pooling!r}; choose 'eos' or 'mean'")
    samples = batch.get("sample_ids")
    if pooling == "eos" and samples is not None:
        place = batch["segment_ids"] == EOS  # (R, L), one a sample
        return hidden[place][samples[place].argsort()]
    if pooling == "eos":
        position = (batch["segment_ids"] == EOS).int().argmax(dim=1)  # (B,)
        return hidden[torch.arange(len(hidden), device=hidden.device), position]
    if samples is None:
        weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # (B, L, 1)
        return (hidden * weight).sum(1) / weight.sum(1)
    real = samples >= 0  # (R, L)
    own = samples[real] == torch.arange(samples.max() + 1, device=hidden.device)[:, None]
    return own.to(hidden.dtype) @ hidden[real] / own.sum(1, keepdim=True)  # own (B, tokens)


def set_mask_token(model: PreTrainedModel, inputs: Inputs, token: str) -> None:
    """Hide words behind `token`: one of the vocabulary, or a new special token.

    A new one gets a new embedding where none is spare. The tokenizer keeps it, so the checkpoint
    does. "" changes nothing. Source: MoCa adds `<|mask|>`. Raises InputError for a token with
    another part.
    """
    if not token:
        return
    tokenizer = inputs.tokenizer
    if token in (VISION_START, IMAGE_PAD, VISION_END, inputs.eos_token, tokenizer.pad_token):
        raise InputError(
            f"mask_token {token!r} has a part of its own in every input; choose another, or none"
        )
    tokenizer.add_special_tokens({"mask_token": token})  # adds what the vocabulary lacks
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.mask_token_id >= rows:
        model.resize_token_embeddings(len(tokenizer))
    logger.info("mask token %r, id %d of %d", token, tokenizer.mask_token_id, rows)
