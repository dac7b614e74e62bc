"""The six notebooks on all three published families, with a task of 1,000 candidates, and on a user's pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from published_form import FAMILIES  # noqa: E402
from test_notebooks import (  # noqa: E402
    NOTEBOOKS,
    check_road,  # noqa: E402
    run_notebook,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_notebooks_run_on_every_published_family(tmp_path, family):
    check_road(family, tmp_path, TESTS.parent.parent / "shared" / "data", many=True)


def test_all_notebooks_run_on_a_users_pairs(tmp_path):
    rng, lines = np.random.default_rng(0), []
    for i in range(64):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"thing number {i}", "class": f"kind {i % 4}"}))
    table = tmp_path / "mine.jsonl"
    table.write_text("\n".join(lines), encoding="utf-8")
    fast = {"steps": 2, "batch_size": 4, "logging_steps": 1}
    changes = {"stage1": fast, "stage2": fast, "stage3": {**fast, "mini_batch_size": 4, "same_task_block": 0}}
    for path in NOTEBOOKS:
        run_notebook(path, tmp_path, {"profile": "smoke", "data": str(table), "changes": changes})
