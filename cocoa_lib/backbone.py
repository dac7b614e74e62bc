"""Open a Qwen2-VL, Qwen2.5-VL or Qwen3-VL (or the small one of this project) and make its attention what is asked.

The models are transformers' own classes, unmodified. Three things are set from outside: whether the language model is
causal, which mask a forward pass uses, and the 3-D rotary positions (always computed here from the 2-D mask, because
they cannot be derived from a 4-D one). A run-time probe checks that the causal switch took before anything trains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import LongTensor, Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .attention import EOS, PAD, A, additive, block_mask, dense_mask, picture_attention
from .inputs import Batch, Inputs
from .items import IMAGE_PAD, VISION_END, VISION_START, InputError

logger = logging.getLogger(__name__)

# The authors' targets (script): language model q,k,v,o,gate,up,down and vision qkv,fc1,fc2. These are Qwen2-VL's names;
# Qwen2.5-VL's vision blocks have gate, up, down, Qwen3-VL's linear_fc1, linear_fc2. Patch mergers are left out in all.
LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "fc1", "fc2", "linear_fc1",
    "linear_fc2",
)  # fmt: skip
# Qwen2's control tokens, in Qwen2's order, and the mask token that stages 1 and 2 need.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>")
MASK_TOKEN = "<|mask|>"
# Shapes of a batch that are compiled; past torch's own limit of 8 the others would run unfused, with a mere warning.
COMPILED_SHAPES = 64
# "flash": from such a name transformers' vision towers take a function that is told where each picture ends.
PICTURES = "flash_pictures"
AttentionInterface.register(PICTURES, picture_attention)


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
        tower = model.model.visual.config  # Qwen2-VL's own name of its width comes first: its hidden_size is the text's
        if (reason := _pictures_failure(getattr(tower, "embed_dim", tower.hidden_size) // tower.num_heads)) is None:
            model.model.visual.config._attn_implementation = PICTURES
        else:
            logger.warning("pictures are attended to one by one, which takes longer and gives the same: %s", reason)
    if (flex or flash) and torch.accelerator.is_available():  # their kernels are there and not on the CPU
        model.to(torch.accelerator.current_accelerator())
    if flex:
        language_model(model).config._attn_implementation = "flex_attention"
        torch._dynamo.config.recompile_limit = COMPILED_SHAPES
        if (reason := _flex_failure(model)) is not None:
            language_model(model).config._attn_implementation = "sdpa"
            logger.warning("flex_attention is not available here (%s); using sdpa, which gives the same", reason)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=flash and dtype == torch.float32):
        probe_attention(model, bidirectional)
    return model.to("cpu").eval()


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """From now on the language model's layers run compiled, one program for all of them; the weights keep their names.

    In place, so that gradient checkpointing, GradCache and an adapter go on as before. So do the vision tower's on a GPU,
    where they attend to all pictures at once (float32 ones of different sizes are lists of numbers, which stop the
    compiler); elsewhere they are left as they are. Needs a C++ compiler on a CPU, Triton on a GPU; torch says what is
    missing. Under torch 2.13 (not 2.11 and 2.12) peft's DoRA stops the compiler in each layer, under gradient checkpointing
    before it begins: from there on a warning says so.
    """
    dora = any(getattr(module, "use_dora", None) and any(module.use_dora.values()) for module in model.modules())
    if dora and torch.__version__ >= "2.13":
        logger.warning(
            "torch_compile gains little or nothing with DoRA, whose code in peft stops the compiler; set dora: false"
        )
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    # An adapter's dropout, which GradCache draws twice, is drawn as it would be uncompiled.
    torch._inductor.config.fallback_random = True
    torch._dynamo.config.optimize_ddp = False  # a layer is one program, not one for each of DDP's buckets
    visual = model.model.visual
    blocks = visual.blocks if visual.config._attn_implementation == PICTURES else ()
    for layer in (*language_model(model).layers, *blocks):
        layer.compile(dynamic=True, backend=backend)  # lengths differ from batch to batch


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _flex_failure(model: PreTrainedModel) -> str | None:
    """Why FlexAttention cannot train this model here, or None: one tiny forward and backward pass."""
    ids = torch.tensor([[5, 6, 7, 8]], device=model.device)
    try:
        with torch.enable_grad():
            hidden = hidden_states(model, _text_batch(ids, torch.full_like(ids, A)))
            # Through all layers, without room for the gradients of all weights.
            torch.autograd.grad(hidden.sum(), language_model(model).embed_tokens.weight)
    except Exception as error:  # whatever a compiler, a device or torch says: each means "not here"
        return _first_line(error)
    return None


def _pictures_failure(width: int, device: str = "cuda") -> str | None:
    """Why this GPU cannot attend to pictures of different sizes in one call, with heads of `width`, or None: a small forward and
    backward pass, in float32, which takes them singly, and in bf16."""
    drawn, ends, found = torch.Generator().manual_seed(0), torch.tensor([0, 100, 300]), []
    values = [torch.randn(1, 2, 300, width, generator=drawn) for _ in range(4)]
    try:
        for dtype in (torch.float32, torch.bfloat16):
            *qkv, pull = (x.to(device, dtype).requires_grad_() for x in values)
            with torch.enable_grad():
                out, _ = picture_attention(nn.Identity(), *qkv, cu_seq_lens_q=ends.to(device), max_length_q=200)
            found.append([out.detach(), *torch.autograd.grad(out, qkv, pull.transpose(1, 2))])
    except Exception as error:  # as for Flex
        return _first_line(error)
    wrong = [float((b - a).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    if not all(share < 0.02 for share in wrong):  # as NaN is not, either
        return f"its numbers are off by {100 * max(wrong):.0f} % or not finite"
    return None


@torch.no_grad()
def probe_attention(model: PreTrainedModel, bidirectional: bool) -> None:
    """Change the last token and look at the first one's state, without and with padding.

    Raises RuntimeError when a bidirectional model does not notice, or a causal one does: llm2vec and others have
    shipped models whose switch was silently off for some backend or for a batch of one.
    """
    was_training = model.training
    model.eval()
    for n_pad in (0, 2):
        ids = torch.tensor([[5, 6, 7, 8] + [0] * n_pad, [5, 6, 7, 9] + [0] * n_pad], device=model.device)
        segments = torch.full_like(ids, A)
        if n_pad:
            segments[:, -n_pad:] = PAD
        states = [hidden_states(model, _text_batch(ids[i : i + 1], segments[i : i + 1]))[0, 0] for i in (0, 1)]
        changed = not torch.equal(states[0], states[1])
        if changed != bidirectional:
            wanted, got = ("bidirectional", "causal") if bidirectional else ("causal", "bidirectional")
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
    if not len(batch.get("image_grid_thw", ())):  # text alone, of which transformers' own is a count of the tokens
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
    images = {key: batch[key] for key in keys if len(batch.get(key, ()))}  # a chunk of GradCache's may have none
    text = language_model(model).config
    own = "bidirectional" if getattr(text, "is_causal", True) is False else "causal"
    plain = layout in (None, own) and "sample_ids" not in batch and text._attn_implementation != "flex_attention"
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"] if plain else layout_mask(model, batch, layout or own),
        position_ids=position_ids(model, batch),
        use_cache=False,
        **images,
    ).last_hidden_state
    if torch.is_grad_enabled() and needed_elsewhere(bool(images), model):
        hidden = hidden + 0.0 * sum(values.sum() for values in model.model.visual.parameters() if values.requires_grad)
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


def add_adapter(model: PreTrainedModel, *, r: int = 8, alpha: int = 64, dropout: float = 0.1, dora: bool = True):
    """LoRA / DoRA by peft on the published targets (script); returns (peft model, names of the matched modules).

    `model` itself is changed in place, so it can still be used directly; peft's `merge_and_unload` undoes that with the
    adapter's effect folded into the weights. Raises ValueError (by peft) when nothing matches.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora, target_modules=list(LORA_TARGETS),
        exclude_modules=r".*merger.*",
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    matched = sorted(wrapped.base_model.targeted_module_names)
    logger.info("LoRA matched %d modules, e.g. %s", len(matched), matched[:3])
    return wrapped, matched


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen2's control tokens: any Unicode text is representable, nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, MASK_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token=MASK_TOKEN,
        additional_special_tokens=list(SPECIAL_TOKENS),
    )


def small_config(
    tokenizer, *, hidden_size: int, layers: int, heads: int, vision_dim: int, vision_layers: int, patch_size: int
):
    """A plain Qwen2VLConfig of one to four million parameters: every part of the real one, smaller."""
    token = tokenizer.convert_tokens_to_ids
    head_dim = hidden_size // heads
    quarter = head_dim // 8  # rotary frequencies: a quarter for time, three eighths each for height and width
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [
                    quarter,
                    (head_dim // 2 - quarter) // 2,
                    head_dim // 2 - quarter - (head_dim // 2 - quarter) // 2,
                ],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": vision_layers,
            "embed_dim": vision_dim,
            "hidden_size": hidden_size,
            "num_heads": max(1, vision_dim // 32),
            "mlp_ratio": 3,
            "patch_size": patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token(IMAGE_PAD),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
        tie_word_embeddings=True,
    )


def new_backbone(
    texts: Iterable[str], *, vocab_size: int, image_pixels: int, seed: int, max_length: int = 256, **sizes: int
) -> tuple[PreTrainedModel, Inputs]:
    """A small Qwen2-VL with random weights and its processor, for texts like these.

    image_pixels: area an image is resized to at most (at least a sixteenth of it); sizes: see `small_config`.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    processor = Qwen2VLImageProcessorPil(
        patch_size=sizes["patch_size"], size={"shortest_edge": image_pixels // 16, "longest_edge": image_pixels}
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(small_config(tokenizer, **sizes))
    return model, Inputs(tokenizer, processor, max_length=max_length)


@torch.inference_mode()
def answer(
    model: PreTrainedModel, inputs: Inputs, items: Sequence[dict], *, max_new_tokens: int = 48, batch_size: int = 64
) -> list[str]:
    """Greedy continuation of each {text, image} prompt by a causal model, up to a line break or EOS."""
    left = replace(inputs, padding_side="left")
    texts: list[str] = []
    for start in range(0, len(items), batch_size):
        batch = left.collate(items[start : start + batch_size], eos=False)
        prompt = {name: batch[name] for name in batch if name not in ("segment_ids", "num_images_per_sample")}
        made = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=inputs.pad_id)
        new = made[:, batch["input_ids"].shape[1] :]
        texts += [text.split("\n")[0].strip() for text in inputs.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts
