"""Rows for training, out of a data folder in MMEB's layout (the built-in benchmark, a user's pairs, MMEB-train).

DATA/train/<Subset>/original-*.parquet   contrastive pairs, MMEB-train's columns
DATA/corpus/train.parquet                image_path, kind (caption | qa), question, answer
DATA/images/...                          every path in a row is relative to this folder
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from . import mmeb
from .inputs import InputError


def fingerprint(data: Path) -> str:
    """What the data are, in one short string: the manifest's content hash, or a hash of file names and sizes."""
    manifest = data / "manifest.json"
    if manifest.is_file():
        found = mmeb.read_manifest(data).get("content_hash")
        if not isinstance(found, str) or not found:
            raise InputError(f"{manifest}: no content_hash; the data folder is damaged, make it again")
        return found
    files = sorted(path for path in data.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{data}: no parquet files; expected train/<Subset>/original-*.parquet or corpus/train.parquet"
        )
    listing = "".join(f"{path.relative_to(data)}:{path.stat().st_size}" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _corpus(data: Path, kind: str, split: str = "train") -> list[dict[str, Any]]:
    path = data / "corpus" / f"{split}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; stages 1 and 2 read image_path, kind, question, answer from it")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path}: not readable as parquet ({error})") from error
    for name in ("image_path", "kind", "question", "answer"):
        if name not in table:
            raise InputError(f"{path}: no column {name}; found {', '.join(table)}")
        table[name] = table[name].astype(object).where(table[name].notna(), "")
        for row in table.index[[not isinstance(value, str) for value in table[name]]][:1]:
            raise InputError(f"{path}, row {row}, column {name}: expected a string, found {table[name][row]!r:.80}")
    table = table[table["kind"] == kind]
    images = data / "images"
    return [
        {"text": question, "image": str(mmeb.below(images, image)) if image else None, "target": answer}
        for image, question, answer in zip(table["image_path"], table["question"], table["answer"], strict=True)
    ]


def captions(data: Path, split: str = "train") -> list[dict[str, Any]]:
    """Image -> caption: {text: "", image, target}."""
    return _corpus(data, "caption", split)


def questions(data: Path, split: str = "train") -> list[dict[str, Any]]:
    """Image + question -> answer: {text, image, target}."""
    return _corpus(data, "qa", split)


def conversations(data: Path, split: str = "train") -> list[dict[str, Any]]:
    """For next-token prediction: each scene twice, {image, turns} with its caption alone, and with all its questions."""
    rows = [{"image": row["image"], "turns": [("", row["target"])]} for row in captions(data, split)]
    asked: dict[str, list[tuple[str, str]]] = {}
    for row in questions(data, split):
        asked.setdefault(row["image"], []).append((row["text"], row["target"]))
    return rows + [{"image": image, "turns": turns} for image, turns in asked.items()]


def check_images(paths: Iterable[str | None]) -> None:
    """Raises InputError if picture files are missing or empty: before training starts, not at step 40,000."""
    wanted = sorted({path for path in paths if path})
    if lost := [path for path in wanted if not (os.path.isfile(path) and os.path.getsize(path))]:
        raise InputError(
            f"{len(lost)} of the {len(wanted)} picture files that this run needs are missing or empty, e.g. "
            f"{', '.join(lost[:3])}; unpack the archive they belong to, or leave their rows out"
        )


def subsets(data: Path) -> list[str]:
    """Names of the training subsets in the folder, sorted."""
    folder = data / "train"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(f"{folder}: no training subsets; expected <Subset>/original-*.parquet")
    return names


def _item(text: str, image: str, images: Path) -> dict[str, Any]:
    return {"text": text or "", "image": str(mmeb.below(images, image)) if image else ""}


def text_pairs(data: Path, max_per_subset: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Query -> positive text of each subset whose positives are text, for stage 2: {text, image, target}."""
    images, found = data / "images", {}
    for name in subsets(data):
        rows = mmeb.load_train(str(data), name, n=max_per_subset)
        found[name] = [
            {**_item(row["qry"], row["qry_image_path"], images), "target": row["pos_text"]}
            for row in rows
            if row["pos_text"] and not row["pos_image_path"]
        ]
    return {name: rows for name, rows in found.items() if rows}


def pairs(data: Path, max_per_subset: int | None = None, *, hard_negatives: bool = False) -> tuple[Dataset, list[int]]:
    """All contrastive pairs: a dataset with columns anchor, positive (, negative) of {text, image}; rows a subset."""
    images, parts = data / "images", []

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        items = {
            "anchor": _item(row["qry"], row["qry_image_path"], images),
            "positive": _item(row["pos_text"], row["pos_image_path"], images),
        }
        if hard_negatives:
            items["negative"] = _item(row["neg_text"], row["neg_image_path"], images)
        return items

    for name in subsets(data):
        rows = mmeb.load_train(str(data), name, n=max_per_subset)
        parts.append(Dataset.from_list([convert(row) for row in rows]))
    return concatenate_datasets(parts), [len(part) for part in parts]
