"""`python -m cocoa_lib.evaluate MODEL --root DATA --out RESULTS`: all tasks with one checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .score import average_intervals, evaluate, write_results
from .tasks import choose_tasks


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_lib.evaluate", description="Evaluate a checkpoint on MMEB-V1."
    )
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument(
        "--root", required=True, help="folder in MMEB's layout, or TIGER-Lab/MMEB-eval"
    )
    parser.add_argument("--image-root", help="folder of the images (default: ROOT/images)")
    parser.add_argument("--tasks", nargs="+", default=["all"], help="names, or 'all'")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results and stored embeddings"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: a GPU's fast kernels",
    )
    parser.add_argument(
        "--workers", type=int, default=0,
        help="processes that read pictures ahead of the model. Default 0: they hand batches over in "
        "shared memory, of which a container may have too little, and are started anew for each window of items",
    )  # fmt: skip
    parser.add_argument(
        "--n-queries", type=int, help="queries a task, drawn by the seed (default: all)"
    )
    parser.add_argument("--ties", choices=("against", "public"), default="against")
    parser.add_argument("--duplicates", choices=("error", "once"), default="error")
    parser.add_argument("--revision", help="commit of the hub data set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch
    from accelerate import PartialState

    from ..data.tables import fingerprint
    from ..embedder import CocoaEmbedder
    from ..store.checkpoint import META, add_scores, provenance

    # Of the hub: a branch moves, a commit does not: resolve once, use and record that.
    if not Path(args.root).is_dir() and len(Path(args.root).parts) == 2:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            args.revision = HfApi().dataset_info(args.root, revision=args.revision).sha
        except (HfHubHTTPError, OSError) as error:
            parser.error(
                f"--root {args.root}: no such folder here, and not found on the hub ({str(error).splitlines()[0]})"
            )
    state = PartialState(
        cpu=not torch.cuda.is_available()
    )  # first: it gives each process its own GPU
    tasks = choose_tasks(args.tasks, args.root)
    data = fingerprint(Path(args.root)) if Path(args.root).is_dir() else args.revision
    embedder = CocoaEmbedder.load(args.model, dtype=getattr(torch, args.dtype))
    results, per_query = evaluate(
        embedder, args.root, args.image_root, tasks=tasks, n_queries=args.n_queries, batch_size=args.batch_size,
        cache_dir=args.out / "embeddings", ties=args.ties, seed=args.seed, show_progress=state.is_main_process,
        revision=args.revision, duplicates=args.duplicates, process_index=state.process_index,
        num_processes=state.num_processes, wait=state.wait_for_everyone, workers=args.workers,
    )  # fmt: skip
    if state.is_main_process:
        facts = {**vars(args), "data": data, "fingerprint": embedder.fingerprint, **provenance()}
        write_results(results, per_query, args.out, facts)
        missing = [
            task.name
            for task in choose_tasks(["all"], args.root)
            if task.name not in set(results["task"])
        ]
        table = average_intervals(per_query, tasks).dropna()
        for row in table.itertuples():
            print(f"{row.average:15s} {row.value:5.1f} [{row.low:.1f}, {row.high:.1f}]")  # noqa: T201
        if missing:
            print(f"MISSING: {', '.join(missing)}")  # noqa: T201
        if (Path(args.model) / META).is_file() and os.access(args.model, os.W_OK):
            add_scores(args.model, _card_scores(table, results, args.root, missing))


def _card_scores(
    table: pd.DataFrame, results: pd.DataFrame, root: str, missing: Sequence[str]
) -> str:
    """The averages as Markdown, for the model card."""
    lines = [
        f"Precision@1 in percent on `{'/'.join(Path(root).parts[-2:])}`, {results['task'].nunique()} tasks, "
        f"{table['n'].max()} queries, 95 % bootstrap intervals over queries; evaluator: {results['evaluator'].iloc[0]}.",
        *([f"**Missing tasks: {', '.join(missing)}.**"] if missing else []),
        "\n| average | tasks | p@1 | interval |\n|---|---|---|---|",
    ]
    rows = [
        f"| {r.average} | {r.n_tasks} | {r.value:.1f} | {r.low:.1f} to {r.high:.1f} |"
        for r in table.itertuples()
    ]
    return "\n".join(lines + rows)


if __name__ == "__main__":
    main()
