"""Shipped checkpoints: weights rounded to bf16 and nothing else, opened where `Run` would train the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cocoa_lib.embedder import CocoaEmbedder
from cocoa_lib.reconstruction import DECODER, load_decoder
from cocoa_lib.run import Run, stage
from cocoa_lib.run import run as run_module
from cocoa_lib.run.profiles import load_profile, merge
from cocoa_lib.store.checkpoint import CheckpointError, read_meta
from cocoa_lib.world.pictures import ATTRIBUTION

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from ship import ship  # noqa: E402

NAMES = ("stage1", "stage2", "cocoa", "contrastive")
FAST = {"steps": 2, "batch_size": 8, "max_length": 256}
TINY = {
    "benchmark": {"n_pairs": 64, "n_queries": 8, "n_corpus": 16},
    "stage1": FAST,
    "stage2": FAST,
    "stage3": FAST | {"mini_batch_size": 8, "same_task_block": 0},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run("laptop", retrain=True), of two steps a stage, its two arms evaluated and shipped."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setattr(run_module, "load_profile", lambda name: merge(load_profile(name), TINY))
        patch.setattr(run_module, "CHECKPOINTS", home / "checkpoints")
        run = Run("laptop", retrain=True, runs=home / "runs")
        for arm in ("cocoa", "contrastive"):
            run.other(arm=arm).evaluate(show_progress=False)
        ship(run, home / "checkpoints", limit=100 << 20)
        yield run


@pytest.fixture
def shipped(trained, tmp_path, monkeypatch):
    """The same run where nothing is trained yet, nor may be; its data are there."""
    monkeypatch.setattr(stage, "_train", None)
    (tmp_path / "data").symlink_to((trained.runs / "data").resolve())
    return Run("laptop", runs=tmp_path)


def folders(run):
    """name -> folder of the four checkpoints."""
    stages = {name: run.folder(name) for name in ("stage1", "stage2")}
    return stages | {arm: run.other(arm=arm).folder("stage3") for arm in ("cocoa", "contrastive")}


def test_weights_are_those_trained_rounded_to_bf16(trained, shipped):
    one, other = folders(trained), folders(shipped)
    for name in NAMES:
        files = sorted(path.name for path in other[name].glob("*.safetensors"))
        assert files == [DECODER, "model.safetensors"][name != "stage1" :]
        for file in files:
            full, half = load_file(one[name] / file), load_file(other[name] / file)
            assert full.keys() == half.keys() and len(full) > 2
            assert all(torch.equal(full[key].bfloat16(), half[key]) for key in full)
        module = CocoaEmbedder.load(other[name]).module
        assert {weights.dtype for weights in module.parameters()} == {torch.float32}
    decoder = load_decoder(other["stage1"], module.model)
    half = load_file(other["stage1"] / DECODER)["project.weight"]
    assert torch.equal(decoder.project.weight, half.float())


def test_records_logs_and_cards_come_along(trained, shipped):
    one, other = folders(trained), folders(shipped)
    for name in NAMES:
        old, new = read_meta(one[name]), read_meta(other[name])
        changed = {key for key in new if new[key] != old.get(key)}
        assert changed == {"weights_sha256", "files_sha256", "float32_sha256"}
        assert new["float32_sha256"] == old["weights_sha256"]
        assert (one[name] / "log.csv").read_text() == (other[name] / "log.csv").read_text()
        assert ATTRIBUTION in (card := (other[name] / "README.md").read_text())
        assert f"Profile laptop, seed 0: {name}, rounded to bfloat16." in card
        assert ("overall" in card) == (other[name] / "modules.json").is_file()
        assert (name in ("cocoa", "contrastive")) == (other[name] / "modules.json").is_file()


def test_a_run_opens_what_is_shipped_and_scores_hardly_move(trained, shipped):
    """Vectors turn by less than a degree; of 96 queries, one at most is won or lost."""
    one, other = (run.other(arm="contrastive") for run in (trained, shipped))
    assert other.stage("stage3") == other.folder("stage3") != other._place("stage3")
    before, after = one.evaluate(show_progress=False), other.evaluate(show_progress=False)
    assert other.folder("evaluate") == shipped.runs / "shipped/laptop/seed0/evaluate/contrastive"
    won = [(ranks["rank"] == 1).to_numpy() for ranks in (before, after)]
    assert len(before) == 96 and (won[0] != won[1]).sum() <= 1
    items = [f"a red apple and {n} cups" for n in range(20)]
    vectors = [CocoaEmbedder.load(run.folder("stage3")).encode(items) for run in (one, other)]
    cosines = (vectors[0] * vectors[1]).sum(1)
    assert 0.9999 < cosines.min() and not np.array_equal(*vectors), "rounded, and hardly so"


def test_only_the_run_that_was_shipped_opens_it(trained, shipped):
    base = shipped.folder("stage2")
    assert base.name == "stage2" and shipped.parent("stage3") == base
    assert shipped.other(arm="cocoa_mean").folder("stage2") == base
    apart = shipped.runs / "shipped" / "laptop" / "seed0" / "stage3" / "cocoa_mean"
    assert shipped.other(arm="cocoa_mean").folder("stage3") == apart
    assert shipped.other(arm="stage2_only").folder("stage2").name != "stage2"
    changes = {"changes": {"stage3": {"steps": 3}}}
    for other in ({"seed": 1}, {"profile": "smoke"}, changes, {"arm": "stage2_only"}):
        run = shipped.other(**other)
        assert all(run.folder(one) == run._place(one) for one in run.stages), other
    assert "--no-retrain" in shipped.arguments()
    again = Run("laptop", runs=shipped.runs, retrain=True)
    assert again.folder("stage3") == shipped.runs / "laptop/seed0/stage3/cocoa"
    assert "--no-retrain" not in again.arguments()
    trained_here = Run("laptop", runs=trained.runs)
    assert trained_here.folder("stage3") == trained.folder("stage3"), (
        "what was trained here is first"
    )


@pytest.mark.parametrize("changed", ["stage1", "stage3"])
def test_a_changed_profile_is_refused(shipped, monkeypatch, changed):
    values = merge(load_profile("laptop"), TINY, {changed: {"warmup_steps": 7}})
    monkeypatch.setattr(run_module, "load_profile", lambda name: values)
    with pytest.raises(CheckpointError, match=r"warmup_steps .*, not 7.* pass retrain=True"):
        shipped.other().stage("stage3")


def test_weights_above_the_limit_are_left_out_and_later_stages_still_open(
    trained, shipped, tmp_path, monkeypatch
):
    out = tmp_path / "few"
    sizes = ship(trained, out, limit=sum(map(size, folders(shipped).values())) - 1)
    assert sorted(path.name for path in (out / "stage1").iterdir()) == [
        "README.md",
        "cocoa.json",
        "log.csv",
    ]
    assert "left out for their size" in (out / "stage1" / "README.md").read_text()
    assert sizes == {folder.name: size(folder) for folder in out.iterdir()}
    monkeypatch.setattr(run_module, "CHECKPOINTS", out)
    run = shipped.other()
    assert run.folder("stage1").name == "base" and run.stage("stage3").name == "cocoa"
    assert list(run._gather_facts({})["seconds"]) == ["stage1", "stage2", "stage3"]
    with pytest.raises(SystemExit, match="not finished, or not evaluated"):
        ship(run, out)


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())
