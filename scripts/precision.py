"""What a smaller form of the stored vectors costs in score: float16, int8, one bit a dimension, fewer dimensions.

    python scripts/precision.py runs/long stage1_longer benchmarks/results/precision.csv

Every seed of an arm is evaluated on the run's benchmark with float32 queries against candidates in each form, as
`embedder.search` compares them; less float32, paired by seed, task and query, with the interval over seeds and queries.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cocoa_lib.data.tables import load_eval
from cocoa_lib.embedder import CocoaEmbedder, as_floats, smaller
from cocoa_lib.evaluate import effects as analysis
from cocoa_lib.evaluate.encode import encode_distinct
from cocoa_lib.evaluate.score import rank, task_items
from cocoa_lib.evaluate.tasks import choose_tasks
from cocoa_lib.run.arms import read_arms

FORMS = {  # name -> share of the dimensions, numbers as
    "float32": (1, "float32"), "float16": (1, "float16"), "int8": (1, "int8"), "1 bit": (1, "ubinary"),
    "half the dimensions, float32": (2, "float32"), "half the dimensions, int8": (2, "int8"),
    "a quarter of the dimensions, float32": (4, "float32"), "a quarter of the dimensions, int8": (4, "int8"),
}  # fmt: skip


def stored(vectors: np.ndarray, dim: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Candidates (N, H) as they would be stored, and as `search` reads them, (N, dim) float32."""
    cut = smaller(vectors, dim, "float32", None)
    ranges = np.stack([cut.min(axis=0), cut.max(axis=0)])
    kept = cut.astype(kind) if kind.startswith("float") else smaller(cut, None, kind, ranges)
    return kept, as_floats(kept, dim, ranges)


def evaluate(embedder: CocoaEmbedder, data: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Ranks of all queries by form (column arm), and bytes a vector."""
    parts, sizes = [], {}
    for task in choose_tasks(["all"], str(data)):
        rows = load_eval(str(data), task.name)
        items, index, _ = task_items(rows, task.name, np.arange(len(rows)), data / "images")
        vectors = encode_distinct(embedder, items, show_progress=False)
        queries, candidates = vectors[: len(rows)], vectors[len(rows) :]
        for form, (share, kind) in FORMS.items():
            dim = vectors.shape[1] // share
            kept, read = stored(candidates, dim, kind)
            sizes[form] = kept.nbytes / len(kept)
            ranks = rank(smaller(queries, dim, "float32", None), read, index)
            facts = {
                "arm": form,
                "task": task.name,
                "meta_task": task.meta_task,
                "in_distribution": task.in_distribution,
            }
            parts.append(ranks[["rank", "n_candidates"]].assign(query=np.arange(len(rows)), **facts))
    return pd.concat(parts, ignore_index=True), sizes


def main(run: Path, arm: str, out: Path) -> None:
    key, found = read_arms()[arm].key("stage3"), []
    models = sorted(run.glob(f"seed*/stage3/{key}"))
    if not models:
        raise SystemExit(f"{run}: no checkpoint of {arm} (seed*/stage3/{key}); make reproduce trains it")
    for folder in models:
        ranks, sizes = evaluate(CocoaEmbedder.load(folder), run / "benchmark")
        found.append(ranks.assign(seed=int(folder.parts[-3].removeprefix("seed"))))
    ranks = pd.concat(found, ignore_index=True)
    effects = analysis.paired_effects(ranks, "float32").set_index("arm")
    scores = ranks.assign(hit=100 * (ranks["rank"] == 1)).groupby(["arm", "task"])["hit"].mean().groupby("arm").mean()
    columns = ["difference", "low", "high", "p_holm", "n_seeds", "n_queries"]
    table = pd.DataFrame([
        {"form": form, "bytes": sizes[form], "p@1": scores[form], **(effects.loc[form, columns] if form in effects.index else {})}
        for form in FORMS
    ]).assign(arm=arm)  # fmt: skip
    table.round(4).to_csv(out, index=False)
    sys.stdout.write(table.round(2).to_string(index=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
