"""A small, generated counterpart of MMEB in MMEB's own file layout: twelve tasks over pictures of coloured objects.

A scene is a list of one to four objects, each a plain dict: kind ("circle", ..., or a digit "0".."9"), color, size
("small" | "large"), position (a cell of a 3 x 3 grid, "top left"), offset ([dx, dy] from the cell's centre), for a
digit also `digit` (its index in scikit-learn's real handwritten digits) and, out of distribution only, `transform`
([name, amount]).

Fixed so that "unseen" means unseen: handwriting is split by index; scenes are split by a checksum of their caption;
HELD_OUT colour and shape combinations appear in one OOD task and nowhere else. `answer` reads a question and a scene
and knows nothing of the rows, so `oracle` shows that every question has exactly one right candidate.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.tables import CORPUS, EVAL, TRAIN, Task, read_finished, write_tables
from ..store.files import write_json
from .scenes import POSITIONS, Scene, caption, crop, render, sample_scene
from .tasks import LABELS, MAKERS, SUBSETS, TASKS, Side, _pick, _questions

GENERATOR_VERSION = 1  # raise it whenever the same arguments would give other rows or pixels
FEW = 4096  # items: of more, all cores make them
# Position in this list is the stream number of the random generator: append, never reorder.
STREAMS = tuple(f"train/{name}" for name in SUBSETS) + tuple(f"eval/{task.name}" for task in TASKS)


class _Pictures:
    """Writes the pictures of one item, each once, and keeps what scenes.jsonl and the content hash need."""

    def __init__(self, root: Path, stem: str) -> None:
        self.root, self.stem = root, stem
        self.paths: dict[tuple[int, int], str] = {}
        self.scenes: list[dict[str, Any]] = []
        self.digest = hashlib.sha256()

    def path(self, side: Side, suffix: str) -> str:
        """The picture's path relative to root/images; "" for a side without one."""
        if side.scene is None:
            return ""
        identity = (id(side.scene), id(side.focus))
        if identity not in self.paths:
            image = render(side.scene)
            image = crop(image, side.focus) if side.focus else image
            path = self.paths[identity] = f"{self.stem}_{suffix}.png"
            image.save(
                self.root / "images" / path, compress_level=1
            )  # the fastest; these are small anyway
            self.digest.update(f"{image.size}".encode() + image.tobytes())
            self.scenes.append({"image": path, "scene": [side.focus] if side.focus else side.scene})
        return self.paths[identity]


def _make(root: Path, seed: int, stream: str, index: int) -> tuple[Any, list[dict], bytes]:
    """Item `index` of a stream: its row, the scenes of its pictures, its digest.

    A row of pairs is (query text, path, [(text, path, key) of the right candidate and of the hard negatives]); a row
    of the corpus is the list of its lines.
    """
    part, name = stream.split("/")
    rng = np.random.default_rng([seed, STREAMS.index(stream), index])
    folder = f"{stream}/{index // 1000:03d}"  # a thousand items a folder
    (root / "images" / folder).mkdir(parents=True, exist_ok=True)
    pictures = _Pictures(root, f"{folder}/{index % 1000:03d}")
    if part == "corpus":
        scene = sample_scene(rng, "train" if name == "train" else "eval")
        path = pictures.path(Side("", scene), "scene")
        row = [(path, "caption", "", caption(scene))] + [
            (path, "qa", *pair) for pair in _questions(rng, scene)
        ]
    else:
        query, right, wrong = MAKERS[name](rng, part)
        wrong = [_pick(rng, wrong)] if part == "train" else wrong  # one hard negative a pair
        query_path = pictures.path(query, "query")
        row = (query.text, query_path, [
            (side.text, pictures.path(side, f"target{i}"), side.key) for i, side in enumerate([right, *wrong])
        ])  # fmt: skip
    pictures.digest.update(json.dumps(row).encode())
    return row, pictures.scenes, pictures.digest.digest()


def _eval_rows(task: Task, rows: list, seed: int) -> pd.DataFrame:
    """Rows of one task with their candidates: the right one, its hard negatives, then others that are not right."""
    labels = LABELS.get(task.name)
    pool = [(label, "", label) for label in labels or ()] or list(
        dict.fromkeys(c for row in rows for c in row[2])
    )
    size = task.n_candidates if labels else min(task.n_candidates, len(rows))
    rng = np.random.default_rng([seed, len(STREAMS), TASKS.index(task)])
    table = []
    for text, path, own in rows:
        chosen = dict.fromkeys(candidate[:2] for candidate in own)
        for i in rng.permutation(len(pool)):
            if len(chosen) >= size:
                break
            if pool[i][2] != own[0][2]:
                chosen.setdefault(pool[i][:2])
        table.append((text, path, *map(list, zip(*chosen, strict=True))))
    return pd.DataFrame(table, columns=EVAL)


def _write_tables(root: Path, rows: dict[str, list], seed: int) -> bytes:
    """All parquet files; returns a digest of their rows."""
    tables = {}
    for name in SUBSETS:
        pairs = [
            (text, path, *right[:2], *wrong[:2])
            for text, path, (right, wrong) in rows[f"train/{name}"]
        ]
        tables[f"train/{name}/original-00000-of-00001"] = pd.DataFrame(pairs, columns=TRAIN)
    for task in TASKS:
        tables[f"eval/{task.name}/test-00000-of-00001"] = _eval_rows(
            task, rows[f"eval/{task.name}"], seed
        )
    for split in ("train", "heldout"):
        lines = [line for scene in rows[f"corpus/{split}"] for line in scene]
        tables[f"corpus/{split}"] = pd.DataFrame(lines, columns=CORPUS)
    write_tables(root, tables)
    digest = hashlib.sha256()
    for name, table in tables.items():
        digest.update(json.dumps([name, table.values.tolist()]).encode())
    return digest.digest()


def label_scene(scene: Scene) -> dict[str, str]:
    """Label a scene: the number of objects, and what and where the first in reading order is."""
    first = min(scene, key=lambda obj: POSITIONS.index(obj["position"]))
    names = ("kind", "color", "size", "position")
    return {"count": str(len(scene)), **{name: str(first[name]) for name in names}}


def _write_labels(root: Path) -> None:
    """Write what the pictures of the corpus show, for `evaluate.probe`."""
    rows = [
        {"image_path": path, **label_scene(scene)}
        for path, scene in read_scenes(root).items()
        if path.startswith("corpus/")
    ]
    write_tables(root, {"corpus/labels": pd.DataFrame(rows)})


def _check_settings(settings: dict[str, int]) -> None:
    limits = {
        "seed": (0, 2**32),
        "n_pairs": (8, 10**7),
        "n_queries": (2, 10**5),
        "n_corpus": (1, 10**7),
    }
    for name, (low, high) in limits.items():
        if not low <= settings[name] <= high:
            raise ValueError(f"{name} must be in {low}..{high}, got {settings[name]}")
    if settings["n_pairs"] % len(SUBSETS):
        raise ValueError(
            f"n_pairs must be a multiple of {len(SUBSETS)}, one share a subset; got {settings['n_pairs']}"
        )


def build(
    root: Path, *, seed: int = 0, n_pairs: int, n_queries: int, n_corpus: int
) -> dict[str, Any]:
    """Write the benchmark into `root` and return its manifest; a finished build of the same settings is returned as is.

    n_pairs: training pairs in all, a multiple of 8; n_queries: a task; n_corpus: scenes of text for the backbone and
    for reconstruction. Item i depends on (seed, stream, i) alone: a smaller build is a prefix of a larger one.
    All cores make a large one. Raises ValueError for a bad argument and where `root` holds something else; nothing is
    ever overwritten.
    """
    root = Path(root)
    settings = {"seed": seed, "n_pairs": n_pairs, "n_queries": n_queries, "n_corpus": n_corpus}
    _check_settings(settings)
    wanted = {"generator": "world", "generator_version": GENERATOR_VERSION, "settings": settings}
    if (found := read_finished(root, wanted)) is not None:
        return found
    from sklearn.utils.parallel import (  # here: it takes a second, and a finished build needs none
        Parallel,
        delayed,
    )

    lengths = {f"train/{name}": n_pairs // len(SUBSETS) for name in SUBSETS}
    lengths |= {f"eval/{task.name}": n_queries for task in TASKS}
    lengths |= {"corpus/train": n_corpus, "corpus/heldout": max(50, n_corpus // 20)}
    (root / "images").mkdir(parents=True)
    rows: dict[str, list] = {stream: [] for stream in lengths}
    content, n_images = hashlib.sha256(), 0
    items = [(stream, index) for stream, length in lengths.items() for index in range(length)]
    in_order = Parallel(n_jobs=-1 if len(items) > FEW else 1, return_as="generator", batch_size=64)
    with (root / "scenes.jsonl").open("w", encoding="utf-8") as scenes:
        made = in_order(delayed(_make)(root, seed, *item) for item in items)
        for (stream, _), (row, lines, digest) in zip(items, made, strict=True):
            rows[stream].append(row)
            scenes.writelines(json.dumps(line) + "\n" for line in lines)
            content.update(digest)
            n_images += len(lines)
    content.update(_write_tables(root, rows, seed))
    _write_labels(root)
    # Candidates a row really has: pools of pictures and captions cannot be larger than the number of queries.
    pools = {
        t.name: t.n_candidates if t.name in LABELS else min(t.n_candidates, n_queries)
        for t in TASKS
    }
    manifest = {
        **wanted, "n_images": n_images, "rows": lengths,
        "tasks": [[t.name, t.meta_task, t.in_distribution, pools[t.name]] for t in TASKS],
        "subsets": list(SUBSETS), "content_hash": content.hexdigest(),
    }  # fmt: skip
    write_json(root / "manifest.json", manifest)
    return manifest


def read_scenes(root: Path) -> dict[str, Scene]:
    """Image path -> its scene; for a grounding crop, the one object it shows."""
    with (Path(root) / "scenes.jsonl").open(encoding="utf-8") as file:
        return {line["image"]: line["scene"] for line in map(json.loads, file)}


STREAMS += ("corpus/train", "corpus/heldout")
