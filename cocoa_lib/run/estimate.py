"""What a stage needs before it starts: memory a device and time, from the model's shape, the data and the devices.

The model is built by its own class on torch's meta device: parameters are counted, not guessed, and nothing is downloaded.

    python -m cocoa_lib.run.estimate --profile paper --model 2B --devices 8 --device-memory 80
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from ..backbone import language_model
from ..data import corpus
from ..items import InputError, image_size
from ..recipes import Recipe, make_recipe
from ..reconstruction import Reconstruction
from .adapters import add_adapter
from .profiles import ROOT, load_profile

SHAPES = {
    "2B": "qwen2_vl_2b",
    "3B": "qwen2_5_vl_3b",
    "7B": "qwen2_5_vl_7b",
}  # data/configs/README.md
MODELS = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)  # that the formula holds for, and not for a mixture of experts
LAYER = re.compile(r".*(layers|blocks)\.(\d+)")
PEAK = 989e12  # FLOP/s of a device (H100 and H200, dense bf16)
# Share of it that 2B's steps reached on an H200: all weights trained, and with the paper profile's adapter (docs/speed.md).
UTILISATION, ADAPTED = 0.30, 0.15
FREE = 0.1  # share of a device's memory that stays free
HEAD = "GB      weights gradients optimiser copies activations logits inputs memory | PFLOP a step | hours"


@dataclass(frozen=True)
class Data:
    """Text tokens of an item, mean and largest area of its picture (pixels), share of the items of contrastive pairs that
    have a picture. The defaults are assumptions; `measure` reads a data folder."""

    text: float = 64
    pixels: float = 1024**2
    largest: float = 1024**2
    share: float = 0.5


class Item(NamedTuple):
    """One item: FLOPs of the passes and of what checkpointing repeats; bytes saved for the backward pass, without and with it."""

    forward: float
    repeated: float
    backward: float
    saved: float
    checkpointed: float


def measure(folder: Path, n: int = 400) -> Data:
    """About `n` items of a folder's pairs, evenly spaced; 4 characters count as a token (a rule of thumb).

    Raises InputError for a folder without pairs or a picture that cannot be read, FileNotFoundError without tables."""
    rows, _ = corpus.pairs(folder)
    if not len(rows):
        raise InputError(f"{folder}: no pairs")
    rows = rows.select(range(0, len(rows), 1 + 2 * len(rows) // n))
    items = [row[side] for row in rows for side in ("anchor", "positive")]
    areas = []
    for path in (item["image"] for item in items if item["image"]):
        areas.append(math.prod(image_size(path)))
    text = sum(len(item["text"]) for item in items) / 4 / len(items)
    return Data(
        text, sum(areas) / max(1, len(areas)), max(areas, default=0), len(areas) / len(items)
    )


def build(source: str | Path, stage: str, recipe: Recipe) -> Reconstruction:
    """The model as this stage trains it, image decoder and adapter included, on the meta device. Raises ValueError for one
    that is not among MODELS."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type not in MODELS:
        raise ValueError(
            f"{source} is a {config.model_type}, the formula knows {', '.join(MODELS)}"
        )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        extra = {
            name: getattr(recipe, name)
            for name in ("image_weight", "decoder_layers")
            if hasattr(recipe, name)
        }
        module = Reconstruction(
            model, layout=recipe.layout, **extra
        )  # stage 3 has no decoder: image_weight 0
    if recipe.lora_r:
        add_adapter(
            model,
            r=recipe.lora_r,
            alpha=recipe.lora_alpha,
            dropout=recipe.lora_dropout,
            dora=recipe.dora,
        )
    return module


def item_cost(
    module: Reconstruction, recipe: Recipe, text: float, pixels: float, masked: float
) -> Item:
    """An item of `text` tokens and a picture of `pixels`, head applied to `masked` places; formula in `estimate`."""
    vision, words = module.model.config.vision_config, language_model(module.model).config
    patches = pixels / vision.patch_size**2
    cells = patches / vision.spatial_merge_size**2
    length, width = text + cells + 3, 2 if recipe.bf16 else 4  # 3: the picture's two marks, EOS
    gated = hasattr(vision, "fullatt_block_indexes")  # Qwen2.5-VL: gated MLP, attention in windows
    tower = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's own name
    inner = (2 + gated) * getattr(
        vision, "intermediate_size", getattr(vision, "mlp_ratio", 0) * tower
    )
    forward = repeated = backward = kept = 0.0
    saved: dict[str, float] = defaultdict(float)  # by layer
    for name, part in module.named_modules():
        layer = LAYER.match(name)
        if layer and layer[0] == name:
            seen = "visual" in name
            n, hidden, mlp = (
                (patches, tower, inner)
                if seen
                else (length, words.hidden_size, 3 * words.intermediate_size)
            )
            windowed = seen and gated and int(layer[2]) not in vision.fullatt_block_indexes
            attention = (
                4
                * n
                * hidden
                * (min(n, (vision.window_size / vision.patch_size) ** 2) if windowed else n)
            )
            forward, repeated, backward = (
                forward + attention,
                repeated + attention,
                backward + 2 * attention,
            )
            kept += 4 * n * hidden
            saved[name] += n * (16 * hidden + width * (4 * hidden + mlp))
        if not isinstance(part, (nn.Linear, nn.Conv3d)):
            continue
        head, pixels_in = name.endswith("lm_head"), isinstance(part, nn.Conv3d)
        rows = patches if "visual" in name else length
        rows = masked if head else cells if "merger" in name or name == "decoder.project" else rows
        dropped = name.endswith("base_layer") and recipe.lora_dropout > 0
        flops = 2 * part.weight.numel() * rows * (1 + (dropped and recipe.dora))
        forward, backward = (
            forward + flops,
            backward + flops * (part.weight.requires_grad + (not pixels_in)),
        )
        repeated += flops * (
            layer is not None and not name.endswith(("down_proj", "fc2"))
        )  # whose output nobody saves
        if not head and not pixels_in:
            n_in, n_out = part.in_features, part.out_features
            saved[layer[0] if layer else ""] += rows * (
                n_in * width + dropped * (5 * n_in + 2 * width * n_out * recipe.dora)
            )
    outside = saved.pop("", 0.0)
    return Item(
        forward,
        repeated,
        backward,
        outside + sum(saved.values()),
        outside + kept + max(saved.values()),
    )


def estimate(source: str | Path, stage: str, recipe: Recipe, data: Data, devices: int = 1, *, sharded: bool = False,
             peak: float = PEAK, utilisation: float | None = None) -> dict[str, float]:  # fmt: skip
    """Bytes on one device by use and their sum `memory`, `flops` of a step on all devices, `hours` of the stage.

    source: folder with `config.json`; sharded: FSDP; peak: FLOP/s of a device, of which `utilisation` is reached (None:
    `usual_utilisation`). Of P parameters T are trained; an item has L tokens and N patches; H, I, E, F are the hidden and
    MLP widths of text and vision; w is 2 bytes under bf16, else 4.
    weights 4 P, gradients 4 T, optimiser 8 T (float32; bf16 is autocast); sharded: over the number of devices.
    copies: under bf16 the casts, 2 T + 2 (P - T), the second part twice under DoRA and of one layer only under gradient
    checkpointing; and DDP's buckets, 4 T. Sharded instead what is whole at a time, weights and gradients in w: two layers of the
    language model, and all that is not in its layers.
    activations of a layer: w x width for each matrix's input; for norms, attention and MLP L (16 H + w (4 H + 3 I)), N (16 E +
    w (4 E + 2 F, gated 3 F)); for each adapted matrix with dropout 5 x in (DoRA: and 2 w x out) a row. With gradient
    checkpointing: the input of each layer and one whole layer. Times batch_size / devices; stage 3: mini_batch_size, or, on
    one device, both sides of a batch that is no larger.
    logits: masked places x vocabulary x (w + 12). inputs: the device's whole batch of pixels, float32.
    flops: forward 2 x weight x rows for each matrix (twice under DoRA with dropout), 4 L^2 H and 4 N^2 E (or windows) for
    attention; backward once for the input and once for a trained weight, attention twice; GradCache, which such a batch does
    without: one forward more, but for its first chunk; gradient checkpointing: the layers' once more, but for a last matrix
    without adapter. hours: steps x flops / (devices x peak x utilisation).
    Not counted: the L x L matrix of eager attention, the allocator's gaps, the loader's own time, the copy of the inputs in
    which cells are hidden, and the picture's copy in stage 2 with `image_weight` above 0, which comes to that of a second
    picture. The sum is within 15 % of the measured peak of a small step on a CPU, and above those of steps at 2B's shape on
    an H200, by 2 to 15 % with all weights trained and kept, by up to 48 % otherwise (tests/test_estimate.py).
    """
    module = build(source, stage, recipe)
    vision, words = module.model.config.vision_config, language_model(module.model).config
    pairs, bf16, saving = stage == "stage3", recipe.bf16, recipe.gradient_checkpointing
    text = data.text * (2 if stage == "stage2" else 1)  # A's query and B
    masked = 0.0 if pairs else data.text * getattr(recipe, "text_mask_rate", 1.0)
    room = min(
        recipe.image_limit(recipe.max_length), recipe.max_length - text - 3
    )  # of a picture, in tokens
    fits = max(0.0, room) * (vision.patch_size * vision.spatial_merge_size) ** 2
    largest, share = min(data.largest, fits), data.share if pairs else 1.0
    worst, mean, bare = (
        item_cost(module, recipe, text, x, masked) for x in (largest, min(data.pixels, fits), 0.0)
    )
    sides = 2 + recipe.hard_negatives if pairs else 1
    items, local = recipe.batch_size * sides, recipe.batch_size / devices
    chunked = pairs and (devices > 1 or local > recipe.mini_batch_size)
    held = (
        min(local, recipe.mini_batch_size) if chunked else sides * local
    )  # items whose graph exists at a time
    twice = chunked * (1 - held / (sides * local))  # share of the items that GradCache embeds again
    passes = [
        (1 + twice) * cost.forward + saving * cost.repeated + cost.backward for cost in (mean, bare)
    ]
    flops = items * (share * passes[0] + (1 - share) * passes[1])
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    layers, parts = words.num_hidden_layers + vision.depth, devices if sharded else 1
    frozen = (
        2
        * (total - trained)
        * (1 + (recipe.lora_r > 0 and recipe.dora and recipe.lora_dropout > 0))
        / (layers if saving else 1)
    )
    inner = sum(p.numel() for p in language_model(module.model).layers.parameters())
    whole = total - inner * max(0.0, 1 - 2 / words.num_hidden_layers)
    copies = bf16 * (2 * trained + frozen) + 4 * trained * (devices > 1)
    if sharded:
        copies = (2 if bf16 else 4) * whole * (1 + trained / total)
    needs = {
        "weights": 4 * total / parts, "gradients": 4 * trained / parts, "optimiser": 8 * trained / parts,
        "copies": copies,
        "activations": held * (worst.checkpointed if saving else worst.saved),
        "logits": local * masked * words.vocab_size * ((2 if bf16 else 4) + 12),
        "inputs": items / devices * 12 * vision.temporal_patch_size * largest,
    }  # fmt: skip
    hours = (
        recipe.steps * flops / (devices * peak * (utilisation or usual_utilisation(recipe))) / 3600
    )
    return needs | {"memory": sum(needs.values()), "flops": flops, "hours": hours}


def usual_utilisation(recipe: Recipe) -> float:
    """The share of a device's peak that such a recipe reached where it was measured: at 2B's shape on one H200."""
    return ADAPTED if recipe.lora_r else UTILISATION


def remedies(stage: str, recipe: Recipe, devices: int) -> list[tuple[str, Recipe, dict]]:
    """What may be changed where a stage does not fit, cheapest first: (in words, recipe, arguments of `estimate`)."""
    changes: list[tuple[str, dict, dict]] = [
        ("gradient_checkpointing: true", {"gradient_checkpointing": True}, {})
    ]
    if stage == "stage3":
        changes.append(("mini_batch_size: 1", {"mini_batch_size": 1}, {}))
    changes += [("lora_r: 8", {"lora_r": recipe.lora_r or 8}, {}),
                ("FSDP (notebooks/profiles/accelerate/fsdp_1x8.yaml)", {}, {"sharded": True}),
                (f"{4 * devices} devices, or a smaller batch_size or pictures", {}, {"devices": 4 * devices})]  # fmt: skip
    return [(words, replace(recipe, **values), more) for words, values, more in changes]


def report(source: str | Path, stage: str, recipe: Recipe, data: Data, memory: float, devices: int = 1,
           **settings: Any) -> list[str]:  # fmt: skip
    """A stage's line of the table below HEAD, and where it does not fit into `memory` GB of a device what each change alone
    would make of that. settings: those of `estimate`, whose errors these are."""
    needs = estimate(source, stage, recipe, data, devices, **settings)
    *sizes, flops, hours = needs.items()
    row = " ".join(f"{value / 1e9:{len(name)}.1f}" for name, value in sizes)
    lines = [f"{stage}  {row} | {flops[1] / 1e15:12.1f} | {hours[1]:5.1f}"]
    if needs["memory"] <= (1 - FREE) * 1e9 * memory:
        return lines
    lines.append(
        f"  does not fit into {memory:g} GB, of which a tenth is left free. Each change alone:"
    )
    for words, changed, more in remedies(stage, recipe, devices):
        less = estimate(source, stage, changed, data, **settings | {"devices": devices} | more)[
            "memory"
        ]
        if less < 0.98 * needs["memory"]:
            lines.append(f"    {words}: {less / 1e9:.1f} GB")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_lib.run.estimate", description="Memory and time before the start."
    )
    parser.add_argument("--profile", default="paper")
    parser.add_argument(
        "--model", default="2B", help=f"{', '.join(SHAPES)}, or a folder with config.json"
    )
    parser.add_argument(
        "--data", type=Path, help="measure items of this folder instead of assuming them"
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument(
        "--device-memory", type=float, default=80, help="GB of one device; a tenth is left free"
    )
    parser.add_argument(
        "--fsdp", action="store_true", help="weights, gradients and optimiser sharded"
    )
    parser.add_argument(
        "--peak", type=float, default=PEAK / 1e12, help="TFLOP/s of one device (H100, dense bf16)"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        help=f"share of the peak that is reached ({UTILISATION}, with an adapter {ADAPTED})",
    )
    args = parser.parse_args(argv)
    source = ROOT / "data/configs" / SHAPES[args.model] if args.model in SHAPES else args.model
    data, profile = measure(args.data) if args.data else Data(), load_profile(args.profile)
    settings = {"sharded": args.fsdp, "peak": args.peak * 1e12, "utilisation": args.utilisation}
    print(f"{args.model}, {args.devices} devices, an item: {data}")  # noqa: T201
    print(HEAD)  # noqa: T201
    for stage in ("stage1", "stage2", "stage3"):
        recipe = make_recipe(stage, profile[stage])
        print(
            *report(source, stage, recipe, data, args.device_memory, args.devices, **settings),
            sep="\n",
        )  # noqa: T201


if __name__ == "__main__":
    main()
