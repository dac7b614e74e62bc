"""Growth of time and peak memory: a forward pass against length and batch, `encode` against items; log-log, with slopes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import torch
from common import BACKBONE, RESULTS, WORDS, in_turn, peaks, record, save

from cocoa_lib.attention import EOS, A
from cocoa_lib.backbone import hidden_states, open_backbone
from cocoa_lib.embedder import CocoaEmbedder

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LENGTHS, BATCHES, ITEMS = (64, 256, 1024, 4096), (4, 16, 64, 256), (64, 256, 1024, 4096)


@torch.inference_mode()
def forward(model, batch: int, length: int) -> None:
    ids = torch.randint(10, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    segments = torch.full_like(ids, A)
    segments[:, -1] = EOS
    data = {"input_ids": ids, "segment_ids": segments, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.zeros_like(ids)}  # fmt: skip
    hidden_states(model, data)


def texts(n: int) -> list[str]:
    return [f"{i} " + " ".join(WORDS[: i % 20]) for i in range(n)]


# An axis: its sizes, and how one of them is run, given (model, embedder).
AXES: dict[str, tuple[Sequence[int], Callable]] = {
    "tokens a sequence (batch 2)": (LENGTHS, lambda model, _, n: forward(model, 2, n)),
    "sequences a batch (64 tokens)": (BATCHES, lambda model, _, n: forward(model, n, 64)),
    "texts to encode": (ITEMS, lambda _, embedder, n: embedder.encode(texts(n))),
}


def setup(axis: str, size: int) -> Callable[[], None]:
    """For `peaks`: the model, after one small run."""
    sizes, run = AXES[axis]
    sides = open_backbone(BACKBONE, bidirectional=True), CocoaEmbedder.load(BACKBONE)
    run(*sides, sizes[0])
    return lambda: run(*sides, size)


def slopes(sizes: Sequence[int], middle: np.ndarray) -> list[float]:
    return [round(float(x), 3) for x in np.diff(np.log(middle)) / np.diff(np.log(sizes))]


def line(name: str, what: str, sizes: Sequence[int], of: dict[int, Sequence[float]]) -> tuple[dict, np.ndarray]:
    """The record of one axis, last size over first, with the slopes from size to size; and the medians."""
    middle = np.array([statistics.median(of[size]) for size in sizes])
    steep = slopes(sizes, middle)
    text = f"{what} at {sizes[-1]} / at {sizes[0]}; log-log slopes between {', '.join(map(str, sizes))}: " + ", ".join(
        f"{slope:.2f}" for slope in steep
    )
    return record(f"growth, {name}, {what}", text, of[sizes[-1]], of[sizes[0]]) | {"slopes": steep}, middle


def draw(curves: dict[str, dict[str, np.ndarray]]) -> None:
    """One panel an axis: time and memory relative to the smallest size, the line of slope 1 beside them."""
    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3), sharey=True, layout="constrained")
    for axis, (name, measured) in zip(axes, curves.items(), strict=True):
        sizes = AXES[name][0]
        ends = []
        for (what, middle), colour, marker in zip(measured.items(), ("#0072B2", "#D55E00"), "os", strict=True):
            axis.loglog(sizes, middle / middle[0], f"{marker}-", color=colour, label=what)
            ends.append(f"{what} {slopes(sizes, middle)[-1]:.2f}")
        axis.loglog(sizes, np.array(sizes) / sizes[0], "--", color="#999999", label="linear")
        axis.set(xlabel=name)
        axis.set_title("slope at the end: " + ", ".join(ends), fontsize=8)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    axes[0].set_ylabel("relative to the smallest size")
    axes[0].legend(frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(RESULTS / f"growth.{kind}", dpi=150)


def main() -> None:
    torch.set_num_threads(1)
    sides = open_backbone(BACKBONE, bidirectional=True), CocoaEmbedder.load(BACKBONE)
    memory = peaks(setup, [(name, n) for name, (sizes, _) in AXES.items() for n in sizes], n=2)
    records, curves = [], {}
    for name, (sizes, run) in AXES.items():
        seconds = in_turn({str(n): lambda n=n, run=run: run(*sides, n) for n in sizes})
        found = {
            "time": {n: seconds[str(n)] for n in sizes},
            "peak memory": {n: memory[name, n] for n in sizes},
        }
        curves[name] = {}
        for what, of in found.items():
            kept, curves[name][what] = line(name, what, sizes, of)
            records.append(kept)
    draw(curves)
    save(
        "growth",
        records,
        "committed backbone, forward pass; time (n 5), peak memory above the model (n 2); figure: growth.png, growth.svg",
    )


if __name__ == "__main__":
    main()
