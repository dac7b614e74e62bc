"""Training steps at Qwen2-VL-2B's shape, random weights: utilisation, tokens a second, memory.

    python benchmarks/gpu.py --out DIR                      # a GPU of 80 GB or more -> DIR/gpu_steps.json
    python benchmarks/gpu.py --out DIR --device cpu --tiny  # a rehearsal: shows that it runs

A step is forward, backward and fused AdamW under bf16 autocast, all weights trained, rows of one
picture and words. FLOPs are torch's own count of forward and backward (`run.estimate`), without
what is computed twice. The peak is that of H100 and H200: 989 TFLOP/s, dense bf16.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import ROOT, WORDS, Record, in_turn, keep, record, say, small_model
from PIL import Image
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from cocoa_lib import attention
from cocoa_lib.backbone import language_model, set_bidirectional
from cocoa_lib.contrastive import CachedInfoNCE
from cocoa_lib.corruption import stage2_batch
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding
from cocoa_lib.inputs import Batch, Inputs
from cocoa_lib.kernels import PICTURES, compile_layers, multiply_patches
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run.estimate import count_flops

PEAK = 989e12
# Stage, rows, tokens a row, ways. Of two ways, time of the first over that of the second.
PARTS = [
    ("stage3", 8, 1024, ("plain", "compiled")),
    ("stage3", 12, 1024, ("compiled",)),
    ("stage2", 4, 4096, ("plain", "flex")),
    ("stage2", 2, 8192, ("plain", "flex")),
]


def open_model(length: int, tiny: bool, device: str) -> tuple[PreTrainedModel, Inputs]:
    """Random weights and a small tokenizer, whose picture mark the model is told."""
    side = 32 if tiny else 448
    patch = 8 if tiny else 14
    model, inputs = small_model(64, patch_size=patch, image_pixels=side**2, max_length=length)
    if not tiny:
        shape = AutoConfig.from_pretrained(ROOT / "data/configs/qwen2_vl_2b")
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(shape, dtype=torch.float32)
        model.config.image_token_id = inputs.image_pad_id
    model.model.visual.config._attn_implementation = PICTURES
    multiply_patches(model.model.visual)
    return set_bidirectional(model.to(device), True), inputs


def make_columns(stage: str, inputs: Inputs, rows: int, side: int) -> list[Batch]:
    """One batch, in stage 3 two columns; every row is cut to the same length."""
    words = " ".join(WORDS * (inputs.max_length // len(WORDS) + 1))
    noise = np.random.default_rng(0).integers(0, 255, (2 * rows, side, side, 3), dtype=np.uint8)
    items = [
        {"text": words, "target": words, "image": Image.fromarray(pixels), "draw": i}
        for i, pixels in enumerate(noise)
    ]
    if stage == "stage3":
        return [inputs.collate(items[:rows]), inputs.collate(items[rows:])]
    return [stage2_batch(items[:rows], inputs, make_recipe("stage2", {}), 0)]


def count_step(stage: str, module: Reconstruction, columns: list[Batch], layout: str) -> float:
    """FLOPs of forward and backward; attention of the pairs that the layout allows. `module` is on
    the meta device."""
    first = {name: value[:1] for name, value in columns[0].items() if name != "pixel_values"}
    first["image_grid_thw"] = columns[0]["image_grid_thw"][:1]
    n_patches = int(first["image_grid_thw"].prod())
    first["pixel_values"] = columns[0]["pixel_values"][:n_patches].to("meta")
    shape = language_model(module.model).config
    flops = sum(count_flops(module, stage, first))
    length = first["input_ids"].shape[1]
    allowed = float(attention.dense_mask(layout, first["segment_ids"]).float().mean())
    unseen = 3 * 4 * length**2 * shape.hidden_size * shape.num_hidden_layers * (1 - allowed)
    return sum(len(column["input_ids"]) for column in columns) * (flops - unseen)


def measure(
    stage: str, rows: int, length: int, ways: Sequence[str], *, tiny: bool, device: str, n: int
) -> list[Record]:
    """Steps in each way, in turn."""
    torch._dynamo.reset()  # past dynamo's limit of shapes, Flex would go on unfused
    cuda, side = device != "cpu", 32 if tiny else 448
    layout = make_recipe(stage, {}).layout
    model, inputs = open_model(length, tiny, device)
    module = Reconstruction(model, layout=layout).train()
    columns = make_columns(stage, inputs, rows, side)
    shape = copy.deepcopy(model.config)
    shape._attn_implementation = "sdpa"  # of the tower too
    with torch.device("meta"):
        twin = Reconstruction(type(model)(shape), layout=layout).train()
    flops = count_step(stage, twin, columns, layout)
    columns = [{name: value.to(device) for name, value in column.items()} for column in columns]
    embed = EosEmbedding(model, inputs)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=cuda)
    memory = dict.fromkeys(ways, 0.0)
    compiled_mask = torch.compile(create_block_mask, backend="inductor" if cuda else "eager")

    def step(way: str) -> None:
        language_model(model).config._attn_implementation = (
            "flex_attention" if way == "flex" else "sdpa"
        )
        if way == "compiled" and language_model(model).layers[0]._compiled_call_impl is None:
            compile_layers(model, "inductor" if cuda else "eager")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        stance = "force_eager" if way == "plain" else "default"
        with (
            torch.compiler.set_stance(stance),
            mock.patch.object(attention, "create_block_mask", compiled_mask),
        ):
            with autocast():
                if stage == "stage3":
                    loss = CachedInfoNCE(embed, mini_batch_size=rows)(map(dict, columns))
                else:
                    loss = module(**dict(columns[0]))["loss"]
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        memory[way] = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0

    seconds = in_turn({way: partial(step, way) for way in ways}, n, clock=time.perf_counter)
    tokens, size = (
        sum(column["input_ids"].numel() for column in columns),
        f"{rows} rows of {length}",
    )
    lines = []
    for way in ways:
        rates = [flops / taken for taken in seconds[way]]
        line = record(f"{stage}, {way}, {size}", "share of the peak", rates, [PEAK] * n)
        middle = float(np.median(seconds[way]))
        lines.append(line | {"tokens_per_second": tokens / middle, "peak_memory_gb": memory[way]})
    if len(ways) == 2:
        name = f"{stage}, {ways[0]} / {ways[1]}, {size}"
        lines.append(record(name, "time of a step", *(seconds[way] for way in ways)))
    return lines


def encode(tiny: bool, device: str, n: int) -> list[Record]:
    """`encode` of pictures in memory, bf16 weights on a GPU, preparing included."""
    model, inputs = open_model(4096, tiny, device)
    shape = copy.deepcopy(model.config)
    shape._attn_implementation = "sdpa"
    with torch.device("meta"):
        twin = Reconstruction(type(model)(shape), layout="bidirectional")
    number, side = (4, 32) if tiny else (512, 448)
    column = make_columns("stage3", inputs, 1, side)[0]
    flops = count_step("stage3", twin, [column], "bidirectional") / 3  # backward is twice forward
    flops *= (column["mm_token_type_ids"].sum() + 3) / column["input_ids"].numel()  # no words
    embedder = CocoaEmbedder(
        EosEmbedding(model.to(torch.float32 if device == "cpu" else torch.bfloat16), inputs)
    )
    noise = np.random.default_rng(0).integers(
        0, 255, (min(number, 32), side, side, 3), dtype=np.uint8
    )
    items = ([Image.fromarray(pixels) for pixels in noise] * number)[:number]
    sides = {"": lambda: embedder.encode(items, batch_size=32)}
    seconds = in_turn(sides, n, clock=time.perf_counter)[""]
    rates = [number * float(flops) / taken for taken in seconds]
    line = record(f"encode, {side} x {side} pixels", "share of the peak", rates, [PEAK] * n)
    return [line | {"images_per_second": number / float(np.median(seconds))}]


def main(argv: Sequence[str] | None = None) -> list[Record]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; `--device cpu --tiny` shows that the script runs")
    lines: list[Record] = []
    failed: dict[str, str] = {}
    how = {"tiny": args.tiny, "device": args.device, "n": args.rounds}
    parts: dict[str, Callable[[], list[Record]]] = {"encode": partial(encode, **how)}
    for stage, rows, length, ways in PARTS:
        if args.device == "cpu":  # no backward pass of Flex there
            ways = tuple(way for way in ways if way != "flex")
        if args.tiny:
            rows, length = rows // 2, 64
        parts[f"{stage}, {rows} rows of {length}"] = partial(
            measure, stage, rows, length, ways, **how
        )
    for name, part in parts.items():
        try:
            found = part()
            print(*map(say, found), sep="\n", flush=True)
            lines += found
        except Exception as error:  # memory, a compiler, a kernel: the other parts go on
            failed[name] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
        torch.cuda.empty_cache()
        keep("gpu_steps", lines, args.out, not_measured=failed)
    if failed:
        raise SystemExit(f"not measured: {failed}")
    return lines


if __name__ == "__main__":
    main()
