"""What the notebooks show of a model and of a data folder, whatever these are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown
from transformers import PreTrainedModel

from ..backbone import open_backbone
from ..data import corpus
from ..data.tables import Task, load_eval, row_items
from ..inputs import Inputs
from ..store.checkpoint import META, load_inputs, read_meta
from .retrieval import Item, words_of


def open_causal(source: str | Path) -> tuple[PreTrainedModel, Inputs]:
    """Open a generative checkpoint and its processor: a folder or hub name, pictures of 256 tokens at most."""
    known = (Path(source) / META).is_file()
    inputs = load_inputs(source, read_meta(source)) if known else Inputs.load(source)
    inputs.limit_images(256)
    return open_backbone(source, bidirectional=False), inputs


def list_examples(data: Path, task: Task, n: int = 1) -> Iterator[tuple[Item, list[Item]]]:
    """Read the first `n` queries of a task: (query, candidates), the right one first."""
    rows = load_eval(str(data), task.name)
    return (row_items(rows[i], data / "images") for i in range(min(n, len(rows))))


def tabulate_tasks(data: Path, tasks: Sequence[Task]) -> pd.DataFrame:
    """Tabulate tasks: name, meta-task, distribution, queries, candidates, the first query, its answer."""
    rows = []
    for task in tasks:
        query, candidates = next(list_examples(data, task))
        said = [
            "a picture, " * bool(item["image"]) + words_of(item, 60)
            for item in (query, candidates[0])
        ]
        rows.append({
            "task": task.name, "meta-task": task.meta_task,
            "distribution": "in" if task.in_distribution else "out of",
            "queries": len(load_eval(str(data), task.name)), "candidates": len(candidates),
            "first query": said[0].strip(", "), "its answer": said[1].strip(", "),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("task")


def list_pairs(data: Path, n: int = 6) -> list[tuple[Item, Item]]:
    """Read the first training pair of up to `n` subsets: (query, target)."""
    rows, _ = corpus.pairs(data, max_per_subset=1)
    return [(row["anchor"], row["positive"]) for row in rows.select(range(min(n, len(rows))))]


def list_restorable(data: Path, n: int) -> list[dict[str, Any]]:
    """Read up to `n` pictures with a text to restore: {text, image, target}.

    Held-out captions where the data have a corpus, else training pairs, which the model has seen.
    """
    if (data / "corpus" / "heldout.parquet").is_file():
        return list(corpus.captions(data, "heldout")[:n])
    rows = chain.from_iterable(corpus.text_pairs(data).values())
    return list(islice((row for row in rows if row["image"]), n))


def list_questions(data: Path, n: int) -> list[dict[str, Any]]:
    """Read up to `n` questions on pictures: {text, image, target}; of the tasks where there is no corpus."""
    if (data / "corpus" / "heldout.parquet").is_file():
        found = list(corpus.questions(data, "heldout")[:n])
        return found or list(corpus.captions(data, "heldout")[:n])
    rows = chain.from_iterable(corpus.text_pairs(data).values())
    return list(islice((row for row in rows if row["image"] and row["text"]), n))


def show_source(*things: Any) -> Markdown:
    """Show the source of functions as it stands in the library."""
    return Markdown("```python\n" + "\n".join(map(inspect.getsource, things)) + "```")
