"""Rows for training, out of a data folder in MMEB's layout (the built-in benchmark, a user's pairs, MMEB-train).

DATA/train/<Subset>/original-*.parquet   contrastive pairs, MMEB-train's columns
DATA/corpus/train.parquet                image_path, kind (caption | qa), question, answer
DATA/images/...                          every path in a row is relative to this folder

Tables are memory-mapped by `datasets`: however many rows there are, a process holds those that it looks at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from ..items import PLACEHOLDER, InputError, image_size, item_images, split_prompt
from .tables import CORPUS, below, blocks, check_columns, load_train, quiet, read_parquet


class Rows(Sequence):
    """Rows of a memory-mapped table, each turned into what training takes when it is asked for. A slice gives a list of
    rows, where `Dataset.with_transform` gives columns.

    `convert` is a function of a module, so that workers which are not forked can have the rows too.
    """

    def __init__(self, table: Dataset, convert: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.table, self.convert = table, convert

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        return self.convert(self.table[i])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.convert, self.table)


def _corpus(data: Path, kind: str, split: str = "train") -> Rows:
    path, images = data / "corpus" / f"{split}.parquet", data / "images"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; stages 1 and 2 read image_path, kind, question, answer from it"
        )
    table = read_parquet([path], split, str(path))
    check_columns(table, str(path), CORPUS)
    _check_paths(table, str(path), ("image_path",), images)
    return Rows(
        _where(table, pc.equal(table.data.column("kind"), kind)),
        partial(_corpus_row, images=images),
    )


def _corpus_row(row: dict[str, Any], images: Path) -> dict[str, Any]:
    return {
        **_item(row["question"], row["image_path"], images, None),
        "target": row["answer"] or "",
    }


def _pairs_row(row: dict[str, Any], images: Path) -> dict[str, Any]:
    return {**_item(row["qry"], row["qry_image_path"], images), "target": row["pos_text"]}


def _where(table: Dataset, mask: pa.ChunkedArray) -> Dataset:
    return table.select(np.flatnonzero(pc.fill_null(mask, False)))


def _check_paths(table: Dataset, where: str, columns: Sequence[str], images: Path) -> None:
    """Raises InputError for an image path that leads out of the image folder."""
    for start, block in blocks(table.select_columns(list(columns))):
        for name in columns:
            for row, path in enumerate(block[name].to_pylist(), start):
                try:
                    if path:
                        below(images, path)
                except ValueError as error:
                    raise InputError(f"{where}, row {row}, column {name}: {error}") from None


def captions(data: Path, split: str = "train") -> Rows:
    """Image -> caption: {text: "", image, target}."""
    return _corpus(data, "caption", split)


def questions(data: Path, split: str = "train") -> Rows:
    """Image + question -> answer: {text, image, target}."""
    return _corpus(data, "qa", split)


def conversations(data: Path, split: str = "train") -> list[dict[str, Any]]:
    """For next-token prediction: each scene twice, {image, turns} with its caption alone, and with all its questions."""
    rows = [
        {"image": row["image"], "turns": [("", row["target"])]} for row in captions(data, split)
    ]
    asked: dict[str, list[tuple[str, str]]] = {}
    for row in questions(data, split):
        asked.setdefault(row["image"], []).append((row["text"], row["target"]))
    return rows + [{"image": image, "turns": turns} for image, turns in asked.items()]


def check_images(paths: Iterable[str | None]) -> None:
    """Raises InputError if picture files are missing, empty, unreadable or too large: before training starts, not at step
    40,000, and then again at each resume.

    Only headers are read.
    """
    wanted = sorted({path for path in paths if path})
    if lost := [path for path in wanted if not (os.path.isfile(path) and os.path.getsize(path))]:
        raise InputError(
            f"{len(lost)} of the {len(wanted)} picture files that this run needs are missing or empty, e.g. "
            f"{', '.join(lost[:3])}; unpack the archive they belong to, or leave their rows out"
        )
    unusable = []
    for path in wanted:
        try:
            image_size(path)
        except InputError as error:
            unusable.append(str(error))
    if unusable:
        raise InputError(
            f"{len(unusable)} of the {len(wanted)} picture files that this run needs cannot be used: replace or shrink them, "
            f"or leave their rows out, e.g.\n  " + "\n  ".join(unusable[:3])
        )


def check_items(items: Iterable[dict[str, Any]], data: Path) -> None:
    """`check_images`, and raises InputError for an item {text, image} that no step could read: one that holds nothing, whose text
    marks other than as many pictures as it has, or whose `target`, in stage 2, leaves nothing to restore."""
    paths: list[str] = []
    for item in items:
        text, images = item["text"] or "", item_images(item)
        try:
            if not any(piece is None or piece for piece in split_prompt(text, len(images))):
                raise InputError("neither text nor picture")
            if "target" in item and not PLACEHOLDER.sub("", item["target"]):
                raise InputError("no text to restore")
        except InputError as error:
            row = f"the row with text {text[:40]!r}, image {item['image'] or 'none'}"
            raise InputError(f"{data}: {error}; mend or leave out {row}") from None
        paths += images
    check_images(paths)


def subsets(data: Path) -> list[str]:
    """Names of the training subsets in the folder, sorted."""
    folder = data / "train"
    names = (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    )
    if not names:
        raise FileNotFoundError(
            f"{folder}: no training subsets; expected <Subset>/original-*.parquet"
        )
    return names


def _pairs(data: Path, name: str, n: int | None, negatives: bool = False) -> Dataset:
    table = load_train(str(data), name, n=n, negatives=negatives)
    columns = ("qry_image_path", "pos_image_path", "neg_image_path")[: 2 + negatives]
    _check_paths(table, f"{data}, {name}", columns, data / "images")
    return table


def _item(
    text: str | None, image: str | None, images: Path, no_image: str | None = ""
) -> dict[str, Any]:
    return {"text": text or "", "image": str(images / image) if image else no_image}


def text_pairs(data: Path) -> dict[str, Rows]:
    """Query -> positive text of each subset whose positives are text, for stage 2: {text, image, target}."""
    images, found = data / "images", {}
    for name in subsets(data):
        table = _pairs(data, name, None)
        has_text, has_image = (
            pc.fill_null(pc.greater(pc.binary_length(table.data.column(column)), 0), False)
            for column in ("pos_text", "pos_image_path")
        )
        found[name] = Rows(
            _where(table, pc.and_not(has_text, has_image)), partial(_pairs_row, images=images)
        )
    return {name: rows for name, rows in found.items() if len(rows)}


def pairs(
    data: Path, max_per_subset: int | None = None, *, hard_negatives: bool = False
) -> tuple[Dataset, list[int]]:
    """All contrastive pairs: a dataset with columns anchor, positive (, negative) of {text, image}; rows a subset."""
    images, parts = data / "images", []
    columns = {"anchor": ("qry", "qry_image_path"), "positive": ("pos_text", "pos_image_path")}
    if hard_negatives:
        columns["negative"] = ("neg_text", "neg_image_path")

    def convert(table: dict[str, list[str]]) -> dict[str, list[dict[str, str]]]:
        return {
            side: [
                _item(text, image, images)
                for text, image in zip(table[texts], table[pictures], strict=True)
            ]
            for side, (texts, pictures) in columns.items()
        }

    for name in subsets(data):
        table = _pairs(data, name, max_per_subset, hard_negatives)
        with (
            quiet()
        ):  # the result is a file in the cache of `datasets`, memory-mapped like its source
            parts.append(table.map(convert, batched=True, remove_columns=table.column_names))
    return concatenate_datasets(parts), [len(part) for part in parts]
