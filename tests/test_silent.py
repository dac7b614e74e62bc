"""What would go wrong without a word: other data taken for the same, settings that nobody hears, old beside new."""

# ruff: noqa: F811 (a fixture is imported, and named as an argument)
from __future__ import annotations

import copy
import json
import os
import re
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
from test_corpus import write
from test_train import go, home, tiny  # noqa: F401 (home is a fixture)

from cocoa_lib.corruption import stage1_batch, stage2_batch
from cocoa_lib.data import corpus, pairs
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding
from cocoa_lib.evaluate.score import write_results
from cocoa_lib.inputs import Inputs
from cocoa_lib.items import InputError
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run.stage import train_backbone
from cocoa_lib.run.trainers import ReconstructionTrainer
from cocoa_lib.store import checkpoint
from cocoa_lib.store.checkpoint import CheckpointError

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


def test_a_model_from_elsewhere_takes_the_recipes_length(home, tmp_path):
    folder = shutil.copytree(home / "causal", tmp_path / "raw")
    (folder / "cocoa.json").unlink()
    out = go(home, "stage1", tmp_path / "out", tiny("stage1", steps=1, max_length=8192), parent=folder)
    assert checkpoint.read_meta(out)["max_length"] == 8192


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


def test_a_tokenizer_is_of_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {})
    monkeypatch.setattr("cocoa_lib.run.stage.run_stage", lambda stage, recipe, *, parent, **rest: parent)
    shape = {
        "vocab_size": 600,
        "image_pixels": 1024,
        "layers": 1,
        "heads": 2,
        "vision_dim": 32,
        "vision_layers": 1,
        "patch_size": 8,
        "hidden_size": 32,
    }
    found = []
    for word in ("zibzab", "quorlix"):
        write(
            tmp_path / word,
            "corpus/train",
            {"image_path": ["a.png"] * 2, "kind": ["caption", "qa"], "question": ["", "what?"], "answer": [word] * 2},
        )
        folder = train_backbone(tmp_path / word, tmp_path / "out", shape, make_recipe("causal"), seed=0)
        found.append(len(Inputs.load(folder).text_ids(word)))
    assert found == [1, 1]


def test_the_first_token_is_not_hidden_on_either_side(small):
    model, inputs = small
    rows = [{"text": "", "image": None, "target": t, "draw": i} for i, t in enumerate(["red", "a large red circle"])]
    recipe, losses = make_recipe("stage1", {"text_mask_rate": 1.0, "image_weight": 0.0}), []
    for side in ("right", "left"):
        batch = stage1_batch(rows, replace(inputs, padding_side=side), recipe, 0)
        module = Reconstruction(model, layout="bidirectional").eval()
        losses.append(float(module(**batch)["text_loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3), np.uint8), float("nan"), {"bytes": b"", "path": None}, [None], 5]
)
def test_what_is_no_picture_is_named_and_skipped(small, image):
    embedder = CocoaEmbedder(EosEmbedding(*small))
    some = ["a", {"text": "b", "image": image}]
    with pytest.raises(InputError, match="item 1: image: expected a path or a PIL image, found"):
        embedder.encode(some)
    assert np.isnan(embedder.encode(some, on_bad_item="skip")).all(1).tolist() == [False, True]


def test_a_folder_with_files_is_refused_before_training(home, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    monkeypatch.setattr("cocoa_lib.run.stage._run", lambda *_: pytest.fail("training began"))
    with pytest.raises(CheckpointError, match="holds files that are no checkpoint"):
        go(home, "stage1", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_picture_and_its_copy_fit(small, picture):
    _, inputs = small
    recipe = make_recipe("stage2", {"image_weight": 0.5, "max_length": 64})
    mine = Inputs(inputs.tokenizer, copy.deepcopy(inputs.image_processor), max_length=64)
    mine.image_processor.size = replace(mine.image_processor.size, longest_edge=10**6)
    mine.limit_images(recipe.image_limit(64))
    row = {"text": "", "image": picture(1280, 640), "target": "a large red circle", "draw": 0}
    batch = stage2_batch([row], mine, recipe, 0)
    assert batch["input_ids"].shape[1] <= 64 and (batch["labels"] != -100).any()


@pytest.mark.parametrize(
    "row, message",
    [
        (("", "caption", "", "no picture"), "neither text nor picture"),
        (("a.png", "caption", "", ""), "no text to restore"),
    ],
)
def test_a_row_without_two_sides_is_named_before_training(home, tmp_path, row, message, monkeypatch):
    data = shutil.copytree(home / "world", tmp_path / "world")
    table = pd.read_parquet(data / "corpus/train.parquet")
    table.loc[0] = [row[0] and table.loc[0, "image_path"], *row[1:]]
    table.to_parquet(data / "corpus/train.parquet", index=False)
    monkeypatch.setattr(ReconstructionTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    recipe = tiny("stage2", sources="captions", steps=10)
    with pytest.raises(InputError, match=f"world: {message}; mend or leave out the row with text"):
        go(home, "stage2", tmp_path / "out", recipe, data=data)


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


def test_only_steps_that_count_for_a_gpu_take_one():
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    head, *rules = re.split(r"^rule ", text, flags=re.M)
    assert "+ SLOT" not in head
    assert all(("gpu=1" in rule) == ("SLOT" in rule) for rule in rules)


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
