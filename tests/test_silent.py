"""What would go wrong without a word: other data taken for the same, settings that nobody hears, old beside new."""

# ruff: noqa: F811 (a fixture is imported, and named as an argument)
from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_train import go, home, tiny  # noqa: F401 (home is a fixture)

from cocoa_lib.corruption import stage2_batch
from cocoa_lib.data import corpus, pairs
from cocoa_lib.evaluate.score import write_results
from cocoa_lib.inputs import Inputs
from cocoa_lib.items import InputError
from cocoa_lib.recipes import make_recipe
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
        found.add(corpus.fingerprint(tmp_path / str(i)))
    assert len(found) == 5


def test_no_old_scores_beside_new_ranks(tmp_path, monkeypatch):
    def results(value):
        return pd.DataFrame(
            [
                {
                    "task": "Digits",
                    "meta_task": "classification",
                    "in_distribution": True,
                    "n_candidates": 10,
                    "metric": "p@1",
                    "value": value,
                    "evaluator": "e",
                }
            ]
        )

    ranks = pd.DataFrame({"task": ["Digits"] * 4, "query": range(4), "rank": 2, "n_candidates": 10})
    write_results(results(0.0), ranks, tmp_path, {})
    monkeypatch.setattr("cocoa_lib.evaluate.score.average_intervals", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_results(results(100.0), ranks.assign(rank=1), tmp_path, {})
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.filterwarnings("ignore")
def test_settings_of_sentence_transformers_are_heard(home):
    from sentence_transformers import SentenceTransformer

    how = {"trust_remote_code": True, "device": "cpu"}
    model = SentenceTransformer(
        str(home / "stage3"), model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"}, **how
    )
    assert model[0].model.dtype == torch.bfloat16 and model[0].model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="max_length: not a setting"):
        SentenceTransformer(str(home / "stage3"), processor_kwargs={"max_length": 16}, **how)


def test_a_picture_and_its_copy_fit(small, picture):
    _, inputs = small
    recipe = make_recipe("stage2", {"image_weight": 0.5, "max_length": 64})
    mine = Inputs(inputs.tokenizer, copy.deepcopy(inputs.image_processor), max_length=64)
    mine.image_processor.size = replace(mine.image_processor.size, longest_edge=10**6)
    mine.limit_images(recipe.image_limit(64))
    row = {"text": "", "image": picture(1280, 640), "target": "a large red circle", "draw": 0}
    batch = stage2_batch([row], mine, recipe, 0)
    assert batch["input_ids"].shape[1] <= 64 and (batch["labels"] != -100).any()


def test_a_bad_first_row_is_skipped_too(tmp_path):
    path = own_pairs(tmp_path, first=[{"image": "gone.png", "text": "lost"}])
    made = pairs.build_pairs(path, tmp_path / "data", on_bad_row="skip", progress=False)
    assert (made["used"], made["skipped"]) == (20, 1)


def test_eos_may_be_the_unknown_token(small):
    _, inputs = small
    tokenizer = copy.deepcopy(inputs.tokenizer)
    tokenizer.unk_token = "<|endoftext|>"
    assert Inputs(tokenizer, inputs.image_processor, eos_token="<|endoftext|>").eos_id == tokenizer.pad_token_id
    for each in (tokenizer, inputs.tokenizer):
        with pytest.raises(InputError, match=r"the tokenizer lacks <\|nope\|>"):
            Inputs(each, inputs.image_processor, eos_token="<|nope|>")


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
