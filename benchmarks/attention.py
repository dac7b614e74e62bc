"""Stage 2's attention: a dense mask through SDPA against FlexAttention with blocks, at Qwen2-VL-2B's shape.

On a CPU one layer and one row; on a GPU 28 layers one after the other and rows of 16,384 tokens together, since starting one
small kernel takes longer than running it.

python benchmarks/attention.py                    # CPU: forward only, FlexAttention has no backward pass there
python benchmarks/attention.py --long             # the same at L 1024, 4096 and 8192 -> attention_long.json; not in `make bench`
python benchmarks/attention.py --device cuda      # forward and backward, L up to 8192 -> attention_gpu.json
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

from cocoa_lib.attention import block_mask, dense_mask
from cocoa_lib.show.masks import segments

HEADS, WIDTH = 12, 128  # keys and values are repeated to 12 heads, as transformers does
LAYERS, TOKENS = 28, 16384  # on a GPU
LONG = [1024, 4096, 8192]
LAYOUT = "eos_bridged"


def tensors(
    length: int, share_a: float, device: str, dtype: torch.dtype, rows: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random q, k, v (rows, heads, L, d) and segment ids (rows, L) with A : EOS : B."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, HEADS, length, WIDTH, generator=generator).to(device, dtype) for _ in range(3))
    n_a = int((length - 1) * share_a)
    return [q, k, v], segments(n_a, length - 1 - n_a).repeat(rows, 1).to(device)


def exact(qkv: list[torch.Tensor], mask: torch.Tensor, pull: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of q, k and v where `pull` is that of the output: float64, softmax written out, each (rows, heads,
    L, width). A head at a time: at L 8192 the scores of all would take 6 GB a row."""
    heads = []
    for head in range(qkv[0].shape[1]):
        q, k, v = (x[:, head].detach().double().requires_grad_() for x in qkv)
        with torch.enable_grad():
            out = (q @ k.mT / WIDTH**0.5).masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ v
        heads.append([out.detach(), *torch.autograd.grad(out, (q, k, v), pull[:, head].double())])
    return [torch.stack(parts, dim=1) for parts in zip(*heads, strict=True)]


def check(
    sides: dict[str, Callable], qkv: list[torch.Tensor], mask: torch.Tensor, tolerance: float, *, gradients: bool = False
) -> None:  # fmt: skip
    """Each side against float64: nowhere off by `tolerance` of the largest entry. Raises AssertionError that says what is."""
    pull = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(qkv[0])
    right = exact(qkv, mask, pull)
    for name, side in sides.items():
        out = side()
        found = [out, *(torch.autograd.grad(out, qkv, pull) if gradients else ())]
        for what, x, y in zip(("output", *(f"gradient of {x}" for x in "qkv")), found, right, strict=False):
            error = float((x.detach().double() - y).abs().max() / y.abs().max())
            assert error < tolerance, f"{name}, {what}: off by {error} of the largest entry"


@truly_compiled()
def measure(length: int, share_a: float, device: str, n: int = 5) -> list[dict]:
    cuda = device != "cpu"
    rows, layers = (max(1, TOKENS // length), LAYERS) if cuda else (1, 1)
    qkv, ids = tensors(length, share_a, device, torch.bfloat16 if cuda else torch.float32, rows)
    dense, blocks = dense_mask(LAYOUT, ids), block_mask(LAYOUT, ids)
    compiled = torch.compile(flex_attention, dynamic=False)
    sides: dict[str, Callable] = {
        "dense": lambda: F.scaled_dot_product_attention(*qkv, attn_mask=dense),
        "flex": lambda: compiled(*qkv, block_mask=blocks),
    }
    tolerance = 3e-2 if cuda else 1e-5
    with torch.no_grad():
        check(sides, qkv, dense, tolerance)
        through = {name: lambda side=side: [side() for _ in range(layers)] for name, side in sides.items()}
        forward = in_turn(through | {"mask": lambda: block_mask(LAYOUT, ids)}, n)
    stack = f"{layers} layers, {rows} rows" if cuda else "one layer"
    shape = f"L {length}, A:B {share_a / (1 - share_a):.0f}:1, {HEADS} heads of {WIDTH}, {stack}"
    sparsity = f"{100 * float(dense.float().mean()):.0f} % of pairs allowed"
    text = f"time, dense SDPA / Flex, {{}}; {shape}; {sparsity}"
    once = f"time, building the block mask, once a batch / Flex, forward, of {stack}; {shape}"
    records = [
        record(f"attention, forward, {shape}", text.format("forward"), forward["dense"], forward["flex"]),
        record(f"attention, block mask / forward, {shape}", once, forward["mask"], forward["flex"]),
    ]
    if cuda:
        for x in qkv:
            x.requires_grad_()
        check(sides, qkv, dense, tolerance, gradients=True)
        both = in_turn(
            {name: lambda side=side: [side().sum().backward() for _ in range(layers)] for name, side in sides.items()},
            n,
        )
        text = text.format("forward and backward")
        records.append(record(f"attention, forward + backward, {shape}", text, both["dense"], both["flex"]))
    return records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Dense SDPA against FlexAttention.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--long", action="store_true", help=f"on a CPU: L {', '.join(map(str, LONG))}, kept by themselves"
    )
    parser.add_argument("--lengths", type=int, nargs="*", help="other lengths than these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args(argv)
    usual = LONG if args.long else [512, 2048] if args.device == "cpu" else [512, 1024, 2048, 4096, 8192]
    name = "attention_gpu" if args.device != "cpu" else "attention_long" if args.long else "attention"
    shares = {"4:1": 0.8, "1:1": 0.5}
    parts = {f"L {length}, A:B {ratio}": partial(measure, length, share, args.device)
             for length in args.lengths or usual for ratio, share in shares.items()}  # fmt: skip
    note = "equal to float64 (to 1e-5 of the largest entry, bf16 3e-2; gradients too where timed), then time (n 5)"
    save_parts(name, parts, note, args.out, args.device)


if __name__ == "__main__":
    main()
