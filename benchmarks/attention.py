"""Stage 2's attention: a dense mask through SDPA against FlexAttention with blocks, one layer of Qwen2-VL-2B's shape.

python benchmarks/attention.py                    # CPU: forward only, FlexAttention has no backward pass there
python benchmarks/attention.py --device cuda      # forward and backward, L up to 8192; not run so far
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, in_turn, record, save_parts, truly_compiled
from torch.nn.attention.flex_attention import flex_attention

from cocoa_lib.attention import block_mask, dense_mask, segments

HEADS, WIDTH = 12, 128  # 28 layers of these; keys and values are repeated to 12 heads, as transformers does
LAYOUT = "eos_bridged"


def tensors(length: int, share_a: float, device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random q, k, v (1, heads, L, d) and segment ids (1, L) with A : EOS : B."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, generator=generator).to(device, dtype) for _ in range(3))
    n_a = int((length - 1) * share_a)
    return [q, k, v], segments(n_a, length - 1 - n_a).to(device)


def check(
    dense: torch.Tensor, flex: torch.Tensor, qkv: list[torch.Tensor], mask: torch.Tensor, tolerance: float
) -> None:
    """Both against float64, softmax written out."""
    q, k, v = (x.double() for x in qkv)
    scores = (q @ k.mT / WIDTH**0.5).masked_fill(~mask, -torch.inf)
    right = scores.softmax(-1) @ v
    for name, out in (("dense", dense), ("flex", flex)):
        error = float((out.double() - right).abs().max())
        assert error < tolerance, f"{name} is off by {error}"


@truly_compiled()
def measure(length: int, share_a: float, device: str, n: int = 5) -> list[dict]:
    cuda = device != "cpu"
    qkv, ids = tensors(length, share_a, device, torch.bfloat16 if cuda else torch.float32)
    dense, blocks = dense_mask(LAYOUT, ids), block_mask(LAYOUT, ids)
    compiled = torch.compile(flex_attention, dynamic=False)
    sides: dict[str, Callable] = {
        "dense": lambda: F.scaled_dot_product_attention(*qkv, attn_mask=dense),
        "flex": lambda: compiled(*qkv, block_mask=blocks),
    }
    with torch.no_grad():
        check(sides["dense"](), sides["flex"](), qkv, dense, 3e-2 if cuda else 1e-5)
        forward = in_turn(sides, n)
    shape = f"L {length}, A:B {share_a / (1 - share_a):.0f}:1, {HEADS} heads of {WIDTH}, one layer"
    sparsity = f"{100 * float(dense.float().mean()):.0f} % of pairs allowed"
    text = f"time, dense SDPA / Flex, {{}}; {shape}; {sparsity}"
    records = [record(f"attention, forward, {shape}", text.format("forward"), forward["dense"], forward["flex"])]
    if cuda:
        for x in qkv:
            x.requires_grad_()
        both = in_turn({name: lambda side=side: side().sum().backward() for name, side in sides.items()}, n)
        text = text.format("forward and backward")
        records.append(record(f"attention, forward + backward, {shape}", text, both["dense"], both["flex"]))
    return records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Dense SDPA against FlexAttention.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args(argv)
    lengths = args.lengths or ([512, 2048] if args.device == "cpu" else [512, 1024, 2048, 4096, 8192])
    shares = {"4:1": 0.8, "1:1": 0.5}
    parts = {f"L {length}, A:B {ratio}": partial(measure, length, share, args.device)
             for length in lengths for ratio, share in shares.items()}  # fmt: skip
    note = "equal to float64 (1e-5; bf16 3e-2), then time (n 5)"
    save_parts("attention" if args.device == "cpu" else "attention_gpu", parts, note, args.out, args.device)


if __name__ == "__main__":
    main()
