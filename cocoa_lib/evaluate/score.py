"""Ranks of the right candidates, and what follows from them: Precision@1, averages, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data.tables import EvalItems, Task, list_items, load_eval
from .encode import encode_distinct
from .tasks import TASKS, averages, group_tasks

METRICS = ("p@1", "hit@5", "mrr", "ndcg@10")
RUN = ["arm", "seed"]  # name a run, where a table holds several
TASK = ["task", "meta_task", "in_distribution"]
RANKS = [*TASK, "query", "rank", "n_candidates", "ties"]
BLOCK = 1 << 24  # working memory of `rank`, in floats


def rank(
    queries: np.ndarray, candidates: np.ndarray, candidate_index: Sequence[np.ndarray]
) -> pd.DataFrame:
    """Rank each query's right candidate by cosine (1 is best): rank, ties, n_candidates, Q rows.

    queries (Q, H), candidates (N, H): float32, length 1. candidate_index: Q arrays of rows of
    `candidates`, the right one first. Candidates that score the same as the right one come before
    it and are counted in `ties`; MMEB's public argmax puts them behind it, which is rank - ties.
    Raises ValueError for values that are not finite and for a query without candidates.

    Scores are float32 matrix products and a tie is exact equality. A product may differ in its last
    bit with the place of a column. So equal candidates are first made one column, and columns are
    ordered by content: equal embeddings always tie, and the order of a list changes nothing.
    """
    lengths = np.array([len(index) for index in candidate_index])
    if len(lengths) != len(queries) or not lengths.all():
        raise ValueError(f"{len(queries)} queries need as many lists of one candidate at least")
    if not (np.isfinite(queries).all() and np.isfinite(candidates).all()):
        raise ValueError("an embedding has values that are not finite")
    queries, candidates = (np.ascontiguousarray(x, np.float32) for x in (queries, candidates))
    whole = candidates.view(np.dtype((np.void, candidates[0].nbytes))).ravel()  # a row, as bytes
    _, first, column = np.unique(whole, return_index=True, return_inverse=True)
    longest = int(lengths.max(initial=1))
    # Few distinct candidates: one product with all of them. Many: gather the lists of a few queries
    # at a time, which breaks even at some 50 times as many distinct candidates as a list has.
    shared = candidates[first] if len(first) <= 32 * longest else None
    step = max(1, BLOCK // (len(first) if shared is not None else longest * queries.shape[1]))
    counts = np.zeros((len(queries), 2), dtype=int)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        valid = np.arange(longest) < lengths[rows, None]  # (rows, longest)
        index = np.zeros(valid.shape, dtype=np.int64)
        index[valid] = column[np.concatenate(candidate_index[rows])]
        if (table := shared) is None:
            used, index = np.unique(index, return_inverse=True)
            table = candidates[first[used]]
        scores = np.take_along_axis(queries[rows] @ table.T, index.reshape(valid.shape), axis=1)
        others, right = valid[:, 1:], scores[:, :1]
        counts[rows, 0] = ((scores[:, 1:] > right) & others).sum(axis=1)
        counts[rows, 1] = ((scores[:, 1:] == right) & others).sum(axis=1)
    better, tied = counts.T
    return pd.DataFrame({"rank": 1 + better + tied, "ties": tied, "n_candidates": lengths})


def evaluate(
    embedder: Any,
    root: str | Path,
    image_root: str | Path | None = None,
    *,
    tasks: Sequence[Task] = TASKS,
    part: str = "eval",
    n_queries: int | None = None,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
    **encoding: Any,
) -> pd.DataFrame:
    """Rank the right candidate of every query of `tasks` below `root`: the columns RANKS.

    `query` is the row number in the task's file. `image_root` is root/images unless given.
    `part`: "eval", or "dev" for the built-in world's development queries.
    `n_queries` draws that many rows a task, the same ones each time. `encoding` goes to
    `encode_distinct`. All rows, and that all pictures are there, is checked before anything is
    encoded. Raises what `load_eval`, `list_items` and `encode_distinct` raise, and ValueError for an
    embedder without `fingerprint` that is to store its embeddings. MMEB's own tasks must have as
    many candidates as `Task` says.
    """
    fingerprint = getattr(embedder, "fingerprint", "")
    if cache_dir is not None and not fingerprint:
        raise ValueError(
            "this embedder has no `fingerprint`, so stored embeddings of two models would mix"
        )
    image_root = Path(root) / "images" if image_root is None else Path(image_root)
    loaded = []
    for task in tasks:
        size = task.n_candidates if task in TASKS else None
        rows = load_eval(root, task.name, n_candidates=size, part=part)
        chosen = np.arange(len(rows))
        if n_queries is not None and n_queries < len(rows):
            draw = np.random.default_rng(0).choice(len(rows), n_queries, replace=False)
            chosen = np.sort(draw)
        loaded.append(list_items(rows, chosen, f"{root}, {task.name}", image_root))
    bar = tqdm(tasks, desc="evaluate", unit="task", disable=not show_progress)
    encoding |= {"cache_dir": cache_dir, "fingerprint": fingerprint, "show_progress": show_progress}
    tables = [
        _rank_task(embedder, items, desc=task.name, **encoding).assign(
            task=task.name, meta_task=task.meta_task, in_distribution=task.in_distribution
        )
        for task, items in zip(bar, loaded, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)[RANKS]


def _rank_task(embedder: Any, items: EvalItems, **encoding: Any) -> pd.DataFrame:
    """Encode and rank one task: query, rank, ties, n_candidates. A bad picture names its row."""
    try:
        vectors = encode_distinct(embedder, items.items, **encoding)
    except ValueError as error:  # a damaged picture, found when it is opened
        if (at := getattr(error, "item", None)) is None:
            raise
        raise type(error)(f"{items.place(at)}: {error}") from None
    n = len(items.queries)
    return rank(vectors[:n], vectors[n:], items.candidates).assign(query=items.queries)


def score_tasks(ranks: pd.DataFrame, *, n_boot: int = 1000) -> pd.DataFrame:
    """Score each task: P@1, hit@5, MRR and NDCG@10 in percent, one row a (run,) task and metric.

    ranks: columns RANKS, and `arm`, `seed` where they are of several runs. Returns (arm, seed,)
    task, meta_task, in_distribution, metric, value, n (queries), low, high, ties (queries whose
    answer ties with another candidate), n_candidates (the largest of a query). low, high: 95 %
    percentile bootstrap over queries. For MMEB's public rule on ties pass
    `ranks.assign(rank=ranks["rank"] - ranks["ties"])`.
    """
    rows = []
    for run, part in _split(ranks):
        for values, task in part.groupby(TASK, sort=False, observed=True):
            facts = {**run, **dict(zip(TASK, values, strict=True)), "n": len(task)}
            facts["ties"] = int((task["ties"] > 0).sum())
            facts["n_candidates"] = task["n_candidates"].max()
            rows += [facts | score for score in _score_ranks(task["rank"].to_numpy(), n_boot)]
    return pd.DataFrame(rows)


def _score_ranks(ranks: np.ndarray, n_boot: int) -> list[dict[str, Any]]:
    """Score ranks (Q,): rows of metric, value, low, high."""
    # A resample of the queries is a multinomial draw of how often each distinct rank occurs.
    distinct, counts = np.unique(ranks, return_counts=True)
    # One right candidate, so the ideal DCG is 1.
    gain = np.where(distinct <= 10, 1 / np.log2(1 + distinct), 0)
    values = 100 * np.stack([distinct == 1, distinct <= 5, 1 / distinct, gain])
    n = counts.sum()
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=n_boot)
    low, high = np.percentile(values @ draws.T / n, [2.5, 97.5], axis=1)
    columns = zip(METRICS, values @ counts / n, low, high, strict=True)
    return [{"metric": m, "value": v, "low": lo, "high": hi} for m, v, lo, hi in columns]


def score_averages(ranks: pd.DataFrame, *, n_boot: int = 1000) -> pd.DataFrame:
    """Score MMEB's averages: a row a (run and) average, P@1 in percent with its interval.

    Returns (arm, seed,) average, value, low, high, n_tasks, n (queries). low, high: 95 % percentile
    bootstrap over the queries within each task; the tasks are fixed and weigh the same. An average
    over no task is nan.
    """
    rows = [run | row for run, part in _split(ranks) for row in _average_ranks(part, n_boot)]
    return pd.DataFrame(rows)


def _average_ranks(ranks: pd.DataFrame, n_boot: int) -> list[dict[str, Any]]:
    rng, tasks = np.random.default_rng(0), list_tasks(ranks)
    hits = (ranks["rank"] == 1).groupby(ranks["task"], sort=False, observed=True)
    hits = hits.agg(["mean", "size"])
    # A resample of n queries of which a share p are hits has Binomial(n, p) hits.
    boots = {name: 100 * rng.binomial(n, p, n_boot) / n for name, p, n in hits.itertuples()}
    values, rows = averages(dict(100 * hits["mean"]), tasks), []
    for average, names in group_tasks(tasks).items():
        drawn = np.mean([boots[name] for name in names], axis=0) if names else np.nan
        low, high = np.percentile(drawn, [2.5, 97.5])
        facts = {"average": average, "value": values[average], "low": low, "high": high}
        rows.append({**facts, "n_tasks": len(names), "n": hits.loc[names, "size"].sum()})
    return rows


def score_arms(ranks: pd.DataFrame) -> pd.DataFrame:
    """Average each run's P@1 in percent: arm, seed and MMEB's seven averages, one row a run.

    Raises ValueError if a run lacks a task that another has: their means would not compare.
    """
    tasks, rows = list_tasks(ranks), []
    for run, part in _split(ranks):
        scores = (100.0 * (part["rank"] == 1)).groupby(part["task"], observed=True).mean()
        if lost := {task.name for task in tasks} - set(scores.index):
            raise ValueError(f"{run} has no ranks of {', '.join(sorted(lost))}")
        rows.append({**run, **averages(dict(scores), tasks)})
    return pd.DataFrame(rows)


def list_tasks(ranks: pd.DataFrame) -> list[Task]:
    """List the tasks of a table of ranks, in its order; n_candidates: the largest of a query."""
    facts = ranks.groupby(TASK, sort=False, observed=True)["n_candidates"].max().reset_index()
    return [Task(*row) for row in facts.itertuples(index=False)]


def _split(ranks: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """List the runs of a table of ranks: (arm and seed, where it names them, and its rows)."""
    if not (keys := [name for name in RUN if name in ranks]):
        return [({}, ranks)]
    runs = ranks.groupby(keys, sort=False, observed=True)
    return [(dict(zip(keys, values, strict=True)), part) for values, part in runs]
