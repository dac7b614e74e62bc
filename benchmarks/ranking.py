"""Ranking at MMEB's size: 36 tasks x 1000 queries x 1000 candidates x 1536, against a query at a time; and memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from common import in_turn, peaks, record, save

from cocoa_lib.evaluate.score import rank

QUERIES = CANDIDATES = 1000
WIDTH, TASKS = 1536, 36


def task(seed: int, n_queries: int = QUERIES) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Queries and candidates of length 1, and each query's list: its own candidate first, then the others."""
    rng = np.random.default_rng(seed)
    candidates = rng.standard_normal((CANDIDATES, WIDTH), dtype=np.float32)
    queries = candidates[:n_queries] + 20 * rng.standard_normal((n_queries, WIDTH), dtype=np.float32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, candidates)]
    everything = np.arange(CANDIDATES)
    return *unit, [np.concatenate([[i], np.delete(everything, i)]) for i in range(n_queries)]


def one_by_one(queries: np.ndarray, candidates: np.ndarray, index: list[np.ndarray]) -> np.ndarray:
    """The public evaluators' way: for each query its own product with its own candidates."""
    ranks = []
    for query, own in zip(queries, index, strict=True):
        scores = candidates[own] @ query
        ranks.append(1 + int((scores[1:] >= scores[0]).sum()))
    return np.array(ranks)


def setup(tasks: int) -> Callable[[], None]:
    """Ranks `tasks` tasks one after the other, their embeddings made as they come."""
    data = task(0)
    rank(*task(1, 8))

    def step() -> None:
        for _ in range(tasks):
            rank(*data)

    return step


def main() -> None:
    data = task(0)
    ours, naive = rank(*data)["rank"].to_numpy(), one_by_one(*data)
    assert (ours == naive).all() and 1 < ours.mean() < 500, ours.mean()
    seconds = in_turn({"naive": lambda: one_by_one(*data), "ours": lambda: rank(*data), "all": setup(TASKS)}, warm=True)
    shape = f"{QUERIES} x {CANDIDATES} x {WIDTH}"
    whole = f"all {TASKS} tasks in {np.median(seconds['all']):.0f} s while measured"
    memory = peaks(setup, [(TASKS,), (1,)])
    inputs = [float(data[0].nbytes + data[1].nbytes + sum(own.nbytes for own in data[2]))] * len(memory[1,])
    records = [
        record("ranking, time", f"a query at a time / rank, {shape}; {whole}", seconds["naive"], seconds["ours"]),
        record("ranking, growth", f"time of {TASKS} tasks / of one", seconds["all"], seconds["ours"]),
        record("ranking, memory, tasks", f"peak of {TASKS} tasks / of one", memory[TASKS,], memory[1,]),
        record("ranking, memory", f"peak of a task above its inputs / its inputs, {shape}", memory[1,], inputs),
    ]
    save("ranking", records, "equal ranks, then time (n 5) and memory (n 5 processes)")


if __name__ == "__main__":
    main()
