"""Each stage at Qwen2-VL-2B's shape with random weights: tokens/s, model FLOP utilisation, peak memory.

    python benchmarks/gpu.py                          # needs a GPU: writes results/gpu.json
    python benchmarks/gpu.py --device cpu --tiny      # that it runs; prints, writes nothing

**No GPU numbers exist yet**: this script has been run on a CPU at the tiny shape only. FLOPs are counted by
`cocoa_lib.estimate.item_cost`, forward and backward, recomputation (GradCache, checkpointing) left out, as utilisation is
usually defined; the peak it is measured against is stated in the output (H100, dense bf16: 989 TFLOP/s).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import ROOT, save, small_model
from transformers import AutoConfig, AutoModelForImageTextToText

from cocoa_lib.attention import EOS, A, B
from cocoa_lib.backbone import hidden_states, language_model, pool, set_bidirectional
from cocoa_lib.corruption import IGNORE
from cocoa_lib.estimate import item_cost
from cocoa_lib.objectives import Reconstruction, info_nce
from cocoa_lib.recipes import make_recipe

SHAPE = ROOT / "data/configs/qwen2_vl_2b"


def model_of(tiny: bool, device: str, attention: str):
    """Random weights: nothing is downloaded."""
    if tiny:
        model, _ = small_model(hidden_size=64, layers=2)
    else:
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(SHAPE), dtype=torch.float32)
    set_bidirectional(model, True)
    language_model(model).config._attn_implementation = attention
    return model.to(device).train()


def text_batch(
    batch: int, length: int, stage: str, rate: float, vocabulary: int, device: str
) -> dict[str, torch.Tensor]:
    """Random ids; stage 2: half A, EOS, half B, B masked; others: A and EOS."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary - 10, (batch, length), generator=generator)  # no special tokens
    segments = torch.full_like(ids, A)
    eos = length // 2 if stage == "stage2" else length - 1
    segments[:, eos], segments[:, eos + 1 :] = EOS, B
    hidden = (torch.rand(ids.shape, generator=generator) < rate) & (segments == (B if stage == "stage2" else A))
    hidden[:, 0] = False
    data = {"input_ids": ids, "segment_ids": segments, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.zeros_like(ids), "labels": torch.where(hidden, ids, IGNORE)}  # fmt: skip
    return {name: value.to(device) for name, value in data.items()}


def measure(stage: str, *, tiny: bool, device: str, batch: int, length: int, peak: float, attention: str = "sdpa",
            n: int = 5) -> dict[str, Any]:  # fmt: skip
    """Medians of n steps (forward and backward, bf16 autocast on a GPU) after one that is not counted."""
    recipe = make_recipe(stage, {"bf16": device != "cpu"})
    module = Reconstruction(model_of(tiny, device, attention), layout=recipe.layout)
    rate = getattr(recipe, "text_mask_rate", 0.0)
    vocabulary = min(150_000, language_model(module.model).config.vocab_size)  # Qwen2's special tokens lie above
    data, seconds = text_batch(batch, length, stage, rate, vocabulary, device), []
    twin = data | {"input_ids": data["input_ids"].roll(1, 1)}
    masked = float((data["labels"] != IGNORE).sum()) / batch
    cost = item_cost(module, recipe, length - 3, 0.0, masked)  # `item_cost` adds the picture's marks and EOS itself
    sides = 2 if stage == "stage3" else 1
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for turn in range(n + 1):
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            if stage == "stage3":
                query, positive = (pool(hidden_states(module.model, side), side) for side in (data, twin))
                loss = info_nce(query, positive, torch.arange(batch, device=device), temperature=recipe.temperature)
            else:
                loss = module(**data)["loss"]
        loss.backward()
        if device != "cpu":
            torch.cuda.synchronize()
        module.zero_grad()
        if turn:
            seconds.append(time.perf_counter() - start)
    rate_of = [sides * batch * (cost.forward + cost.backward) / x / (peak * 1e12) for x in seconds]
    memory = 0 if device == "cpu" else torch.cuda.max_memory_allocated()
    return {
        "name": f"{stage}, {attention}, L {length}, batch {batch}",
        "compared": f"achieved / peak FLOP rate ({peak:g} TFLOP/s), forward and backward",
        "ratio": statistics.median(rate_of), "n": n, "lowest": min(rate_of), "highest": max(rate_of),
        "tokens_per_second": sides * batch * length / statistics.median(seconds), "peak_memory_gb": memory / 1e9,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Tokens/s, utilisation, peak memory of each stage; text sequences.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks that the script runs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of the device at the precision used")
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing measured. `--device cpu --tiny` checks that the script runs.")
    runs = [("stage1", "sdpa"), ("stage2", "sdpa"), ("stage2", "flex_attention"), ("stage3", "sdpa")]
    records = []
    for stage, attention in runs:
        if args.device == "cpu" and attention != "sdpa":
            continue  # Flex has no backward on a CPU
        batch = max(2, args.batch // 2) if stage == "stage3" else args.batch  # it has two sides, and no GradCache here
        try:
            records.append(
                measure(stage, tiny=args.tiny, device=args.device, batch=batch, length=args.length, peak=args.peak,
                        attention=attention)
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            sys.stdout.write(f"{stage}, {attention}, not measured: {error}\n")
            torch.cuda.empty_cache()
    if args.device != "cpu":
        save("gpu", records, "random weights at Qwen2-VL-2B's shape, text only, bf16 autocast")
    else:
        sys.stdout.write("runs; a CPU's numbers mean nothing here and are not kept. No GPU numbers exist yet.\n")
    return records


if __name__ == "__main__":
    main()
