"""Write the benchmark in MMEB's own file layout, and read it back.

    ROOT/eval/<Task>/test-*.parquet            test queries, read once
    ROOT/dev/<Task>/test-*.parquet             development queries: other scenes, other unseen
    concepts ROOT/train/<Subset>/original-*.parquet     contrastive pairs; the first n // 8 rows of
    each are the pair set of n ROOT/corpus/{train,heldout}.parquet        captions and questions
    ROOT/images/...  ROOT/scenes.jsonl  ROOT/manifest.json  ROOT/README.md

Item i of a stream depends on (seed, stream, i) alone, whatever the workers: a smaller build is a
prefix of a larger one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.utils.parallel import Parallel, delayed

from ..data.tables import CORPUS, EVAL, TRAIN, Task, read_finished, write_tables
from ..store.files import write_json
from .lessons import known_concepts
from .pictures import ATTRIBUTION, describe_versions
from .questions import answer, list_questions, name_kind
from .scenes import STYLES, Scene, crop, list_names, render, sample_scene
from .tasks import MAKERS, SUBSETS, TASKS, Side, Source, list_labels
from .words import with_article

GENERATOR_VERSION = 3  # raise it whenever the same arguments would give other rows or pixels
QUESTIONS_A_SCENE = 3
CROPS = 0.3  # share of the corpus' pictures that show one drawing close up, as grounding's candidates do
LEAST = {"seed": 0, "n_pairs": len(SUBSETS), "n_queries": 2, "n_corpus": 1}
FEW = 2048  # items: of more, all cores make them
# Place in this list is the stream's number for the random generator: append, never reorder.
STREAMS = (
    *(f"train/{name}" for name in SUBSETS),
    *(f"{part}/{task.name}" for part in ("eval", "dev") for task in TASKS),
    "corpus/train",
    "corpus/heldout",
)
SPLITS = {"train": "train", "eval": "test", "dev": "dev"}


class Pictures:
    """Write the pictures of one item, each once; keep its scenes and its digest."""

    def __init__(self, root: Path, stream: str, index: int) -> None:
        self.root, self.stem = root, f"{stream}/{index // 1000:03d}/{index % 1000:03d}"
        (root / "images" / self.stem).parent.mkdir(parents=True, exist_ok=True)
        self.paths: dict[tuple, str] = {}
        self.scenes: list[dict[str, Any]] = []
        self.digest = hashlib.sha256()

    def write(self, side: Side, suffix: str) -> str:
        """The picture's path relative to ROOT/images; "" for a side without one."""
        if side.scene is None:
            return ""
        if (side.scene, side.focus) not in self.paths:
            pixels = render(side.scene)
            pixels = crop(pixels, side.focus) if side.focus else pixels
            shown = Scene((side.focus,), side.scene.background) if side.focus else side.scene
            path = self.paths[side.scene, side.focus] = f"{self.stem}_{suffix}.png"
            Image.fromarray(pixels).save(self.root / "images" / path, compress_level=1)
            self.digest.update(pixels.tobytes())
            self.scenes.append({"image": path, "crop": bool(side.focus), "scene": shown.to_json()})
        return self.paths[side.scene, side.focus]


Made = tuple[Any, list[dict], bytes]  # an item's row, the scenes of its pictures, its digest


def make_item(root: Path, seed: int, stream: str, index: int) -> Made:
    """Make item `index` of a stream.

    Its row is a query or pair {text, path, accepted, sides}, or the lines of one scene of
    the corpus.
    """
    part, name = stream.split("/")
    rng = np.random.default_rng([seed, STREAMS.index(stream), index])
    pictures = Pictures(root, stream, index)
    row = (
        make_corpus_lines(rng, name, pictures)
        if part == "corpus"
        else make_row(rng, part, name, index, pictures)
    )
    pictures.digest.update(json.dumps(row).encode())
    return row, pictures.scenes, pictures.digest.digest()


def make_row(
    rng: np.random.Generator, part: str, name: str, index: int, pictures: Pictures
) -> dict[str, Any]:
    """A query with its right candidate and hard negatives; a training pair has one of these."""
    place = index * len(SUBSETS) + SUBSETS.index(name) if part == "train" else 10**8
    query, right, wrong = MAKERS[name](Source.open(rng, SPLITS[part], place))
    if part == "train":
        wrong = [wrong[int(rng.integers(len(wrong)))]]
    return {
        "text": query.text,
        "path": pictures.write(query, "query"),
        "accepted": sorted(answer(query.text, query.scene)),
        "sides": [
            (side.text, pictures.write(side, f"target{i}"), sorted(side.truths))
            for i, side in enumerate([right, *wrong])
        ],
    }


def make_corpus_lines(
    rng: np.random.Generator, name: str, pictures: Pictures
) -> list[tuple[str, str, str, str]]:
    """A caption and some questions, in the columns of the corpus; of a scene, or one of its drawings."""
    scene = sample_scene(rng, "train" if name == "train" else "dev", known_concepts())
    if rng.random() < CROPS:
        one = scene.drawings[int(rng.integers(len(scene)))]
        path, shown = pictures.write(Side("", scene, one), "crop"), Scene((one,))
        captions = [one.name, one.phrase, with_article(one.phrase)]
        texts = ["What is in the picture?", "What kind of thing is in the picture?"]
    else:
        path, shown = pictures.write(Side("", scene), "scene"), scene
        captions = [style(scene) for style in (*STYLES, list_names)]
        texts = list_questions(scene)
    caption = captions[int(rng.integers(len(captions)))]
    chosen = [texts[i] for i in rng.permutation(len(texts))[:QUESTIONS_A_SCENE]]
    return [(path, "caption", "", caption)] + [
        (path, "qa", text, min(answer(text, shown))) for text in chosen
    ]


def make_queries(task: Task, rows: list[dict], seed: int) -> pd.DataFrame:
    """Lay out one task: candidates are the right one, its hard negatives, then others not right."""
    labels = list_labels().get(task.name)
    others = [(label, "", [label]) for label in labels or ()] or [
        tuple(side) for row in rows for side in row["sides"]
    ]
    pool = list({side[:2]: side for side in others}.values())
    rng = np.random.default_rng([seed, len(STREAMS), TASKS.index(task)])
    size = count_candidates(task, len(rows))
    table = []
    for row in rows:
        chosen, accepted = (
            dict.fromkeys(tuple(side[:2]) for side in row["sides"]),
            set(row["accepted"]),
        )
        for i in rng.permutation(len(pool)):
            if len(chosen) >= size:
                break
            if accepted.isdisjoint(pool[i][2]):
                chosen.setdefault(pool[i][:2])
        table.append((row["text"], row["path"], *map(list, zip(*chosen, strict=True))))
    return pd.DataFrame(table, columns=EVAL)


def count_candidates(task: Task, n_queries: int) -> int:
    """Count the candidates of a query; pools of pictures and captions are as large as n_queries."""
    return task.n_candidates if task.name in list_labels() else min(task.n_candidates, n_queries)


def make_tables(rows: dict[str, list], seed: int) -> dict[str, pd.DataFrame]:
    """File name below ROOT -> table."""
    tables = {}
    for name in SUBSETS:
        pairs = [
            (row["text"], row["path"], *right[:2], *wrong[:2])
            for row in rows[f"train/{name}"]
            for right, wrong in [row["sides"]]
        ]
        tables[f"train/{name}/original-00000-of-00001"] = pd.DataFrame(pairs, columns=TRAIN)
    for part in ("eval", "dev"):
        for task in TASKS:
            tables[f"{part}/{task.name}/test-00000-of-00001"] = make_queries(
                task, rows[f"{part}/{task.name}"], seed
            )
    for split in ("train", "heldout"):
        lines = [line for scene in rows[f"corpus/{split}"] for line in scene]
        tables[f"corpus/{split}"] = pd.DataFrame(lines, columns=CORPUS)
    return tables


def label_scene(scene: Scene) -> dict[str, str]:
    """What a picture of the corpus shows, for `evaluate.probe`: how many, and the first drawing."""
    first = scene.drawings[0]
    return {
        "count": str(len(scene)),
        "kind": name_kind(first.name),
        "size": first.size,
        "position": first.position,
    }


def make_labels(root: Path) -> pd.DataFrame:
    """The labels of all whole scenes of the corpus."""
    found = [
        {"image_path": path, **label_scene(side.scene)}
        for path, side in read_scenes(root).items()
        if path.startswith("corpus/") and not side.focus  # a crop has no places
    ]
    return pd.DataFrame(found)


def count_rows(n_pairs: int, n_queries: int, n_corpus: int) -> dict[str, int]:
    """Stream -> number of its items; pairs are dealt out to the subsets in turn."""
    lengths = {
        f"train/{name}": (n_pairs + len(SUBSETS) - 1 - k) // len(SUBSETS)
        for k, name in enumerate(SUBSETS)
    }
    lengths |= {stream: n_queries for stream in STREAMS if stream.startswith(("eval/", "dev/"))}
    return lengths | {"corpus/train": n_corpus, "corpus/heldout": max(50, n_corpus // 20)}


def make_items(root: Path, seed: int, items: list[tuple[str, int]]) -> Iterable[Made]:
    """All items in order; many are made by all cores."""
    workers = Parallel(n_jobs=-1 if len(items) > FEW else 1, return_as="generator", batch_size=64)
    return workers(delayed(make_item)(root, seed, *item) for item in items)


def write_items(root: Path, seed: int, lengths: dict[str, int]) -> tuple[dict[str, list], Any, int]:
    """Write all pictures and scenes.jsonl; returns (stream -> rows, sha256 so far, pictures)."""
    items = [(stream, index) for stream, length in lengths.items() for index in range(length)]
    rows: dict[str, list] = {stream: [] for stream in lengths}
    content, n_images = hashlib.sha256(), 0
    with (root / "scenes.jsonl").open("w", encoding="utf-8") as file:
        made = make_items(root, seed, items)
        for (stream, _), (row, scenes, digest) in zip(items, made, strict=True):
            rows[stream].append(row)
            file.writelines(json.dumps(scene) + "\n" for scene in scenes)
            content.update(digest)
            n_images += len(scenes)
    return rows, content, n_images


def build(
    root: Path, *, seed: int = 0, n_pairs: int, n_queries: int, n_corpus: int
) -> dict[str, Any]:
    """Write the benchmark into `root`, or find it there finished; returns its manifest.

    n_pairs: training pairs in all, at least 8; n_queries: a task, for test and for development
    each; n_corpus: scenes with captions and questions. Raises ValueError for a number out of range
    and where `root` holds something else.
    """
    root = Path(root)
    settings = {"seed": seed, "n_pairs": n_pairs, "n_queries": n_queries, "n_corpus": n_corpus}
    for name, least in LEAST.items():
        if settings[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {settings[name]}")
    version = {"generator": "drawings", "generator_version": GENERATOR_VERSION}
    wanted = {**version, "settings": settings}
    if (found := read_finished(root, wanted)) is not None:
        return found
    (root / "images").mkdir(parents=True)
    (root / "README.md").write_text(f"# The built-in benchmark\n\n{ATTRIBUTION}\n", "utf-8")
    lengths = count_rows(n_pairs, n_queries, n_corpus)
    rows, content, n_images = write_items(root, seed, lengths)
    tables = make_tables(rows, seed) | {"corpus/labels": make_labels(root)}
    write_tables(root, tables)
    for name, table in tables.items():
        content.update(json.dumps([name, table.values.tolist()]).encode())
    sizes = {task: count_candidates(task, n_queries) for task in TASKS}
    manifest = {
        **wanted,
        "n_images": n_images,
        "rows": lengths,
        "tasks": [[t.name, t.meta_task, t.in_distribution, n] for t, n in sizes.items()],
        "subsets": list(SUBSETS),
        "content_hash": content.hexdigest(),
        "versions": describe_versions(),
    }
    write_json(root / "manifest.json", manifest)
    return manifest


# ---- reading ------------------------------------------------------------------------------------


def read_scenes(root: Path) -> dict[str, Side]:
    """Image path -> its scene, and for a grounding crop the one drawing that it is about."""
    sides = {}
    with (Path(root) / "scenes.jsonl").open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            scene = Scene.from_json(line["scene"])
            sides[line["image"]] = Side("", scene, scene.drawings[0] if line["crop"] else None)
    return sides


def oracle(row: dict[str, Any], scenes: dict[str, Side]) -> int:
    """Find the candidate that the question and the scenes make right, wherever it stands.

    Returns its index. Raises ValueError unless exactly one is.
    """
    asked = scenes.get(row["qry_img_path"])
    accepted = answer(row["qry_text"], asked.scene if asked else None)
    candidates = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
    right = [
        i
        for i, (text, path) in enumerate(candidates)
        if accepted & (Side(text) if text else scenes[path]).truths
    ]
    if len(right) != 1:
        raise ValueError(f"{len(right)} candidates answer {row['qry_text']!r}")
    return right[0]
