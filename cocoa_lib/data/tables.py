"""MMEB's tables: columns, rows read and checked, image paths that stay below the image folder.

DATA/{eval,dev}/<Task>/test-*.parquet, DATA/train/<Subset>/original-*.parquet, DATA/images/...
Image paths are relative to DATA/images; a leading `images/`, as MMEB-train writes, is dropped.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from ..items import InputError
from ..store.files import file_hash, files_hash, read_json

META_TASKS = ("classification", "vqa", "retrieval", "grounding")
# Columns of a data folder's files: evaluation, training pairs, corpus.
EVAL = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
TRAIN = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
CORPUS = ["image_path", "kind", "question", "answer"]


@dataclass(frozen=True)
class Task:
    name: str  # MMEB-eval's own subset name
    meta_task: str  # one of META_TASKS
    in_distribution: bool  # has a subset in MMEB-train
    n_candidates: int  # a query, the right one among them


def load_eval(
    root: str | Path, task: str, *, n_candidates: int | None = None, part: str = "eval"
) -> Dataset:
    """Load the rows of one task, <Task>/test-*.parquet in ROOT or ROOT/PART: the columns EVAL.

    The two lists of a row are of equal length, the right candidate first. Raises FileNotFoundError
    for a task that is not there, and ValueError naming the file for a missing column or a wrong
    type, and the row for lists of different lengths or of another number than `n_candidates`.
    """
    pattern = find_part(root, part) / task / "test-*.parquet"
    rows = read_parquet(pattern, EVAL)
    table = rows.with_format("arrow")[:]
    texts, images = (pc.fill_null(pc.list_value_length(table[name]), 0) for name in EVAL[2:])
    texts, images = texts.to_numpy(), images.to_numpy()
    wrong = (texts != images) | (texts == 0) | (texts != (n_candidates or texts))
    for row in np.flatnonzero(wrong)[:1]:
        raise ValueError(
            f"{pattern}, row {row}: {texts[row]} texts and {images[row]} pictures of candidates, "
            f"expected {n_candidates or 'as many, at least 1'}"
        )
    return rows


def load_train(
    root: str | Path, subset: str, *, n: int | None = None, negatives: bool = False
) -> Dataset:
    """Load the first `n` rows of a training subset: the columns TRAIN.

    Its files are <Subset>/original-*.parquet in ROOT or ROOT/train; the last two columns are read
    with `negatives` only. Raises what `read_parquet` raises.
    """
    pattern = find_part(root, "train") / subset / "original-*.parquet"
    rows = read_parquet(pattern, TRAIN if negatives else TRAIN[:4])
    return rows.select(range(min(len(rows), len(rows) if n is None else n)))


def find_part(root: str | Path, part: str) -> Path:
    """Name the folder of a part of the data: ROOT/PART, or ROOT itself where that is not there."""
    return folder if (folder := Path(root) / part).is_dir() else Path(root)


def read_parquet(pattern: Path, columns: Sequence[str]) -> Dataset:
    """Read these columns of local parquet files as one memory-mapped table of strings.

    Columns named tgt_ hold lists. `datasets` keeps the table in its cache. Raises FileNotFoundError,
    and ValueError naming the files if they are damaged, lack a column or hold no rows.
    """
    files = sorted(pattern.parent.glob(pattern.name))
    if not files:
        raise FileNotFoundError(f"{pattern}: no such file")
    # `datasets` takes paths for patterns, and knows a file again by path and time: a cache for each
    # content cannot give the rows of a file that was put in another's place.
    paths = [glob.escape(str(path.parent.resolve() / path.name)) for path in files]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "cocoa" / files_hash(files)[:16]
    text = Value("string")
    kinds = {name: List(text) if name.startswith("tgt_") else text for name in columns}
    try:
        # Not load_dataset: a README beside the files must have no say, and it asks the hub.
        rows = Dataset.from_parquet(
            paths, cache_dir=str(cache), columns=list(columns), features=Features(kinds)
        )
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{pattern}: not a table of these columns ({error.__cause__ or error})"
        ) from error
    if not len(rows):
        raise ValueError(f"{pattern}: no rows")
    return rows


@dataclass(frozen=True)
class EvalItems:
    """What is encoded for a task: queries, then distinct candidates, as {text, image path or None}."""

    items: list[dict[str, Any]]
    queries: np.ndarray  # (Q,) row number of each query
    candidates: list[np.ndarray]  # Q arrays of candidate numbers, the right one first, none twice
    where: str

    def place(self, i: int) -> str:
        """Say where item `i` stands in the task's file."""
        i, column = i - len(self.queries), "tgt_img_path"
        if i < 0:
            row, column = self.queries[i], "qry_img_path"
        else:
            row = self.queries[[i in own for own in self.candidates].index(True)]
        return f"{self.where}, row {row}, {column}"


def list_items(rows: Dataset, chosen: np.ndarray, where: str, image_root: Path) -> EvalItems:
    """List what is encoded for the `chosen` rows of a task.

    Candidates are the same if both text and image path are: the path alone would join WebQA's
    captions. Raises ValueError for a path that leaves `image_root`, and FileNotFoundError saying how
    many pictures are missing and where the first is named.
    """
    table = rows.select(chosen).with_format("arrow")[:].combine_chunks()
    flat = [pc.fill_null(pc.list_flatten(table[name]), "") for name in ("tgt_img_path", "tgt_text")]
    pairs = pc.binary_join_element_wise(*flat, "\0").combine_chunks().dictionary_encode()
    lengths = pc.list_value_length(table["tgt_text"]).to_numpy()
    own = np.split(pairs.indices.to_numpy(), np.cumsum(lengths)[:-1])
    named = zip(table["qry_img_path"].to_pylist(), table["qry_text"].to_pylist(), strict=True)
    named = [*named, *(pair.split("\0", 1) for pair in pairs.dictionary.to_pylist())]
    found = EvalItems([], chosen, [pd.unique(part) for part in own], where)
    missing = []
    for i, (rel, text) in enumerate(named):
        try:
            path = resolve_image(image_root, rel) if rel else None
        except ValueError as error:
            raise ValueError(f"{found.place(i)}: {error}") from None
        found.items.append({"text": text or "", "image": path})
        if path and not path.is_file():
            missing.append(i)
    if missing:
        first = found.items[missing[0]]["image"]
        raise FileNotFoundError(
            f"{len(missing)} pictures are not in {image_root}, first {first} "
            f"({found.place(missing[0])}); unpack the archive they belong to"
        )
    return found


def resolve_below(folder: Path, rel: str) -> Path:
    """Resolve a path below a folder; whether a file is there shows when it is read.

    Raises ValueError for a path that is absolute, has `..` or leaves the folder through a link.
    """
    plain = PureWindowsPath(rel)  # knows both separators and drive letters
    if plain.anchor or ".." in plain.parts or "\0" in rel:
        raise ValueError(f"path {rel!r} is not a plain path below {folder}")
    path = Path(folder) / rel
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"path {rel!r} is a link that leaves {folder}")
    return path


def resolve_image(image_root: Path, rel: str) -> Path:
    """Resolve a row's image path, without the `images/` that MMEB-train writes in front."""
    return resolve_below(image_root, rel.removeprefix("images/"))


def read_manifest(root: str | Path) -> dict[str, Any]:
    """Read a data folder's manifest.json. Raises ValueError if it is not a JSON object."""
    return read_json(
        Path(root) / "manifest.json", ValueError, "the data folder is damaged, make it again"
    )


def read_finished(root: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the manifest of a folder that holds what is `wanted`; None where nothing is.

    Raises ValueError where the folder holds other data or an unfinished build.
    """
    if (root / "manifest.json").is_file():
        found = read_manifest(root)
        held, asked = _flatten({name: found.get(name) for name in wanted}), _flatten(wanted)
        differ = [name for name in asked | held if asked.get(name) != held.get(name)]
        if differ:
            said = "; ".join(f"{name} {held.get(name)}, not {asked.get(name)}" for name in differ)
            raise ValueError(
                f"{root}: holds other data ({said:.500}); delete the folder or choose another one"
            )
        return found
    if root.exists() and any(root.iterdir()):
        raise ValueError(
            f"{root}: holds files but no manifest, an unfinished build; delete it and run again"
        )
    return None


def _flatten(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Put a manifest's `settings` among its facts, so that one that differs is named alone."""
    settings = facts.get("settings")
    return {**facts, "settings": None, **settings} if isinstance(settings, dict) else dict(facts)


def write_tables(root: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write each table as root/NAME.parquet."""
    for name, table in tables.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path, index=False)


def fingerprint(data: Path) -> str:
    """Say what the data are in one short string: the manifest's hash, or one over all tables."""
    if (data / "manifest.json").is_file():
        found = read_manifest(data).get("content_hash")
        if not isinstance(found, str) or not found:
            raise InputError(f"{data / 'manifest.json'}: no content_hash; make the folder again")
        return found
    files = sorted(data.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{data}: no parquet files; expected train/<Subset>/original-*.parquet"
        )
    listing = "".join(f"{path.relative_to(data)}:{file_hash(path)}" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()
