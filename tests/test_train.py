"""Runs: what a stage leaves, that it repeats to the bit, goes on after any interruption, and refuses what it must."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.nn.parallel import DistributedDataParallel

import cocoa_lib.inputs
from cocoa_lib import corruption, embedder
from cocoa_lib.backbone import open_backbone
from cocoa_lib.contrastive import CachedInfoNCE, pair_features
from cocoa_lib.corruption import stage1_batch
from cocoa_lib.data import corpus
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding
from cocoa_lib.items import InputError
from cocoa_lib.recipes import RECIPES, make_recipe
from cocoa_lib.reconstruction import Reconstruction, load_decoder
from cocoa_lib.run import stage as stage_module
from cocoa_lib.run import trainers
from cocoa_lib.run.__main__ import main
from cocoa_lib.run.plan import Planned, index_plan
from cocoa_lib.run.resume import TrainingError, Watch, last_whole_checkpoint
from cocoa_lib.run.sharding import join_processes
from cocoa_lib.run.stage import BUILDERS, check_parent, run_stage, train_backbone
from cocoa_lib.run.trainers import PlainTrainer, ReconstructionTrainer, training_arguments
from cocoa_lib.store.checkpoint import (
    CheckpointError,
    load_inputs,
    read_meta,
    save_checkpoint,
    weights_hash,
)
from cocoa_lib.store.files import file_hash
from cocoa_lib.world.backbone import new_backbone
from cocoa_lib.world.build import build

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

STAGES = ("causal", "stage1", "stage2", "stage3")
PARENT = {"causal": "init", "stage1": "causal", "stage2": "stage1", "stage3": "stage2"}
# Checkpoints at 2 and 4, log rows at 4 and 6: neither falls together, so a resumed run must carry half a log row.
TINY = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "max_length": 128, "save_steps": 2,
        "logging_steps": 4}  # fmt: skip
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3}


def tiny(stage, **values):
    extra = {"mini_batch_size": 3, "temperature": 0.1} if stage == "stage3" else {}
    return make_recipe(stage, TINY | extra | values)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `world`, `init` and the four stages from it, seed 0, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    build(folder / "world", seed=0, n_pairs=64, n_queries=8, n_corpus=16)
    rows = [*corpus.captions(folder / "world"), *corpus.questions(folder / "world")]
    model, inputs = new_backbone(
        [row["text"] + row["target"] for row in rows], vocab_size=400, image_pixels=1024, seed=0, hidden_size=64,
        layers=2, heads=2, vision_dim=32, vision_layers=1, patch_size=8,
    )  # fmt: skip
    save_checkpoint(folder / "init", model, inputs, {"stage": "init"})
    for stage in STAGES:
        go(folder, stage, folder / stage)
    return folder


def go(home, stage, out, recipe=None, **settings):
    settings = {"parent": home / PARENT[stage], "data": home / "world", "show_progress": False} | settings
    return run_stage(stage, recipe or tiny(stage), out=out, **settings)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(one, other):
    assert (one / "log.csv").read_text() == (other / "log.csv").read_text()
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert read_meta(one)["weights_sha256"] == read_meta(other)["weights_sha256"]


# --- what a run leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_a_whole_checkpoint(home, stage):
    folder, parent = home / stage, read_meta(home / PARENT[stage])
    meta = read_meta(folder)  # checks the weights against their hash
    assert meta["stage"] == stage and meta["layout"] == RECIPES[stage]().layout and meta["pooling"] == "eos"
    assert meta["eos_token"] == "<|im_end|>" and meta["max_length"] == 128
    assert meta["prompt"] == "<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>"
    assert meta["run"]["recipe"]["steps"] == 6 and meta["run"]["seed"] == 0
    assert meta["parent"] == f"{home.name}/{PARENT[stage]}", "found by its last two names, no path of this machine"
    assert meta["run"]["parent_stage"] == PARENT[stage]
    assert meta["run"]["parent_sha256"] == parent["weights_sha256"] != meta["weights_sha256"]
    log = pd.read_csv(folder / "log.csv")
    assert log["step"].tolist() == [4, 6] and np.isfinite(log["loss"]).all() and (log["loss"] > 0).all()
    if stage != "stage3":
        weight = meta["run"]["recipe"].get("image_weight", 0.0)
        assert np.allclose(log["loss"], log["text_loss"] + weight * log["image_loss"])
    assert not (home / f".{stage}.work").exists(), "no trace of the run is left beside its result"
    vectors = CocoaEmbedder.load(folder).encode([{"text": "a red circle"}])
    assert vectors.shape == (1, 64) and np.isclose(np.linalg.norm(vectors), 1)
    causal = open_backbone(folder, bidirectional=stage != "causal").config.text_config.is_causal
    assert causal == (stage == "causal")


def test_a_log_row_is_the_mean_of_its_steps(home, tmp_path):
    every = pd.read_csv(go(home, "stage1", tmp_path / "out", tiny("stage1", logging_steps=1)) / "log.csv")
    log = pd.read_csv(home / "stage1" / "log.csv")
    assert every["step"].tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "text_loss", "image_loss"):
        assert np.allclose(log[name], [every[name][:4].mean(), every[name][4:].mean()])
    assert log["learning_rate"].tolist() == every["learning_rate"][[3, 5]].tolist()


def test_stage3_learns(home, tmp_path):
    recipe = tiny("stage3", steps=20, batch_size=16, logging_steps=1, save_steps=100, temperature=0.2)
    loss = pd.read_csv(go(home, "stage3", tmp_path / "out", recipe) / "log.csv")["loss"]
    assert loss[-5:].mean() < loss[:5].mean() - 0.1


# --- the same again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_is_bit_equal_and_another_differs(home, stage, tmp_path):
    assert_same_run(go(home, stage, tmp_path / "again"), home / stage)
    other = go(home, stage, tmp_path / "other", seed=1)
    assert (other / "log.csv").read_text() != (home / stage / "log.csv").read_text()
    assert read_meta(other)["weights_sha256"] != read_meta(home / stage)["weights_sha256"]


def test_a_picture_is_read_once_and_keeping_it_changes_nothing(home, tmp_path, monkeypatch):
    """At a stage that goes through its pictures several times."""
    read = Counter()
    load = cocoa_lib.inputs.load_image
    monkeypatch.setattr(cocoa_lib.inputs, "load_image", lambda source: read.update([str(source)]) or load(source))
    assert_same_run(go(home, "stage1", tmp_path / "kept"), home / "stage1")
    assert set(read.values()) == {1}
    monkeypatch.setattr("cocoa_lib.run.stage.KEPT_IMAGES", 0)
    assert_same_run(go(home, "stage1", tmp_path / "read"), home / "stage1")
    assert max(read.values()) > 2


def test_a_finished_run_is_returned_and_another_configuration_refused(home, monkeypatch):
    out = home / "stage1"
    before = (out / "cocoa.json").read_bytes()
    monkeypatch.setitem(BUILDERS, "stage1", None)  # nothing may be trained
    assert go(home, "stage1", out) == out and (out / "cocoa.json").read_bytes() == before
    with pytest.raises(CheckpointError, match=r"another configuration \(different: recipe\)"):
        go(home, "stage1", out, tiny("stage1", steps=7))
    with pytest.raises(CheckpointError, match=r"\(different: seed\)"):
        go(home, "stage1", out, seed=3)
    with pytest.raises(CheckpointError, match=r"\(different: parent_sha256, parent_stage, stage\)|recipe"):
        go(home, "stage2", out)
    with pytest.raises(CheckpointError, match="different: data, parent_sha256"):
        go(home, "causal", home / "init")  # a checkpoint that no run made


def test_a_checkpoint_from_before_an_option_existed_is_still_the_same_run(home, tmp_path):
    out = shutil.copytree(home / "stage2", tmp_path / "out")
    meta = json.loads((out / "cocoa.json").read_text())
    del meta["run"]["recipe"]["image_weight"]
    (out / "cocoa.json").write_text(json.dumps(meta))
    assert go(home, "stage2", out) == out
    with pytest.raises(CheckpointError, match="different: recipe"):
        go(home, "stage2", out, tiny("stage2", image_weight=0.5))


def test_several_gpus_and_one_process_are_one_gpu(tmp_path):
    """transformers would wrap the model in DataParallel, which cuts pictures apart, and take a batch for each GPU."""

    class OnTwo(transformers.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    recipe = tiny("stage1")
    args = training_arguments(OnTwo, recipe, tmp_path, 0)
    assert args.train_batch_size == recipe.batch_size


def test_a_large_picture_does_not_end_a_run(home, tmp_path):
    """The processor would let it take more than max_length; `image_tokens` is what the recipe lets it."""
    folder = shutil.copytree(home / "causal", tmp_path / "causal")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] *= 100
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "cocoa.json").unlink()  # which would have seen that; as a model from elsewhere has none
    data = shutil.copytree(home / "world", tmp_path / "world")
    for file in (data / "images").rglob("*.png"):
        Image.open(file).resize((640, 640)).save(file)
    out = go(home, "stage1", tmp_path / "out", tiny("stage1", image_tokens=9), parent=folder, data=data)
    grid = load_inputs(out, read_meta(out)).process_images([Image.new("RGB", (640, 640))])[1]
    assert grid.prod() == 9 * 4
    go(
        home, "stage1", tmp_path / "half", tiny("stage1", steps=1), parent=folder, data=data
    )  # 1280, but half of 128 at most


def test_a_parent_without_our_record_is_told_by_its_weights(home, tmp_path):
    for name in ("one", "two"):
        folder = shutil.copytree(home / "causal", tmp_path / name)
        (folder / "cocoa.json").unlink()
    one, two = (check_parent("stage1", tmp_path / name, False) for name in ("one", "two"))
    assert one == two and one["weights_sha256"] == read_meta(home / "causal")["weights_sha256"]
    save_file(weights(home / "stage1"), tmp_path / "two" / "model.safetensors", {"format": "pt"})
    assert check_parent("stage1", tmp_path / "two", False) != one
    assert (
        check_parent("stage1", "Qwen/Qwen2-VL-2B-Instruct", False)["weights_sha256"]
        == "Qwen/Qwen2-VL-2B-Instruct"
    )


def test_a_learned_fill_stays_with_the_decoder(home, tmp_path):
    out = go(home, "stage1", tmp_path / "out", tiny("stage1", patch_fill="learned"))
    model = open_backbone(out, bidirectional=True)
    assert load_decoder(out, model).fill.abs().sum() > 0
    assert load_decoder(home / "stage1", model).fill is None


def test_stage2_with_the_picture_restored_too_is_a_run(home, tmp_path):
    out = go(home, "stage2", tmp_path / "out", tiny("stage2", image_weight=0.5))
    assert (pd.read_csv(out / "log.csv")["image_loss"] > 0).all()
    assert (out / "image_decoder.safetensors").is_file()


@pytest.mark.parametrize("token, added", [("<|gap|>", True), ("a", False)], ids=["added", "of the vocabulary"])
def test_the_mask_token_can_be_chosen_and_stays_with_the_checkpoint(home, tmp_path, token, added, monkeypatch):
    seen, write = [], corruption.mask_text
    monkeypatch.setattr("cocoa_lib.corruption.mask_text", lambda *a, **k: seen.append(k["mask_token_id"]) or write(*a, **k))
    before = load_inputs(home / "causal", read_meta(home / "causal"))
    go(home, "stage1", tmp_path / "stage1", tiny("stage1", mask_token=token))
    inputs = load_inputs(tmp_path / "stage1", read_meta(tmp_path / "stage1"))
    assert set(seen) == {inputs.tokenizer.convert_tokens_to_ids(token)} == {inputs.tokenizer.mask_token_id}
    assert len(inputs.tokenizer) == len(before.tokenizer) + added
    assert inputs.text_ids("a red circle") == before.text_ids("a red circle")
    one, other = (
        next(len(value) for name, value in weights(folder).items() if "embed_tokens" in name)
        for folder in (tmp_path / "stage1", home / "causal")
    )
    assert one == max(len(inputs.tokenizer), other)
    seen.clear()
    go(home, "stage2", tmp_path / "stage2", parent=tmp_path / "stage1")
    assert set(seen) == {inputs.tokenizer.mask_token_id}, "stage 2 goes on with it"


def test_empty_pictures_count_as_missing_and_no_picture_does_not(tmp_path):
    paths = [str(tmp_path / name) for name in ("empty.png", "gone.png", "there.png")]
    Path(paths[0]).touch()
    Path(paths[2]).write_bytes(b"x")
    with pytest.raises(InputError, match=f"^2 of the 3 picture files .* e.g. {paths[0]}, {paths[1]};"):
        corpus.check_images([*paths, None, ""])


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>"])
def test_a_mask_token_with_a_part_of_its_own_is_refused(home, tmp_path, token):
    with pytest.raises(InputError, match="has a part of its own in every input"):
        go(home, "stage1", tmp_path / "out", tiny("stage1", mask_token=token))


@pytest.mark.parametrize(
    "stage, item, message",
    [
        ("stage1", {"text": "", "target": "<|image_1|>", "image": ""}, "neither text nor picture"),
        ("stage1", {"text": "", "target": "a", "image": "1x300"}, "of 1 x 300 pixels"),
        ("stage2", {"text": "<|image_1|><|image_2|>", "target": "a", "image": "there"}, "marks 2 image"),
        ("stage3", {"text": "<|image_1|>", "image": ""}, r"neither text nor picture.*row with text '<\|image_1\|>'"),
    ],
)
def test_a_row_that_no_step_could_read_is_named_before_the_first(home, stage, item, message, tmp_path, monkeypatch):
    Image.new("RGB", (1, 300)).save(tmp_path / "strip.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    item = item | {
        "image": {"1x300": str(tmp_path / "strip.png"), "there": str(tmp_path / "there.png")}.get(item["image"], "")
    }
    if stage == "stage3":
        bad = datasets.Dataset.from_list([{"anchor": item, "positive": {"text": "a", "image": ""}}] * 8)
        monkeypatch.setattr(corpus, "pairs", lambda *_, **__: (bad, [8]))
    else:
        monkeypatch.setattr(corpus, "captions", lambda *_: [item] * 8)
        monkeypatch.setattr(corpus, "text_pairs", lambda *_: {})
    with pytest.raises(InputError, match=message):
        go(home, stage, tmp_path / "out")
    assert not list(tmp_path.glob(".out.work/checkpoint-*"))


def test_precision_is_the_recipes_and_not_the_launchers(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_same_run(home / "stage1", go(home, "stage1", tmp_path / "out"))


def test_a_length_that_the_parent_does_not_reach_is_said(home, tmp_path, caplog):
    go(home, "stage3", tmp_path / "out", tiny("stage3", max_length=512))
    assert "max_length 512: the parent was made for 128 tokens, which is used" in caplog.text


@pytest.mark.parametrize("stage", STAGES)
def test_missing_pictures_are_named_before_the_first_step(home, stage, tmp_path):
    shutil.copytree(home / "world", tmp_path / "world")
    pictures = sorted(path for path in (tmp_path / "world" / "images").rglob("*.png"))
    for path in pictures[::2]:
        path.unlink()
    with pytest.raises(
        InputError, match=r"\d+ of the \d+ picture files that this run needs are missing or empty, e.g. .*png"
    ):
        go(home, stage, tmp_path / "out", data=tmp_path / "world")
    assert not list(tmp_path.glob(".out.work/checkpoint-*")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_workers_change_nothing(home, stage, tmp_path):
    recipe = tiny(stage, workers=2)
    assert training_arguments(transformers.TrainingArguments, recipe, tmp_path, 0).dataloader_num_workers == 2
    assert_same_run(home / stage, go(home, stage, tmp_path / "out", recipe))


def test_a_run_with_packed_rows_learns_the_same(home, tmp_path):
    for stage in ("stage1", "stage2"):
        log = pd.read_csv(go(home, stage, tmp_path / stage, tiny(stage, packing=True)) / "log.csv")
        plain = pd.read_csv(home / stage / "log.csv")
        assert not log.equals(plain), "nothing was packed"
        assert np.allclose(log["loss"], plain["loss"], rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_gradient_checkpointing_trains_the_same(home, tmp_path, stage, monkeypatch):
    """With an adapter, whose dropout the second forward pass has to repeat, and in stage 3 within GradCache's."""
    from transformers import modeling_utils

    calls, checkpoint = [], modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *args, **kw: calls.append(1) or checkpoint(*args, **kw))
    plain = go(home, stage, tmp_path / "plain", tiny(stage, steps=3, **LORA))
    assert not calls
    saving = go(home, stage, tmp_path / "saving", tiny(stage, steps=3, gradient_checkpointing=True, **LORA))
    a, b = pd.read_csv(plain / "log.csv"), pd.read_csv(saving / "log.csv")
    losses = [name for name in a if name.endswith("loss") or name == "grad_norm"]
    assert calls and losses and np.allclose(a[losses], b[losses], rtol=1e-5, equal_nan=True)
    one, other = weights(plain), weights(saving)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6


def test_a_working_folder_of_another_configuration_is_refused(home, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, RuntimeError("stopped"))
    with pytest.raises(RuntimeError, match="stopped"):
        go(home, "stage2", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"\.out\.work: holds a run of another configuration \(different: seed\)"):
        go(home, "stage2", tmp_path / "out", seed=5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize(
    ("stage", "values"), [("stage1", {"steps": 2}), ("stage2", LORA | {"steps": 2}), ("stage3", {"steps": 2})]
)
def test_compiled_layers_train_the_same(home, tmp_path, stage, values):
    plain = go(home, stage, tmp_path / "plain", tiny(stage, **values))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dynamo, drawn = torch._dynamo.config, torch._inductor.config.fallback_random
    here = dynamo.patch(recompile_limit=dynamo.recompile_limit, optimize_ddp=dynamo.optimize_ddp)
    with here, torch._inductor.config.patch(fallback_random=drawn):
        compiled = go(home, stage, tmp_path / "compiled", tiny(stage, torch_compile=True, **values))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    a, b = pd.read_csv(plain / "log.csv"), pd.read_csv(compiled / "log.csv")
    losses = [name for name in a if name.endswith("loss")]  # with the same dropout, in GradCache's two passes as well
    assert losses and (a[losses] - b[losses]).abs().max().max() < 1e-6
    one, other = weights(plain), weights(compiled)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 5e-6


# --- interrupted --------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch, step, how):
    """At the loss of `step`: raise `how`, or send that signal to this process; steps before it are untouched."""
    original = PlainTrainer.checked

    def checked(self, loss):
        if self.state.global_step + 1 == step:
            if isinstance(how, BaseException):
                raise how
            os.kill(os.getpid(), how)
        return original(self, loss)

    monkeypatch.setattr(PlainTrainer, "checked", checked)


def killed_run(home, stage, out, values, where):
    """In a child process: run the command line until `where`, then SIGKILL oneself."""
    torch.set_num_threads(1)
    kill = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    patch = pytest.MonkeyPatch()
    if where == "finishing":  # all is trained and written aside, the last rename is missing
        replace = os.replace
        patch.setattr("cocoa_lib.store.checkpoint.os.replace", lambda a, b: kill() if str(b) == str(out) else replace(a, b))
    elif where == "saving":  # checkpoint-4 holds its weights but neither optimiser nor random state
        save = PlainTrainer._save
        patch.setattr(
            PlainTrainer, "_save",
            lambda self, *a, **k: (save(self, *a, **k), kill() if self.state.global_step == 4 else None),
        )  # fmt: skip
    else:
        stop_at(patch, where, signal.SIGKILL)
    command = [stage, "--parent", home / PARENT[stage], "--data", home / "world", "--out", out]
    main([str(word) for word in command] + ["--recipe", json.dumps(values)])


@pytest.fixture(scope="module")
def processes():
    """Child processes from one that has imported the library once, and nothing of this one's state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cocoa_lib.run"])
    return context


@pytest.mark.parametrize(
    "stage, where, extra",
    [("stage1", 6, LORA), ("stage3", 4, LORA), ("stage2", "saving", {}), ("causal", "finishing", {}), ("stage3", 2, {})],
)  # fmt: skip
def test_killed_and_resumed_is_the_uninterrupted_run(home, processes, stage, where, extra, tmp_path, caplog):
    """At a step, in the middle of a save, after the last step, before the first save; with dropout in the adapter."""
    whole = home / stage if not extra else go(home, stage, tmp_path / "whole", tiny(stage, **extra))
    recipe, out = tiny(stage, **extra), tmp_path / "out"
    child = processes.Process(target=killed_run, args=(home, stage, out, recipe.__dict__, where))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL and not out.exists()
    saved = sorted(path.name for path in (tmp_path / ".out.work").glob("checkpoint-*"))
    caplog.clear()
    assert_same_run(go(home, stage, out, recipe), whole)
    if where == "saving":
        assert saved == ["checkpoint-2", "checkpoint-4"]
        assert "checkpoint-4 is not whole ((unfinished)): removed, going on from the one before" in caplog.text
    elif where == 2:
        assert saved == [], "from the start, in the same order"
    else:
        assert saved and "not whole" not in caplog.text
    assert not (tmp_path / ".out.work").exists() and not (tmp_path / ".out.partial").exists()


def test_the_command_killed_at_a_random_moment_goes_on(home, tmp_path):
    """python -m cocoa_lib.run, from outside, at no chosen place; then the same command again (in this process)."""
    values = TINY | {"steps": 30, "mini_batch_size": 3}
    command = ["stage3", "--parent", home / "stage2", "--data", home / "world", "--out"]
    command = [str(word) for word in command]
    whole = tmp_path / "whole"
    main([*command, str(whole), "--recipe", json.dumps(values)])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "cocoa_lib.run", *command, str(tmp_path / "out"), "--recipe", json.dumps(values)],
        cwd=Path(corruption.__file__).parent.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    work, deadline = tmp_path / ".out.work", time.monotonic() + 120
    while not (work / "checkpoint-2").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.random() * 0.3)  # noqa: S311
    child.kill()
    child.wait()
    assert work.exists(), "killed before it was done"
    main([*command, str(tmp_path / "out"), "--recipe", json.dumps(values)])
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("stage, number", [("stage1", signal.SIGINT), ("stage3", signal.SIGTERM)])
def test_ctrl_c_or_a_schedulers_sigterm_saves_and_the_same_call_goes_on(home, stage, number, tmp_path, monkeypatch):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3; the same command goes on from there"):
            go(home, stage, tmp_path / "out")
    assert signal.getsignal(number) is handler
    checkpoint = tmp_path / ".out.work" / "checkpoint-3"
    spent = json.loads((checkpoint / "seconds.json").read_text())["seconds"]
    assert 0 < spent < 1000
    (checkpoint / "seconds.json").write_text('{"seconds": 1000}')  # as if the first attempt had taken long
    whole = json.loads((checkpoint / "complete.json").read_text())
    whole["seconds.json"] = file_hash(checkpoint / "seconds.json")
    (checkpoint / "complete.json").write_text(json.dumps(whole))
    assert_same_run(go(home, stage, tmp_path / "out"), home / stage)
    assert 1000 < read_meta(tmp_path / "out")["train_seconds"] < 2000, "the time of all attempts"
    assert 0 < read_meta(home / stage)["train_seconds"] < 1000


def test_ctrl_c_in_the_last_step_finishes(home, tmp_path, monkeypatch):
    stop_at(monkeypatch, 6, signal.SIGINT)
    assert_same_run(go(home, "stage2", tmp_path / "out"), home / "stage2")


def test_ctrl_c_twice_stops_at_once_but_sigterm_may_come_from_scheduler_and_launcher():
    watch = Watch()
    watch._interrupt(signal.SIGTERM, None)
    watch._interrupt(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        watch._interrupt(signal.SIGINT, None)


@pytest.mark.parametrize("damage", ["optimizer.pt", "model.safetensors", "rng_state.pth", "half", "both"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(home, damage, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, RuntimeError("stopped"))
        with pytest.raises(RuntimeError, match="stopped"):
            go(home, "stage2", tmp_path / "out")
    work = tmp_path / ".out.work"
    newest = work / "checkpoint-4"
    assert last_whole_checkpoint(work) == newest
    if damage == "half":
        (newest / "complete.json").unlink()
        (newest / "trainer_state.json").unlink()
    else:
        for folder in (newest, work / "checkpoint-2")[: 1 + (damage == "both")]:
            file = folder / ("scheduler.pt" if damage == "both" else damage)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    assert_same_run(go(home, "stage2", tmp_path / "out"), home / "stage2")
    what = {"half": "(unfinished)", "both": "scheduler.pt"}.get(damage, damage)
    warnings = [record.getMessage() for record in caplog.records if "not whole" in record.getMessage()]
    assert len(warnings) == 1 + (damage == "both")
    assert warnings[0].startswith(str(newest)) and f"({what})" in warnings[0]


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_a_stage_starts_from_the_one_before_unless_told(home, tmp_path):
    for stage, parent in (("stage1", "init"), ("stage2", "causal"), ("stage3", "stage1"), ("causal", "stage1")):
        with pytest.raises(
            CheckpointError, match=f"{stage} starts from a .* but .*{parent}.* is {parent}.*allow_parent"
        ):
            go(home, stage, tmp_path / "out", parent=home / parent)
    assert not list(tmp_path.iterdir()), "a refusal leaves nothing behind"
    out = go(home, "stage3", tmp_path / "out", tiny("stage3", steps=1), parent=home / "causal", allow_parent=True)
    assert read_meta(out)["run"]["parent_stage"] == "causal"


def test_parents_that_are_no_checkpoint(home, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        go(home, "stage1", tmp_path / "out", parent=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no config.json"):
        go(home, "stage1", tmp_path / "out", parent=tmp_path / "empty")


def test_altered_weights_are_noticed(home, tmp_path):
    copy = tmp_path / "causal"
    shutil.copytree(home / "causal", copy)
    assert read_meta(copy)["stage"] == "causal"
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    assert read_meta(copy, check=False)["stage"] == "causal"
    for use in (read_meta, CocoaEmbedder.load, lambda folder: go(home, "stage1", tmp_path / "out", parent=folder)):
        with pytest.raises(CheckpointError, match="the weights do not match cocoa.json"):
            use(copy)
    file.unlink()
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        read_meta(copy)
    (copy / "cocoa.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_meta(copy)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(home, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    for stage in ("stage1", "stage3"):
        with pytest.raises(TrainingError, match=r"the loss is nan at step [23]\. Lower learning_rate.*delete .*\.work"):
            go(home, stage, tmp_path / stage, tiny(stage, learning_rate=1e30, warmup_steps=0))
        assert not (tmp_path / stage).exists()
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C must work after a failed run"


@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "_finish"])
def test_a_full_disk_is_said_whoever_writes(home, where, tmp_path, monkeypatch):
    """As torch's own writer fails, in a checkpoint, and as safetensors does, in the finished folder."""
    from safetensors import SafetensorError

    said = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    said = said if where != "_finish" else SafetensorError("IoError: No space left on device (os error 28)")
    target = stage_module if where == "_finish" else transformers.Trainer

    def full(*args, **kwargs):
        raise said

    monkeypatch.setattr(target, where, full)
    with pytest.raises(TrainingError, match="the disk is full, a checkpoint could not be written below"):
        go(home, "stage1", tmp_path / "out")
    monkeypatch.undo()
    assert_same_run(go(home, "stage1", tmp_path / "out"), home / "stage1")


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_a_full_disk_is_said_and_the_same_command_goes_on(home, stage, tmp_path, monkeypatch):

    save, written = trainers.save_model, []

    def full(model, path, *args):
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(model, path, *args)

    monkeypatch.setattr("cocoa_lib.run.trainers.save_model", full)
    with pytest.raises(TrainingError, match=r"the disk is full.*step 4.*same command: it goes on"):
        go(home, stage, tmp_path / stage)
    assert not (tmp_path / stage).exists()
    monkeypatch.setattr("cocoa_lib.run.trainers.save_model", save)
    assert_same_run(go(home, stage, tmp_path / stage), home / stage)


def test_a_batch_larger_than_the_data_is_refused(home, tmp_path):
    with pytest.raises(TrainingError, match="64 training pairs are fewer than one batch of 65"):
        go(home, "stage3", tmp_path / "out", tiny("stage3", batch_size=65))


def test_with_an_adapter_the_patch_decoder_is_trained_whole(home, tmp_path, monkeypatch):
    seen = {}

    def look(self, **kwargs):
        seen.update({name: p.requires_grad for name, p in self.model.named_parameters()})
        raise RuntimeError("seen")

    monkeypatch.setattr(ReconstructionTrainer, "train", look)
    with pytest.raises(RuntimeError, match="seen"):
        go(home, "stage1", tmp_path / "out", tiny("stage1", **LORA))
    decoder = {name: flag for name, flag in seen.items() if name.startswith("decoder.")}
    assert decoder and all(decoder.values()) and not any("lora" in name for name in decoder)
    rest = {name: flag for name, flag in seen.items() if not name.startswith("decoder.")}
    assert {name for name, flag in rest.items() if flag} == {name for name in rest if "lora_" in name}


# --- collapse -----------------------------------------------------------------------------------------------------------


def test_collapse_is_reported_once_with_what_to_try(home, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(embedder, "pool", lambda hidden, batch, pooling: hidden[:, 0] * 0.0 + 1.0)
    go(home, "stage3", tmp_path / "out", tiny("stage3", steps=14, warmup_steps=2))
    reports = [record for record in caplog.records if record.getMessage().startswith("collapsed")]
    assert len(reports) == 1 and reports[0].levelno == logging.WARNING
    text = reports[0].getMessage()
    assert "for 10 steps, up to step 12" in text and "effective rank of this batch's embeddings is 1.00" in text
    for remedy in ("warmup_steps", "max_grad_norm", "learning_rate", "batch_size"):
        assert remedy in text


def test_a_healthy_run_is_not_called_collapsed(home, tmp_path, caplog):
    go(home, "stage3", tmp_path / "out", tiny("stage3", steps=14, batch_size=16))
    assert "collapsed" not in caplog.text


def test_the_loss_of_identical_embeddings_leaves_copies_out():
    """ln of the candidates that count: copies of a positive are no candidates, its own place is."""

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1, 4))

        def forward(self, features):
            return {"sentence_embedding": self.one.expand(len(features["input_ids"]), 4)}

    rows = torch.zeros(6, 1)
    for keys in (None, (torch.arange(6), torch.tensor([0, 0, 0, 1, 2, 3]))):
        column = {"input_ids": rows, "attention_mask": torch.ones(6, 1)}
        columns = [column | ({} if keys is None else {"key": keys[i]}) for i in range(2)]
        loss = CachedInfoNCE(Constant(), temperature=0.02, mini_batch_size=4)
        assert np.isclose(loss(columns).item(), loss.chance, rtol=1e-6)
        assert np.isclose(loss.chance, np.log(6) if keys is None else (3 * np.log(4) + 3 * np.log(6)) / 6)


@pytest.mark.parametrize("chunk", [3, 8])
def test_stage_3_and_encode_never_call_the_language_model_head(home, tmp_path, chunk):
    """At 152 k numbers a token it would cost more than the rest of a small batch; stage 2, which needs it, calls it."""
    pair = corpus.pairs(home / "world")[0][0]

    def refuse(module, args):
        if isinstance(module, torch.nn.Linear) and module.out_features == words:
            raise AssertionError("the head was called")

    words = len(load_inputs(home / "stage3", read_meta(home / "stage3")).tokenizer)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        folder = go(home, "stage3", tmp_path / "stage3", tiny("stage3", steps=1, mini_batch_size=chunk))
        assert CocoaEmbedder.load(folder).encode(list(pair.values())).shape == (2, 64)
        with pytest.raises(AssertionError, match="the head was called"):
            go(home, "stage2", tmp_path / "stage2", tiny("stage2", steps=1))
    finally:
        hook.remove()


# --- two processes ------------------------------------------------------------------------------------------------------


def pairs(home):
    rows, _ = corpus.pairs(home / "world")
    return [rows[i] for i in (0, 20, 40, 63, 8, 30, 50, 16)]


def captions(home):
    """The second half has longer texts and no image: two processes mask different numbers of words and cells."""
    rows = [row | {"draw": i} for i, row in enumerate(corpus.captions(home / "world")[:8])]
    return rows[:4] + [row | {"image": None, "target": row["target"] + ", " + row["target"]} for row in rows[4:]]


def contrastive_gradients(home, mine, wrap):
    folder = home / "stage3"
    inputs = load_inputs(folder, read_meta(folder))
    model = SentenceTransformer(modules=[EosEmbedding(open_backbone(folder, bidirectional=True), inputs)], device="cpu")
    batch = SentenceTransformerDataCollator(partial(pair_features, inputs=inputs))(pairs(home)[mine])
    columns = [
        {k.removeprefix(f"{c}_"): v for k, v in batch.items() if k.startswith(c)} for c in ("anchor", "positive")
    ]
    wrapped = wrap(model.train())
    loss = CachedInfoNCE(wrapped, temperature=0.1, mini_batch_size=3)(columns)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reconstruction_gradients(home, mine, wrap):
    folder = home / "causal"
    inputs = load_inputs(folder, read_meta(folder))
    torch.manual_seed(0)
    module = Reconstruction(open_backbone(folder, bidirectional=True), layout="bidirectional", image_weight=0.5)
    batch = stage1_batch(captions(home)[mine], inputs, make_recipe("stage1", {"preset": "figure"}), seed=0)
    wrapped = wrap(module.train())
    out = wrapped(**batch)
    out["loss"].backward()
    losses = {name: float(value.detach()) for name, value in out.items()}
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def one_of_two(rank, port, home, out):
    """A process of two: gradients through DDP with what was sent, stages 1 and 3, stage 3 interrupted, into `out`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    torch.set_num_threads(1)
    assert join_processes().num_processes == 2
    sent = []

    def count(state, bucket):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        sent.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    def wrap(module):
        wrapped = DistributedDataParallel(module, find_unused_parameters=True)
        wrapped.register_comm_hook(None, count)
        return wrapped

    mine, results = slice(4 * rank, 4 * rank + 4), {}
    for name, gradients in (("stage3", contrastive_gradients), ("stage1", reconstruction_gradients)):
        sent.clear()
        results[name] = (*gradients(home, mine, wrap), list(sent))
    torch.save(results, out / f"gradients-{rank}.pt")
    for stage in ("stage1", "stage3"):
        go(home, stage, out / stage)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            stop_at(patch, 3, signal.SIGTERM)  # reaches one process only: both must stop at the same step
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
            go(home, "stage3", out / "resumed")
    files = json.loads((out / ".resumed.work" / "checkpoint-3" / "complete.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files.keys(), "every process's random state is vouched for"
    go(home, "stage3", out / "resumed")


@pytest.fixture(scope="module")
def two(home, processes, tmp_path_factory):
    """What two gloo processes on this machine left: gradients-0.pt, gradients-1.pt, stage1, stage3, resumed."""
    if Version(transformers.__version__) < Version("5.20"):
        pytest.skip("transformers before 5.20 cannot resume on two CPU processes (it asks torch for a device cpu:0)")
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [processes.Process(target=one_of_two, args=(rank, port, home, out)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.exitcode is None:
            child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    return out


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_two_processes_give_the_gradient_of_the_whole_batch(home, two, stage):
    """Relative 1e-5 in float32; the losses of the two average to that of the whole batch, also where one has no image."""
    ranks = [torch.load(two / f"gradients-{rank}.pt", weights_only=True)[stage] for rank in (0, 1)]
    if stage == "stage3":
        loss, whole = contrastive_gradients(home, slice(None), lambda module: module)
        assert np.isclose(np.mean([rank[0] for rank in ranks]), loss, rtol=1e-5)
    else:
        losses, whole = reconstruction_gradients(home, slice(None), lambda module: module)
        for name, value in losses.items():
            assert np.isclose(np.mean([rank[0][name] for rank in ranks]), value, rtol=1e-5), name
        assert ranks[0][0]["text_loss"] != ranks[1][0]["text_loss"] and ranks[1][0]["image_loss"] == 0
    for _, gradients, _ in ranks:
        assert gradients.keys() == whole.keys()
        for name, gradient in whole.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_one_synchronisation_a_step(two):
    """Six chunks of GradCache and two columns, but every number crosses once."""
    for rank in (0, 1):
        results = torch.load(two / f"gradients-{rank}.pt", weights_only=True)
        for _, gradients, sent in results.values():
            assert sum(sent) == sum(gradient.numel() for gradient in gradients.values())


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_a_stage_on_two_processes_is_the_stage_on_one(home, two, stage):
    """Same rows, same corruption, same means: losses to 1e-4; weights to 1e-4 (Adam divides rounding by tiny gradients)."""
    one, other = pd.read_csv(home / stage / "log.csv"), pd.read_csv(two / stage / "log.csv")
    assert np.allclose(one["loss"], other["loss"], rtol=1e-4)
    assert np.allclose(one["grad_norm"], other["grad_norm"], rtol=1e-3)
    a, b = weights(home / stage), weights(two / stage)
    start = weights(home / PARENT[stage])
    moved = sum((a[name] - start[name]).norm() ** 2 for name in a) ** 0.5
    apart = sum((a[name] - b[name]).norm() ** 2 for name in a) ** 0.5
    assert apart < 1e-2 * moved
    if stage == "stage1":
        assert np.allclose(one[["text_loss", "image_loss"]], other[["text_loss", "image_loss"]], rtol=1e-4)
    assert not (two / f".{stage}.work").exists()


def test_two_processes_stop_together_and_go_on(two):
    assert_same_run(two / "resumed", two / "stage3")


# --- the plan -----------------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(sizes=sizes, n=st.integers(0, 80), block=st.integers(0, 9), seed=st.integers(0, 5))
def test_plan_takes_every_row_once_before_any_twice(sizes, n, block, seed):
    plan = index_plan(sizes, n, seed=seed, block=block)
    assert plan.shape == (n,) and np.array_equal(plan, index_plan(sizes, n, seed=seed, block=block))
    start = 0
    for size in sizes:
        mine = plan[(plan >= start) & (plan < start + size)]
        start += size
        for first in range(0, len(mine), size):
            assert max(Counter(mine[first : first + size].tolist()).values()) == 1
    assert ((plan >= 0) & (plan < start)).all()


@settings(max_examples=50, deadline=None)
@given(sizes=sizes, n=st.integers(1, 60), more=st.integers(0, 40), block=st.integers(0, 9))
def test_a_shorter_plan_begins_a_longer_one(sizes, n, more, block):
    assert np.array_equal(
        index_plan(sizes, n + more, seed=0, block=block)[:n], index_plan(sizes, n, seed=0, block=block)
    )


@settings(max_examples=50, deadline=None)
@given(sizes=sizes, n=st.integers(1, 80), block=st.integers(2, 9))
def test_a_block_is_of_one_subset(sizes, n, block):
    subset = np.searchsorted(np.cumsum(sizes), index_plan(sizes, n, seed=0, block=block), side="right")
    for first in range(0, n, block):
        assert len(set(subset[first : first + block].tolist())) == 1


def test_subsets_take_turns_in_proportion_and_seeds_differ():
    plan = index_plan([300, 100], 4000, seed=0)
    assert 0.72 < (plan < 300).mean() < 0.78
    assert not np.array_equal(plan, index_plan([300, 100], 4000, seed=1))
    with pytest.raises(ValueError, match=r"a subset without training rows \(sizes \[3, 0\]\)"):
        index_plan([3, 0], 5, seed=0)


def test_a_backbone_of_another_shape_or_seed_does_not_start_from_what_an_earlier_call_left(tmp_path, monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {})
    monkeypatch.setattr("cocoa_lib.run.stage.run_stage", lambda stage, recipe, *, parent, **rest: parent)
    build(tmp_path / "world", seed=0, n_pairs=8, n_queries=2, n_corpus=4)
    shape = {"vocab_size": 400, "image_pixels": 1024, "layers": 1, "heads": 2, "vision_dim": 32, "vision_layers": 1}

    def init(hidden_size, seed):
        sizes = {**shape, "patch_size": 8, "hidden_size": hidden_size}
        return train_backbone(tmp_path / "world", tmp_path / "out", sizes, make_recipe("causal"), seed=seed)

    weights = {}
    for hidden_size, seed in [(64, 0), (32, 0), (32, 7), (64, 0)]:
        folder = init(hidden_size, seed)
        assert json.loads((folder / "config.json").read_text())["text_config"]["hidden_size"] == hidden_size
        assert weights.setdefault((hidden_size, seed), read_meta(folder)["weights_sha256"]) == weights_hash(folder)
    assert len(set(weights.values())) == 3
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert (init(64, 0) / "model.safetensors").stat().st_mtime_ns == made, "what fits is used again"


def test_stages_1_and_2_take_the_rows_in_the_order_of_the_plan(home, tmp_path, monkeypatch):
    taken, read = [], Planned.__getitem__
    monkeypatch.setattr(Planned, "__getitem__", lambda self, k: taken.append(k) or read(self, k))
    go(home, "stage1", tmp_path / "out", tiny("stage1", steps=3))
    assert taken[-24:] == list(range(24))


def test_stage_3_takes_the_rows_in_the_order_of_the_plan(home, tmp_path, monkeypatch):
    taken, read = [], datasets.Dataset.__getitems__
    monkeypatch.setattr(datasets.Dataset, "__getitems__", lambda self, keys: taken.extend(keys) or read(self, keys))
    go(home, "stage3", tmp_path / "out", tiny("stage3", steps=3))
    assert taken[-24:] == list(range(24)), "so that a block of one subset is in one batch"


def test_order_and_draws_do_not_depend_on_workers():
    data = Planned([{"row": i} for i in range(7)], index_plan([7], 20, seed=0))
    loaders = [torch.utils.data.DataLoader(data, batch_size=4, collate_fn=list, num_workers=n) for n in (0, 2)]
    alone, shared = [[row for batch in loader for row in batch] for loader in loaders]
    assert alone == shared and [row["draw"] for row in alone] == list(range(20))
