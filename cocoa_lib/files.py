"""Files that are whole or not there: written aside, flushed to the disk, renamed; and the hashes that tell them apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_hash(paths: Iterable[Path]) -> str:
    """sha256 over the hashes of files, in the order given."""
    return hashlib.sha256("".join(map(file_hash, paths)).encode()).hexdigest()


def sync(path: Path) -> None:
    """Have the disk, not only the system, hold this file, or the names in this folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(aside)`, then rename: the file is whole or not there."""
    aside = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    write(aside)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_json(path: Path, error: type[Exception], remedy: str) -> dict[str, Any]:
    """A JSON object from a file. Raises `error` naming the file and what to do."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: not valid JSON ({reason}); {remedy}") from reason
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}; {remedy}")
    return content


def source_hash(path: Path) -> str:
    """sha256 of a table's bytes, or of the names and sizes below a folder; "" where there is nothing."""
    if path.is_dir():
        listing = [
            f"{file.relative_to(path)}:{file.stat().st_size}" for file in sorted(path.rglob("*")) if file.is_file()
        ]
        return hashlib.sha256("\n".join(listing).encode()).hexdigest()
    return file_hash(path) if path.is_file() else ""
