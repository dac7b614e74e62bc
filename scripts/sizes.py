"""Print how large the project is, against its limits: `python scripts/sizes.py`.

Code lines hold code: blank lines, comments and docstrings are not counted. Exits with 1 where a
limit is passed.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHOD = "attention inputs corruption backbone reconstruction contrastive embedder recipes".split()
LIMITS = {
    "the method": 1000,
    "cocoa_lib": 4200,
    "a file": 300,
    "a function": 50,
    "tests, all lines": 8000,
    "files under reports/": 200,
}
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count_lines(text: str) -> set[int]:
    """The numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        holds_docstring = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        if holds_docstring and ast.get_docstring(node, clean=False) is not None:
            string = node.body[0]
            lines -= set(range(string.lineno, string.end_lineno + 1))
    return lines


def measure_functions(text: str, lines: set[int]) -> dict[str, int]:
    """Name -> code lines of every function, its signature included."""
    return {
        node.name: len(lines & set(range(node.lineno, node.end_lineno + 1)))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def main() -> None:
    files: dict[str, int] = {}
    functions: dict[str, int] = {}
    for path in sorted((ROOT / "cocoa_lib").rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT / "cocoa_lib"))
        lines = count_lines(text)
        files[name] = len(lines)
        functions |= {
            f"{name}:{function}": n for function, n in measure_functions(text, lines).items()
        }
    method = {f"{name}.py" for name in METHOD}
    rooms: Counter[str] = Counter()
    for name, n in files.items():
        inside = name.split("/")[0] + "/" if "/" in name else "leaves"
        rooms["the method" if name in method else inside] += n
    tests = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "tests").rglob("*.py")
    )
    command = ["git", "ls-files", "reports"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    found = {
        "the method": rooms["the method"],
        "cocoa_lib": sum(files.values()),
        "a file": max(files.values()),
        "a function": max(functions.values()),
        "tests, all lines": tests,
        "files under reports/": len(listed.stdout.splitlines()),
    }
    print("code lines a file")
    for name, n in files.items():
        print(f"  {n:5d}  {name}{'  <- the method' if name in method else ''}")
    print("a room")
    for name, n in rooms.most_common():
        print(f"  {n:5d}  {name}")
    print("the longest functions")
    for name, n in Counter(functions).most_common(12):
        print(f"  {n:5d}  {name}")
    print("against the limits")
    for name, limit in LIMITS.items():
        print(f"  {found[name]:5d}  of {limit:5d}  {name}{'  OVER' if found[name] > limit else ''}")
    sys.exit(any(found[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    main()
