"""docs/names.md: each name that it lists exists, and is listed once."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "names.md"
ROWS = re.findall(r"^\| (`.+?`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
NAMES = [name for row in ROWS for name in re.findall(r"`([\w.]+)`", row)]


@pytest.mark.parametrize("name", NAMES)
def test_a_listed_name_exists(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(f"cocoa_lib.{module}"), attribute)


def test_no_name_is_listed_twice():
    assert len(NAMES) > 60
    assert sorted(NAMES) == sorted(set(NAMES))
