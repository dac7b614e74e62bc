"""The six names of a run: types checked, models and data found, and short names for folders."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..items import InputError
from ..recipes import RecipeError, unknown_name
from ..store.checkpoint import CheckpointError
from .profiles import PROFILES, ROOT, SECTIONS, read_yaml

NAMES: dict[str, tuple[type, ...]] = {
    "profile": (str,),
    "arm": (str,),
    "seed": (int,),
    "model": (str,),
    "data": (str,),
    "changes": (dict, type(None)),
}


def check_types(given: Mapping[str, Any]) -> None:
    """Raise RecipeError for a value of another type than its name has."""
    for name, value in given.items():
        if type(value) in NAMES[name]:
            continue
        if name == "changes" and isinstance(value, str):
            raise RecipeError(
                f"changes is the text {value!r:.60}, not names and values; pass it with -y: "
                "-y '{changes: {stage3: {steps: 500}}}'"
            )
        raise RecipeError(f"{name}: expected {NAMES[name][0].__name__}, found {value!r:.60}")
    if given["seed"] < 0:
        raise RecipeError(f"seed: expected a whole number from 0, found {given['seed']}")


def check_injected(cells: Sequence[str]) -> None:
    """Raise RecipeError for names that papermill injected and no notebook has.

    `cells`: a kernel's cells so far, IPython's `In`.
    """
    injected: dict[str, Any] = {}
    for cell in cells:
        if cell.startswith("# Parameters\n"):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    injected[node.targets[0].id] = ast.literal_eval(node.value)
    unknown = [name for name in injected if name not in NAMES]
    if not unknown:
        return
    known = f"the parameters of every notebook are {', '.join(NAMES)}"
    if set(unknown) <= set(SECTIONS):
        layers = {path.stem: read_yaml(path) for path in PROFILES.glob("*.yaml")}
        same = [
            name
            for name, layer in layers.items()
            if layer == {key: injected[key] for key in unknown}
        ]
        if same:
            raise RecipeError(
                f"{same[0]}.yaml is a profile: pass it by name, -p profile {same[0]}; {known}"
            )
        section = unknown[0]
        raise RecipeError(
            f"{section} is a section of a profile, not a parameter: pass -y "
            f"'{{changes: {{{section}: ...}}}}', or name a "
            f"profile, -p profile NAME; {known}"
        )
    raise unknown_name(unknown[0], list(NAMES), "papermill's parameters")


def find_path(name: str) -> str | None:
    """Find a file or folder: its path from the repository's root, absolute outside; None without
    one.

    Relative names start at the working directory, or else at the repository's root.
    """
    for start in (Path.cwd(), ROOT):
        path = Path(os.path.abspath(start / Path(name).expanduser()))
        if path.exists():
            return (
                path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
            )
    return None


def find_model(name: str) -> str:
    """Find a model: a folder's path (see `find_path`), or a hub name as it is.

    Raises CheckpointError for neither.
    """
    if not name:
        return ""
    if (path := find_path(name)) is not None:
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"model {name!r}: no such folder here, and not a hub name such as "
            f"Qwen/Qwen2-VL-2B-Instruct"
        )
    return name


def find_data(name: str) -> str:
    """Find a data folder or table (see `find_path`). Raises InputError saying what `data` takes."""
    if not name:
        return ""
    path = find_path("data/MMEB" if name == "MMEB" else name)
    if path is None and name == "MMEB":
        raise InputError(
            "data MMEB: not there yet; run `python -m cocoa_lib.data.download --out data/MMEB`"
        )
    if path is None:
        raise InputError(
            f"data {name!r}: no such file or folder; data takes a folder in MMEB's layout, MMEB, "
            f"a .jsonl or .csv file of "
            "pictures and texts, or a folder of named folders of pictures"
        )
    return path


def is_pairs(source: Path) -> bool:
    """Tell a user's own pictures and texts from a folder in MMEB's layout."""
    tables = ("train/*/*.parquet", "eval/*/*.parquet", "corpus/*.parquet", "manifest.json")
    return not source.is_dir() or not any(next(source.glob(table), None) for table in tables)


def digest(content: Any) -> str:
    """Eight hexadecimal digits that tell contents apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def slug(words: str) -> str:
    """Letters, digits, dots and dashes, 40 at most: names folders, stands in commands."""
    return re.sub(r"[^\w.-]+", "_", words)[:40].strip("._-") or "run"
