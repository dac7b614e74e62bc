"""A user's own pictures and texts -> a data folder in MMEB's layout, with concepts held out."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from ..items import InputError, load_image
from ..store.files import file_hash, write_json
from .tables import CORPUS, EVAL, TRAIN, read_finished, resolve_below, write_tables

IMAGE_COLUMNS = ("image", "image_path", "file", "path", "filename", "file_name")
TEXT_COLUMNS = ("text", "caption", "name", "title", "description")
CLASS_COLUMNS = ("class", "label", "category", "group")
# Words whose exchange makes a near-copy of a picture: variants by gender and age (ours).
VARIANT_WORDS = re.compile(r"\b(man|woman|person|men|women|people|boy|girl|male|female)\b")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
SHARD = "00000-of-00001"
SEED = 0  # of the split


def build_pairs(
    path: str | Path,
    root: str | Path,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    class_column: str | None = None,
    image_root: str | Path | None = None,
    on_bad_row: str = "stop",
    n_eval: int = 300,
    max_side: int = 512,
) -> dict[str, Any]:
    """Write the data folder `root` from a .jsonl or .csv file or a folder; return its manifest.

    `n_eval` concepts, at most a fifth of all but two at least, are held out as unseen; as many of
    the others are evaluated as seen, so that both have the same chance; one row a concept, since
    its variants have no single right answer. Pictures are stored as RGB PNG with sides of at most
    `max_side`. on_bad_row: "stop" raises InputError listing the bad rows before anything is
    written; "skip" leaves them out, counts and lists them in skipped.txt.
    """
    path, root = Path(path), Path(root)
    if on_bad_row not in ("stop", "skip"):
        raise InputError(f"on_bad_row must be 'stop' or 'skip', got {on_bad_row!r}")
    columns = [image_column, text_column, class_column]
    settings = {"source": path.name, "source_sha256": source_hash(path), "columns": columns}
    settings |= {"on_bad_row": on_bad_row, "n_eval": n_eval, "max_side": max_side, "seed": SEED}
    settings |= {"image_root": str(image_root)} if image_root else {}
    if (found := read_finished(root, {"settings": settings})) is not None:
        return found
    rows = read_table(path)
    columns = choose_columns(rows, columns, path)
    base = Path(image_root or (path if path.is_dir() else path.parent))
    good, bad = check_rows(rows, columns, base)
    if bad and on_bad_row == "stop":
        listed = "\n  ".join([f"{path}: {len(bad)} of {len(rows)} rows cannot be used:", *bad[:20]])
        raise InputError(
            f"{listed}\nMend them, name the folder of the pictures (image_root), or set "
            "on_bad_row=skip"
        )
    if len(good) < 10:
        raise InputError(f"{path}: {len(good)} usable rows; training and holding out need 10")
    facts = _write_folder(root, good, bad, settings)
    names = {"image_root": base.name, "columns": columns, "rows": len(rows)}
    manifest = {"generator": "pairs", "settings": settings, **names, **facts}
    write_json(root / "manifest.json", manifest)
    return manifest


def source_hash(path: Path) -> str:
    """Hash a table's bytes, or the names and sizes below a folder, by sha256; "" for nothing."""
    if path.is_file():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = [f"{file.relative_to(path)}:{file.stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest() if path.is_dir() else ""


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL or CSV file, or of a folder of named folders of pictures.

    Of a folder: a picture's text is the name of its folder, its class that of the first one. Raises
    InputError naming file and line for what is not a row.
    """
    if not path.exists():
        raise InputError(
            f"{path}: no such file; expected a .jsonl or .csv file with an image path and a text a "
            "row, or a folder of named folders of pictures"
        )
    if not (rows := _read_folders(path) if path.is_dir() else _read_lines(path)):
        raise InputError(f"{path}: no rows; of a folder, pictures in named folders are read")
    return rows


def _read_folders(path: Path) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if file.suffix.lower() in PICTURES and len(parts) > 1:
            text = parts[-2].replace("-", " ").replace("_", " ")
            label = {"class": parts[0]} if len(parts) > 2 else {}
            rows.append({"image": "/".join(parts), "text": text} | label)
    return rows


def _read_lines(path: Path) -> list[dict[str, Any]]:
    where, rows = str(path), []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                return list(csv.DictReader(file, restkey=""))
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                rows += [dict(json.loads(line))] if line.strip() else []
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a table in UTF-8 ({error}); save it as UTF-8") from error
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise InputError(f"{where}: not a JSON object or a row of CSV ({error})") from error
    return rows


def choose_columns(
    rows: list[dict[str, Any]], wanted: list[str | None], path: Path
) -> list[str | None]:
    """Choose the columns of image, text and class: the named ones, or the first usual ones.

    Raises InputError listing the columns there are.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    said = ", ".join(map(str, columns))
    if lost := [name for name in wanted if name and name not in columns]:
        raise InputError(f"{path}: no column {lost[0]!r}; columns: {said}")
    usual = (IMAGE_COLUMNS, TEXT_COLUMNS, CLASS_COLUMNS)
    chosen = [
        name or next((one for one in known if one in columns), None)
        for name, known in zip(wanted, usual, strict=True)
    ]
    if None in chosen[:2]:
        raise InputError(f"{path}: cannot tell image and text columns among {said}; name them")
    return chosen


def read_text(row: dict[str, Any], column: str | None) -> str:
    """Read a row's text, path or class as a string, "" where it has none: 0 is one."""
    value = row.get(column) if column else None
    return "" if value is None else str(value).strip()


def check_rows(
    rows: list[dict[str, Any]], columns: list[str | None], root: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Read every row and decode every picture: (good rows {text, class, path, hash}, complaints).

    Pixels are not kept: there may be many.
    """
    good, bad = [], []
    for number, row in enumerate(tqdm(rows, desc="check pairs", unit="row"), start=1):
        try:
            good.append(_check_row(row, columns, root))
        except ValueError as error:
            bad.append(f"row {number}: {error}")
    return good, bad


def _check_row(row: dict[str, Any], columns: list[str | None], root: Path) -> dict[str, Any]:
    name, text, label = (read_text(row, column) for column in columns)
    for column, value in zip(columns, (name, text), strict=False):
        if not value or isinstance(row[column], (list, dict)):
            raise InputError(f"{column!r} must hold one text, found {row.get(column)!r:.40}")
    (text + name).encode()  # half of a surrogate pair, as JSON can hold, is a ValueError
    path = resolve_below(root, name)
    image = load_image(path)
    digest = hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()
    return {"text": text, "class": label, "path": path, "hash": digest}


def find_concept(text: str) -> str:
    """Reduce a text to its concept: no part after a colon, no gender and age words, lower case."""
    return " ".join(VARIANT_WORDS.sub(" ", text.lower().split(":")[0]).split()) or text.lower()


def group_concepts(rows: list[dict[str, Any]]) -> np.ndarray:
    """Number the concept of each row (N,): equal concepts and pixel-equal pictures share one."""
    keys = [f"text:{find_concept(row['text'])}" for row in rows] + [row["hash"] for row in rows]
    codes, names = pd.factorize(np.array(keys, dtype=object))
    n = len(rows)
    links = coo_array((np.ones(2 * n), (np.tile(np.arange(n), 2), n + codes)), [n + len(names)] * 2)
    return connected_components(links, directed=False)[1][:n]


def split_concepts(
    rows: list[dict[str, Any]], n_eval: int
) -> tuple[list[dict], list[dict], list[dict]]:
    """Split into (seen, unseen, training): whole concepts are held out, one row each is evaluated.

    Raises InputError where there are too few concepts.
    """
    groups = group_concepts(rows)
    order = np.random.default_rng([SEED, 3]).permutation(groups.max() + 1)
    n_out = min(n_eval, max(2, len(order) // 5))
    if min(n_out, len(order) - n_out) < 2:  # one candidate is always right
        raise InputError(
            f"{len(order)} concepts (texts without what follows a colon, gender and age): at least "
            f"2 are held out and 2 trained on; use more, or an n_eval of at least 2 (found {n_eval})"
        )
    first = np.unique(groups, return_index=True)[1]  # the first row of each concept
    unseen = [rows[i] for i in first[order[:n_out]]]
    seen = [rows[i] for i in first[order[n_out : 2 * n_out]]]
    training = [rows[i] for i in np.flatnonzero(~np.isin(groups, order[:n_out]))]
    return seen, unseen, training


def _write_folder(
    root: Path, rows: list[dict[str, Any]], bad: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Write pictures and tables; return the manifest's facts about them."""
    seen, unseen, training = split_concepts(rows, settings["n_eval"])
    (root / "images").mkdir(parents=True)
    for i, row in enumerate(rows):
        image = load_image(row["path"])
        image.thumbnail((settings["max_side"],) * 2, Image.Resampling.LANCZOS)
        row["file"] = f"{i:06d}.png"
        image.save(root / "images" / row["file"])
    (root / "skipped.txt").write_text("\n".join(bad), encoding="utf-8")
    classes = sorted({row["class"] for row in rows} - {""})
    tables, tasks = _list_training(training, unseen), []
    for name, part in {"Seen": seen, "Unseen": unseen}.items():
        for task, meta_task, lines in _list_eval(part, classes):
            tables[f"eval/{task}{name}/test-{SHARD}"] = pd.DataFrame(lines, columns=EVAL)
            tasks.append([task + name, meta_task, name == "Seen", len(lines[0][2])])
    write_tables(root, tables)
    # What `fingerprint` knows the data by: the rows, and the settings that split them.
    listing = [[row["hash"], row["text"], row["class"]] for row in rows] + [settings]
    return {
        "used": len(rows),
        "skipped": len(bad),
        "training": len(training),
        "seen": len(seen),
        "unseen": len(unseen),
        "tasks": tasks,
        "content_hash": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }


def _list_eval(part: list[dict], classes: list[str]) -> list[tuple[str, str, list[tuple]]]:
    """List (task, meta-task, rows) for one part; the right candidate comes first."""

    def move_first(values: list[str], i: int) -> list[str]:
        return [values[i], *values[:i], *values[i + 1 :]]

    files, texts = ([row[name] for row in part] for name in ("file", "text"))
    none, no_files = [""] * len(part), [""] * len(classes)
    find = [(text, "", none, move_first(files, i)) for i, text in enumerate(texts)]
    name = [("", file, move_first(texts, i), none) for i, file in enumerate(files)]
    places = [(row["file"], classes.index(row["class"])) for row in part if row["class"]]
    sort = [("", file, move_first(classes, i), no_files) for file, i in places]
    tasks = [("TextToImage", "retrieval", find), ("ImageToText", "retrieval", name)]
    return tasks + [("Class", "classification", sort)] * bool(sort and len(classes) > 1)


def _list_training(training: list[dict], unseen: list[dict]) -> dict[str, pd.DataFrame]:
    """List the tables of training pairs and of the corpus."""
    labelled = [row for row in training if row["class"]]
    # Of one class there is nothing to tell apart, as in evaluation.
    labelled = labelled if len({row["class"] for row in labelled}) > 1 else []
    subsets = {
        "TextToImage": [(row["text"], "", "", row["file"], "", "") for row in training],
        "ImageToText": [("", row["file"], row["text"], "", "", "") for row in training],
        "Class": [("", row["file"], row["class"], "", "", "") for row in labelled],
    }
    tables = {
        f"train/{name}/original-{SHARD}": pd.DataFrame(rows, columns=TRAIN)
        for name, rows in subsets.items()
        if rows
    }
    for split, rows in (("train", training), ("heldout", unseen)):
        lines = [(row["file"], "caption", "", row["text"]) for row in rows]
        tables[f"corpus/{split}"] = pd.DataFrame(lines, columns=CORPUS)
    return tables
