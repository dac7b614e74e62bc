"""What the notebooks show of a model and of a data folder, whatever these are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from sklearn.decomposition import PCA
from transformers import PreTrainedModel

from ..backbone import open_backbone
from ..data import corpus
from ..data.tables import META_TASKS, Task, load_eval
from ..embedder import CocoaEmbedder, EosEmbedding
from ..evaluate import evaluate, score_tasks
from ..evaluate.floor import pixel_bow_embed
from ..evaluate.probe import probe
from ..inputs import Inputs
from ..recipes import PRESETS, Recipe, Stage1Recipe
from ..store.checkpoint import META, load_inputs, read_meta
from .panel import wrap
from .retrieval import Item, card, read_task, words_of


def open_causal(source: str | Path) -> tuple[PreTrainedModel, Inputs]:
    """Open a generative checkpoint and its processor: a folder or hub name, pictures of 256 tokens at most."""
    known = (Path(source) / META).is_file()
    inputs = load_inputs(source, read_meta(source)) if known else Inputs.load(source)
    inputs.limit_images(256)
    return open_backbone(source, bidirectional=False), inputs


def open_embedder(source: str | Path) -> CocoaEmbedder:
    """Open a checkpoint of any stage, or a generative model before any, as an embedder."""
    if (Path(source) / META).is_file():
        return CocoaEmbedder.load(source)
    model, inputs = open_causal(source)
    return CocoaEmbedder(EosEmbedding(model, inputs))


def score_floors(data: Path, tasks: Sequence[Task]) -> pd.DataFrame:
    """Score two floors, chance and pixels with words: columns task, label, value, low, high."""
    floor = SimpleNamespace(encode=lambda items, **_: pixel_bow_embed(items))
    found = evaluate(floor, data, tasks=tasks, n_queries=100, show_progress=False)
    scores = score_tasks(found)
    return add_chance(scores[scores["metric"] == "p@1"], "pixels and words")


def list_examples(data: Path, task: Task, n: int = 1) -> Iterator[tuple[Item, list[Item]]]:
    """Read the first `n` queries of a task: (query, candidates), the right one first."""
    queries, items, index = read_task(data, task, n)
    for query, chosen in zip(queries, index, strict=True):
        yield query, [items[i] for i in chosen]


def tabulate_tasks(data: Path, tasks: Sequence[Task]) -> pd.DataFrame:
    """Tabulate tasks: name, meta-task, distribution, queries, candidates, the first query, its answer."""
    rows = {}
    for task in tasks:
        query, candidates = next(list_examples(data, task))
        said = [
            ("a picture, " * bool(item["image"]) + words_of(item, 60)).strip(", ")
            for item in (query, candidates[0])
        ]
        known, n = "in" if task.in_distribution else "out of", len(load_eval(data, task.name))
        rows[task.name] = [task.meta_task, known, n, len(candidates), *said]
    names = ["meta-task", "distribution", "queries", "candidates", "first query", "its answer"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names).rename_axis("task")


def list_pairs(data: Path, n: int = 6) -> list[tuple[Item, Item]]:
    """Read the first training pair of up to `n` subsets: (query, target)."""
    rows, _ = corpus.pairs(data, max_per_subset=1)
    return [(row["anchor"], row["positive"]) for row in rows.select(range(min(n, len(rows))))]


def list_restorable(data: Path, n: int) -> list[dict[str, Any]]:
    """Read up to `n` pictures with a text to restore: {text, image, target}.

    Held-out captions where the data have a corpus, else training pairs, which the model has seen.
    """
    return corpus.captions(data, _find_split(data))[:n]


def list_questions(data: Path, n: int) -> list[dict[str, Any]]:
    """Read up to `n` questions on pictures: {text, image, target}; texts to restore where are none."""
    split = _find_split(data)
    asked = corpus.questions(data, split)[:n] if split == "heldout" else []
    return asked or list_restorable(data, n)


def _find_split(data: Path) -> str:
    return "heldout" if (data / "corpus" / "heldout.parquet").is_file() else "train"


def show_source(*things: Any) -> Markdown:
    """Show the source of functions as it stands in the library."""
    return Markdown("```python\n" + "\n".join(map(inspect.getsource, things)) + "```")


def compare_presets(recipe: Stage1Recipe) -> pd.DataFrame:
    """Tabulate what stage 1 hides and weighs: this run's recipe (`here`) beside the sources' presets."""
    here = {name: getattr(recipe, name) for name in next(iter(PRESETS.values()))}
    return pd.DataFrame({"here": here, **PRESETS})


def answers_html(rows: Sequence[Item], answers: Sequence[str]) -> str:
    """Show questions with a model's answers, each with a tick or a cross and what was expected."""
    cards = []
    for row, said in zip(rows, answers, strict=False):
        right = said == row["target"]
        title = f"{escape(said[:60])} " + ("&#10003;" if right else "&#10007;")
        expected = "" if right else f" (expected: {row['target'][:60]})"
        cards.append(card({**row, "text": f"{row['text']}{expected}"}, title))
    return wrap("".join(cards))


def probe_stages(folders: Mapping[str, str | Path], data: Path) -> pd.DataFrame:
    """Probe several checkpoints on the built-in world: columns task, label, value, low, high, n."""
    found = {label: probe(open_embedder(folder), data) for label, folder in folders.items()}
    table = pd.concat(found, names=["label"]).reset_index("label").dropna(subset="low")
    table = table.rename(columns={"measure": "task"})
    always = table[table["label"] == [*folders][-1]].drop(columns=["low", "high"])
    return pd.concat([table, always.assign(value=always["majority"], label="always the same")])


def list_queries(data: Path, tasks: Sequence[Task], n: int) -> tuple[list[Item], list[str]]:
    """Read `n` queries a task: (items, the meta-task of each)."""
    found = [(q, task.meta_task) for task in tasks for q, _ in list_examples(data, task, n)]
    return [query for query, _ in found], [kind for _, kind in found]


def project(vectors: np.ndarray) -> np.ndarray:
    """Project vectors (N, H) on their two main axes: (N, 2)."""
    return PCA(2, random_state=0).fit_transform(vectors)


def add_chance(first: pd.DataFrame, label: str) -> pd.DataFrame:
    """Add chance to P@1 by task (`score_tasks`), for `draw_scores`: task, label, value, low, high."""
    chance = first.drop(columns=["low", "high"])
    chance = chance.assign(label="chance", value=100 / first["n_candidates"])
    return pd.concat([first.assign(label=label), chance])


def add_published(means: pd.DataFrame, published: pd.DataFrame, label: str) -> pd.DataFrame:
    """Add published averages to a run's own (`score_averages` by average), for `draw_scores`."""
    names = [name for name in (*META_TASKS, "overall") if name in means.index]
    theirs = published.melt(id_vars="model", value_vars=names, var_name="task")
    mine = means.loc[names].rename_axis("task").reset_index().assign(label=label)
    return pd.concat([mine, theirs.rename(columns={"model": "label"})])


def describe_training(recipe: Recipe, seed: int) -> str:
    """Say for a caption how long a stage trained."""
    return (
        f"{recipe.steps} steps of {recipe.batch_size} rows, rate {recipe.learning_rate:g}, seed {seed}. "
        "Faint: log entries; solid: their mean over 5."
    )
