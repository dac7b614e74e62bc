"""Every measurement, one after the other, each in a process of its own: `make bench`.

The libraries are imported once, in the process that multiprocessing's forkserver forks the scripts from: each starts as in a
fresh interpreter, with nothing that another one left (threads, compiled code, freed blocks). One that measures memory imports
them once more, for a forkserver of its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from multiprocessing.context import ForkServerContext

PRELOAD = ["torch", "transformers", "sentence_transformers", "cocoa_lib.objectives", "cocoa_lib.embedder"]
SCRIPTS = ["stages", "logits", "encode", "gradcache", "ranking", "input_side", "packing", "attention", "growth"]


def forkserver() -> ForkServerContext:
    """What starts processes with the libraries imported, and clean of threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run(script: str) -> None:
    sys.argv = [script]  # called by itself, without arguments
    # A forkserver's child starts its own processes by forkserver as well, and then `encode`'s workers import everything anew.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    importlib.import_module(script).main()


def main() -> None:
    began = time.monotonic()
    for script in SCRIPTS:
        start = time.monotonic()
        process = forkserver().Process(target=run, args=(script,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"benchmarks/{script}.py failed, see above why; those after it were not run")
        now = time.monotonic()
        sys.stdout.write(f"{script} took {now - start:.0f} s, {now - began:.0f} s so far\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
