"""Rows for training, from a data folder in MMEB's layout: built-in world, a user's pairs, MMEB.

DATA/train/<Subset>/original-*.parquet   contrastive pairs, MMEB-train's columns
DATA/corpus/train.parquet                image_path, kind (caption | qa), question, answer
DATA/images/...                          what the paths in a row are relative to

MMEB has no corpus: captions are then the pairs of a picture with a text. Tables are memory-mapped
by `datasets`: however many rows there are, a process holds those that it looks at.
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

from ..items import PLACEHOLDER, InputError, item_images, split_prompt
from .tables import CORPUS, load_train, read_parquet, resolve_image


class Rows(Sequence):
    """Rows of a memory-mapped table, each converted when it is asked for; a slice gives a list.

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


def _read_corpus(data: Path, kind: str, split: str) -> Rows:
    table = read_parquet(data / "corpus" / f"{split}.parquet", CORPUS)
    chosen = _select(table, pc.equal(table.data.column("kind"), kind))
    return Rows(chosen, partial(_convert_corpus, images=data / "images"))


def _convert_corpus(row: dict[str, Any], images: Path) -> dict[str, Any]:
    item = _make_item(row["question"], row["image_path"], images)
    return {**item, "image": item["image"] or None, "target": row["answer"] or ""}


def _convert_pair(row: dict[str, Any], images: Path) -> dict[str, Any]:
    return {**_make_item(row["qry"], row["qry_image_path"], images), "target": row["pos_text"]}


def _make_item(text: str | None, image: str | None, images: Path) -> dict[str, Any]:
    return {"text": text or "", "image": str(resolve_image(images, image)) if image else ""}


def _select(table: Dataset, mask: pa.ChunkedArray) -> Dataset:
    return table.select(np.flatnonzero(pc.fill_null(mask, False)))


def _is_given(table: Dataset, column: str) -> pa.ChunkedArray:
    return pc.fill_null(pc.greater(pc.binary_length(table.data.column(column)), 0), False)


def captions(data: Path, split: str = "train") -> Rows:
    """Read image -> caption: {text: "", image, target}.

    Without a corpus/: the training pairs of a picture with a text, {text: query, image, target}.
    """
    if split != "train" or (data / "corpus").is_dir():
        return _read_corpus(data, "caption", split)
    if not (found := text_pairs(data, with_picture=True)):
        raise InputError(f"{data}: no corpus/, and no training pair of a picture with a text")
    tables = concatenate_datasets([rows.table for rows in found.values()])
    return Rows(tables, partial(_convert_pair, images=data / "images"))


def questions(data: Path, split: str = "train") -> Rows:
    """Read image + question -> answer: {text, image, target}."""
    return _read_corpus(data, "qa", split)


def subsets(data: Path) -> list[str]:
    """List the names of the training subsets in the folder, sorted."""
    folder = data / "train"
    if not (names := sorted(path.name for path in folder.glob("[!.]*/"))):
        raise FileNotFoundError(
            f"{folder}: no training subsets; expected <Subset>/original-*.parquet"
        )
    return names


def text_pairs(data: Path, *, with_picture: bool = False) -> dict[str, Rows]:
    """Read query -> positive text of each subset that has any, for stage 2: {text, image, target}.

    with_picture: only the queries with a picture.
    """
    found = {}
    for name in subsets(data):
        table = load_train(data, name)
        chosen = pc.and_not(_is_given(table, "pos_text"), _is_given(table, "pos_image_path"))
        if with_picture:
            chosen = pc.and_(chosen, _is_given(table, "qry_image_path"))
        if pc.any(chosen).as_py():
            rows = _select(table, chosen)
            found[name] = Rows(rows, partial(_convert_pair, images=data / "images"))
    return found


def pairs(
    data: Path, max_per_subset: int | None = None, *, hard_negatives: bool = False
) -> tuple[Dataset, list[int]]:
    """Read all contrastive pairs: (columns anchor, positive (, negative) of {text, image}; sizes).

    The sizes are the rows of each subset, in the order of `subsets`.
    """
    columns = {"anchor": ("qry", "qry_image_path"), "positive": ("pos_text", "pos_image_path")}
    if hard_negatives:
        columns["negative"] = ("neg_text", "neg_image_path")

    def convert(table: dict[str, list[str]]) -> dict[str, list[dict[str, str]]]:
        return {
            side: [
                _make_item(text, image, data / "images")
                for text, image in zip(table[texts], table[pictures], strict=True)
            ]
            for side, (texts, pictures) in columns.items()
        }

    parts = []
    for name in subsets(data):
        table = load_train(data, name, n=max_per_subset, negatives=hard_negatives)
        # The result is memory-mapped, like its source.
        parts.append(table.map(convert, batched=True, remove_columns=table.column_names))
    return concatenate_datasets(parts), [len(part) for part in parts]


def check_items(items: Iterable[dict[str, Any]], data: Path) -> None:
    """Check the items {text, image} that a run will read, before it starts.

    Raises InputError for an item that holds nothing, whose text marks other than as many pictures as
    it has, or whose `target` leaves nothing to restore; and what `check_images` raises.
    """
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


def check_images(paths: Iterable[str | None]) -> None:
    """Raise InputError where picture files are missing or empty: how many, and the first three."""
    wanted = sorted({path for path in paths if path})
    if lost := [path for path in wanted if not (os.path.isfile(path) and os.path.getsize(path))]:
        raise InputError(
            f"{len(lost)} of the {len(wanted)} picture files that this run needs are missing or "
            f"empty, e.g. {', '.join(lost[:3])}; unpack the archive they belong to, or leave their "
            "rows out"
        )
