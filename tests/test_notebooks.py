"""The six notebooks on a model in published form and on data like MMEB, by plain papermill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
from published_form import write_data, write_model

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
SMALL = {"steps": 2, "batch_size": 4, "max_length": 96, "image_tokens": 16, "logging_steps": 1}
CHANGES = {
    "stage1": {**SMALL, "patch_mask_rate": 0.5},
    "stage2": SMALL,
    "stage3": {**SMALL, "mini_batch_size": 4, "same_task_block": 0},
    "evaluation": {"n_queries": 8},
}


def run_notebook(path: Path, out: Path, parameters: dict) -> nbformat.NotebookNode:
    """Run a notebook as a user does, in the repository's folder of notebooks."""
    os.environ["PYTHONPATH"] = str(ROOT)
    papermill.execute_notebook(
        str(path), str(out / path.name), parameters=parameters, cwd=str(ROOT / "notebooks"),
        kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    return nbformat.read(out / path.name, as_version=4)


def read_outputs(notebook: nbformat.NotebookNode) -> str:
    """All that the outputs of a notebook say."""
    outputs = (each for cell in notebook.cells for each in cell.get("outputs", []))
    return "\n".join(
        str(dict(each.get("data", {}))) + str(each.get("text", "")) for each in outputs
    )


def check_road(family: str, folder: Path, shared: Path, **data) -> None:
    """Run all six notebooks on a published model of `family` and MMEB-like data."""
    model = write_model(folder / f"Tiny-{family}", family, shared)
    parameters = {"profile": "smoke", "model": str(model), "changes": CHANGES}
    parameters["data"] = str(write_data(folder / "mmeb", **data))
    said = {
        path.name[:2]: read_outputs(run_notebook(path, folder, parameters)) for path in NOTEBOOKS
    }
    assert len(said) == 6
    for number in ("02", "05"):  # what only the built-in world can show
        assert "Left out" in said[number]
    assert "image/png" in said["04"] and "Country211" in said["04"]
    assert not (model / "cocoa.json").exists(), "the user's folder is left as it was"


def test_all_notebooks_run_on_a_published_model_and_mmeb_rows(tmp_path):
    """Small files of our own: `tests/nightly` takes the real tokenizer and all families."""
    check_road("qwen2_vl", tmp_path, tmp_path / "nothing shared")


def test_papermill_with_a_profile_as_its_file_stops_before_anything_trains(tmp_path):
    profile = ROOT / "notebooks" / "profiles" / "smoke.yaml"
    command = [sys.executable, "-m", "papermill", str(NOTEBOOKS[1]), str(tmp_path / "out.ipynb"),
               "-f", str(profile), "--cwd", str(ROOT / "notebooks"), "-k", "python3"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode
    assert "name the profile, -p profile NAME" in done.stderr
