"""Rows for training, from a data folder in MMEB's layout: built-in world, a user's pairs, MMEB.

DATA/train/<Subset>/original-*.parquet   contrastive pairs, MMEB-train's columns
DATA/corpus/train.parquet                image_path, kind (caption | qa), question, answer
DATA/images/...                          what the paths in a row are relative to

MMEB has no corpus: captions are then the pairs of a picture with a text. Tables are memory-mapped
by `datasets`: however many rows there are, a process holds those that it looks at.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from ..items import PLACEHOLDER, InputError, image_size, item_images, split_prompt
from .tables import (
    CORPUS,
    check_columns,
    hide_progress,
    load_train,
    read_parquet,
    resolve_image,
)

CHECKED = ".checked"  # hashes of sets of pictures that were read once without complaint


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
    path = data / "corpus" / f"{split}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds {', '.join(CORPUS)}")
    table = read_parquet([path], str(path))
    check_columns(table, str(path), CORPUS)
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
    if not (found := _read_text_pairs(data, with_picture=True)):
        raise InputError(f"{data}: no corpus/, and no training pair of a picture with a text")
    columns = ["qry", "qry_image_path", "pos_text"]
    tables = [rows.table.select_columns(columns) for rows in found.values()]
    return Rows(concatenate_datasets(tables), partial(_convert_pair, images=data / "images"))


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


def text_pairs(data: Path) -> dict[str, Rows]:
    """Read query -> positive text of each subset that has any, for stage 2: {text, image, target}."""
    return _read_text_pairs(data)


def _read_text_pairs(data: Path, with_picture: bool = False) -> dict[str, Rows]:
    found = {}
    for name in subsets(data):
        table = load_train(data, name)
        chosen = pc.and_not(_is_given(table, "pos_text"), _is_given(table, "pos_image_path"))
        if with_picture:
            chosen = pc.and_(chosen, _is_given(table, "qry_image_path"))
        found[name] = Rows(_select(table, chosen), partial(_convert_pair, images=data / "images"))
    return {name: rows for name, rows in found.items() if len(rows)}


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
        with hide_progress():  # the result is memory-mapped, like its source
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
    check_images(paths, data)


def check_images(paths: Iterable[str | None], data: Path | None = None) -> None:
    """Check the headers of picture files; a set of them found good is not read again.

    Sets that are good are remembered in DATA/.checked, by paths, sizes and times. Raises InputError
    saying how many are missing, empty, unreadable or too large, and the first three.
    """
    wanted = sorted({path for path in paths if path})
    if data is not None and wanted and not (data / "images").is_dir():
        raise InputError(f"{data}: no folder images/, but rows name {len(wanted)} pictures")
    seen, lost = hashlib.sha256(), []
    for path in wanted:
        try:
            found = os.stat(path)
        except OSError:
            found = None
        if found is None or not found.st_size:
            lost.append(path)
        else:
            seen.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    if lost:
        raise InputError(
            f"{len(lost)} of the {len(wanted)} picture files that this run needs are missing or "
            f"empty, e.g. {', '.join(lost[:3])}; unpack the archive they belong to, or leave their "
            "rows out"
        )
    note, digest = data and data / CHECKED, seen.hexdigest()
    if note and note.is_file() and digest in note.read_text(encoding="utf-8").split():
        return
    if unusable := [complaint for path in wanted if (complaint := _find_complaint(path))]:
        raise InputError(
            f"{len(unusable)} of the {len(wanted)} picture files that this run needs cannot be "
            "used: replace or shrink them, or leave their rows out, e.g.\n  "
            + "\n  ".join(unusable[:3])
        )
    if note:
        with suppress(OSError), note.open("a", encoding="utf-8") as file:  # or it is read-only
            file.write(f"{digest}\n")


def _find_complaint(path: str) -> str:
    try:
        image_size(path)
    except InputError as error:
        return str(error)
    return ""
