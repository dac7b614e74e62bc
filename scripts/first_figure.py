"""How long a reader of a notebook waits for its first picture: a new kernel, then cell by cell with the committed parameters.

    python scripts/first_figure.py benchmarks/results/first_figure.csv

What the notebooks need (runs/smoke) has to be there: `make reproduce PROFILE=smoke`. Seconds of a round each, after
one round that is not counted.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5


def has_picture(cell: nbformat.NotebookNode) -> bool:
    """A figure, or a drawing in HTML, as the explorer of masks shows."""
    data = [output.get("data", {}) for output in cell.get("outputs", [])]
    return any("image/png" in each or "<svg" in str(each.get("text/html", "")) for each in data)


async def wait(path: Path) -> tuple[float, int]:
    """Seconds until the first picture, the start of the kernel included, and the number of the cell that shows it."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    start = time.perf_counter()
    async with client.async_setup_kernel():
        for i, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                await client.async_execute_cell(cell, i)
                if has_picture(cell):
                    return time.perf_counter() - start, i
    raise SystemExit(f"{path.name} shows no picture")


def main(out: Path) -> None:
    rows = []
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        found = [asyncio.run(wait(path)) for _ in range(ROUNDS + 1)][1:]
        seconds = pd.Series([each for each, _ in found])
        rows.append({"notebook": path.stem, "cell": found[0][1], "seconds": seconds.median(), "lowest": seconds.min(),
                     "highest": seconds.max(), "n": ROUNDS})  # fmt: skip
    table = pd.DataFrame(rows).round(2)
    table.to_csv(out, index=False)
    print(table.to_string(index=False))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
