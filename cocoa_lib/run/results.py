"""What a finished run leaves: ranks of every query, what made them, and probes."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import torch

from ..data.tables import fingerprint
from ..embedder import CocoaEmbedder
from ..evaluate.probe import probe
from ..evaluate.results import read_ranks, write_ranks
from ..evaluate.score import evaluate
from ..store.checkpoint import CheckpointError, provenance, read_meta, read_note
from ..store.files import write_whole
from .sharding import join_processes
from .spec import RunSpec


def evaluate_run(run: RunSpec, *, show_progress: bool = True) -> pd.DataFrame:
    """Rank all queries with a run's embedder, or read the ranks that are there."""
    out, model = run.folder("evaluate"), run.folder("stage3")
    settings = {"batch_size": 64, "dtype": "float32"} | run.values.get("evaluation", {})
    settings.pop("tasks", None)
    facts = run_facts(run) | {"evaluation": settings | {"tasks": [task.name for task in run.tasks]}}
    if run.done("evaluate"):
        found = read_note(out / "run.json")
        same = ("data_sha256", "evaluation", "sha256")
        if differs := [
            name for name in same if json.dumps(found.get(name)) != json.dumps(facts[name])
        ]:
            raise CheckpointError(
                f"{out}: ranks of another run (different: {', '.join(differs)}); delete the "
                f"folder to rank again"
            )
        return read_ranks(out)
    state = join_processes()
    dtype = getattr(torch, settings.pop("dtype"))
    ranks = evaluate(
        CocoaEmbedder.load(model, dtype=dtype),
        run.data,
        tasks=run.tasks,
        cache_dir=out / "embeddings",
        show_progress=show_progress and state.is_main_process,
        process_index=state.process_index,
        num_processes=state.num_processes,
        wait=state.wait_for_everyone,
        **settings,
    )
    if state.is_main_process:
        write_ranks(out, ranks, facts)
    state.wait_for_everyone()
    return read_ranks(out)


def probe_run(run: RunSpec) -> pd.DataFrame:
    """Probe a run's embedder, or read the table that is there; see `Run.probe`."""
    path = run.folder("evaluate") / "probe.csv"
    if not path.is_file():
        table = probe(CocoaEmbedder.load(run.folder("stage3")), run.data)
        table = table.assign(arm=run.arm, seed=run.seed)[["arm", "seed", *table.columns]]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda aside: table.to_csv(aside, index=False))
    return pd.read_csv(path)


def run_facts(run: RunSpec) -> dict[str, Any]:
    """Gather what produced a run's ranks: names, recipes, seconds a stage, hashes, commit,
    versions.
    """
    metas = {stage: read_meta(run.folder(stage), check=False) for stage in run.stages}
    return {
        **run.names(),
        "hypothesis": run.hypothesis,
        "recipes": {stage: meta["run"]["recipe"] for stage, meta in metas.items()},
        "seconds": {stage: meta["train_seconds"] for stage, meta in metas.items()},
        "commits": {stage: meta["commit"] for stage, meta in metas.items()},
        "sha256": {stage: meta["weights_sha256"] for stage, meta in metas.items()},
        "backbone_sha256": metas[run.stages[0]]["run"]["parent_sha256"],
        "data_sha256": fingerprint(run.data),
        **provenance(),
    }
