"""What EOS holds: linear probes of the content of a picture, and the geometry of the embeddings.

"Compact and informative" is a claim about the state at EOS; here it is measured. A picture alone is encoded, and a linear
classifier reads from its embedding what the scene was: how many objects, and kind, colour, size and position of the first
one in reading order. Works on the built-in benchmark, whose scenes are known, and on any checkpoint of it: the causal
backbone, a stage in the middle, the final embedder.

    python -m cocoa_lib.evaluate.probe CHECKPOINT --data runs/laptop/benchmark --out probe.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..data import corpus
from ..embedder import CocoaEmbedder
from ..store.files import write_whole
from ..world.build import read_scenes
from ..world.scenes import POSITIONS, Scene
from . import effects as analysis

CONTENT = ("count", "kind", "color", "size", "position")


def content(scene: Scene) -> dict[str, str]:
    """The labels of a scene: the number of objects, and what and where the first one in reading order is."""
    first = min(scene, key=lambda obj: POSITIONS.index(obj["position"]))
    return {"count": str(len(scene)), **{name: str(first[name]) for name in CONTENT[1:]}}


def probe(
    embedder: CocoaEmbedder, data: Path, *, n_train: int = 2000, batch_size: int = 64
) -> pd.DataFrame:
    """Rows of measure, value, low, high, majority, n for one embedder on the benchmark folder `data`.

    Probes (percent right, 95 % Wilson interval over test pictures, `majority`: always the most frequent answer): trained
    on the first `n_train` scenes of the corpus, tested on all held-out ones. Geometry, of the held-out pictures:
    effective_rank (1 to H), uniformity (0 collapsed, lower is more spread), alignment with their captions (0 to 4);
    no interval. Raises FileNotFoundError where the folder has no scenes: the labels come from them.
    """
    scenes, parts = read_scenes(data), {}
    for split in ("train", "heldout"):
        rows = corpus.captions(data, split)[: n_train if split == "train" else None]
        vectors = embedder.encode([{"image": row["image"]} for row in rows], batch_size=batch_size)
        names = [str(Path(row["image"]).relative_to(data / "images")) for row in rows]
        parts[split] = rows, vectors, pd.DataFrame([content(scenes[name]) for name in names])
    (_, train_x, train_y), (rows, test_x, test_y) = parts["train"], parts["heldout"]
    captions = embedder.encode([{"text": row["target"]} for row in rows], batch_size=batch_size)
    found = []
    for name in CONTENT:
        result = analysis.linear_probe(
            train_x, train_y[name].to_numpy(), test_x, test_y[name].to_numpy()
        )
        found.append((name, result.accuracy, result.low, result.high, result.majority, result.n))
    for name, value in (
        ("effective_rank", analysis.effective_rank(test_x)),
        ("uniformity", analysis.uniformity(test_x)),
        ("alignment", analysis.alignment(test_x, captions)),
    ):
        found.append((name, value, None, None, None, len(test_x)))
    return pd.DataFrame(found, columns=["measure", "value", "low", "high", "majority", "n"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_lib.evaluate.probe", description="What a checkpoint's EOS holds."
    )
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the built-in benchmark")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args(argv)
    table = probe(CocoaEmbedder.load(args.model), args.data)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, lambda aside: table.to_csv(aside, index=False))
    print(table.to_string(index=False))  # noqa: T201


if __name__ == "__main__":
    main()
