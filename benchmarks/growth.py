"""Growth of time and peak memory: a forward pass against length and batch, `encode` against items; log-log, with slopes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from common import BACKBONE, RESULTS, WORDS, in_turn, peaks, record, save

from cocoa_lib.attention import EOS, A
from cocoa_lib.backbone import hidden_states, open_backbone
from cocoa_lib.embedder import CocoaEmbedder

LENGTHS, BATCHES, ITEMS = (64, 256, 1024, 4096), (4, 16, 64, 256), (16, 64, 256, 1024)


def model():
    return open_backbone(BACKBONE, bidirectional=True)


def embedder() -> CocoaEmbedder:
    return CocoaEmbedder.load(BACKBONE)


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


# An axis: its sizes, what is opened, and how one size is run with it.
AXES: dict[str, tuple[Sequence[int], Callable, Callable]] = {
    "tokens a sequence (batch 2)": (LENGTHS, model, lambda opened, n: forward(opened, 2, n)),
    "sequences a batch (64 tokens)": (BATCHES, model, lambda opened, n: forward(opened, n, 64)),
    "texts to encode": (ITEMS, embedder, lambda opened, n: opened.encode(texts(n))),
}


def setup(axis: str, size: int) -> Callable[[], None]:
    """The step of one size, after one run of the smallest."""
    sizes, opens, run = AXES[axis]
    opened = opens()
    run(opened, sizes[0])
    return lambda: run(opened, size)


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
    import matplotlib  # here, so that the processes that measure memory do not import it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
    memory = peaks(setup, [(name, n) for name, (sizes, *_) in AXES.items() for n in reversed(sizes)])
    records, curves = [], {}
    for name, (sizes, opens, run) in AXES.items():
        opened = opens()
        run(opened, sizes[0])  # in place of an uncounted round, most of which the largest size would take
        seconds = in_turn({str(n): lambda n=n, run=run, opened=opened: run(opened, n) for n in sizes}, warm=True)
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
        "committed backbone, forward pass; time (n 5), memory above the model (n 5 processes); figure: growth.png, growth.svg",
    )


if __name__ == "__main__":
    main()
