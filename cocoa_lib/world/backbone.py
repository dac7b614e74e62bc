"""The small causal backbone: tokenizer, shape, training by next-token prediction, answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..corruption import IGNORE
from ..inputs import Batch, Inputs
from ..items import IMAGE_PAD, VISION_END, VISION_START

# Qwen2's control tokens, in Qwen2's order, and the mask token that stages 1 and 2 need.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    VISION_START,
    VISION_END,
    IMAGE_PAD,
    "<|video_pad|>",
)
MASK_TOKEN = "<|mask|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen2's control tokens: any Unicode text is representable, nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
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
    tokenizer,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    vision_dim: int,
    vision_layers: int,
    patch_size: int,
):
    """A plain Qwen2VLConfig of one to four million parameters: every part of the real one, smaller."""
    text = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 4096,
    }
    return make_config(
        tokenizer,
        text,
        rope_theta=10_000.0,
        vision_dim=vision_dim,
        vision_layers=vision_layers,
        patch_size=patch_size,
    )


def make_config(
    tokenizer,
    text: dict[str, Any],
    *,
    rope_theta: float,
    vision_dim: int,
    vision_layers: int,
    patch_size: int,
) -> Qwen2VLConfig:
    """A Qwen2VLConfig of a language model of shape `text` and a small vision tower below it."""
    token = tokenizer.convert_tokens_to_ids
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    # Rotary frequencies: a quarter for time, three eighths each for height and width.
    time, height = half // 4, (half - half // 4) // 2
    return Qwen2VLConfig(
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rope_theta,
                "mrope_section": [time, height, half - time - height],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": vision_layers,
            "embed_dim": vision_dim,
            "hidden_size": text["hidden_size"],
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
    texts: Iterable[str],
    *,
    vocab_size: int,
    image_pixels: int,
    seed: int,
    max_length: int = 256,
    **sizes: int,
) -> tuple[PreTrainedModel, Inputs]:
    """A small Qwen2-VL with random weights and its processor, for texts like these.

    image_pixels: area an image is resized to at most (at least a sixteenth of it); sizes: see `small_config`.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    processor = make_processor(sizes["patch_size"], image_pixels)
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(small_config(tokenizer, **sizes))
    return model, Inputs(tokenizer, processor, max_length=max_length)


def make_processor(patch_size: int, image_pixels: int) -> Qwen2VLImageProcessorPil:
    """Qwen2-VL's image processor, for images of `image_pixels` at most, a sixteenth at least."""
    size = {"shortest_edge": image_pixels // 16, "longest_edge": image_pixels}
    return Qwen2VLImageProcessorPil(patch_size=patch_size, size=size)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    inputs: Inputs,
    items: Sequence[dict],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 64,
) -> list[str]:
    """Greedy continuation of each {text, image} prompt by a causal model, up to a line break or EOS."""
    left = replace(inputs, padding_side="left")
    texts: list[str] = []
    for start in range(0, len(items), batch_size):
        batch = left.collate(items[start : start + batch_size], eos=False)
        prompt = {
            name: batch[name]
            for name in batch
            if name not in ("segment_ids", "num_images_per_sample")
        }
        made = model.generate(
            **prompt, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=inputs.pad_id
        )
        new = made[:, batch["input_ids"].shape[1] :]
        texts += [
            text.split("\n")[0].strip()
            for text in inputs.tokenizer.batch_decode(new, skip_special_tokens=True)
        ]
    return texts


def causal_batch(rows: list[dict[str, Any]], inputs: Inputs) -> Batch:
    """Next-token prediction: a picture, then turns "question answer" one a line, then EOS.

    Each row has `image` and `turns`, a list of (question, answer); a caption is an answer without a question. The loss is
    on answers and on the line break or EOS that ends them. Several questions share one picture because the vision tower
    costs more than the words.
    """
    pieces = [_turn_pieces(row["turns"]) for row in rows]
    items = [
        {"text": "".join(text for text, _ in row), "image": rows[i]["image"]}
        for i, row in enumerate(pieces)
    ]
    batch = inputs.collate(items)
    labels = torch.full_like(batch["input_ids"], IGNORE)
    for i, row in enumerate(pieces):
        learned = [flag for text, flag in row for _ in inputs.text_ids(text)]
        at = inputs.text_places(
            batch["input_ids"][i, : batch["attention_mask"][i].sum()].tolist()
        )  # and EOS's
        keep = torch.tensor(
            [k for k, flag in zip(at, [*learned[: len(at) - 1], True], strict=True) if flag and k]
        )
        labels[i, keep] = batch["input_ids"][i, keep]
    return batch | {"labels": labels}


def _turn_pieces(turns: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Turns -> (text, learned?) pieces; a piece starts at a space or line break, so each is tokenised as it is alone."""
    pieces = []
    for i, (question, answer) in enumerate(turns):
        pieces += [("\n", True)] * (i > 0) + [
            (question, False),
            (f" {answer}" if question else answer, True),
        ]
    return pieces
