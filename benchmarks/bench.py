"""Every measurement, each in a process of its own, two at a time: `make bench`.

A process has one thread, so that each has a core to itself on two; what a neighbour takes of the memory's speed hits both sides
of a ratio, which run in turn. A script that starts loaders beside the model takes both cores: it runs alone, first.

The libraries are imported once, in the process that multiprocessing's forkserver forks the scripts from: each starts as in a
fresh interpreter, with nothing that another one left (threads, compiled code, freed blocks). One that measures memory imports
them once more, for a forkserver of its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext

PRELOAD = ["torch", "transformers", "sentence_transformers", "cocoa_lib.embedder", "cocoa_lib.reconstruction"]
ALONE = ["input_side"]
# The longest first.
BESIDE = ["gradcache", "growth", "logits", "stages", "packing", "ranking", "attention"]


def forkserver() -> ForkServerContext:
    """What starts processes with the libraries imported, and clean of threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run(script: str) -> None:
    sys.argv = [script]  # called by itself, without arguments
    # A forkserver's child starts its own processes by forkserver as well, and then a loader's workers import everything anew.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    importlib.import_module(script).main()


def measure(script: str) -> str | None:
    """Runs it and says how long it took; its name if it failed."""
    start = time.monotonic()
    process = forkserver().Process(target=run, args=(script,))
    process.start()
    process.join()
    sys.stdout.write(f"{script} took {time.monotonic() - start:.0f} s\n")
    sys.stdout.flush()
    return script if process.exitcode else None


def main() -> None:
    start = time.monotonic()
    failed = [measure(script) for script in ALONE]
    with ThreadPoolExecutor(2) as pool:
        failed += pool.map(measure, BESIDE)
    sys.stdout.write(f"all took {time.monotonic() - start:.0f} s\n")
    if names := ", ".join(f"benchmarks/{script}.py" for script in failed if script):
        raise SystemExit(f"failed, see above why: {names}; the others are measured")


if __name__ == "__main__":
    main()
