"""What a stage needs before it starts: memory a device and time, from the model's shape, the data and the devices.

The model is built by its own class on torch's meta device: nothing is downloaded, parameters are counted, and FLOPs are
torch's own count (`FlopCounterMode`) of a forward and backward pass there.

    python -m cocoa_lib.run.estimate --profile paper --model 2B --devices 8 --device-memory 80
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from ..attention import EOS, A
from ..backbone import hidden_states, language_model, set_bidirectional
from ..data import corpus
from ..inputs import Batch
from ..items import InputError, image_size
from ..recipes import Recipe, make_recipe
from ..reconstruction import Reconstruction
from .adapters import add_adapter
from .profiles import ROOT, STAGES, load_profile

SHAPES = {"2B": "qwen2_vl_2b", "3B": "qwen2_5_vl_3b", "7B": "qwen2_5_vl_7b"}  # data/configs/README.md
MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PEAK = 989e12  # FLOP/s of a device (H100 and H200, dense bf16)
# Share of it that 2B's steps reached on an H200: all weights trained, and with the paper profile's adapter (docs/speed.md).
UTILISATION, ADAPTED = 0.30, 0.15
FREE = 0.1  # share of a device's memory that stays free
REMEDIES = (
    "lower mini_batch_size (stage 3) or batch_size, image_tokens or max_length; set gradient_checkpointing; train an "
    "adapter (lora_r: 8); take more devices, or shard over them (accelerate/fsdp_1x8.yaml)"
)
HEAD = "GB      weights gradients optimiser copies activations logits inputs memory | PFLOP a step | hours"


@dataclass(frozen=True)
class Data:
    """Text tokens of an item, mean and largest area of its picture (pixels), share of the items of contrastive pairs that
    have a picture. The defaults are assumptions; `measure` reads a data folder."""

    text: float = 64
    pixels: float = 1024**2
    largest: float = 1024**2
    share: float = 0.5


def measure(folder: Path, n: int = 400) -> Data:
    """About `n` items of a folder's pairs, evenly spaced; 4 characters count as a token (a rule of thumb).

    Raises InputError for a folder without pairs or a picture that cannot be read, FileNotFoundError without tables."""
    rows, _ = corpus.pairs(folder)
    if not len(rows):
        raise InputError(f"{folder}: no pairs")
    rows = rows.select(range(0, len(rows), 1 + 2 * len(rows) // n))
    items = [row[side] for row in rows for side in ("anchor", "positive")]
    areas = [math.prod(image_size(item["image"])) for item in items if item["image"]]
    text = sum(len(item["text"]) for item in items) / 4 / len(items)
    return Data(text, sum(areas) / max(1, len(areas)), max(areas, default=0), len(areas) / len(items))


def build(source: str | Path, stage: str, recipe: Recipe) -> Reconstruction:
    """The model as this stage trains it, image decoder and adapter included, on the meta device."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type not in MODELS:
        raise ValueError(f"{source} is a {config.model_type}; the estimate knows {', '.join(MODELS)}")
    names = ("image_weight", "decoder_layers")
    extra = {name: getattr(recipe, name) for name in names if hasattr(recipe, name)}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        module = Reconstruction(model, layout=recipe.layout, **extra)
    set_bidirectional(model, recipe.layout != "causal")
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.lora_r:
        settings = {name: getattr(recipe, f"lora_{name}") for name in ("r", "alpha", "dropout")}
        add_adapter(model, **settings, dora=recipe.dora)
    return module.train()


class Weightless(TorchDispatchMode):
    """Weights, pixels and all that is computed from them are on meta; ids, masks and grids keep their values, on the
    CPU, as what follows from them does (rotary positions, windows, places of pictures): the code runs as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        lookups = (torch.ops.aten.index, torch.ops.aten.index_put_)
        if func is torch.ops.aten._to_copy.default and not args[0].is_meta:
            kwargs.pop("device", None)
        elif any(value.is_meta for value in tensors) and func.overloadpacket not in lookups:
            args, kwargs = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def make_item(module: Reconstruction, text: int, cells: int, masked: int) -> Batch:
    """One item (1, L): a picture of about `cells` tokens, `text` words of which the last `masked` are, and EOS."""
    config, vision = module.model.config, module.model.config.vision_config
    side = round(math.sqrt(cells))
    marks = [config.vision_start_token_id, *[config.image_token_id] * side**2, config.vision_end_token_id]
    ids = torch.tensor([marks * (side > 0) + [7] * text + [8]])
    segments = torch.full_like(ids, A)
    segments[0, -1] = EOS
    labels = torch.full_like(ids, -100)
    labels[0, ids.shape[1] - 1 - masked : -1] = 7
    kinds = (ids == config.image_token_id).long()
    batch = {"input_ids": ids, "segment_ids": segments, "attention_mask": torch.ones_like(ids)}
    batch |= {"mm_token_type_ids": kinds, "labels": labels}
    if side:
        edge, numbers = side * vision.spatial_merge_size, 3 * vision.temporal_patch_size * vision.patch_size**2
        batch["pixel_values"] = torch.empty(edge**2, numbers, device="meta")
        batch["image_grid_thw"] = torch.tensor([[1, edge, edge]])
        batch |= {"hidden_cells": torch.arange(side**2) % 2 == 0, "patch_fill": torch.zeros(numbers)}
    return batch


def count_flops(module: Reconstruction, stage: str, batch: Batch) -> tuple[int, int]:
    """FLOPs of a forward and of a backward pass (what checkpointing repeats included), by torch's count on meta."""
    with Weightless(), FlopCounterMode(display=False) as counter:
        if stage == "stage3":
            loss = hidden_states(module.model, batch)[:, -1].sum()
        else:
            loss = module(**batch)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def saved_bytes(module: Reconstruction, recipe: Recipe, length: float, patches: float) -> float:
    """Bytes kept for the backward pass of one item of `length` tokens and `patches` patches; see `estimate`."""
    text, vision = language_model(module.model), module.model.model.visual
    width = 2 if recipe.bf16 else 4
    outside, layers = 0.0, defaultdict(float)
    for name, part in module.named_modules():
        rows = patches if "visual" in name else length
        layer = ".".join(name.split(".")[: name.split(".").index(kind) + 2]) if (kind := _layer_kind(name)) else ""
        if layer == name and layer:
            hidden = part.norm1.weight.numel() if "visual" in name else part.input_layernorm.weight.numel()
            layers[name] += rows * hidden * 16
    return outside + (max(layers.values()) if recipe.gradient_checkpointing else sum(layers.values()))
