"""Open a Qwen2-VL, Qwen2.5-VL or Qwen3-VL (or the small one of this project) and make its attention what is asked.

The models are transformers' own classes, unmodified. Three things are set from outside: whether the language model is
causal, which mask a forward pass uses, and the 3-D rotary positions (always computed here from the 2-D mask, because
they cannot be derived from a 4-D one). A run-time probe checks that the causal switch took before anything trains.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import LongTensor, Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForImageTextToText, PreTrainedModel

from .attention import EOS, PAD, A, additive, block_mask, dense_mask
from .inputs import Batch, Inputs
from .items import IMAGE_PAD, VISION_END, VISION_START, InputError
from .kernels import COMPILED_SHAPES, PICTURES, _flex_failure, _pictures_failure

logger = logging.getLogger(__name__)


def language_model(model: PreTrainedModel) -> nn.Module:
    """The text decoder inside a vision-language model: `.layers`, `.norm`, `.rotary_emb`, `.embed_tokens`."""
    return model.model.language_model


def set_bidirectional(model: PreTrainedModel, bidirectional: bool) -> PreTrainedModel:
    """Switch the language model between causal and bidirectional attention, in place; saved with its config.

    `config.is_causal` decides the mask under SDPA and eager; flash-attention reads `self_attn.is_causal` of each layer.
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
    """Local folder or hub name -> model with the wanted attention, probed.

    attn_implementation: "sdpa", "eager", "flash_attention_2" or "flex_attention". Qwen2-VL does not declare Flex as
    supported although its attention takes any registered function, so it is enabled on the language model's config
    only; the vision tower stays on SDPA, on a GPU for all pictures at once (`picture_attention`). Where Flex does not
    run forward and backward (there is no backward pass on a CPU, and nothing at all without a compiler), SDPA takes its
    place with a warning. safetensors only, never remote code. The model comes back on the CPU. Raises RuntimeError if the
    probe fails.
    """
    flex = attn_implementation == "flex_attention"
    model = AutoModelForImageTextToText.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation="sdpa" if flex else attn_implementation,
        use_safetensors=True,
        trust_remote_code=False,
    )
    set_bidirectional(model, bidirectional)
    flash = attn_implementation.startswith("flash")
    if torch.cuda.is_available() and (flex or attn_implementation == "sdpa"):
        tower = (
            model.model.visual.config
        )  # Qwen2-VL's own name of its width comes first: its hidden_size is the text's
        if (
            reason := _pictures_failure(
                getattr(tower, "embed_dim", tower.hidden_size) // tower.num_heads
            )
        ) is None:
            model.model.visual.config._attn_implementation = PICTURES
        else:
            logger.warning(
                "pictures are attended to one by one, which takes longer and gives the same: %s",
                reason,
            )
    if (
        flex or flash
    ) and torch.accelerator.is_available():  # their kernels are there and not on the CPU
        model.to(torch.accelerator.current_accelerator())
    if flex:
        language_model(model).config._attn_implementation = "flex_attention"
        torch._dynamo.config.recompile_limit = COMPILED_SHAPES
        if (reason := _flex_failure(lambda: _try_backward(model))) is not None:
            language_model(model).config._attn_implementation = "sdpa"
            logger.warning(
                "flex_attention is not available here (%s); using sdpa, which gives the same",
                reason,
            )
    with torch.autocast(
        model.device.type, torch.bfloat16, enabled=flash and dtype == torch.float32
    ):
        probe_attention(model, bidirectional)
    return model.to("cpu").eval()


def _try_backward(model: PreTrainedModel) -> None:
    """One tiny forward and backward pass through all layers, without room for the gradients of all weights."""
    ids = torch.tensor([[5, 6, 7, 8]], device=model.device)
    with torch.enable_grad():
        hidden = hidden_states(model, _text_batch(ids, torch.full_like(ids, A)))
        torch.autograd.grad(hidden.sum(), language_model(model).embed_tokens.weight)


@torch.no_grad()
def probe_attention(model: PreTrainedModel, bidirectional: bool) -> None:
    """Change the last token and look at the first one's state, without and with padding.

    Raises RuntimeError when a bidirectional model does not notice, or a causal one does: llm2vec and others have
    shipped models whose switch was silently off for some backend or for a batch of one.
    """
    was_training = model.training
    model.eval()
    for n_pad in (0, 2):
        ids = torch.tensor(
            [[5, 6, 7, 8] + [0] * n_pad, [5, 6, 7, 9] + [0] * n_pad], device=model.device
        )
        segments = torch.full_like(ids, A)
        if n_pad:
            segments[:, -n_pad:] = PAD
        states = [
            hidden_states(model, _text_batch(ids[i : i + 1], segments[i : i + 1]))[0, 0]
            for i in (0, 1)
        ]
        changed = not torch.equal(states[0], states[1])
        if changed != bidirectional:
            wanted, got = (
                ("bidirectional", "causal") if bidirectional else ("causal", "bidirectional")
            )
            raise RuntimeError(
                f"the attention switch did not take: {wanted} attention was asked for, but {type(model).__name__} with "
                f"{language_model(model).config._attn_implementation!r} attends like a {got} model"
            )
    model.train(was_training)


def _text_batch(input_ids: LongTensor, segment_ids: LongTensor) -> Batch:
    zeros = torch.zeros_like(input_ids)
    return {
        "input_ids": input_ids,
        "segment_ids": segment_ids,
        "attention_mask": (segment_ids != PAD).long(),
        "mm_token_type_ids": zeros,
    }


def position_ids(model: PreTrainedModel, batch: Batch) -> LongTensor:
    """transformers' own 3-D rotary positions (3, B, L), from the 2-D mask, for text-only batches too; a packed batch
    brings its own."""
    if "position_ids" in batch:
        return batch["position_ids"]
    if not len(
        batch.get("image_grid_thw", ())
    ):  # text alone, of which transformers' own is a count of the tokens
        mask = batch["attention_mask"]
        return ((mask.cumsum(1) - 1) * mask).expand(3, -1, -1)
    # On the CPU: it goes row by row through thousands of small operations, each of which would stop a GPU.
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(
        **{"image_grid_thw": None} | {n: batch[n].cpu() for n in names if n in batch}
    )
    return positions.to(batch["input_ids"].device)


def layout_mask(model: PreTrainedModel, batch: Batch, layout: str):
    """The layout in the form that the model's attention functions take: bool, additive or BlockMask, each (B, 1, L, L).

    Raises ValueError for flash-attention, which takes none.
    """
    implementation = language_model(model).config._attn_implementation
    segments, samples = batch["segment_ids"], batch.get("sample_ids")  # samples: of packed rows
    if implementation == "flex_attention":
        return block_mask(layout, segments, samples)
    if implementation.startswith("flash_attention"):
        raise ValueError(
            f"{implementation} cannot express the layout {layout!r}, or packed rows; use sdpa or flex_attention"
        )
    mask = dense_mask(layout, segments, samples)
    return additive(mask, model.dtype) if implementation == "eager" else mask


def hidden_states(model: PreTrainedModel, batch: Batch, layout: str | None = None) -> Tensor:
    """One forward pass without logits: final, normed hidden states (B, L, H) under the given layout.

    `layout=None` is the model's own mode, which needs the 2-D mask alone; another is passed as a mask of its own. No
    language-model head is applied here: at 152 k x L numbers a sample it would cost more than the rest of a small batch, and
    nothing in stage 3 or inference reads it.
    """
    keys = ("pixel_values", "image_grid_thw")
    images = {
        key: batch[key] for key in keys if len(batch.get(key, ()))
    }  # a chunk of GradCache's may have none
    text = language_model(model).config
    own = "bidirectional" if getattr(text, "is_causal", True) is False else "causal"
    plain = (
        layout in (None, own)
        and "sample_ids" not in batch
        and text._attn_implementation != "flex_attention"
    )
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"]
        if plain
        else layout_mask(model, batch, layout or own),
        position_ids=position_ids(model, batch),
        use_cache=False,
        **images,
    ).last_hidden_state
    if torch.is_grad_enabled() and needed_elsewhere(bool(images), model):
        hidden = hidden + 0.0 * sum(
            values.sum() for values in model.model.visual.parameters() if values.requires_grad
        )
    return hidden


def needed_elsewhere(here: bool, model: PreTrainedModel) -> bool:
    """Under FSDP: is something that is done `here` or not (the vision tower, the patch decoder) done by another process only?

    Then it must get a gradient, of zeros, here as well: processes that share the weights exchange the gradients of the same
    ones, or they wait for each other for ever. Every process must ask. False without FSDP.
    """
    if not (model.training and isinstance(language_model(model).layers[0], FSDPModule)):
        return False
    anywhere = torch.tensor(int(here), device=model.device)
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
    return bool(anywhere) and not here


def pool(hidden: Tensor, batch: Batch, pooling: str = "eos") -> Tensor:
    """(B, L, H) -> (B, H), not normalised: the state at EOS (script) or the mean over real tokens (MoCa).

    The EOS position comes from segment_ids, so padding side and padding token play no part.
    """
    if pooling == "eos":
        position = (batch["segment_ids"] == EOS).int().argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), position]
    if pooling == "mean":
        weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)
    raise ValueError(f"unknown pooling {pooling!r}; choose 'eos' or 'mean'")


def set_mask_token(model: PreTrainedModel, inputs: Inputs, token: str) -> None:
    """Hide words behind `token`: one of the vocabulary, or a new special token, with a new embedding where none is spare.

    The tokenizer keeps it, so the checkpoint does. "" changes nothing. Source: MoCa adds `<|mask|>`.
    """
    if not token:
        return
    if token in (VISION_START, IMAGE_PAD, VISION_END, inputs.eos_token, inputs.tokenizer.pad_token):
        raise InputError(
            f"mask_token {token!r} has a part of its own in every input; choose another, or leave it empty"
        )
    inputs.tokenizer.add_special_tokens({"mask_token": token})  # adds what the vocabulary lacks
    rows = model.get_input_embeddings().num_embeddings
    if inputs.tokenizer.mask_token_id >= rows:
        model.resize_token_embeddings(len(inputs.tokenizer))
    logger.info("mask token %r, id %d of %d", token, inputs.tokenizer.mask_token_id, rows)
