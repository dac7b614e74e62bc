"""Growth: time of a forward pass against length and batch, of `encode` against items; log-log, with slopes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import torch
from common import BACKBONE, RESULTS, WORDS, in_turn, record, save

from cocoa_lib.attention import EOS, A
from cocoa_lib.backbone import hidden_states, open_backbone
from cocoa_lib.embedder import CocoaEmbedder

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LENGTHS, BATCHES, ITEMS = (64, 256, 1024, 4096), (4, 16, 64, 256), (64, 256, 1024, 4096)


def forward(model, batch: int, length: int) -> Callable[[], None]:
    ids = torch.randint(10, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    segments = torch.full_like(ids, A)
    segments[:, -1] = EOS
    data = {"input_ids": ids, "segment_ids": segments, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.zeros_like(ids)}  # fmt: skip

    @torch.inference_mode()
    def run() -> None:
        hidden_states(model, data)

    return run


def curve(name: str, sizes: Sequence[int], sides: dict[str, Callable]) -> tuple[dict, np.ndarray]:
    """The record of one axis, last size over first, with the slope between the last two sizes; and the medians."""
    seconds = in_turn(sides)
    middle = np.array([statistics.median(seconds[str(size)]) for size in sizes])
    slopes = np.diff(np.log(middle)) / np.diff(np.log(sizes))
    text = f"time at {sizes[-1]} / at {sizes[0]}; log-log slopes between {', '.join(map(str, sizes))}: " + ", ".join(
        f"{slope:.2f}" for slope in slopes
    )
    line = record(f"growth, {name}", text, seconds[str(sizes[-1])], seconds[str(sizes[0])])
    return line | {"slopes": [round(float(slope), 3) for slope in slopes]}, middle / middle[0]


def draw(curves: dict[str, tuple[Sequence[int], np.ndarray, list[float]]]) -> None:
    """One panel an axis: time relative to the smallest size, the line of slope 1 beside it."""
    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3), sharey=True, layout="constrained")
    for axis, (name, (sizes, relative, slopes)) in zip(axes, curves.items(), strict=True):
        axis.loglog(sizes, relative, "o-", color="#0072B2", label="measured")
        axis.loglog(sizes, np.array(sizes) / sizes[0], "--", color="#999999", label="linear")
        axis.set(xlabel=name, title=f"slope at the end: {slopes[-1]:.2f}")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    axes[0].set_ylabel("time / time at the smallest")
    axes[0].legend(frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(RESULTS / f"growth.{kind}", dpi=150)


def main() -> None:
    torch.set_num_threads(1)
    model, embedder = open_backbone(BACKBONE, bidirectional=True), CocoaEmbedder.load(BACKBONE)
    texts = [f"{i} " + " ".join(WORDS[: i % 20]) for i in range(ITEMS[-1])]
    axes = {
        "tokens a sequence (batch 2)": (LENGTHS, {str(n): forward(model, 2, n) for n in LENGTHS}),
        "sequences a batch (64 tokens)": (BATCHES, {str(n): forward(model, n, 64) for n in BATCHES}),
        "texts to encode": (ITEMS, {str(n): lambda n=n: embedder.encode(texts[:n]) for n in ITEMS}),
    }
    records, curves = [], {}
    for name, (sizes, sides) in axes.items():
        line, relative = curve(name, sizes, sides)
        records.append(line)
        curves[name] = (sizes, relative, line["slopes"])
    draw(curves)
    save("growth", records, "committed backbone, forward pass; n 5; figure: growth.png, growth.svg")


if __name__ == "__main__":
    main()
