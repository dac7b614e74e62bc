"""The six notebooks on all three published families, with a task of 1,000 candidates, and on a user's pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image
from published_form import FAMILIES
from test_notebooks import NOTEBOOKS, check_road, run_notebook


@pytest.mark.parametrize("family", FAMILIES)
def test_all_notebooks_run_on_every_published_family(tmp_path, family):
    check_road(family, tmp_path, SHARED, many=True)


def test_all_notebooks_run_on_a_users_pairs(tmp_path):
    rng, lines = np.random.default_rng(0), []
    for i in range(64):
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        row = {"image": f"{i}.png", "text": f"thing number {i}", "class": f"kind {i % 4}"}
        lines.append(json.dumps(row))
    table = tmp_path / "mine.jsonl"
    table.write_text("\n".join(lines), encoding="utf-8")
    fast = {"steps": 2, "batch_size": 4, "logging_steps": 1}
    contrastive = fast | {"mini_batch_size": 4, "same_task_block": 0}
    changes = {"stage1": fast, "stage2": fast, "stage3": contrastive}
    for path in NOTEBOOKS:
        run_notebook(path, tmp_path, {"profile": "smoke", "data": str(table), "changes": changes})
