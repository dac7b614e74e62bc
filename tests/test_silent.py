"""What would go wrong without a word: other data taken for the same, settings that nobody hears, old beside new."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cocoa_lib.data import corpus, pairs, tables
from cocoa_lib.store import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def own_pairs(folder, n=20, first=()):
    (folder / "pics").mkdir()
    rng, rows = np.random.default_rng(0), list(first)
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / "pics" / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"thing number {i}", "class": "abc"[i % 3], "kind": "xy"[i % 2]})
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_other_settings_are_other_data(tmp_path):
    path = own_pairs(tmp_path)
    found = set()
    for i, how in enumerate(({}, {"seed": 1}, {"n_eval": 2}, {"max_side": 16}, {"class_column": "kind"})):
        pairs.build_pairs(path, tmp_path / str(i), progress=False, **how)
        found.add(tables.fingerprint(tmp_path / str(i)))
    assert len(found) == 5


def test_a_bad_first_row_is_skipped_too(tmp_path):
    path = own_pairs(tmp_path, first=[{"image": "gone.png", "text": "lost"}])
    made = pairs.build_pairs(path, tmp_path / "data", on_bad_row="skip", progress=False)
    assert (made["used"], made["skipped"]) == (20, 1)


def test_the_commit_is_this_packages_own(tmp_path):
    shutil.copytree(ROOT / "cocoa_lib", tmp_path / ".venv/lib/cocoa_lib")
    (tmp_path / ".gitignore").write_text(".venv\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    code = "from cocoa_lib.store.checkpoint import provenance; print(provenance()['commit'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / ".venv/lib")},
    )
    assert done.stdout.strip() == "unknown" and checkpoint.provenance()["commit"] != "unknown"


def test_one_class_is_no_training_subset(tmp_path):
    path = own_pairs(tmp_path)
    path.write_text(path.read_text().replace('"class": "a"', '"class": "b"').replace('"class": "c"', '"class": "b"'))
    pairs.build_pairs(path, tmp_path / "data", progress=False)
    assert corpus.subsets(tmp_path / "data") == ["ImageToText", "TextToImage"]
