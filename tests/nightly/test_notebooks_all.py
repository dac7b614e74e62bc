"""The six notebooks on all three published families, with a task of 1,000 candidates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from published_form import FAMILIES  # noqa: E402
from test_notebooks import check_road  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_all_notebooks_run_on_every_published_family(tmp_path, family):
    check_road(family, tmp_path, TESTS.parent.parent / "shared" / "data", many=True)
