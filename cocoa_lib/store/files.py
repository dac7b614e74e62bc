"""Files that are whole or not there, their hashes, and a lock on a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout


def file_hash(path: Path) -> str:
    """Hash a file's bytes by sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_hash(paths: Iterable[Path]) -> str:
    """Hash the hashes of files, in the order given, by sha256."""
    return hashlib.sha256("".join(map(file_hash, paths)).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(aside)`, flush, rename to `path`: the file is whole or not there."""
    aside = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    write(aside)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write JSON by `write_whole`; what JSON has no type for is written as text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_json(path: Path, error: type[Exception], remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises `error` naming the file and what to do."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: not valid JSON ({reason}); {remedy}") from reason
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}; {remedy}")
    return content


@contextmanager
def locked(folder: Path, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """Keep a folder for this process while the block lasts; make it if it is not there.

    The lock ends with the process, however that ends. Raises `error` where another process holds
    it, or where nothing can be written.
    """
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as reason:
        raise error(
            f"{folder}: another run is at work in this folder; wait for it, stop it, or choose "
            "another output folder"
        ) from reason
    except OSError as reason:
        raise error(
            f"cannot write below {folder.parent} ({reason.strerror}): choose another output "
            "folder, or change who may write there"
        ) from reason
    try:
        yield
    finally:
        lock.release()
