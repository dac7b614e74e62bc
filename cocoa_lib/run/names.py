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
from .profiles import ROOT, SECTIONS

NAMES = {"profile": str, "arm": str, "seed": int, "model": str, "data": str, "changes": dict}


def check_types(given: Mapping[str, Any]) -> None:
    """Raise RecipeError for a value of another type than its name has."""
    for name, value in given.items():
        if type(value) is not NAMES[name]:
            said = f"{name}: expected {NAMES[name].__name__}, found {value!r:.60}"
            hint = "; pass it with -y: -y '{changes: {stage3: {steps: 500}}}'"
            raise RecipeError(said + (hint if name == "changes" else ""))


def check_injected(cells: Sequence[str]) -> None:
    """Raise RecipeError for names that papermill injected and no notebook has.

    `cells`: a kernel's cells so far, IPython's `In`.
    """
    lines = [ast.parse(cell).body for cell in cells if cell.startswith("# Parameters\n")]
    for name in (line.targets[0].id for line in sum(lines, [])):
        if name in (*SECTIONS, "grid", "extends"):
            raise RecipeError(
                f"{name} is a section of a profile, not a parameter: name the profile, "
                f"-p profile NAME, or pass -y '{{changes: {{{name}: ...}}}}'"
            )
        if name not in NAMES:
            raise unknown_name(name, list(NAMES), "papermill's parameters")


def find_path(name: str) -> str | None:
    """Find a file or folder: its path from the repository's root, absolute outside, or None.

    Relative names start at the working directory, or else at the repository's root.
    """
    for start in (Path.cwd(), ROOT):
        path = Path(os.path.abspath(start / Path(name).expanduser()))
        if path.exists():
            return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()
    return None


def find_model(name: str) -> str:
    """Find a model: a folder's path (see `find_path`), or a hub name as it is; else an error."""
    path = find_path(name) if name else ""
    if path is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"model {name!r}: no such folder here, and not a hub name such as "
            "Qwen/Qwen2-VL-2B-Instruct"
        )
    return name if path is None else path


def find_data(name: str) -> str:
    """Find a data folder or table (see `find_path`). Raises InputError saying what `data` takes."""
    path = find_path("data/MMEB" if name == "MMEB" else name) if name else ""
    if path is None:
        raise InputError(
            f"data {name!r}: no such file or folder; data takes MMEB, once `python -m "
            "cocoa_lib.data.download --out data/MMEB` has run, a folder in its layout, a .jsonl or "
            ".csv file of pictures and texts, or a folder of named folders of pictures"
        )
    return path


def digest(content: Any) -> str:
    """Eight hexadecimal digits that tell contents apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def slug(words: str) -> str:
    """Letters, digits, dots and dashes, 40 at most: names folders, stands in commands."""
    return re.sub(r"[^\w.-]+", "_", words)[:40].strip("._-") or "run"
