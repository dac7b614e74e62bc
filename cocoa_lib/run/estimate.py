"""Memory a device and time that a stage needs, before it starts.

The model is built by its own class on torch's meta device: nothing is downloaded, parameters are
counted, and FLOPs are torch's own count (`FlopCounterMode`) of a forward and backward pass there.

    python -m cocoa_lib.run.estimate --profile paper --model 2B --devices 8 --device-memory 80
"""

from __future__ import annotations

import argparse
import math
import re
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
from ..items import image_size
from ..recipes import Recipe, make_recipe
from ..reconstruction import Reconstruction
from .adapters import add_adapter
from .profiles import ROOT, STAGES, load_profile

SHAPES = {
    "2B": "qwen2_vl_2b",
    "3B": "qwen2_5_vl_3b",
    "7B": "qwen2_5_vl_7b",
}  # data/configs/README.md
LAYER = re.compile(r".*(layers|blocks)\.(\d+)")
PEAK = 989e12  # FLOP/s of a device (H100 and H200, dense bf16)
# Share of it that 2B reached on an H200, with all weights and with the adapter (docs/speed.md).
UTILISATION, ADAPTED = 0.30, 0.15
FREE = 0.1  # share of a device's memory that stays free
REMEDIES = (
    "lower mini_batch_size (stage 3) or batch_size, image_tokens or max_length; set "
    "gradient_checkpointing; train an "
    "adapter (lora_r: 8); take more devices, or shard over them (accelerate/fsdp_1x8.yaml)"
)
USES = "weights gradients optimiser copies activations logits inputs memory"  # of a device's memory
HEAD = f"GB      {USES} | PFLOP a step | hours"


@dataclass(frozen=True)
class Data:
    """What items are like: text tokens, mean and largest picture area (pixels), share with a
    picture.

    `share` is of the items of contrastive pairs. The defaults are assumptions; `measure` reads
    data.
    """

    text: float = 64
    pixels: float = 1024**2
    largest: float = 1024**2
    share: float = 0.5


def measure(folder: Path, n: int = 400) -> Data:
    """Measure about `n` items of a folder's pairs; 4 characters count as a token (a rule of thumb).

    Raises InputError for a picture that cannot be read, FileNotFoundError without tables.
    """
    rows, _ = corpus.pairs(folder)
    rows = rows.select(range(0, len(rows), 1 + 2 * len(rows) // n))
    items = [row[side] for row in rows for side in ("anchor", "positive")]
    areas = [math.prod(image_size(item["image"])) for item in items if item["image"]]
    text, n = sum(len(item["text"]) for item in items) / 4 / len(items), len(areas)
    return Data(text, sum(areas) / max(1, n), max(areas, default=0), n / len(items))


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
        leaves = tree_leaves((args, kwargs))
        lookups, packet = (torch.ops.aten.index, torch.ops.aten.index_put_), func.overloadpacket
        if func is torch.ops.aten._to_copy.default and not args[0].is_meta:
            kwargs.pop("device", None)
        elif any(getattr(leaf, "is_meta", False) for leaf in leaves) and packet not in lookups:
            args, kwargs = tree_map_only(torch.Tensor, lambda leaf: leaf.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def make_item(module: Reconstruction, text: int, cells: int, masked: int) -> Batch:
    """Make one item (1, L): a picture of about `cells` tokens, `text` words, EOS.

    The last `masked` words are masked, and every second cell is hidden.
    """
    config, vision = module.model.config, module.model.config.vision_config
    side = round(math.sqrt(cells))
    picture = [config.image_token_id] * side**2
    marks = [config.vision_start_token_id, *picture, config.vision_end_token_id]
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


def count_flops(module: Reconstruction, stage: str, batch: Batch) -> tuple[int, int]:
    """Count the FLOPs of a forward and of a backward pass on meta, by torch's own counter.

    The backward pass includes what gradient checkpointing repeats, of which torch on meta leaves
    out a matrix more than elsewhere: up to 4 % less than a real step's.
    """
    with Weightless(), FlopCounterMode(display=False) as counter:
        if stage == "stage3":
            loss = hidden_states(module.model, batch)[:, -1].sum()
        else:
            loss = module(**batch)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def saved_bytes(module: Reconstruction, recipe: Recipe, length: float, patches: float) -> float:
    """Estimate the bytes kept for the backward pass of an item; see `estimate`."""
    vision, words = module.model.config.vision_config, language_model(module.model).config
    gated = hasattr(vision, "fullatt_block_indexes")  # Qwen2.5-VL: a gated MLP
    tower = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's own name
    inner = getattr(vision, "intermediate_size", getattr(vision, "mlp_ratio", 0) * tower)
    sizes = {
        True: (tower, (2 + gated) * inner),
        False: (words.hidden_size, 3 * words.intermediate_size),
    }
    width, kept = 2 if recipe.bf16 else 4, 0.0
    saved: dict[str, float] = defaultdict(float)  # by layer
    for name, part in module.named_modules():
        layer = LAYER.match(name)
        seen = "visual" in name
        rows = patches if seen else length
        if layer and layer[0] == name:
            hidden, mlp = sizes[seen]
            kept += 4 * rows * hidden
            saved[name] += rows * (16 * hidden + width * (4 * hidden + mlp))
        if isinstance(part, nn.Linear) and not name.endswith("lm_head"):
            rows = patches / vision.spatial_merge_size**2 if "merger" in name else rows
            saved[layer[0] if layer else ""] += rows * part.in_features * width
            if name.endswith("base_layer") and recipe.lora_dropout > 0:
                out = part.out_features * recipe.dora
                saved[layer[0]] += rows * (5 * part.in_features + 2 * width * out)
    outside = saved.pop("", 0.0)
    if recipe.gradient_checkpointing:
        return outside + kept + max(saved.values())
    return outside + sum(saved.values())


def count_bytes(
    module: Reconstruction, recipe: Recipe, devices: int, sharded: bool
) -> dict[str, float]:
    """Count the bytes of weights, gradients, optimiser and copies on one device; see `estimate`."""
    words = language_model(module.model)
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    parts = devices if sharded else 1
    needs = {
        "weights": 4 * total / parts,
        "gradients": 4 * trained / parts,
        "optimiser": 8 * trained / parts,
    }
    if sharded:
        layers = sum(p.numel() for p in words.layers.parameters())
        whole = total - layers * max(0.0, 1 - 2 / len(words.layers))
        return needs | {"copies": (2 if recipe.bf16 else 4) * whole * (1 + trained / total)}
    frozen = 2 * (total - trained) * (1 + (recipe.lora_r > 0 and recipe.dora))
    if recipe.gradient_checkpointing:
        frozen /= len(words.layers) + module.model.config.vision_config.depth
    return needs | {"copies": recipe.bf16 * (2 * trained + frozen) + 4 * trained * (devices > 1)}


def estimate(
    source: str | Path,
    stage: str,
    recipe: Recipe,
    data: Data,
    devices: int = 1,
    *,
    sharded: bool = False,
    peak: float = PEAK,
    utilisation: float | None = None,
) -> dict[str, float]:
    """Estimate bytes on one device by use, their sum `memory`, `flops` of a step, `hours` of the
    stage.

    source: folder with `config.json`; sharded: FSDP; peak: FLOP/s of a device, of which
    `utilisation` is reached (None: what such a recipe reached, UTILISATION or ADAPTED).

    flops: torch's count of one item's passes on meta, times the items of a batch on all devices;
    GradCache embeds all of it twice. hours: steps x flops / (devices x peak x utilisation).

    Counted, for P parameters of which T are trained, w = 2 bytes under bf16, else 4:

    - weights 4 P, gradients 4 T, optimiser 8 T (bf16 is autocast), each over the devices where
    sharded; - copies: casts under bf16, DDP's buckets, or what FSDP gathers at a time (two layers
    and the rest); - activations of the items whose graph is held at a time: each matrix's input,
    norms, attention and MLP of each layer, the adapters' dropout; under gradient checkpointing each
    layer's input and one whole layer; - logits: masked places x vocabulary x (w + 12); inputs: the
    device's batch of pixels, float32.

    Not counted: the L x L matrix of eager attention, the allocator's gaps, the loader's own time,
    copies of the inputs.
    """
    module = build(source, stage, recipe)
    vision, words = module.model.config.vision_config, language_model(module.model).config
    pairs, cell = stage == "stage3", (vision.patch_size * vision.spatial_merge_size) ** 2
    text = data.text * (2 if stage == "stage2" else 1)  # A's query and B
    masked = 0.0 if pairs else data.text * getattr(recipe, "text_mask_rate", 1.0)
    room = max(0.0, min(recipe.image_limit(recipe.max_length), recipe.max_length - text - 3))
    largest, mean = min(data.largest / cell, room), min(data.pixels / cell, room)  # tokens
    sides = 2 + recipe.hard_negatives if pairs else 1
    items, local = recipe.batch_size * sides, recipe.batch_size / devices
    chunked = pairs and (devices > 1 or local > recipe.mini_batch_size)
    held = min(local, recipe.mini_batch_size) if chunked else sides * local
    share, flops = data.share if pairs else 1.0, 0.0
    for part, cells in ((share, mean), (1 - share, 0.0)):
        if part > 0:
            batch = make_item(module, round(text), round(cells), round(masked))
            forward, backward = count_flops(module, stage, batch)
            flops += items * part * ((1 + chunked) * forward + backward)  # GradCache: twice
    patches = largest * vision.spatial_merge_size**2
    pixels = 12 * vision.temporal_patch_size * min(data.largest, largest * cell)  # bytes an item
    needs = count_bytes(module, recipe, devices, sharded) | {
        "activations": held * saved_bytes(module, recipe, text + largest + 3, patches),
        "logits": local * masked * words.vocab_size * ((2 if recipe.bf16 else 4) + 12),
        "inputs": items / devices * pixels,
    }
    rate = devices * peak * (utilisation or (ADAPTED if recipe.lora_r else UTILISATION))
    return needs | {
        "memory": sum(needs.values()),
        "flops": flops,
        "hours": recipe.steps * flops / rate / 3600,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cocoa_lib.run.estimate", description=__doc__)
    parser.add_argument("--profile", default="paper")
    parser.add_argument("--model", default="2B", help="2B, 3B, 7B or a folder with config.json")
    parser.add_argument("--data", type=Path, help="measure this folder's items, assume none")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--device-memory", type=float, default=80, help="GB; a tenth is left free")
    parser.add_argument("--fsdp", action="store_true", help="all but activations sharded")
    parser.add_argument("--peak", type=float, default=PEAK / 1e12, help="TFLOP/s of one device")
    parser.add_argument("--utilisation", type=float, help="share of the peak that is reached")
    args = parser.parse_args(argv)
    source = ROOT / "data/configs" / SHAPES[args.model] if args.model in SHAPES else args.model
    data, profile = measure(args.data) if args.data else Data(), load_profile(args.profile)
    settings = {"sharded": args.fsdp, "peak": args.peak * 1e12, "utilisation": args.utilisation}
    print(f"{args.model}, {args.devices} devices, an item: {data}", HEAD, sep="\n")  # noqa: T201
    for stage in STAGES:
        recipe = make_recipe(stage, profile[stage])
        needs = estimate(source, stage, recipe, data, args.devices, **settings)
        *sizes, (_, flops), (_, hours) = needs.items()
        row = " ".join(f"{value / 1e9:{len(name)}.1f}" for name, value in sizes)
        print(f"{stage}  {row} | {flops / 1e15:12.1f} | {hours:5.1f}")  # noqa: T201
        if needs["memory"] > (1 - FREE) * 1e9 * args.device_memory:
            print(f"  does not fit into {args.device_memory:g} GB, a tenth left free: {REMEDIES}")  # noqa: T201


if __name__ == "__main__":
    main()
