"""Files that are whole or not there: written aside, flushed to the disk, renamed; and the hashes that tell them apart."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from ..items import InputError, load_image
from ..store.files import file_hash, write_json
from .tables import CORPUS, EVAL, TRAIN, finished, write_tables


def source_hash(path: Path) -> str:
    """sha256 of a table's bytes, or of the names and sizes below a folder; "" where there is nothing."""
    if path.is_dir():
        listing = [
            f"{file.relative_to(path)}:{file.stat().st_size}"
            for file in sorted(path.rglob("*"))
            if file.is_file()
        ]
        return hashlib.sha256("\n".join(listing).encode()).hexdigest()
    return file_hash(path) if path.is_file() else ""


IMAGE_COLUMNS = ("image", "image_path", "file", "path", "filename", "file_name")
TEXT_COLUMNS = ("text", "caption", "name", "title", "description")
CLASS_COLUMNS = ("class", "label", "category", "group")
# Words whose exchange makes a near-copy of a picture: variants by gender and age (ours, for emoji and people photos).
VARIANT_WORDS = re.compile(r"\b(man|woman|person|men|women|people|boy|girl|male|female)\b")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def read_folders(path: Path) -> list[dict[str, Any]]:
    """A folder of pictures sorted into folders: a picture's text is the name of its folder, its class the first one."""
    rows = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.suffix.lower() in PICTURES and len(parts) > 1:
            text = parts[-2].replace("-", " ").replace("_", " ")
            rows.append(
                {"image": "/".join(parts), "text": text}
                | ({"class": parts[0]} if len(parts) > 2 else {})
            )
    if not rows:
        raise InputError(f"{path}: no pictures in named folders below it ({', '.join(PICTURES)})")
    return rows


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL or CSV file, or of a folder. Raises InputError naming file and line for what is not a row."""
    if path.is_dir():
        return read_folders(path)
    if not path.is_file():
        known = "a .jsonl or .csv file with an image path and a text a row, or a folder of named folders"
        raise InputError(f"{path}: no such file; PAIRS takes {known}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = (
                list(csv.DictReader(file, restkey=""))
                if path.suffix.lower() == ".csv"
                else _json_rows(path, file)
            )
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: not a table in UTF-8 ({error}); save it as UTF-8 .jsonl or .csv"
        ) from error
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def _json_rows(path: Path, lines: Iterable[str]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not a JSON object ({error})") from None
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, line {number}: expected a JSON object, found {type(row).__name__}"
                )
            rows.append(row)
    return rows


def pick_column(
    rows: list[dict[str, Any]], wanted: str | None, known: tuple[str, ...], what: str, path: Path
) -> str | None:
    """The named column, or the first known one that the file has. Raises InputError listing the columns there are."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if wanted is not None:
        if wanted not in columns:
            raise InputError(
                f"{path}: no column {wanted!r} for the {what}; columns: {', '.join(columns)}"
            )
        return wanted
    return next((name for name in known if name in columns), None)


def find_image_root(path: Path, first_image: str) -> Path:
    """Where relative image paths start: the table's folder, or the one folder below it that holds the first image."""
    if path.is_dir() or os.path.isfile(path.parent / first_image):  # False for a name too long, too
        return path if path.is_dir() else path.parent
    parts = Path(first_image).parts
    for found in sorted(path.parent.rglob("*")) if parts else ():
        if found.parts[-len(parts) :] == parts:
            return found.parents[len(parts) - 1]
    return path.parent


def concept(text: str) -> str:
    """A text without what only varies it: what follows a colon, gender and age words, case and spaces."""
    return " ".join(VARIANT_WORDS.sub(" ", text.lower().split(":")[0]).split()) or text.lower()


def _string(row: dict[str, Any], column: str | None) -> str:
    """A row's text, path or class as a string, "" where it has none: 0 is one."""
    value = row.get(column) if column else None
    return "" if value is None else str(value).strip()


def check_rows(
    rows: list[dict[str, Any]], image_column: str, text_column: str, root: Path, progress: bool
):
    """Every row read and every picture decoded: (good rows with `image` and `text`, complaints)."""
    good, bad = [], []
    for number, row in enumerate(
        tqdm(rows, desc="check pairs", unit="row", disable=not progress), start=1
    ):
        try:
            good.append(row | _checked(row, image_column, text_column, root))
        except InputError as error:
            bad.append(f"row {number}: {error}")
    return good, bad


def _checked(
    row: dict[str, Any], image_column: str, text_column: str, root: Path
) -> dict[str, Any]:
    """`_text`, `_path` and `_hash` of a row: not its pixels, of which there may be many. InputError for a bad row."""
    for column in (text_column, image_column):
        if isinstance(row.get(column), (list, dict)):
            raise InputError(
                f"{column!r} holds a {type(row[column]).__name__}, not a text; write a row for each entry"
            )
    text, name = (_string(row, column) for column in (text_column, image_column))
    if not text:
        raise InputError(f"empty {text_column!r} (image {name or 'none'})")
    if not name:
        raise InputError(f"empty {image_column!r} (text {text[:40]!r})")
    if not os.path.realpath(root / name.replace("\0", "")).startswith(
        os.path.join(os.path.realpath(root), "")
    ):
        raise InputError(
            f"image path {name!r} leaves the image folder {root}; name another image_root"
        )
    try:
        (text + name).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can hold
        raise InputError(f"not valid Unicode ({error.reason})") from None
    image = load_image(root / name)
    digest = hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()
    return {"_text": text, "_path": root / name, "_hash": digest}


def group_concepts(rows: list[dict[str, Any]]) -> np.ndarray:
    """(N,) concept number a row: equal concepts, and pixel-equal pictures, share one (union of both relations)."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        for key in ("text:" + concept(row["_text"]), "image:" + row["_hash"]):
            parent[root(i)] = root(first.setdefault(key, i))
    return np.unique([root(i) for i in range(len(rows))], return_inverse=True)[1]


def build_pairs(
    path: str | Path, root: str | Path, *, image_column: str | None = None, text_column: str | None = None,
    class_column: str | None = None, image_root: str | Path | None = None, on_bad_row: str = "stop",
    n_eval: int = 300, max_side: int = 512, seed: int = 0, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write the data folder `root` from the table `path`; returns its manifest.

    `n_eval` concepts, at most a fifth of all but two at least, are held out as unseen; as many of the others are evaluated
    as seen, so that both have the same chance; one row a concept, since its variants have no single right answer. Pictures
    are stored as RGB PNG with sides of at most `max_side`. on_bad_row: "stop" (default) raises InputError listing the
    bad rows before anything is written; "skip" leaves them out, counts and lists them in `skipped.txt`.
    """
    path, root = Path(path), Path(root)
    if on_bad_row not in ("stop", "skip"):
        raise InputError(f"on_bad_row must be 'stop' or 'skip', got {on_bad_row!r}")
    settings = {"source": path.name, "source_sha256": source_hash(path),
                "columns": [image_column, text_column, class_column], "on_bad_row": on_bad_row, "n_eval": n_eval,
                "max_side": max_side, "seed": seed, **({"image_root": str(image_root)} if image_root else {})}  # fmt: skip
    if (found := finished(root, {"settings": settings})) is not None:
        return found

    rows = read_table(path)
    image_name = pick_column(rows, image_column, IMAGE_COLUMNS, "image path", path)
    text_name = pick_column(rows, text_column, TEXT_COLUMNS, "text", path)
    class_name = pick_column(rows, class_column, CLASS_COLUMNS, "class", path)
    if image_name is None or text_name is None:
        raise InputError(
            f"{path}: cannot tell image and text columns among {', '.join(rows[0])}; name them"
        )
    names = (
        str(row.get(image_name) or "") for row in rows[:20]
    )  # of the first row whose picture is there
    roots = ((find_image_root(path, name), name) for name in names)
    base = (
        Path(image_root)
        if image_root
        else next((root for root, name in roots if os.path.isfile(root / name)), path.parent)
    )
    good, bad = check_rows(rows, image_name, text_name, base, progress)
    if bad and on_bad_row == "stop":
        listing = "\n  ".join(bad[:20]) + (
            f"\n  ... and {len(bad) - 20} more" if len(bad) > 20 else ""
        )
        raise InputError(
            f"{path}: {len(bad)} of {len(rows)} rows cannot be used:\n  {listing}\nMend them, or set on_bad_row=skip"
        )
    if len(good) < 10:
        raise InputError(
            f"{path}: {len(good)} usable rows; at least 10 are needed to train and to hold some out"
        )

    seen, unseen, training = _split(good, n_eval, seed)
    images = root / "images"
    images.mkdir(parents=True)
    for i, row in enumerate(good):
        image = load_image(row["_path"])
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        row["_file"] = f"{i:06d}.png"
        image.save(images / row["_file"])
    tasks = _write_eval(root, {"Seen": seen, "Unseen": unseen}, good, class_name)
    _write_training(root, training, unseen, class_name)
    (root / "skipped.txt").write_text("\n".join(bad), encoding="utf-8")
    # What `corpus.fingerprint` knows the data by: the split and what is stored, so the settings as well as the rows.
    listing = json.dumps(
        [[row["_hash"], row["_text"], _string(row, class_name)] for row in good] + [settings]
    ).encode()
    manifest = {
        "generator": "pairs", "settings": settings, "image_root": base.name, "columns": [image_name, text_name, class_name],
        "rows": len(rows), "used": len(good), "skipped": len(bad), "training": len(training),
        "seen": len(seen), "unseen": len(unseen), "tasks": tasks, "content_hash": hashlib.sha256(listing).hexdigest(),
    }  # fmt: skip
    write_json(root / "manifest.json", manifest)
    return manifest


def _split(rows: list[dict[str, Any]], n_eval: int, seed: int):
    """(seen, unseen, training): whole concepts are held out; one row a concept is evaluated, the first."""
    groups = group_concepts(rows)
    rng = np.random.default_rng([seed, 3])
    order = rng.permutation(groups.max() + 1)
    n_out = min(n_eval, max(2, len(order) // 5))
    if min(n_out, len(order) - n_out) < 2:  # one candidate is always right
        raise InputError(
            f"{len(order)} concepts (texts without what follows a colon, gender and age): at least 2 are held out and 2 "
            f"trained on; use more of them, or an n_eval of at least 2 (found {n_eval})"
        )
    held_out = set(order[:n_out].tolist())
    first = {int(group): i for i, group in reversed(list(enumerate(groups)))}
    training = [row for row, group in zip(rows, groups, strict=True) if int(group) not in held_out]
    unseen = [rows[first[int(group)]] for group in order[:n_out]]
    seen = [rows[first[int(group)]] for group in order[n_out : 2 * n_out]]
    return seen, unseen, training


def _write_eval(
    root: Path, parts: dict[str, list], rows: list[dict[str, Any]], class_name: str | None
) -> list[list]:
    tasks = []
    classes = sorted({_string(row, class_name) for row in rows} - {""})
    for name, part in parts.items():
        files, texts, n, seen = (
            [row["_file"] for row in part],
            [row["_text"] for row in part],
            len(part),
            name == "Seen",
        )
        image_task = [
            ("", files[i], [texts[i]] + texts[:i] + texts[i + 1 :], [""] * n) for i in range(n)
        ]
        text_task = [
            (texts[i], "", [""] * n, [files[i]] + files[:i] + files[i + 1 :]) for i in range(n)
        ]
        tasks += [_eval_task(root, f"TextToImage{name}", "retrieval", seen, text_task)]
        tasks += [_eval_task(root, f"ImageToText{name}", "retrieval", seen, image_task)]
        if len(classes) > 1:
            class_task = [
                ("", row["_file"], [own, *(label for label in classes if label != own)], [""] * len(classes))
                for row in part if (own := _string(row, class_name))
            ]  # fmt: skip
            tasks += (
                [_eval_task(root, f"Class{name}", "classification", seen, class_task)]
                if class_task
                else []
            )
    return tasks


def _eval_task(root: Path, name: str, meta_task: str, seen: bool, rows: list[tuple]) -> list:
    write_tables(root, {f"eval/{name}/test-00000-of-00001": pd.DataFrame(rows, columns=EVAL)})
    return [name, meta_task, seen, len(rows[0][2])]


def _write_training(
    root: Path, training: list[dict], unseen: list[dict], class_name: str | None
) -> None:
    labelled = [(row, own) for row in training if (own := _string(row, class_name))]
    several = (
        len({own for _, own in labelled}) > 1
    )  # of one class there is nothing to tell apart, as in evaluation
    subsets = {
        "TextToImage": [(row["_text"], "", "", row["_file"], "", "") for row in training],
        "ImageToText": [("", row["_file"], row["_text"], "", "", "") for row in training],
        "Class": [("", row["_file"], own, "", "", "") for row, own in labelled if several],
    }
    tables = {
        f"train/{name}/original-00000-of-00001": pd.DataFrame(rows, columns=TRAIN)
        for name, rows in subsets.items() if rows
    }  # fmt: skip
    for split, rows in (("train", training), ("heldout", unseen)):
        lines = [(row["_file"], "caption", "", row["_text"]) for row in rows]
        tables[f"corpus/{split}"] = pd.DataFrame(lines, columns=CORPUS)
    write_tables(root, tables)
