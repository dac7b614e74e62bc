"""Runs: what a stage leaves, that it repeats to the bit, goes on after any interruption, and refuses what it must."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import (
    LORA,
    PARENT,
    STAGES,
    assert_same_run,
    fork_server,
    go,
    stop_at,
    tiny,
    weights,
)  # fmt: skip

from cocoa_lib import embedder
from cocoa_lib.data import corpus
from cocoa_lib.embedder import CocoaEmbedder
from cocoa_lib.items import InputError
from cocoa_lib.recipes import RECIPES
from cocoa_lib.run import stage as stage_module
from cocoa_lib.run.plan import Planned, index_plan
from cocoa_lib.run.resume import TrainingError, Watch
from cocoa_lib.run.stage import check_parent
from cocoa_lib.run.trainers import PlainTrainer, ReconstructionTrainer
from cocoa_lib.store.checkpoint import CheckpointError, load_inputs, read_meta

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # in peft


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_a_whole_checkpoint(home, stage):
    folder, parent = home / stage, read_meta(home / PARENT[stage])
    meta = read_meta(folder)  # checks the weights against their hash
    made = (meta["stage"], meta["layout"], meta["pooling"])
    assert made == (stage, RECIPES[stage]().layout, "eos")
    assert meta["eos_token"] == "<|im_end|>" and meta["max_length"] == 128
    assert meta["prompt"] == "<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>"
    assert meta["run"]["recipe"]["steps"] == 6 and meta["run"]["seed"] == 0
    assert meta["parent"] == f"{home.name}/{PARENT[stage]}", "no path of this machine"
    assert meta["run"]["parent_stage"] == PARENT[stage]
    assert meta["run"]["parent_sha256"] == parent["weights_sha256"] != meta["weights_sha256"]
    log = pd.read_csv(folder / "log.csv")
    assert log["step"].tolist() == [4, 6]
    assert np.isfinite(log["loss"]).all() and (log["loss"] > 0).all()
    if stage != "stage3":
        weight = meta["run"]["recipe"].get("image_weight", 0.0)
        assert np.allclose(log["loss"], log["text_loss"] + weight * log["image_loss"])
    assert not (home / f".{stage}.work").exists(), "no trace of the run is left beside its result"
    vectors = CocoaEmbedder.load(folder).encode([{"text": "a red circle"}])
    assert vectors.shape == (1, 64) and np.isclose(np.linalg.norm(vectors), 1)


def test_a_log_row_is_the_mean_of_its_steps(home, tmp_path):
    out = go(home, "stage1", tmp_path / "out", tiny("stage1", logging_steps=1))
    every = pd.read_csv(out / "log.csv")
    log = pd.read_csv(home / "stage1" / "log.csv")
    assert every["step"].tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "text_loss", "image_loss"):
        assert np.allclose(log[name], [every[name][:4].mean(), every[name][4:].mean()])
    assert log["learning_rate"].tolist() == every["learning_rate"][[3, 5]].tolist()


def test_stage3_learns(home, tmp_path):
    how = {"logging_steps": 1, "save_steps": 100, "temperature": 0.2}
    recipe = tiny("stage3", steps=20, batch_size=16, **how)
    loss = pd.read_csv(go(home, "stage3", tmp_path / "out", recipe) / "log.csv")["loss"]
    assert loss[-5:].mean() < loss[:5].mean() - 0.1


def test_same_seed_is_bit_equal_and_another_differs(home, tmp_path):
    assert_same_run(go(home, "stage2", tmp_path / "again"), home / "stage2")
    other = go(home, "stage2", tmp_path / "other", seed=1)
    assert (other / "log.csv").read_text() != (home / "stage2" / "log.csv").read_text()
    assert read_meta(other)["weights_sha256"] != read_meta(home / "stage2")["weights_sha256"]


def test_a_finished_run_is_returned_and_another_configuration_refused(home, monkeypatch):
    out = home / "stage1"
    before = (out / "cocoa.json").read_bytes()
    monkeypatch.setattr(stage_module, "_train", None)  # nothing may be trained
    assert go(home, "stage1", out) == out and (out / "cocoa.json").read_bytes() == before
    with pytest.raises(CheckpointError, match=r"another configuration \(steps 6, not 7\)"):
        go(home, "stage1", out, tiny("stage1", steps=7))
    with pytest.raises(CheckpointError, match=r"\(seed 0, not 3\)"):
        go(home, "stage1", out, seed=3)
    with pytest.raises(CheckpointError, match="stage 'stage1', not 'stage2'"):
        go(home, "stage2", out)
    with pytest.raises(CheckpointError, match="stage None, not"):
        go(home, "stage1", home / "causal")  # a checkpoint that no run made


def test_a_checkpoint_from_before_an_option_existed_is_still_the_same_run(home, tmp_path):
    out = shutil.copytree(home / "stage2", tmp_path / "out")
    meta = json.loads((out / "cocoa.json").read_text())
    del meta["run"]["recipe"]["image_weight"]
    (out / "cocoa.json").write_text(json.dumps(meta))
    assert go(home, "stage2", out) == out
    with pytest.raises(CheckpointError, match="image_weight 0.0, not 0.5"):
        go(home, "stage2", out, tiny("stage2", image_weight=0.5))


def test_a_parent_without_our_record_is_told_by_its_weights(home, tmp_path):
    for name in ("one", "two"):
        folder = shutil.copytree(home / "causal", tmp_path / name)
        (folder / "cocoa.json").unlink()
    one, two = (check_parent("stage1", tmp_path / name, False) for name in ("one", "two"))
    assert one == two and one["weights_sha256"] == read_meta(home / "causal")["weights_sha256"]
    save_file(weights(home / "stage1"), tmp_path / "two" / "model.safetensors", {"format": "pt"})
    assert check_parent("stage1", tmp_path / "two", False) != one
    hub = "Qwen/Qwen2-VL-2B-Instruct"
    assert check_parent("stage1", hub, False)["weights_sha256"] == hub


@pytest.mark.parametrize(
    "stage, item, message",
    [
        ("stage1", {"text": "", "target": "<|image_1|>"}, "neither text nor picture"),
        ("stage1", {"text": "", "target": "a", "image": "1x300.png"}, "of 1 x 300 pixels"),
        ("stage2", {"text": "<|image_1|>" * 2, "target": "a", "image": "8x8.png"}, "marks 2 image"),
        ("stage2", {"text": "a", "target": ""}, "no text to restore; mend or leave out the row"),
        ("stage3", {"text": "<|image_1|>"}, r"nor picture.*row with text '<\|image_1\|>'"),
    ],
)
def test_a_bad_row_is_named_before_training(home, stage, item, message, tmp_path, monkeypatch):
    for width, height in ((1, 300), (8, 8)):
        Image.new("RGB", (width, height)).save(tmp_path / f"{width}x{height}.png")
    item = item | {"image": str(tmp_path / item["image"]) if "image" in item else ""}
    bad = datasets.Dataset.from_list([{"anchor": item, "positive": {"text": "a", "image": ""}}] * 8)
    monkeypatch.setattr(corpus, "pairs", lambda *_, **__: (bad, [8]))
    monkeypatch.setattr(corpus, "captions", lambda *_: [item] * 8)
    monkeypatch.setattr(corpus, "text_pairs", lambda *_: {})
    with pytest.raises(InputError, match=message):
        go(home, stage, tmp_path / "out")
    assert not list(tmp_path.glob(".out.work/checkpoint-*"))


def test_what_does_not_fit_is_said(home, tmp_path, caplog):
    with pytest.raises(TrainingError, match="64 training pairs are fewer than one batch of 65"):
        go(home, "stage3", tmp_path / "large", tiny("stage3", batch_size=65))
    go(home, "stage3", tmp_path / "out", tiny("stage3", max_length=512, steps=1))
    assert "max_length 512: the parent was made for 128" in caplog.text


def killed_run(home, stage, out, recipe, where):
    """In a child process: run until `where`, then SIGKILL oneself."""
    torch.set_num_threads(1)
    kill = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    patch = pytest.MonkeyPatch()
    if where == "finishing":  # all is trained and written aside, the last rename is missing
        replace = os.replace
        patch.setattr(os, "replace", lambda a, b: kill() if str(b) == str(out) else replace(a, b))
    elif where == "saving":  # checkpoint-4 holds its weights but neither optimiser nor random state
        save = PlainTrainer._save
        half = lambda self, *a, **k: save(self, *a, **k) or self.state.global_step == 4 and kill()  # noqa: E731
        patch.setattr(PlainTrainer, "_save", half)
    else:
        stop_at(patch, where, signal.SIGKILL)
    go(home, stage, out, recipe)


@pytest.mark.parametrize(
    "stage, where, extra",
    [("stage1", 6, LORA), ("stage3", 4, {}), ("stage2", "saving", {}), ("stage1", "finishing", {})],
)  # fmt: skip
def test_killed_and_resumed_is_the_uninterrupted_run(home, stage, where, extra, tmp_path, caplog):
    """At a step, in the middle of a save, after the last step, before the first save; with dropout in the adapter."""
    whole = home / stage if not extra else go(home, stage, tmp_path / "whole", tiny(stage, **extra))
    recipe, out = tiny(stage, **extra), tmp_path / "out"
    child = fork_server().Process(target=killed_run, args=(home, stage, out, recipe, where))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL and not out.exists()
    saved = sorted(path.name for path in (tmp_path / ".out.work").glob("checkpoint-*"))
    caplog.clear()
    assert_same_run(go(home, stage, out, recipe), whole)
    if where == "saving":
        assert saved == ["checkpoint-2", "checkpoint-4"]
        assert "checkpoint-4 is unfinished: removed" in caplog.text
    else:
        assert saved and "unfinished" not in caplog.text
    assert not (tmp_path / ".out.work").exists() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("stage, number", [("stage1", signal.SIGINT), ("stage3", signal.SIGTERM)])
def test_a_signal_saves_and_the_same_call_goes_on(home, stage, number, tmp_path, monkeypatch):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        said = "stopped at step 3; the same command goes on from there"
        with pytest.raises(KeyboardInterrupt, match=said):
            go(home, stage, tmp_path / "out")
    assert signal.getsignal(number) is handler
    marker = tmp_path / ".out.work" / "checkpoint-3" / "complete.json"
    assert 0 < json.loads(marker.read_text())["seconds"] < 1000
    marker.write_text('{"seconds": 1000}')  # as if the first attempt had taken long
    assert_same_run(go(home, stage, tmp_path / "out"), home / stage)
    assert 1000 < read_meta(tmp_path / "out")["train_seconds"] < 2000, "the time of all attempts"
    assert 0 < read_meta(home / stage)["train_seconds"] < 1000


def test_ctrl_c_twice_stops_at_once_but_sigterm_may_come_from_scheduler_and_launcher():
    watch = Watch()
    watch._interrupt(signal.SIGTERM, None)
    watch._interrupt(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        watch._interrupt(signal.SIGINT, None)


def test_a_stage_starts_from_the_one_before_unless_told(home, tmp_path):
    for stage, parent in (("stage1", "stage2"), ("stage2", "causal"), ("stage3", "stage1")):
        said = f"{stage} starts from a .* but .*{parent}.* is {parent}.*allow_parent"
        with pytest.raises(CheckpointError, match=said):
            go(home, stage, tmp_path / "out", parent=home / parent)
    assert not list(tmp_path.iterdir()), "a refusal leaves nothing behind"
    how = {"parent": home / "causal", "allow_parent": True}
    out = go(home, "stage3", tmp_path / "out", tiny("stage3", steps=1), **how)
    assert read_meta(out)["run"]["parent_stage"] == "causal"


def test_a_loss_that_is_not_finite_stops_and_names_the_step(home, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    for stage in ("stage1", "stage3"):
        said = r"the loss is nan at step [23]\. Lower learning_rate.*delete .*\.work"
        with pytest.raises(TrainingError, match=said):
            go(home, stage, tmp_path / stage, tiny(stage, learning_rate=1e30, warmup_steps=0))
        assert not (tmp_path / stage).exists()
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C must work after a failed run"


def test_with_an_adapter_the_patch_decoder_is_trained_whole(home, tmp_path, monkeypatch):
    seen = {}

    def look(self, **kwargs):
        seen.update({name: p.requires_grad for name, p in self.model.named_parameters()})
        raise RuntimeError("seen")

    monkeypatch.setattr(ReconstructionTrainer, "train", look)
    with pytest.raises(RuntimeError, match="seen"):
        go(home, "stage1", tmp_path / "out", tiny("stage1", **LORA))
    decoder = {name for name in seen if name.startswith("decoder.")}
    adapter = {name for name in seen if "lora_" in name}
    assert decoder and adapter and not decoder & adapter
    assert {name for name, trained in seen.items() if trained} == decoder | adapter


def test_collapse_is_reported_once_with_what_to_try(home, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(embedder, "pool", lambda hidden, batch, pooling: hidden[:, 0] * 0.0 + 1.0)
    go(home, "stage3", tmp_path / "out", tiny("stage3", steps=14, warmup_steps=2))
    reports = [record for record in caplog.records if record.getMessage().startswith("collapsed")]
    assert len(reports) == 1 and reports[0].levelno == logging.WARNING
    text = reports[0].getMessage()
    assert "for 10 steps, up to step 12" in text and "warmup_steps" in text


def test_stage_3_and_encode_never_call_the_language_model_head(home, tmp_path):
    """At 152 k numbers a token it would cost more than the rest; stage 2 needs and calls it."""
    pair = corpus.pairs(home / "world")[0][0]

    def refuse(module, args):
        if isinstance(module, torch.nn.Linear) and module.out_features == words:
            raise AssertionError("the head was called")

    words = len(load_inputs(home / "stage3", read_meta(home / "stage3")).tokenizer)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        folder = go(home, "stage3", tmp_path / "stage3", tiny("stage3", steps=1, mini_batch_size=3))
        assert CocoaEmbedder.load(folder).encode(list(pair.values())).shape == (2, 64)
        with pytest.raises(AssertionError, match="the head was called"):
            go(home, "stage2", tmp_path / "stage2", tiny("stage2", steps=1))
    finally:
        hook.remove()


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
def test_a_shorter_plan_begins_a_longer_one_and_a_block_is_of_one_subset(sizes, n, more, block):
    plan = index_plan(sizes, n, seed=0, block=block)
    assert np.array_equal(index_plan(sizes, n + more, seed=0, block=block)[:n], plan)
    subset = np.searchsorted(np.cumsum(sizes), plan, side="right")
    for first in range(0, n, block or 1):
        assert len(set(subset[first : first + (block or 1)].tolist())) == 1


def test_subsets_take_turns_in_proportion_and_seeds_differ():
    plan = index_plan([300, 100], 4000, seed=0)
    assert 0.72 < (plan < 300).mean() < 0.78
    assert not np.array_equal(plan, index_plan([300, 100], 4000, seed=1))


def test_stages_1_and_2_take_the_rows_in_the_order_of_the_plan(home, tmp_path, monkeypatch):
    taken, read = [], Planned.__getitem__
    monkeypatch.setattr(Planned, "__getitem__", lambda self, k: taken.append(k) or read(self, k))
    go(home, "stage1", tmp_path / "out", tiny("stage1", steps=3))
    assert taken[-24:] == list(range(24))


def test_stage_3_takes_the_rows_in_the_order_of_the_plan(home, tmp_path, monkeypatch):
    taken, read = [], datasets.Dataset.__getitems__
    take = lambda self, keys: taken.extend(keys) or read(self, keys)  # noqa: E731
    monkeypatch.setattr(datasets.Dataset, "__getitems__", take)
    go(home, "stage3", tmp_path / "out", tiny("stage3", steps=3))
    assert taken[-24:] == list(range(24)), "so that a block of one subset is in one batch"


def test_a_folder_with_files_is_refused_before_training(home, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    monkeypatch.setattr("cocoa_lib.run.stage._train", lambda *_: pytest.fail("training began"))
    with pytest.raises(CheckpointError, match="holds files that are no checkpoint"):
        go(home, "stage1", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
