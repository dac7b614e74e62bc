"""Training steps and `encode` at Qwen2-VL-2B's shape with random weights: tokens/s, utilisation, memory, what options cost.

    python benchmarks/gpu.py                          # needs a GPU of 80 GB: writes results/gpu.json, part by part
    python benchmarks/gpu.py --device cpu --tiny      # that it runs; prints, keeps nothing unless --out says where

What one H200 gave is in docs/speed.md. A step is forward, backward and fused AdamW, under bf16 autocast, all weights trained, or
the adapter of profile `paper`, one picture of 448 x 448 a row and words up to the length. FLOPs are counted by
`cocoa_lib.run.estimate.count_step`, in stage 2 of the allowed pairs only; forward and backward, recomputation (GradCache,
checkpointing) and the optimiser left out, as utilisation is usually defined. The peak it is measured against is stated in the
output (H100 and H200, dense bf16: 989 TFLOP/s). Attention at other lengths: `attention.py`; the road: `make
reproduce PROFILE=gpu`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, ROOT, WORDS, in_turn, record, save_parts, small_model, truly_compiled
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from cocoa_lib.attention import dense_mask
from cocoa_lib.backbone import language_model, set_bidirectional
from cocoa_lib.contrastive import CachedInfoNCE
from cocoa_lib.corruption import stage1_batch, stage2_batch
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding
from cocoa_lib.kernels import PICTURES, compile_layers
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run.adapters import add_adapter
from cocoa_lib.run.estimate import count_step, make_item
from cocoa_lib.run.profiles import load_profile

SHAPE = ROOT / "data/configs/qwen2_vl_2b"
WITH_ADAPTER = "stage1 with adapter"
COMPILED, CHECKPOINTING, FLEX, CACHE = "compiled layers", "gradient checkpointing", "Flex", "GradCache"
SINGLY = "pictures singly"  # the vision tower's attention: transformers' SDPA, a call for each picture
# Stage and ways of taking a step; of two ways, time of the first over that of the second. "plain": SDPA, no option on, a whole
# batch at once. Its rate comes with the first part of a stage that has it.
PARTS: list[tuple[str, tuple[str, ...]]] = [
    ("stage1", (SINGLY, "plain")), ("stage1", ("plain", COMPILED)), ("stage3", (CACHE, "plain")),
    ("stage3", ("plain", COMPILED)), ("stage2", ("plain", FLEX)), ("stage1", (CHECKPOINTING, "plain")),
    (WITH_ADAPTER, (CHECKPOINTING, "plain")), ("stage3", (CACHE,)),
]  # fmt: skip


def model_of(tiny: bool, device: str, max_length: int):
    """Random weights, and inputs with a small tokenizer, whose picture mark the model is told: nothing is downloaded."""
    model, inputs = small_model(
        64, patch_size=8 if tiny else 14, image_pixels=pixels(1344, tiny) ** 2, max_length=max_length
    )
    if not tiny:
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(SHAPE), dtype=torch.float32)
        model.config.image_token_id = inputs.image_pad_id
    model.model.visual.config._attn_implementation = PICTURES  # as `open_backbone` has it on a GPU
    return set_bidirectional(model.to(device), True), inputs


def pixels(side: int, tiny: bool) -> int:
    """A picture's side: the tiny model is shown one fourteenth of it."""
    return side // 14 if tiny else side


def pictures(n: int, side: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (n, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in noise]


def switch(model, way: str, device: str) -> None:
    """From now on, steps in this way. (Compiled layers are so for good: `set_stance` says whether that is used.)"""
    language_model(model).config._attn_implementation = "flex_attention" if way == FLEX else "sdpa"
    model.model.visual.config._attn_implementation = "sdpa" if way == SINGLY else PICTURES
    model.gradient_checkpointing_enable() if way == CHECKPOINTING else model.gradient_checkpointing_disable()
    if way == COMPILED and language_model(model).layers[0]._compiled_call_impl is None:
        compile_layers(model, "eager" if device == "cpu" else "inductor")  # on a CPU: only that it can be traced


def batches(stage: str, recipe, inputs, rows: int, side: int) -> list[dict[str, torch.Tensor]]:
    """One batch, in stage 3 two columns, as training makes them; every row is cut to the same length."""
    text = " ".join(WORDS * (inputs.max_length // len(WORDS) + 1))  # a token a word or more
    items = [
        {"text": text, "target": text, "image": image, "draw": i} for i, image in enumerate(pictures(2 * rows, side))
    ]
    if stage == "stage3":
        return [inputs.collate(items[:rows]), inputs.collate(items[rows:])]
    return [{"stage1": stage1_batch, "stage2": stage2_batch}[stage](items[:rows], inputs, recipe, 0)]


def flops_of(module: Reconstruction, stage: str, recipe, columns: list[dict[str, torch.Tensor]]) -> float:
    """Forward and backward of a step; attention, backward twice forward, of the pairs that the layout allows."""
    rows, length = columns[0]["input_ids"].shape
    cells = int(columns[0]["mm_token_type_ids"][0].sum())
    masked = float((columns[0]["labels"] >= 0).sum()) / rows if "labels" in columns[0] else 0.0
    bare = copy.deepcopy(module).to("meta")
    item = make_item(bare, length - cells - 3, cells, round(masked))  # adds the picture's marks and EOS itself
    forward, backward, _ = count_step(bare, stage, item)
    words = language_model(module.model).config
    barred = 1 - float(dense_mask(recipe.layout, columns[0]["segment_ids"]).float().mean())
    layers = words.num_hidden_layers + (len(module.decoder.layers) if module.decoder else 0)
    unseen = 3 * 4 * length**2 * words.hidden_size * layers * barred
    return len(columns) * rows * (forward + backward - unseen)


@truly_compiled()
def train(stage: str, ways: tuple[str, ...], *, tiny: bool, device: str, rows: int, chunk: int, length: int, peak: float,
          n: int = 5) -> list[dict[str, Any]]:  # fmt: skip
    """Steps in each way, in turn: utilisation, tokens/s and peak memory of each (of "plain" where it is alone), and the ratio."""
    cuda, side = device != "cpu", pixels(448, tiny)
    part, stage = stage, stage.split()[0]
    adapter = {"lora_r", "lora_alpha", "lora_dropout", "dora"} if part == WITH_ADAPTER else set()
    recipe = make_recipe(stage, {name: load_profile("paper")[stage][name] for name in adapter} | {"bf16": cuda})
    model, inputs = model_of(tiny, device, length)
    module = Reconstruction(model, layout=recipe.layout, image_weight=getattr(recipe, "image_weight", 0.0))
    if adapter:
        add_adapter(model, recipe)
    module.to(device).train()
    columns = batches(stage, recipe, inputs, rows, side)
    flops, tokens = flops_of(module, stage, recipe, columns), sum(column["input_ids"].numel() for column in columns)
    columns = [{name: value.to(device) for name, value in column.items()} for column in columns]
    taken = EosEmbedding(model, inputs) if stage == "stage3" else module
    taken.forward = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda)(taken.forward)
    optimiser, memory = torch.optim.AdamW(taken.parameters(), lr=1e-5, fused=True), dict.fromkeys(ways, 0.0)

    def step(way: str) -> None:
        switch(model, way, device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with torch.compiler.set_stance("default" if way in (COMPILED, FLEX) else "force_eager"):
            if stage == "stage3":
                size = chunk if way == CACHE else rows
                loss = CachedInfoNCE(taken, temperature=recipe.temperature, mini_batch_size=size)(map(dict, columns))
            else:
                loss = taken(**columns[0])["loss"]
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        memory[way] = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0

    seconds = in_turn({way: partial(step, way) for way in ways}, n)
    shape = f"{rows} rows of {length}"
    lines = []
    for way in ways:
        rates = [flops / x / 1e12 for x in seconds[way]]
        more = {"tokens_per_second": tokens / float(np.median(seconds[way])), "peak_memory_gb": memory[way]}
        lines.append(record(f"{part}, {way}, {shape}", f"achieved / peak FLOP rate ({peak:g} TFLOP/s), step with AdamW", rates,
                            [peak] * n, **more))  # fmt: skip
    if len(ways) == 2:
        more = {"peak_memory_gb": [memory[way] for way in ways]}
        lines.append(
            record(f"{part}, {ways[0]} / {ways[1]}, {shape}", "step time", *(seconds[way] for way in ways), **more)
        )
    return lines


def unshown(measure: Callable[[], list[dict[str, Any]]], shown: set[str]) -> list[dict[str, Any]]:
    """Of its records those whose names no part before has shown: several parts take steps in the same way."""
    lines = [line for line in measure() if line["name"] not in shown]
    shown.update(line["name"] for line in lines)
    return lines


def encode(side: int, *, tiny: bool, device: str, peak: float, n: int = 5) -> list[dict[str, Any]]:
    """`encode` of pictures in memory, bf16 weights on a GPU: preparing, copying and computing in turn."""
    cuda, size = device != "cpu", pixels(side, tiny)
    model, inputs = model_of(tiny, device, 4096)
    module = Reconstruction(model, layout="bidirectional")
    embedder = CocoaEmbedder(EosEmbedding(model.to(torch.bfloat16 if cuda else torch.float32), inputs))
    number, batch = (4, 2) if tiny else (512 * 448**2 // side**2, max(1, 32 * 448**2 // side**2))
    items = (pictures(min(number, 32), size) * number)[:number]
    seconds = in_turn({"": lambda: embedder.encode(items, batch_size=batch)}, n)[""]
    cells = inputs.collate([{"text": "", "image": items[0]}])["mm_token_type_ids"].sum()
    bare = copy.deepcopy(module).to("meta")
    forward, *_ = count_step(bare, "stage3", make_item(bare, 0, int(cells), 0))
    rates = [number * forward / x / 1e12 for x in seconds]
    return [record(f"encode, {side} x {side} pixels", f"achieved / peak FLOP rate ({peak:g} TFLOP/s), preparing included", rates,
                   [peak] * n, images_per_second=number / float(np.median(seconds)))]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description="Tokens/s, utilisation, peak memory of each stage; images/s of encode."
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks that the script runs")
    parser.add_argument(
        "--batch",
        type=int,
        default=6,
        help="rows of a step; stage 3 and the adapter take half, GradCache alone twice as many",
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of the device at the precision used")
    parser.add_argument("--out", type=Path, help="folder of gpu.json (benchmarks/results; of a CPU's numbers none)")
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    if not cpu and not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing measured. `--device cpu --tiny` checks that the script runs.")
    common = {"tiny": args.tiny, "device": args.device, "peak": args.peak}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        f"encode, {side} pixels": partial(encode, side, **common) for side in (448, 1344)
    }
    shown: set[str] = set()
    for stage, ways in PARTS:
        if cpu and FLEX in ways:
            continue  # Flex has no backward on a CPU
        half = max(2, args.batch // 2)
        rows, chunk = (2 * args.batch, args.batch) if ways == (CACHE,) else (half, (half + 1) // 2)
        rows = rows if stage == "stage3" else half if stage == WITH_ADAPTER else args.batch  # it keeps twice as much
        measure = partial(train, stage, ways, rows=rows, chunk=chunk, length=args.length, **common)
        parts[f"{stage}, {' / '.join(ways)}"] = partial(unshown, measure, shown)
    note = "random weights at Qwen2-VL-2B's shape, bf16, a picture of 448 x 448 a row; n 5"
    if cpu:
        note = "runs; a CPU's numbers mean nothing here and are not kept."
    return save_parts("gpu", parts, note, args.out or (None if cpu else RESULTS), args.device)


if __name__ == "__main__":
    main()
