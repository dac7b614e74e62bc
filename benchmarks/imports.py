"""What importing this package takes, against an empty interpreter and against the libraries that it stands on."""

from __future__ import annotations

import subprocess
import sys

from common import in_turn, record, save

# In one process, so that what both need counts once: the libraries, then what this package adds.
STACK = """import time
start = time.perf_counter()
import torch, transformers, sentence_transformers
stack = time.perf_counter()
import cocoa_lib.embedder
print(stack - start, time.perf_counter() - start)"""


def importing(n: int = 5) -> list[dict]:
    """A fresh interpreter each: this package's imports against those of what it stands on."""

    def run(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout  # noqa: S603

    seconds = in_turn({"package": lambda: run("import cocoa_lib"), "nothing": lambda: run("pass")}, n)
    stack, whole = zip(*[map(float, run(STACK).split()) for _ in range(n)], strict=True)
    return [
        record("import cocoa_lib", "time, import cocoa_lib / an empty interpreter", seconds["package"], seconds["nothing"]),
        record("import cocoa_lib.embedder", "time, torch, transformers, sentence_transformers and cocoa_lib.embedder / the first "
               "three", whole, stack),
    ]  # fmt: skip


def main() -> None:
    save("imports", importing(), "time; n 5 interpreters")


if __name__ == "__main__":
    main()
