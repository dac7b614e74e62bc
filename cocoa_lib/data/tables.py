"""MMEB's tables: columns, tasks, rows read and checked, paths that stay below the image folder."""

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


def load_eval(
    root: str,
    task: str,
    *,
    revision: str | None = None,
    n_candidates: int | None = None,
    duplicates: str = "error",
) -> datasets.Dataset:
    """Rows of one task: qry_text, qry_img_path (str), tgt_text, tgt_img_path (lists of equal length, right one first).

    `root` is a hub name or a folder that holds <Task>/test-*.parquet, itself or under eval/. Every row is checked:
    ValueError names file, row and column for a missing column, a wrong type, an item with neither text nor image, lists
    of different lengths, a number of candidates other than `n_candidates`, and a copy of the right candidate among the
    others (`duplicates="once"` lets it pass; `evaluate` then counts it once).
    """
    rows, where = _load(root, "eval", task, "test", revision)
    check_columns(rows, where, texts=EVAL[:2], lists=EVAL[2:])
    table = rows.with_format("arrow")[:]
    _check_filled(table, where, "qry_text", "qry_img_path")
    lengths, texts, images = _flat_candidates(table, where)
    wrong = (lengths == 0) | (lengths != (lengths if n_candidates is None else n_candidates))
    _check(
        wrong,
        where,
        "tgt_text",
        lambda row: f"{lengths[row]} candidates, expected {n_candidates or 'at least 1'}",
    )
    row_of, first = np.repeat(np.arange(len(rows)), lengths), np.cumsum(lengths) - lengths

    def check_candidates(bad: np.ndarray, message: str) -> None:
        for at in np.flatnonzero(bad)[:1]:
            place = f"{where}, row {row_of[at]}, column tgt_text/tgt_img_path"
            raise ValueError(f"{place}: candidate {at - first[row_of[at]]} {message}")

    check_candidates(_blank(texts) & _blank(images), "has neither text nor image")
    codes, _ = _codes(texts, images)
    copies = codes == np.repeat(codes[first], lengths)
    copies[first] = False
    if duplicates == "error":
        check_candidates(
            copies,
            "is the same as the right one, candidate 0; mend the row or use duplicates='once'",
        )
    return rows


def load_train(
    root: str, subset: str, *, n: int | None = None, negatives: bool = False
) -> datasets.Dataset:
    """The first `n` rows of a training subset: qry, qry_image_path, pos_text, pos_image_path (, neg_text, neg_image_path).

    `root` is a hub name or a folder that holds <Subset>/original-*.parquet, itself or under train/; with `negatives` every row
    must have one. Raises ValueError naming file, row and column.
    """
    rows, where = _load(root, "train", subset, "original", None)
    rows = rows.select(range(min(len(rows), n))) if n is not None else rows
    sides = [
        ("qry", "qry_image_path"),
        ("pos_text", "pos_image_path"),
        ("neg_text", "neg_image_path"),
    ]
    sides = sides[: 2 + negatives]
    check_columns(rows, where, texts=[name for side in sides for name in side])
    for start, table in blocks(rows):
        for text, image in sides:
            _check_filled(table, where, text, image, start)
    return rows


def blocks(rows: datasets.Dataset, size: int = 1 << 12) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, table) of `size` rows at a time: a check of a large file needs no more memory than these."""
    for start in range(0, len(rows), size):
        yield start, rows.with_format("arrow")[start : start + size]


def _load(
    root: str, part: str, name: str, split: str, revision: str | None
) -> tuple[datasets.Dataset, str]:
    """(rows, how messages call the file). The hub and a folder differ only in what the pattern starts with."""
    if Path(root).is_dir():
        folder = Path(root) / part if (Path(root) / part).is_dir() else Path(root)
        files = sorted((folder / name).glob(f"{split}-*.parquet"))
        where = str(files[0]) if len(files) == 1 else f"{folder / name}/{split}-*.parquet"
        if not files:
            here = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise FileNotFoundError(f"{where}: no such file; folders in {folder}: {here or 'none'}")
    elif len(Path(root).parts) == 2 and not Path(root).is_absolute():
        files = where = f"hf://datasets/{root}@{revision or 'main'}/{name}/{split}-*.parquet"
    else:
        raise FileNotFoundError(
            f"{root}: no such folder, and not a hub name such as TIGER-Lab/MMEB-eval"
        )
    return read_parquet(files, split, where), where


def read_parquet(files: str | Sequence[Path], split: str, where: str) -> datasets.Dataset:
    """Parquet files, local or a pattern of the hub, as a memory-mapped table: `datasets` keeps it in its cache.

    Raises ValueError naming `where` if they are damaged or hold no rows.
    """
    import datasets

    pattern, cache = files, None
    if not isinstance(files, str):
        # `datasets` takes paths for patterns, and its search does not follow a linked folder. It knows a file again by path
        # and time; a cache for each content cannot give the rows of a file that was put in another's place.
        pattern = [glob.escape(str(path.parent.resolve() / path.name)) for path in files]
        cache = str(Path(datasets.config.HF_DATASETS_CACHE) / "cocoa" / files_hash(files)[:16])
    try:
        with quiet():
            # Not load_dataset: a README beside the files must have no say, and it asks the hub even for local files.
            rows = datasets.Dataset.from_parquet({split: pattern}, split=split, cache_dir=cache)
    except (
        datasets.exceptions.DatasetGenerationError,
        pa.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:
        if isinstance(error, OSError) and isinstance(
            pattern, str
        ):  # the hub cannot be reached, or has no such file
            raise
        raise ValueError(
            f"{where}: empty, or not readable as parquet ({error.__cause__ or error})"
        ) from error
    if not len(rows):
        raise ValueError(f"{where}: no rows")
    for name, kind in rows.features.items():
        if (
            getattr(kind, "dtype", None) == "null"
        ):  # a column without any value has no type of its own
            rows = rows.cast_column(name, datasets.Value("string"))
        elif (
            getattr(getattr(kind, "feature", None), "dtype", None) == "null"
        ):  # lists of nothing but nothing
            rows = rows.cast_column(name, datasets.List(datasets.Value("string")))
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`: one a file, for milliseconds."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _check(
    bad: np.ndarray, where: str, columns: str, message: Callable[[int], str], start: int = 0
) -> None:
    for row in np.flatnonzero(bad)[:1]:
        raise ValueError(f"{where}, row {start + row}, column {columns}: {message(row)}")


def check_columns(
    rows: datasets.Dataset, where: str, texts: Sequence[str], lists: Sequence[str] = ()
) -> None:
    """Raises ValueError where a column is missing or does not hold strings, or lists of strings."""
    if missing := [name for name in (*texts, *lists) if name not in rows.column_names]:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; found {', '.join(rows.column_names)}"
        )
    for name in (*texts, *lists):
        kind = rows.features[name]
        value = getattr(kind, "feature", None) if name in lists else kind
        if getattr(value, "dtype", None) not in ("string", "large_string"):
            wanted = "lists of strings" if name in lists else "strings"
            raise ValueError(f"{where}: column {name} must hold {wanted}, found {kind}")


def _check_filled(table: pa.Table, where: str, text: str, image: str, start: int = 0) -> None:
    bad = _blank(_strings(table, text)) & _blank(_strings(table, image))
    _check(bad, where, f"{text}/{image}", lambda row: "neither text nor image", start)


def _blank(values: pa.Array) -> np.ndarray:
    return pc.equal(pc.utf8_trim_whitespace(values), "").to_numpy(zero_copy_only=False)


def _strings(table: pa.Table, name: str) -> pa.Array:
    return pc.fill_null(table[name].combine_chunks(), "")


def _flat_candidates(table: pa.Table, where: str) -> tuple[np.ndarray, pa.Array, pa.Array]:
    """Candidates a row (Q,), and the texts and image paths of all rows one after the other."""
    columns = [table[name].combine_chunks() for name in ("tgt_text", "tgt_img_path")]
    lengths, others = (
        pc.fill_null(pc.list_value_length(column), 0).to_numpy() for column in columns
    )
    differ = lengths != others
    _check(
        differ,
        where,
        "tgt_text/tgt_img_path",
        lambda row: f"lists of {lengths[row]} and {others[row]} entries",
    )
    return lengths, *(pc.fill_null(pc.list_flatten(column), "") for column in columns)


def _codes(texts: pa.Array, images: pa.Array) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """A number for each distinct (text, image path), and these. The path alone would join WebQA's captions."""
    text, image = pc.dictionary_encode(texts), pc.dictionary_encode(images)
    width = max(1, len(image.dictionary))
    codes, distinct = pd.factorize(
        text.indices.to_numpy().astype(np.int64) * width + image.indices.to_numpy()
    )
    texts, images = text.dictionary.to_pylist(), image.dictionary.to_pylist()
    return codes, [(texts[pair // width], images[pair % width]) for pair in distinct]


def below(image_root: Path, rel: str) -> Path:
    """Where a row's image path leads; whether a file is there shows when it is read.

    Raises ValueError for a path that is absolute, has `..` or leaves the folder through a link.
    """
    plain = PureWindowsPath(rel)  # knows both separators and drive letters
    if plain.anchor or ".." in plain.parts or "\0" in rel:
        raise ValueError(
            f"image path {rel!r} is not a plain path below the image folder {image_root}"
        )
    path = Path(image_root) / rel
    real = os.path.realpath(path) if path.is_symlink() else _real_folder(path.parent)
    if not Path(real).is_relative_to(_real_folder(Path(image_root))):
        raise ValueError(f"image path {rel!r} is a link that leaves the image folder {image_root}")
    return path


@lru_cache(maxsize=4096)
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def resolve_image(image_root: Path, rel: str) -> Path:
    """The file that a row's image path names. Raises what `below` raises, and FileNotFoundError where there is none."""
    path = below(image_root, rel)
    if not path.is_file():
        raise FileNotFoundError(f"image {rel!r} not found in {image_root}")
    return path


def row_items(
    row: Mapping[str, Any], image_root: str | Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of `load_eval` as items to encode: (query, candidates). Raises what `resolve_image` raises."""
    texts, names = [row["qry_text"], *row["tgt_text"]], [row["qry_img_path"], *row["tgt_img_path"]]
    paths = [str(resolve_image(Path(image_root), name)) if name else None for name in names]
    query, *candidates = [
        {"text": text, "image": path} for text, path in zip(texts, paths, strict=True)
    ]
    return query, candidates


def read_manifest(root: str | Path) -> dict[str, Any]:
    """A data folder's manifest.json. Raises ValueError naming the file if it is not a JSON object."""
    return read_json(
        Path(root) / "manifest.json", ValueError, "the data folder is damaged, make it again"
    )


def finished(root: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a data folder that holds what is `wanted`; None where nothing is. Raises ValueError for all else."""
    if (root / "manifest.json").is_file():
        found = read_manifest(root)
        held, asked = _flat({key: found.get(key) for key in wanted}), _flat(wanted)
        names = [name for name in asked | held if asked.get(name) != held.get(name)]
        if names:
            differs = "; ".join(f"{name} {held.get(name)}, not {asked.get(name)}" for name in names)
            raise ValueError(
                f"{root}: holds other data ({differs:.500}); delete the folder or choose another one"
            )
        return found
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(
            f"{root}: holds files but no manifest, an unfinished build; delete it and run again"
        )
    return None


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a manifest with its `settings` among them, so that one that differs is named alone."""
    settings = facts.get("settings")
    return {**facts, "settings": None, **settings} if isinstance(settings, dict) else dict(facts)


def write_tables(root: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """name -> root/name.parquet."""
    for name, table in tables.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path, index=False)


def fingerprint(data: Path) -> str:
    """What the data are, in one short string: the manifest's content hash, or one over all tables (pictures are not read)."""
    manifest = data / "manifest.json"
    if manifest.is_file():
        found = read_manifest(data).get("content_hash")
        if not isinstance(found, str) or not found:
            raise InputError(
                f"{manifest}: no content_hash; the data folder is damaged, make it again"
            )
        return found
    files = sorted(path for path in data.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{data}: no parquet files; expected train/<Subset>/original-*.parquet or corpus/train.parquet"
        )
    listing = "".join(f"{path.relative_to(data)}:{file_hash(path)}" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()
