"""What scores mean: chance, pixels and words, random weights, a small CNN, the generator's truth.

    python -m cocoa_lib.run.floors runs/laptop/benchmark --pairs 2000 --out floors.csv

Each is a row a task, in percent right at rank 1. All read the same files as the models do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import corpus
from ..data.tables import load_eval
from ..embedder import CocoaEmbedder, EosEmbedding
from ..evaluate.floor import hash_words, pixel_bow_embed
from ..evaluate.score import evaluate
from ..items import load_image
from ..kernels import flush_denormals
from ..store.files import write_whole
from ..world.backbone import new_backbone
from ..world.build import oracle, read_scenes
from ..world.pretrain import Schedule
from ..world.tasks import SUBSETS, TASKS

SIDE = 80  # pixels a side that the CNN sees
WORDS = 1024  # hashed words
WIDTH = 96  # numbers an embedding of the CNN
TEMPERATURE = 0.05
Item = dict[str, Any]  # {"text": str, "image": path or None}


class SmallCnn(nn.Module):
    """Four convolutions and a bag of hashed words, 0.4 million weights, trained on the pairs."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.picture = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 25, WIDTH))
        self.words = nn.EmbeddingBag(WORDS, WIDTH, mode="sum")
        self.seen: dict[str, Tensor] = {}

    def read_picture(self, path: str | None) -> Tensor:
        """(3, SIDE, SIDE) uint8, black where there is none; a file is read once."""
        if not path:
            return torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
        if path not in self.seen:
            pixels = np.array(load_image(path).resize((SIDE, SIDE)))
            self.seen[path] = torch.from_numpy(pixels).permute(2, 0, 1)
        return self.seen[path]

    def forward(self, items: Sequence[Item]) -> Tensor:
        """(N, WIDTH), of length 1: the sum of what picture and words give."""
        pictures = torch.stack([self.read_picture(item.get("image")) for item in items])
        shown = torch.tensor([bool(item.get("image")) for item in items])[:, None]
        hashed = [hash_words(item, WORDS) for item in items]
        starts = torch.tensor([0, *map(len, hashed)][:-1]).cumsum(0)
        words = self.words(torch.tensor(sum(hashed, []), dtype=torch.long), starts)
        return F.normalize(self.picture(pictures / 255 - 0.5) * shown + words, dim=-1)

    @torch.inference_mode()
    def encode(self, items: Sequence[Item], **_: Any) -> np.ndarray:
        """(N, WIDTH) float32."""
        self.eval()
        parts = [self(items[start : start + 256]) for start in range(0, len(items), 256)]
        return torch.cat(parts).numpy()


def train_small_cnn(root: Path, *, n_pairs: int, steps: int, seed: int = 0) -> SmallCnn:
    """InfoNCE on the first `n_pairs` pairs, 128 a step, with their hard negatives."""
    torch.manual_seed(seed)
    rng, model = np.random.default_rng(seed), SmallCnn()
    rows, _ = corpus.pairs(root, n_pairs // len(SUBSETS), hard_negatives=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = rows.select(rng.integers(len(rows), size=128))
        vectors = model([*batch["anchor"], *batch["positive"], *batch["negative"]])
        scores = vectors[:128] @ vectors[128:].T / TEMPERATURE
        loss = F.cross_entropy(scores, torch.arange(128))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def open_random_model(root: Path, seed: int = 0) -> CocoaEmbedder:
    """The small backbone as it is before any training."""
    texts = [row["target"] for row in corpus.captions(root)]
    model, inputs = new_backbone(texts, seed=seed, **Schedule().shape)
    return CocoaEmbedder(EosEmbedding(model, inputs))


def score_embedder(embedder: Any, root: Path, part: str) -> dict[str, float]:
    """Task -> Precision@1 in percent, on the queries of "eval" or "dev"."""
    ranks = evaluate(embedder, root / part, root / "images", tasks=TASKS, show_progress=False)
    return {task: 100 * float((of["rank"] == 1).mean()) for task, of in ranks.groupby("task")}


def score_rows(root: Path, part: str, score: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    """Task -> mean of `score` over its rows, in percent."""
    return {
        task.name: 100 * float(np.mean([score(row) for row in load_eval(root / part, task.name)]))
        for task in TASKS
    }


def make_floor_table(
    root: Path, *, part: str = "eval", n_pairs: int = 2000, steps: int = 1500
) -> pd.DataFrame:
    """Rows the tasks and their mean, columns floor, in percent.

    chance: a candidate drawn. truth: does the generator's truth pick the first candidate: 100, or
    a row is wrong.
    """
    scenes = read_scenes(root)
    table = pd.DataFrame(
        {
            "chance": score_rows(root, part, lambda row: 1 / len(row["tgt_text"])),
            "truth": score_rows(root, part, lambda row: float(oracle(row, scenes) == 0)),
        }
    )
    embedders = {
        "pixels and words": SimpleNamespace(encode=lambda items, **_: pixel_bow_embed(items)),
        "random weights": open_random_model(root),
        f"small CNN, {n_pairs:,} pairs": train_small_cnn(root, n_pairs=n_pairs, steps=steps),
    }
    for name, embedder in embedders.items():
        table[name] = score_embedder(embedder, root, part)
    table.loc["overall"] = table.mean()
    return table.rename_axis("task").round(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The floors of the built-in benchmark.")
    parser.add_argument("root", type=Path, help="folder of the benchmark")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--part", choices=("eval", "dev"), default="eval")
    parser.add_argument("--pairs", type=int, default=2000, help="training pairs of the CNN")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the CNN")
    args = parser.parse_args(argv)
    with flush_denormals():
        table = make_floor_table(args.root, part=args.part, n_pairs=args.pairs, steps=args.steps)
    write_whole(args.out, table.to_csv)
    print(table.to_string())  # noqa: T201


if __name__ == "__main__":
    main()
