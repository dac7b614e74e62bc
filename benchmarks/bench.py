"""`make bench`: twelve ratios that a user decides by -> results/bench.json and docs/speed.md.

Two processes at a time, one thread each. A row that fails is named; the others are measured.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import page
import step
import torch
from common import Record, keep, say
from rows import rows


def measure(name: str, runs: str) -> Record | str:
    """The row, or why there is none."""
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        return rows(runs)[name]() | {"took": round(time.monotonic() - start)}
    except Exception as error:  # a kernel, memory, an assertion: each in its own type
        return f"{name}: not measured: {type(error).__name__}: {error}"


def main() -> None:
    start, records, failed = time.monotonic(), [], []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, context) as pool:
        _ = step.few_rows(folder).data  # written once
        for future in [pool.submit(measure, name, folder) for name in rows(folder)]:
            found = future.result()
            (failed if isinstance(found, str) else records).append(found)
            print(found if isinstance(found, str) else say(found), flush=True)
    seconds = round(time.monotonic() - start)
    print(f"all took {seconds} s")
    if failed:
        sys.exit(f"{len(failed)} of {len(records) + len(failed)} rows not measured; nothing kept")
    keep("bench", records, seconds=seconds)
    page.write()


if __name__ == "__main__":
    main()
