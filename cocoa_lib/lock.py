"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


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
                "%s: this file system has no locks (%s); see to it that one run at a time uses it", folder, reason
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
