"""Small files in MMEB's layout, and embedders whose scores are known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from cocoa_lib.data.tables import Task, write_tables
from cocoa_lib.evaluate import TASKS
from cocoa_lib.evaluate.encode import hash_item
from cocoa_lib.evaluate.score import RANKS

N_QUERIES, DIM = 40, 32
SMALL = tuple(replace(task, n_candidates=min(task.n_candidates, 8)) for task in TASKS)
ONE = Task("DocVQA", "vqa", True, 3)


class Embedder:
    """Vectors from a function of (text, image path or None); stops after `limit` calls."""

    def __init__(self, vector, fingerprint="a", limit=10**9):
        self.vector, self.fingerprint, self.limit = vector, fingerprint, limit
        self.calls, self.seen = 0, []

    def encode(self, items, batch_size, show_progress):
        if self.calls >= self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        self.seen += [(item["text"], item["image"] and item["image"].name) for item in items]
        vectors = np.stack([self.vector(item["text"], item["image"]) for item in items])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_vector(text, image):
    return np.random.default_rng(list(hash_item({"text": text, "image": image}))).normal(size=DIM)


def oracle_vector(text, image):
    """By the number in the text: query 7 and its answer 7 get the same vector."""
    return np.random.default_rng(int(re.findall(r"\d+", text)[-1])).normal(size=DIM)


def write_task(root: Path, task: str, rows, file="test-00000-of-00001.parquet", part="eval"):
    write_tables(root, {f"{part}/{task}/{Path(file).stem}": pd.DataFrame(rows)})
    return root / part / task / file


def make_rows(task: Task, n: int = N_QUERIES) -> list[dict]:
    """Query i is answered by candidate i; the others are other numbers, drawn for each row."""
    rng, rows = np.random.default_rng(len(task.name)), []
    for i in range(n):
        wrong = rng.choice([j for j in range(n) if j != i], task.n_candidates - 1, replace=False)
        texts = [f"{task.name} answer {j}" for j in (i, *wrong)]
        row = {"qry_text": f"{task.name} query {i}", "qry_img_path": ""}
        rows.append({**row, "tgt_text": texts, "tgt_img_path": [""] * len(texts)})
    return rows


def edit(rows: list[dict], row: int, **fields) -> list[dict]:
    return [{**r, **fields} if i == row else r for i, r in enumerate(rows)]


def make_ranks(ranks: dict[str, list[int]], tasks=TASKS) -> pd.DataFrame:
    """Ranks by task, as `evaluate` gives them."""
    known = {task.name: task for task in tasks}
    parts = []
    for name, r in ranks.items():
        part = pd.DataFrame({"query": range(len(r)), "rank": r}).assign(**vars(known[name]))
        parts.append(part.assign(task=name, n_candidates=9, ties=0)[RANKS])
    return pd.concat(parts, ignore_index=True)
