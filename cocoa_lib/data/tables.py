"""MMEB's tables: columns, rows read and checked, image paths that stay below the image folder.

DATA/eval/<Task>/test-*.parquet, DATA/train/<Subset>/original-*.parquet, DATA/images/...
Image paths are relative to DATA/images; a leading `images/`, as MMEB-train writes, is dropped.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

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


def load_eval(root: str | Path, task: str, *, n_candidates: int | None = None) -> datasets.Dataset:
    """Load the rows of one task: the columns EVAL; the two lists are of equal length, right one first.

    `root` holds <Task>/test-*.parquet, itself or under eval/. Raises FileNotFoundError for a task
    that is not there, and ValueError naming file, row and column for a missing column, a wrong type,
    an item with neither text nor image, lists of different lengths, and a number of candidates other
    than `n_candidates`.
    """
    rows, where = _load(root, "eval", task, "test")
    check_columns(rows, where, texts=EVAL[:2], lists=EVAL[2:])
    table = rows.with_format("arrow")[:]
    _check_filled(table, where, *EVAL[:2])
    lengths, texts, images = _flatten_candidates(table, where)
    wanted = lengths if n_candidates is None else n_candidates
    expected = n_candidates or "at least 1"
    _check_rows(
        (lengths == 0) | (lengths != wanted),
        lambda row: f"{where}, row {row}, tgt_text: {lengths[row]} candidates, expected {expected}",
    )
    row_of = np.repeat(np.arange(len(rows)), lengths)
    _check_rows(
        _is_blank(texts) & _is_blank(images),
        lambda at: f"{where}, row {row_of[at]}, tgt_text: a candidate with neither text nor image",
    )
    return rows


def load_train(
    root: str | Path, subset: str, *, n: int | None = None, negatives: bool = False
) -> datasets.Dataset:
    """Load the first `n` rows of a training subset: the columns TRAIN, the last two with `negatives`.

    `root` holds <Subset>/original-*.parquet, itself or under train/. With `negatives` every row must
    have one. Raises FileNotFoundError, and ValueError naming file, row and column.
    """
    rows, where = _load(root, "train", subset, "original")
    rows = rows.select(range(min(len(rows), n))) if n is not None else rows
    columns = TRAIN if negatives else TRAIN[:4]
    check_columns(rows, where, texts=columns)
    for start, table in iterate_blocks(rows):
        for side in range(0, len(columns), 2):
            _check_filled(table, where, *columns[side : side + 2], start)
    return rows


def _load(root: str | Path, part: str, name: str, split: str) -> tuple[datasets.Dataset, str]:
    """Load one table: (rows, how messages call the file)."""
    folder = Path(root) / part if (Path(root) / part).is_dir() else Path(root)
    files = sorted((folder / name).glob(f"{split}-*.parquet"))
    where = str(files[0]) if len(files) == 1 else f"{folder / name}/{split}-*.parquet"
    if not files:
        found = sorted(path.name for path in folder.glob("[!.]*/")) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{where}: no such file; folders in {folder}: {', '.join(found) or 'none'}"
        )
    return read_parquet(files, where), where


def read_parquet(files: Sequence[Path], where: str) -> datasets.Dataset:
    """Read local parquet files as one memory-mapped table; `datasets` keeps it in its cache.

    Raises ValueError naming `where` if they are damaged or hold no rows.
    """
    # `datasets` takes paths for patterns, and knows a file again by path and time: a cache for each
    # content cannot give the rows of a file that was put in another's place.
    pattern = [glob.escape(str(path.parent.resolve() / path.name)) for path in files]
    cache = str(Path(datasets.config.HF_DATASETS_CACHE) / "cocoa" / files_hash(files)[:16])
    try:
        with hide_progress():
            # Not load_dataset: a README beside the files must have no say, and it asks the hub.
            rows = datasets.Dataset.from_parquet(pattern, cache_dir=cache)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{where}: empty, or not readable as parquet ({error.__cause__ or error})"
        ) from error
    if not len(rows):
        raise ValueError(f"{where}: no rows")
    text = datasets.Value("string")
    for name, kind in rows.features.items():  # a column of nothing but nulls has no type of its own
        if getattr(kind, "dtype", None) == "null":
            rows = rows.cast_column(name, text)
        elif getattr(getattr(kind, "feature", None), "dtype", None) == "null":
            rows = rows.cast_column(name, datasets.List(text))
    return rows


@contextmanager
def hide_progress() -> Iterator[None]:
    """Hide the progress bars of `datasets`: one a file, for milliseconds."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def iterate_blocks(rows: datasets.Dataset, size: int = 1 << 12) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number of the first row, table of `size` rows), to check a large file in little memory."""
    for start in range(0, len(rows), size):
        yield start, rows.with_format("arrow")[start : start + size]


def check_columns(
    rows: datasets.Dataset, where: str, texts: Sequence[str], lists: Sequence[str] = ()
) -> None:
    """Raise ValueError where a column is missing or does not hold strings, or lists of strings."""
    if missing := [name for name in (*texts, *lists) if name not in rows.column_names]:
        found = ", ".join(rows.column_names)
        raise ValueError(f"{where}: no column {', '.join(missing)}; found {found}")
    for name in (*texts, *lists):
        kind = rows.features[name]
        value = getattr(kind, "feature", None) if name in lists else kind
        if getattr(value, "dtype", None) not in ("string", "large_string"):
            wanted = "lists of strings" if name in lists else "strings"
            raise ValueError(f"{where}: column {name} must hold {wanted}, found {kind}")


def _check_rows(bad: np.ndarray, say: Callable[[int], str]) -> None:
    for row in np.flatnonzero(bad)[:1]:
        raise ValueError(say(row))


def _check_filled(table: pa.Table, where: str, text: str, image: str, start: int = 0) -> None:
    _check_rows(
        _is_blank(_read_strings(table, text)) & _is_blank(_read_strings(table, image)),
        lambda row: f"{where}, row {start + row}, {text}/{image}: neither text nor image",
    )


def _is_blank(values: pa.Array) -> np.ndarray:
    return pc.equal(pc.utf8_trim_whitespace(values), "").to_numpy(zero_copy_only=False)


def _read_strings(table: pa.Table, name: str) -> pa.Array:
    return pc.fill_null(table[name].combine_chunks(), "")


def _flatten_candidates(table: pa.Table, where: str) -> tuple[np.ndarray, pa.Array, pa.Array]:
    """Count the candidates of each row (Q,), and join the texts and image paths of all rows."""
    columns = [table[name].combine_chunks() for name in EVAL[2:]]
    texts, images = (pc.fill_null(pc.list_value_length(column), 0).to_numpy() for column in columns)
    _check_rows(
        texts != images,
        lambda row: (
            f"{where}, row {row}, tgt_text/tgt_img_path: "
            f"lists of {texts[row]} and {images[row]} entries"
        ),
    )
    return texts, *(pc.fill_null(pc.list_flatten(column), "") for column in columns)


@dataclass(frozen=True)
class EvalItems:
    """What is encoded for a task: queries, then distinct candidates, as {text, image path or None}."""

    items: list[dict[str, Any]]
    queries: np.ndarray  # (Q,) row number of each query
    candidates: list[np.ndarray]  # Q arrays of candidate numbers, the right one first, none twice
    where: str

    def place(self, i: int) -> str:
        """Say where item `i` stands in the task's file."""
        n = len(self.queries)
        if i < n:
            return f"{self.where}, row {self.queries[i]}, qry_img_path"
        row = next(
            row for row, own in zip(self.queries, self.candidates, strict=True) if i - n in own
        )
        return f"{self.where}, row {row}, tgt_img_path"


def list_items(
    rows: datasets.Dataset, chosen: np.ndarray, where: str, image_root: Path
) -> EvalItems:
    """List what is encoded for the `chosen` rows of a task.

    Candidates are the same if both text and image path are: the path alone would join WebQA's
    captions. Raises ValueError for a path that leaves `image_root`, and FileNotFoundError saying how
    many pictures are missing and where the first is named.
    """
    table = rows.select(chosen).with_format("arrow")[:]
    queries = zip(*(_read_strings(table, name).to_pylist() for name in EVAL[:2]), strict=True)
    lengths, texts, images = _flatten_candidates(table, where)
    # One number for each distinct (text, image path).
    text, image = pc.dictionary_encode(texts), pc.dictionary_encode(images)
    width = max(1, len(image.dictionary))
    pairs = text.indices.to_numpy().astype(np.int64) * width + image.indices.to_numpy()
    codes, distinct = pd.factorize(pairs)
    codes = codes.astype(np.int32)  # 36 tasks have 36 million
    texts, images = text.dictionary.to_pylist(), image.dictionary.to_pylist()
    named = [*queries, *((texts[pair // width], images[pair % width]) for pair in distinct)]
    own = [pd.unique(part) for part in np.split(codes, np.cumsum(lengths)[:-1])]
    found = EvalItems([], chosen, own, where)
    missing = []
    for i, (text, rel) in enumerate(named):
        try:
            path = resolve_image(image_root, rel) if rel else None
        except ValueError as error:
            raise ValueError(f"{found.place(i)}: {error}") from None
        found.items.append({"text": text, "image": path})
        if path and not path.is_file():
            missing.append(i)
    if missing:
        first = named[missing[0]][1]
        raise FileNotFoundError(
            f"{len(missing)} pictures are not in {image_root}, first {first!r} "
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
    real = os.path.realpath(path) if path.is_symlink() else _resolve_folder(path.parent)
    if not Path(real).is_relative_to(_resolve_folder(Path(folder))):
        raise ValueError(f"path {rel!r} is a link that leaves {folder}")
    return path


@lru_cache(maxsize=4096)
def _resolve_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def resolve_image(image_root: Path, rel: str) -> Path:
    """Resolve a row's image path, without the `images/` that MMEB-train writes in front."""
    return resolve_below(image_root, rel.removeprefix("images/"))


def row_items(
    row: Mapping[str, Any], image_root: str | Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Turn a row of `load_eval` into items: (query, candidates) of {text, image path or None}."""
    texts, names = [row["qry_text"], *row["tgt_text"]], [row["qry_img_path"], *row["tgt_img_path"]]
    paths = [str(resolve_image(Path(image_root), name)) if name else None for name in names]
    query, *candidates = [
        {"text": text, "image": path} for text, path in zip(texts, paths, strict=True)
    ]
    return query, candidates


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
        held, asked = _flatten({key: found.get(key) for key in wanted}), _flatten(wanted)
        differ = [name for name in asked | held if asked.get(name) != held.get(name)]
        if differ:
            said = "; ".join(f"{name} {held.get(name)}, not {asked.get(name)}" for name in differ)
            raise ValueError(
                f"{root}: holds other data ({said:.500}); delete the folder or choose another one"
            )
        return found
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
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
