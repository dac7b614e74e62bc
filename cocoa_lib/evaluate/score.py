"""Ranks, Precision@1 with intervals, and the averages over tasks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data.tables import Task, _codes, _flat_candidates, _strings, load_eval, resolve_image
from ..store.files import write_whole
from .encode import encode_distinct
from .tasks import TASKS, groups

METRICS = ("p@1", "hit@5", "mrr", "ndcg@10")


def rank(
    queries: np.ndarray,
    candidates: np.ndarray,
    candidate_index: Sequence[np.ndarray],
    *,
    ties: str = "against",
    block: int = 1 << 24,
) -> pd.DataFrame:
    """Rank of the right candidate of each query by cosine (1 is best): columns rank, ties, n_candidates, Q rows.

    queries (Q, H), candidates (N, H): float32, length 1. candidate_index: Q arrays of rows of `candidates`, the right
    one first. `ties="against"` puts candidates that score the same as the right one before it, "public" behind it, as
    argmax does on a list with the right one first; the column `ties` counts them either way. `block` bounds the working
    memory, in floats. Raises ValueError for values that are not finite.

    Scores are float32 matrix products and a tie is exact equality. A product may differ in its last bit with the place
    of a column, so equal candidate vectors are first made one column, and columns stand in an order given by their
    content: equal embeddings always tie, and the order of a candidate list changes nothing.
    """
    if ties not in ("against", "public"):
        raise ValueError(f"ties must be 'against' or 'public', found {ties!r}")
    for name, vectors in (("query", queries), ("candidate", candidates)):
        for row in np.flatnonzero(~np.isfinite(vectors.sum(axis=1)))[:1]:
            raise ValueError(f"the embedding of {name} {row} has values that are not finite")
    lengths = np.array([len(index) for index in candidate_index])
    if len(lengths) != len(queries) or (lengths == 0).any():
        raise ValueError(
            f"{len(queries)} queries need as many lists of at least one candidate, found {len(lengths)}"
        )
    queries, candidates = (
        np.asarray(queries, dtype=np.float32),
        np.asarray(candidates, dtype=np.float32),
    )
    first, column = _distinct_rows(candidates)
    longest = int(lengths.max(initial=1))
    # Few distinct candidates: one product with all of them. Many: gather the lists of a few queries at a time, which
    # is bound by memory traffic and breaks even at some 50 times as many distinct candidates as a list has.
    shared = candidates[first] if len(first) <= 32 * longest else None
    step = max(1, block // (len(first) if shared is not None else longest * queries.shape[1]))
    counts = np.zeros((len(queries), 2), dtype=int)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        valid = np.arange(longest) < lengths[rows, None]
        index = np.zeros(valid.shape, dtype=np.int64)
        index[valid] = column[np.concatenate(candidate_index[rows])]
        if (table := shared) is None:
            used, index = np.unique(index, return_inverse=True)
            table = candidates[first[used]]
        scores = np.take_along_axis(queries[rows] @ table.T, index.reshape(valid.shape), axis=1)
        right = scores[:, :1].copy()
        valid[:, 0] = False
        counts[rows, 0] = ((scores > right) & valid).sum(axis=1)
        counts[rows, 1] = ((scores == right) & valid).sum(axis=1)
    before, tied = counts.T
    return pd.DataFrame(
        {"rank": 1 + before + tied * (ties == "against"), "ties": tied, "n_candidates": lengths}
    )


def _distinct_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row stands first (M,), in the order of their hashes, and which of these each row is (N,)."""
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in vectors)
    return np.unique(np.frombuffer(digests, dtype="V16"), return_index=True, return_inverse=True)[
        1:
    ]


def score_ranks(ranks: np.ndarray, n_boot: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Ranks (Q,) -> rows of metric, value, n, low, high: P@1, hit@5, MRR and NDCG@10 in percent.

    low, high: 95 % interval of the bootstrap over queries (of no width where all queries score alike). Raises
    ValueError without queries.
    """
    # A resample of the queries is a multinomial draw of how often each distinct rank occurs: same law, less memory.
    distinct, counts = np.unique(np.asarray(ranks), return_counts=True)
    if not (n := int(counts.sum())):
        raise ValueError("no queries to score")
    top10 = np.where(
        distinct <= 10, 1 / np.log2(1 + distinct), 0
    )  # one right candidate, so the ideal DCG is 1
    values = 100 * np.stack([distinct == 1, distinct <= 5, 1 / distinct, top10])
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=n_boot)
    low, high = np.percentile(values @ draws.T / n, [2.5, 97.5], axis=1)
    columns = zip(METRICS, values @ counts / n, low, high, strict=True)
    return [
        {"metric": m, "value": float(v), "n": n, "low": float(lo), "high": float(hi)}
        for m, v, lo, hi in columns
    ]


def evaluate(
    embedder: Any,
    root: str,
    image_root: str | Path | None = None,
    *,
    tasks: Sequence[Task] = TASKS,
    n_queries: int | None = None,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    ties: str = "against",
    seed: int = 0,
    show_progress: bool = True,
    revision: str | None = None,
    duplicates: str = "error",
    **processes: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score an embedder: (results, per_query).

    results: task, meta_task, in_distribution, metric, value, n, low, high (percent), ties (queries whose answer ties
    with another candidate), n_candidates (the largest of a row), evaluator. per_query: task, query (row number), rank,
    n_candidates. Only MMEB's own 36 must have exactly as many candidates as their `Task` says.

    `image_root` is root/images unless given. `n_queries` draws that many rows a task by `seed`, which also seeds the
    intervals. `processes` goes to `encode_distinct`. Raises what load_eval, resolve_image and encode_distinct raise.
    """
    if image_root is None and not Path(root).is_dir():
        raise ValueError(
            f"{root}: no such folder; of a data set on the hub, give image_root: where its images lie here"
        )
    if n_queries is not None and n_queries < 1:
        raise ValueError(f"n_queries must be at least 1, found {n_queries}")
    image_root = Path(root) / "images" if image_root is None else Path(image_root)
    fingerprint = getattr(embedder, "fingerprint", "")
    if cache_dir is not None and not fingerprint:
        raise ValueError(
            "this embedder has no `fingerprint`, so stored embeddings of two models would mix; set one"
        )
    evaluator = f"cocoa_lib mmeb, ties {'against the answer' if ties == 'against' else 'as in the public argmax'}"
    encoding = {
        "cache_dir": cache_dir,
        "fingerprint": fingerprint,
        "batch_size": batch_size,
        **processes,
    }
    loaded = []  # memory-mapped; all are checked before anything is encoded
    for task in tasks:
        expected = (
            task.n_candidates if task in TASKS else None
        )  # other folders may be small builds of theirs
        loaded.append(
            load_eval(
                root, task.name, revision=revision, n_candidates=expected, duplicates=duplicates
            )
        )
    results, per_query = [], []
    for task, rows in zip(
        tqdm(tasks, desc="MMEB", unit="task", disable=not show_progress), loaded, strict=True
    ):
        chosen = np.arange(len(rows))
        if n_queries is not None and n_queries < len(rows):
            chosen = np.sort(
                np.random.default_rng(seed).choice(len(rows), n_queries, replace=False)
            )
        items, index, place = task_items(
            rows.select(chosen), f"{root}, {task.name}", chosen, image_root
        )
        try:
            vectors = encode_distinct(
                embedder, items, show_progress=show_progress, desc=task.name, **encoding
            )
        except ValueError as error:  # a damaged picture, found when it is opened
            if (at := getattr(error, "item", None)) is None:
                raise
            raise type(error)(f"{place(at)}: {re.sub(r'^item [0-9]+: ', '', str(error))}") from None
        found = rank(vectors[: len(chosen)], vectors[len(chosen) :], index, ties=ties)
        facts = {
            "task": task.name,
            "meta_task": task.meta_task,
            "in_distribution": task.in_distribution,
        }
        tail = {
            "ties": int((found["ties"] > 0).sum()),
            "n_candidates": int(found["n_candidates"].max()),
        }
        results += [
            {**facts, **score, **tail, "evaluator": evaluator}
            for score in score_ranks(found["rank"].to_numpy(), seed=seed)
        ]
        per_query.append(
            found.assign(task=task.name, query=chosen)[["task", "query", "rank", "n_candidates"]]
        )
    return pd.DataFrame(results), pd.concat(per_query, ignore_index=True)


def task_items(
    rows: datasets.Dataset, where: str, numbers: np.ndarray, image_root: Path
) -> tuple[list[dict[str, Any]], list[np.ndarray], Callable[[int], str]]:
    """Queries, then the distinct candidates, as items; each row's candidates by number, a repeated one once; and the
    place of an item in the files, in words."""
    table = rows.with_format("arrow")[:]
    queries = list(
        zip(
            *(_strings(table, name).to_pylist() for name in ("qry_text", "qry_img_path")),
            strict=True,
        )
    )
    lengths, texts, images = _flat_candidates(table, where)
    codes, candidates = _codes(texts, images)
    ends, items = np.cumsum(lengths), []

    def place(i: int) -> str:
        at = np.flatnonzero(codes == i - len(queries))[
            :1
        ]  # first place of a candidate; none for a query
        row = np.searchsorted(ends, at[0], side="right") if at.size else i
        return (
            f"{where}, row {numbers[row]}, column {'tgt_img_path' if at.size else 'qry_img_path'}"
        )

    for i, (text, rel) in enumerate([*queries, *candidates]):
        try:
            items.append({"text": text, "image": resolve_image(image_root, rel) if rel else None})
        except (ValueError, OSError) as error:
            raise type(error)(f"{place(i)}: {error}") from None
    return items, [pd.unique(part) for part in np.split(codes, ends[:-1])], place


def average_intervals(
    per_query: pd.DataFrame, tasks: Sequence[Task] = TASKS, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """P@1 of each of MMEB's averages with its interval: average, value, low, high (percent), n_tasks, n (queries).

    low, high: 95 % interval of the bootstrap over the queries within each task; the tasks are fixed and weigh the same,
    however many queries they have. An average over no task is nan. Raises ValueError for an unknown task.
    """
    hits = {str(name): part["rank"].to_numpy() == 1 for name, part in per_query.groupby("task")}
    if unknown := sorted(set(hits) - {task.name for task in tasks}):
        raise ValueError(
            f"unknown task(s) {', '.join(unknown)}; known: {', '.join(task.name for task in tasks)}"
        )
    rng, present = np.random.default_rng(seed), [task for task in tasks if task.name in hits]
    # A resample of n queries of which a share p are hits has Binomial(n, p) hits.
    boots = {
        task.name: rng.binomial(len(hits[task.name]), hits[task.name].mean(), n_boot)
        / len(hits[task.name])
        for task in present
    }
    rows = []
    for name, group in groups(present).items():
        value, low, high = (float("nan"),) * 3
        if group:
            value = 100 * float(np.mean([hits[task].mean() for task in group]))
            low, high = np.percentile(
                100 * np.mean([boots[task] for task in group], axis=0), [2.5, 97.5]
            )
        n = sum(len(hits[task]) for task in group)
        rows.append(
            {
                "average": name,
                "value": value,
                "low": low,
                "high": high,
                "n_tasks": len(group),
                "n": n,
            }
        )
    return pd.DataFrame(rows)


def write_results(
    results: pd.DataFrame, per_query: pd.DataFrame, out_dir: str | Path, provenance: dict
) -> None:
    """provenance.json (with the evaluator's name), per_query.parquet, averages.csv (`average_intervals`), and last
    results.csv: where it is, all are."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.csv").unlink(
        missing_ok=True
    )  # of an earlier evaluation: or it would stand beside the new ranks
    facts = json.dumps(
        {"evaluator": results["evaluator"].iloc[0], **provenance}, indent=2, default=str
    )
    write_whole(out / "provenance.json", lambda aside: aside.write_text(facts, encoding="utf-8"))
    write_whole(out / "per_query.parquet", lambda aside: per_query.to_parquet(aside, index=False))
    columns = ["task", "meta_task", "in_distribution", "n_candidates"]
    tasks = [Task(*row) for row in results.drop_duplicates("task")[columns].itertuples(index=False)]
    table = average_intervals(per_query, tasks)
    write_whole(out / "averages.csv", lambda aside: table.to_csv(aside, index=False))
    write_whole(out / "results.csv", lambda aside: results.to_csv(aside, index=False))
