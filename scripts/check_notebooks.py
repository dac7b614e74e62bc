#!/usr/bin/env python
"""Check that notebooks are fit to be committed.

    python scripts/check_notebooks.py notebooks            # a folder, or notebook files

A notebook is valid nbformat, has exactly one code cell tagged `parameters`, names the kernel `python3`, was run once
from top to bottom (execution counts 1..n) without an error, holds no absolute path of somebody's machine, and is
smaller than 3 MB. It reads well: at most 14 code cells of at most 12 lines of at most 100 columns, fewer than its
Markdown cells, none of which defines a class. Prints one line a fault and exits 1 when there is one.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

MAX_BYTES = 3_000_000
MAX_CELLS, MAX_LINES, MAX_COLUMNS = 14, 12, 100
ROOT = Path(__file__).resolve().parent.parent
# Where a path of a particular machine begins: not inside a web address or a longer path.
START = r"(?:(?<![\w./:~-])|(?<=file://))"
HOME_LIKE = re.compile(
    START + r"(?:/home/\w+|/Users/\w+|/root\b|/tmp/\w+|/private/\w+|/var/folders/\w+)|\b[A-Za-z]:\\+Users\\+\w+"
)


def find_notebooks(paths: list[str]) -> list[Path]:
    """The notebook files named, and those in the folders named (checkpoints left out), in order."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"no such notebook or folder: {path}")
    return found


def texts(cell) -> Iterator[tuple[str, str]]:
    """(where, text) of everything in a cell that a reader can see as text: source, streams, results, tracebacks."""
    yield "source", cell.source
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.name, output.text
        elif output.output_type == "error":
            yield "error", "\n".join(output.traceback)
        else:
            for kind, value in output.data.items():
                if kind.startswith("image/") and kind != "image/svg+xml":
                    continue
                yield kind, value if isinstance(value, str) else repr(value)


def machine_path(text: str) -> str | None:
    """The first absolute path of a particular machine in `text`, or None."""
    for own in {str(ROOT), str(Path.home())}:
        if len(own) > 1 and re.search(START + re.escape(own) + r"(?![\w-])", text):
            return own
    match = HOME_LIKE.search(text)
    return match.group(0) if match else None


def check_style(cells: list) -> Iterator[str]:
    """What makes a notebook hard to read, a sentence each."""
    code = [cell.source for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    n_markdown = sum(cell.cell_type == "markdown" for cell in cells)
    if len(code) > MAX_CELLS:
        yield f"has {len(code)} code cells; at most {MAX_CELLS}"
    if n_markdown <= len(code) > 1:
        yield f"has {n_markdown} Markdown cells for {len(code)} code cells; text comes first"
    for source in code:
        start, lines = source.splitlines()[0][:40], source.splitlines()
        if len(lines) > MAX_LINES:
            yield f"a cell of {len(lines)} lines ({start!r}); at most {MAX_LINES}"
        if (longest := max(map(len, lines))) > MAX_COLUMNS:
            yield f"a line of {longest} columns in cell {start!r}; at most {MAX_COLUMNS}"
        if re.search(r"^\s*class \w", source, re.MULTILINE):
            yield f"a cell defines a class ({start!r}); it belongs into the library"


def check(path: Path, max_bytes: int = MAX_BYTES) -> list[str]:
    """The faults of one notebook, each a sentence; an empty list when it is fit."""
    size = path.stat().st_size
    faults = [f"is {size / 1e6:.1f} MB; the limit is {max_bytes / 1e6:.1f} MB"] if size > max_bytes else []
    try:
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds, from JSON's to jsonschema's
        return [*faults, f"is not a valid notebook: {str(error).splitlines()[0]}"]
    if notebook.nbformat != 4:
        return [*faults, f"is nbformat {notebook.nbformat}, not 4"]

    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        faults.append(f"names the kernel {kernel!r}, not 'python3'")

    tagged = {tag: [] for tag in ("parameters", "injected-parameters")}
    expected = 1
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        for tag, cells in tagged.items():
            if tag in tags:
                cells.append(cell)
        for where, text in texts(cell):
            if found := machine_path(text):
                faults.append(f"cell {number}: {where} names a path of one machine: {found}")
        if cell.cell_type != "code":
            continue
        if any(o.output_type == "error" for o in cell.outputs) and "raises-exception" not in tags:
            faults.append(f"cell {number}: has an error among its outputs")
        if cell.source.strip():
            if cell.execution_count != expected:
                faults.append(
                    f"cell {number}: execution count is {cell.execution_count}, expected {expected}; "
                    "restart the kernel and run all cells"
                )
                expected = cell.execution_count or expected
            expected += 1

    if [cell.cell_type for cell in tagged["parameters"]] != ["code"]:
        faults.append(f"has {len(tagged['parameters'])} cells tagged 'parameters'; it takes one code cell")
    if tagged["injected-parameters"]:
        faults.append("has a cell tagged 'injected-parameters': it is papermill's output, not a source notebook")
    return faults + list(check_style(notebook.cells))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["notebooks"], help="notebooks, or folders of them")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="largest size of one notebook (%(default)s)")
    options = parser.parse_args(arguments)
    notebooks = find_notebooks(options.paths)
    faults = [(path, fault) for path in notebooks for fault in check(path, options.max_bytes)]
    for path, fault in faults:
        print(f"{path}: {fault}")
    print(f"{len(notebooks)} notebooks checked; faults: {len(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
