"""Faults from outside: kills, a second run, a folder nobody can write, a clock that jumps, numbers that blow up, odd paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import assert_same_run, make_start, tiny

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts/nightly"))

import soak  # noqa: E402

from cocoa_lib.embedder import CocoaEmbedder  # noqa: E402
from cocoa_lib.run.resume import TrainingError, find_checkpoint  # noqa: E402
from cocoa_lib.run.trainers import PlainTrainer  # noqa: E402
from cocoa_lib.store.checkpoint import CheckpointError, read_meta  # noqa: E402
from cocoa_lib.store.files import locked  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("faults"))


def go(home, out, **values):
    return tiny_runs.go(home, "stage1", out, tiny("stage1", **{"steps": 5} | values))


@pytest.mark.slow
def test_nothing_is_lost_to_random_kills_and_the_soak_would_see_it(tmp_path, monkeypatch):
    """Four rounds of `make soak`; then one whose result is made to differ."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = soak.Soak(tmp_path, seed=int(time.time()))
    faults = ("stage3", "evaluation", "saving", "second run")
    equal = [run.round(fault, number) for number, fault in enumerate(faults)]
    assert equal == [True] * 4, run.log.read_text()[-3000:]
    total = sum(run.counts.values(), Counter())
    assert (total["tried"], total["equal"], total["lost"]) == (4, 4, 0)
    assert not list(tmp_path.glob("round*"))

    class Instant:  # a process that has ended, well, and left nothing
        pid, exitcode = 0, 0
        join = is_alive = lambda self: False

    monkeypatch.setattr(run, "start", lambda name, out: Instant())
    monkeypatch.setattr(run, "kill", lambda child: True)
    monkeypatch.setattr(run, "seconds", dict.fromkeys(run.seconds, 0.0))
    assert not run.round("stage1", 9) and run.counts["stage1"]["lost"] == 1
    assert (tmp_path / "round9").exists()
    row = f"all 5 {total['killed'] + 1} {total['refused']} 4 1"
    assert run.table().splitlines()[-1].split() == row.split()


def test_what_a_kill_after_the_last_rename_left_is_cleared(home, tmp_path):
    out = go(home, tmp_path / "out")
    (tmp_path / ".out.work" / "checkpoint-4").mkdir(parents=True)
    assert go(home, out) == out and not (tmp_path / ".out.work").exists()


def test_a_run_ends_whole_where_there_is_no_git(home, tmp_path, monkeypatch):
    """Its folder names a commit where there is one; images for GPUs often come without git."""
    monkeypatch.setenv("PATH", str(tmp_path))
    go(home, tmp_path / "run", steps=1)
    assert read_meta(tmp_path / "run")["commit"] == "unknown"


def test_an_output_folder_nobody_can_write_is_said(home, tmp_path):
    (tmp_path / "file").write_text("")
    said = r"cannot write below .*file \(Not a directory\): choose another output"
    with pytest.raises(TrainingError, match=said):
        go(home, tmp_path / "file" / "out")


@pytest.mark.parametrize("content", ["{", "[]", "\udc80"])
def test_a_damaged_note_in_the_work_folder_is_named(home, tmp_path, content):
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    said = r"run\.json: (not valid JSON|expected a JSON object)"
    with pytest.raises(CheckpointError, match=said):
        go(home, tmp_path / "out")


def spoil(patch, step, how):
    """At `step`: the loss is nan, or it is finite and its gradient is not."""
    checked = PlainTrainer.check_loss

    def spoilt(self, loss):
        if self.state.global_step + 1 == step and how == "loss":
            loss = loss * float("nan")
        elif self.state.global_step + 1 == step:
            weight = next(values for values in self.model.parameters() if values.requires_grad)
            loss = loss + (weight - weight).abs().sum().sqrt()
        return checked(self, loss)

    patch.setattr(PlainTrainer, "check_loss", spoilt)


BLOWN = [
    ("loss", 4, r"the loss is nan at step 4\. .*places 24 to 31 of the plan; .*/checkpoint-2"),
    ("loss", 1, r"the loss is nan at step 1\. .*places 0 to 7 of the plan; .*checkpoint: none"),
    ("gradient", 4, r"the weights .* are not finite at step 4\. .*checkpoint-2"),
    ("gradient", 5, r"not finite at step 5\. .*checkpoint-4"),  # the last: no later loss shows it
]


@pytest.mark.parametrize("how, step, said", BLOWN)
def test_numbers_that_blow_up_stop_the_run_and_spoil_no_checkpoint(
    home, tmp_path, monkeypatch, how, step, said
):
    spoil(monkeypatch, step, how)
    with pytest.raises(TrainingError, match=said):
        go(home, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    good = find_checkpoint(tmp_path / ".out.work")
    assert (good and good.name) == {4: "checkpoint-2", 1: None, 5: "checkpoint-4"}[step]


def test_a_path_with_spaces_and_letters_of_all_kinds(home, tmp_path):
    odd = tmp_path / "größe 目录 'a' [b] #1"
    (odd / "copy").mkdir(parents=True)
    for name in ("causal", "world"):
        (odd / name).symlink_to(home / name)
    assert_same_run(go(odd, odd / "out it"), go(home, tmp_path / "out"))


IN_C = r"""
import locale, sys
from cocoa_lib.embedder import CocoaEmbedder
from cocoa_lib.run.profiles import load_profile, read_arms

assert locale.getpreferredencoding(False).upper() in ("ANSI_X3.4-1968", "US-ASCII", "ASCII")
load_profile("smoke"), read_arms()
print(CocoaEmbedder.load(sys.argv[1]).encode(["Gr\u00f6\u00dfe \u76ee"])[0, :3].tolist())
"""


def test_locale_c_offline_and_from_another_folder(home, tmp_path):
    """`LC_ALL=C` without Python's UTF-8 mode: files are read and written as UTF-8 all the same."""
    out = go(home, tmp_path / "out")
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    how = {"cwd": tmp_path, "env": os.environ | environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", IN_C, str(out)], timeout=120, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    here = CocoaEmbedder.load(out).encode(["Größe 目"])[0, :3]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert torch.allclose(torch.tensor(found), torch.tensor(here))


def test_the_lowest_versions_are_the_ranges_lower_ends():
    import environments
    from packaging.requirements import Requirement

    for line, found in (("torch>=2.11", "torch==2.11.*"), ("snakemake<10,>=9", "snakemake==9.0.*")):
        assert str(environments.lowest(Requirement(line))) == found
    with pytest.raises(ValueError, match="no lower bound"):
        environments.lowest(Requirement("torch<3"))
    wanted = environments.pins("lowest", "2.13.0+cpu")
    assert "torch==2.13.0+cpu" in wanted and len(wanted) == len(environments.ranges()) > 25
    assert all("==" in line for line in wanted), "every range of pyproject.toml has a lower end"


def test_a_second_run_refuses_while_the_first_lives(home, tmp_path):
    with locked(tmp_path / ".out.work"):
        with pytest.raises(TrainingError, match="another run is at work .*wait"):
            go(home, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert read_meta(go(home, tmp_path / "out"))["stage"] == "stage1"


def test_one_graph_at_a_time(tmp_path):
    """`make reproduce` passes --nolock, since Snakemake's lock outlives a kill; the Snakefile's own does not."""
    assert "--nolock" in (ROOT / "Makefile").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock"]
    command += ["--config", "profile=gpu", "--", "nothing"]
    with locked(ROOT / "runs" / "gpu"):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and "another run is at work in this folder" in done.stdout + done.stderr
