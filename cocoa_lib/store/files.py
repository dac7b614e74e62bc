"""Files that are whole or not there: written aside, flushed to the disk, renamed; and the hashes that tell them apart."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

logger = logging.getLogger(__name__)


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


@contextmanager
def locked(folder: Path, error: type[Exception] = RuntimeError) -> Iterator[None]:
    """The folder is this process's alone while the block lasts; made if it is not there.

    A lock of the kernel's: it ends with the process, however that ends, so a killed run leaves nothing to clear away.
    Raises `error` where another process holds it, or where nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as reason:
        raise error(
            f"cannot write below {folder.parent} ({reason.strerror}): choose another output folder, or change who may "
            "write there"
        ) from reason
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as reason:
            file.seek(0)
            raise error(
                f"{folder}: another run (process {file.read() or 'unknown'}) is at work in this folder; wait for it, stop it, "
                "or choose another output folder"
            ) from reason
        except OSError as reason:
            logger.warning(
                "%s: this file system has no locks (%s); see to it that one run at a time uses it",
                folder,
                reason,
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
