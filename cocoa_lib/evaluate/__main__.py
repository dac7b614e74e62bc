"""`python -m cocoa_lib.evaluate MODEL --root DATA --out RESULTS`: all tasks with one checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.tables import fingerprint
from ..embedder import CocoaEmbedder
from ..kernels import join_processes
from ..store.checkpoint import META, add_scores, provenance
from .results import write_ranks
from .score import evaluate, score_averages
from .tasks import choose_tasks, list_known


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_lib.evaluate", description="Evaluate a checkpoint on MMEB-V1."
    )
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--root", type=Path, required=True, help="data folder in MMEB's layout")
    parser.add_argument("--image-root", type=Path, help="folder of the images (ROOT/images)")
    parser.add_argument("--tasks", nargs="+", default=["all"], help="names, or 'all'")
    parser.add_argument("--out", type=Path, required=True, help="ranks and stored embeddings")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--n-queries", type=int, help="queries a task, drawn at random (all)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, write ranks.parquet and run.json, print the averages, update the model card."""
    args = parse(argv)
    state = join_processes()  # first: it gives each process its own GPU
    tasks = choose_tasks(args.tasks, args.root)
    embedder = CocoaEmbedder.load(args.model, dtype=getattr(torch, args.dtype))
    ranks = evaluate(
        embedder,
        args.root,
        args.image_root,
        tasks=tasks,
        n_queries=args.n_queries,
        batch_size=args.batch_size,
        cache_dir=args.out / "embeddings",
        show_progress=state.is_main_process,
    )
    if not state.is_main_process:
        return
    facts = {
        **vars(args),
        "arm": Path(args.model).name,
        "seed": 0,
        "data": fingerprint(args.root),
        "fingerprint": embedder.fingerprint,
        **provenance(),
    }
    write_ranks(args.out, ranks, facts)
    table = score_averages(ranks).dropna().round(1).to_string(index=False)
    missing = [task.name for task in list_known(args.root) if task not in tasks]
    print(f"{table}\nMISSING: {', '.join(missing)}" if missing else table)  # noqa: T201
    if (Path(args.model) / META).is_file() and os.access(args.model, os.W_OK):
        add_scores(
            args.model,
            f"Precision@1 in percent on `{'/'.join(args.root.parts[-2:])}`, 95 % bootstrap "
            "intervals over queries; ties count against the answer. Missing tasks: "
            f"{', '.join(missing) or 'none'}.\n\n```\n{table}\n```",
        )


if __name__ == "__main__":
    main()
