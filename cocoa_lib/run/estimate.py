"""Memory a device and time that a stage needs, before it starts.

The model is built by its own class on torch's meta device: nothing is downloaded. FLOPs are torch's
own count (`FlopCounterMode`) of a forward and backward pass there, activations are the tensors that
autograd keeps.

    python -m cocoa_lib.run.estimate --profile paper --model 2B --devices 8 --device-memory 80
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from ..attention import EOS, A
from ..backbone import hidden_states, language_model, set_bidirectional
from ..data import corpus
from ..inputs import Batch
from ..items import image_size
from ..recipes import Recipe, make_recipe
from ..reconstruction import Reconstruction
from .adapters import add_adapter
from .profiles import ROOT, STAGES, load_profile

# data/configs/README.md
SHAPES = {"2B": "qwen2_vl_2b", "3B": "qwen2_5_vl_3b", "7B": "qwen2_5_vl_7b"}
PEAK = 989e12  # FLOP/s of a device (H100 and H200, dense bf16)
# Share of it that 2B reached on an H200, with all weights and with the adapter (docs/speed.md).
UTILISATION, ADAPTED = 0.30, 0.15
HALF = 0.57  # bytes kept under bf16 per byte: norms and the residual stream stay float32
USES = (
    "weights gradients optimiser copies activations inputs memory".split()
)  # of a device's memory
REMEDIES = (
    "lower mini_batch_size (stage 3) or batch_size, image_tokens or max_length; set "
    "gradient_checkpointing; train an adapter (lora_r: 8); take more devices, or shard (fsdp_1x8)"
)


@dataclass(frozen=True)
class Data:
    """What items are like: text tokens, picture area (pixels), share of pairs' items with a picture.

    The defaults are assumptions; `measure` reads data.
    """

    text: float = 64
    pixels: float = 1024**2
    share: float = 0.5


def measure(folder: Path, n: int = 400) -> Data:
    """Measure about `n` items of a folder's pairs; 4 characters count as a token (a rule of thumb)."""
    rows, _ = corpus.pairs(folder)
    rows = rows.select(range(0, len(rows), 1 + 2 * len(rows) // n))
    items = [row[side] for row in rows for side in ("anchor", "positive")]
    areas = [math.prod(image_size(item["image"])) for item in items if item["image"]]
    text = sum(len(item["text"]) for item in items) / 4 / len(items)
    return Data(text, sum(areas) / max(1, len(areas)), len(areas) / len(items))


def build(source: str | Path, stage: str, recipe: Recipe) -> Reconstruction:
    """Build the model as this stage trains it, decoder and adapter included, on the meta device."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    names = ("image_weight", "decoder_layers")
    extra = {name: getattr(recipe, name) for name in names if hasattr(recipe, name)}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        module = Reconstruction(model, layout=recipe.layout, **extra)
    set_bidirectional(model, recipe.layout != "causal")
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.lora_r:
        add_adapter(model, recipe)
    return module.train()


class Weightless(TorchDispatchMode):
    """Compute with weights and pixels on meta, and with ids, masks and grids on the CPU.

    What follows from ids keeps its values (rotary positions, windows, places of pictures), so
    the code runs as it is.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        lookups = (torch.ops.aten.index, torch.ops.aten.index_put_)
        if func is torch.ops.aten._to_copy.default and not args[0].is_meta:
            kwargs.pop("device", None)
        elif any(one.is_meta for one in tensors) and func.overloadpacket not in lookups:
            args, kwargs = tree_map_only(torch.Tensor, lambda one: one.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def make_item(module: Reconstruction, text: int, cells: int, masked: int) -> Batch:
    """Make one item (1, L): a picture of about `cells` tokens, `text` words, EOS.

    The last `masked` words are masked, and every second cell is hidden.
    """
    config, vision = module.model.config, module.model.config.vision_config
    side = round(math.sqrt(cells))
    pads = [config.image_token_id] * side**2
    marks = [config.vision_start_token_id, *pads, config.vision_end_token_id]
    ids = torch.tensor([marks * (side > 0) + [7] * text + [8]])
    segments = torch.full_like(ids, A)
    segments[0, -1] = EOS
    labels = torch.full_like(ids, -100)
    labels[0, ids.shape[1] - 1 - masked : -1] = 7
    kinds = (ids == config.image_token_id).long()
    batch = {"input_ids": ids, "segment_ids": segments, "attention_mask": torch.ones_like(ids)}
    batch |= {"mm_token_type_ids": kinds, "labels": labels}
    if side:
        edge = side * vision.spatial_merge_size
        numbers = 3 * vision.temporal_patch_size * vision.patch_size**2
        batch["pixel_values"] = torch.empty(edge**2, numbers, device="meta")
        batch["image_grid_thw"] = torch.tensor([[1, edge, edge]])
        batch["hidden_cells"] = torch.arange(side**2) % 2 == 0
        batch["patch_fill"] = torch.zeros(numbers)
    return batch


def count_step(module: Reconstruction, stage: str, batch: Batch) -> tuple[int, int, int]:
    """Count FLOPs of a forward and of a backward pass on meta, and bytes that autograd keeps.

    By torch's own counter. The backward pass includes what gradient checkpointing repeats, of which
    torch on meta leaves out a matrix more than elsewhere: up to 4 % less than a real step's. The
    bytes are those of float32, weights aside.
    """
    own = {weight.untyped_storage()._cdata for weight in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 3 or tensor.shape[-1] != tensor.shape[-2]:  # L x L: no kernel keeps it
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with Weightless(), FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            if stage == "stage3":
                loss = hidden_states(module.model, batch)[:, -1].sum()
            else:
                loss = module(**batch)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    size = sum(storage.nbytes() for name, storage in kept.items() if name not in own)
    return forward, counter.get_total_flops() - forward, size


def estimate(
    source: str | Path,
    stage: str,
    recipe: Recipe,
    data: Data,
    devices: int = 1,
    *,
    sharded: bool = False,
) -> dict[str, float]:
    """Estimate bytes on one device by USES, `flops` of a step, `hours` of the stage.

    source: folder with `config.json`; sharded: FSDP. For P parameters of which T are trained:
    weights 4 P, gradients 4 T, optimiser 8 T (bf16 is autocast), each over the devices where
    sharded; copies: casts under bf16, DDP's buckets, or what FSDP gathers at a time (two layers and
    the rest); activations of the items whose graph is held at a time, under gradient checkpointing
    each layer's input and one whole layer; inputs: the device's batch of pixels.

    GradCache embeds all of a batch twice. Not counted: the L x L matrix of eager attention, the
    allocator's gaps, the loader's own time.
    """
    module = build(source, stage, recipe)
    vision, words = module.model.config.vision_config, language_model(module.model)
    pairs, cell = stage == "stage3", (vision.patch_size * vision.spatial_merge_size) ** 2
    text = data.text * (2 if stage == "stage2" else 1)  # A's query and B
    masked = 0.0 if pairs else data.text * getattr(recipe, "text_mask_rate", 1.0)
    room = max(0.0, min(recipe.image_limit(recipe.max_length), recipe.max_length - text - 3))
    cells = min(data.pixels / cell, room)  # tokens of a picture
    sides = 2 + recipe.hard_negatives if pairs else 1
    items, local = recipe.batch_size * sides, recipe.batch_size / devices
    chunked = pairs and (devices > 1 or local > recipe.mini_batch_size)
    held = min(local, recipe.mini_batch_size) if chunked else sides * local
    share, flops, layers = data.share if pairs else 1.0, 0.0, len(words.layers)
    for part, n in ((1 - share, 0), (share, cells)):  # the one with a picture last
        if part:
            item = make_item(module, round(text), round(n), round(masked))
            forward, backward, kept = count_step(module, stage, item)
            flops += items * part * ((1 + chunked) * forward + backward)
    half = HALF if recipe.bf16 else 1.0
    if recipe.gradient_checkpointing:  # each layer's input, in float32, and one whole layer
        module.model.gradient_checkpointing_disable()
        kept += half * count_step(module, stage, item)[2] / (layers + vision.depth)
    else:
        kept *= half
    total = sum(weight.numel() for weight in module.parameters())
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    parts = devices if sharded else 1
    if sharded:
        layered = sum(weight.numel() for weight in words.layers.parameters())
        gathered = total - layered * (1 - 2 / layers)
        copies = (2 if recipe.bf16 else 4) * gathered * (1 + trained / total)
    else:
        casts = (total - trained) / (layers if recipe.gradient_checkpointing else 1) + trained
        copies = 2 * recipe.bf16 * casts + 4 * trained * (devices > 1)
    pixels = item["pixel_values"].nbytes if "pixel_values" in item else 0
    used = [4 * total / parts, 4 * trained / parts, 8 * trained / parts, copies]
    used += [held * kept, items / devices * pixels]
    rate = devices * PEAK * (ADAPTED if recipe.lora_r else UTILISATION)
    hours = recipe.steps * flops / rate / 3600
    return dict(zip(USES, [*used, sum(used)], strict=True)) | {"flops": flops, "hours": hours}


def print_estimate(
    source: str | Path, profile: str, data: Data, memory: float, devices: int = 1, **settings: Any
) -> None:
    """Print a line a stage: GB by use, FLOPs, hours; and what helps where `memory` GB are too few."""
    print(f"GB      {' '.join(USES)} | PFLOP a step | hours")  # noqa: T201
    for stage in STAGES:
        recipe = make_recipe(stage, load_profile(profile)[stage])
        *sizes, flops, hours = estimate(source, stage, recipe, data, devices, **settings).values()
        row = [f"{size / 1e9:{len(name)}.1f}" for name, size in zip(USES, sizes, strict=True)]
        print(f"{stage}  {' '.join(row)} | {flops / 1e15:12.1f} | {hours:5.1f}")  # noqa: T201
        if sizes[-1] > 0.9e9 * memory:
            print(f"  does not fit into {memory:g} GB, a tenth left free: {REMEDIES}")  # noqa: T201


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cocoa_lib.run.estimate", description=__doc__)
    parser.add_argument("--profile", default="paper")
    parser.add_argument("--model", default="2B", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--data", type=Path, help="measure this folder's items, assume none")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--device-memory", type=float, default=80, help="GB; a tenth is left free")
    parser.add_argument("--fsdp", action="store_true", help="weights and optimiser sharded")
    args = parser.parse_args(argv)
    source = ROOT / "data/configs" / SHAPES[args.model] if args.model in SHAPES else args.model
    data = measure(args.data) if args.data else Data()
    print_estimate(source, args.profile, data, args.device_memory, args.devices, sharded=args.fsdp)


if __name__ == "__main__":
    main()
