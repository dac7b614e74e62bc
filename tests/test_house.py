"""Who may know whom: the rooms of cocoa_lib import downwards only, and nothing imports in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parent.parent / "cocoa_lib"
LEAVES = {"items", "packing", "positions", "kernels"}
METHOD = set("attention inputs corruption backbone reconstruction contrastive".split())
METHOD |= {"embedder", "recipes"}
BELOW = {
    "leaves": {"method"},  # packing reads a batch as inputs makes it
    "method": {"leaves"},
    "store": {"leaves", "method"},
    "data": {"leaves", "method", "store"},
    "world": {"leaves", "method", "store", "data"},
    "evaluate": {"leaves", "method", "store", "data"},
    "run": {"leaves", "method", "store", "data", "world", "evaluate"},
    "show": {"leaves", "method", "store", "data", "world", "evaluate"},
}


def room(module: str) -> str:
    head = module.split(".")[0]
    return "leaves" if head in LEAVES else "method" if head in METHOD else head


def module_name(path: Path) -> str:
    parts = path.relative_to(LIB).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in LIB.rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """The modules of cocoa_lib that `module` imports anywhere, also inside functions."""
    path = FILES[module]
    package = list(path.relative_to(LIB).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = [part for part in base if part]
            for alias in node.names:
                whole, parent = ".".join([*base, alias.name]), ".".join(base)
                found.add(whole if whole in FILES else parent)
    return {name for name in found if name in FILES and name not in ("", module)}


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_room_imports_lower_rooms_only(module):
    own = room(module)
    for other in imports_of(module) if module else ():
        allowed = room(other) == own or room(other) in BELOW[own]
        # The embedder is what one takes away: it alone of the method opens a checkpoint.
        allowed |= module == "embedder" and room(other) == "store"
        assert allowed, f"{module} ({own}) imports {other} ({room(other)})"


def test_no_circles():
    graph = {name: imports_of(name) - {name.rpartition(".")[0]} for name in FILES if name}
    assert len(tuple(TopologicalSorter(graph).static_order())) >= len(FILES) - 1
