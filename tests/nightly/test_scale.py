"""Beyond one machine: stages on two processes, a process that dies, resuming on another number of them, launch files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace as Namespace

import numpy as np
import pandas as pd
import pytest
import tiny_runs
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from packaging.version import Version
from safetensors.torch import load_file
from tiny_runs import TINY, make_start, stop_at, together
from torch.distributed.fsdp import MixedPrecisionPolicy

from cocoa_lib.backbone import open_backbone
from cocoa_lib.data import corpus
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run import Run
from cocoa_lib.run.profiles import NOTEBOOKS, ROOT, load_profile
from cocoa_lib.run.resume import TrainingError, Watch, find_checkpoint
from cocoa_lib.run.sharding import shard
from cocoa_lib.run.trainers import PlainTrainer

STAGES = ("stage1", "stage2", "stage3")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`world`, the random model `causal`, and each stage from it on one process, uninterrupted."""
    folder = make_start(tmp_path_factory.mktemp("scale"))
    for stage in STAGES:
        go(folder, stage, folder / stage)
    return folder


def tiny(stage):
    # mini_batch_size: half of the batch, so two chunks on one process and one on each of two
    chunks = {"mini_batch_size": 4, "temperature": 0.1} if stage == "stage3" else {}
    return TINY | {"steps": 5, "logging_steps": 1} | chunks


def go(home, stage, out, **more):
    recipe = make_recipe(stage, tiny(stage) | more)
    return tiny_runs.go(home, stage, out, recipe, parent=home / "causal", allow_parent=True)


def assert_close(home, stage, folder):
    """Losses to 1e-4, and weights apart by less than a hundredth of the way that training moved them."""
    one, other = pd.read_csv(home / stage / "log.csv"), pd.read_csv(folder / "log.csv")
    assert one["step"].tolist() == other["step"].tolist() == [1, 2, 3, 4, 5]
    assert np.allclose(one["loss"], other["loss"], rtol=1e-4)
    folders = (home / "causal", home / stage, folder)
    start, a, b = (load_file(path / "model.safetensors") for path in folders)
    far = lambda x, y: sum((x[name] - y[name]).norm() ** 2 for name in start) ** 0.5  # noqa: E731
    assert far(a, b) < 1e-2 * far(a, start)


def steps_of(run):
    """The steps whose loss this process computes while `run` lasts."""
    steps, original = [], PlainTrainer.check_loss
    with pytest.MonkeyPatch.context() as patch:
        note = lambda self, loss: steps.append(self.state.global_step + 1) or original(self, loss)  # noqa: E731
        patch.setattr(PlainTrainer, "check_loss", note)
        run()
    return steps


def stop_after_2(home, stages):
    """Begin runs, folder -> stage, and stop them in step 4: their last checkpoint is of step 2."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4, RuntimeError("stopped"))
        for out, stage in stages.items():
            with pytest.raises(RuntimeError, match="stopped"):
                go(home, stage, out)


# Before, it asks torch for a device cpu:0.
RESUMES = Version(transformers.__version__) >= Version("5.20")


def read_errors(out):
    return [path.read_text() for path in out.glob("error-*")]


def all_of_it(rank, home, out):
    for stage in STAGES:
        go(home, stage, out / stage)
    for stage in ("stage2", "stage3") if RESUMES else ():  # one process had begun these
        assert steps_of(lambda stage=stage: go(home, stage, out / f"grown-{stage}")) == [3, 4, 5]
    stop_after_2(home, {out / f"shrunk-{stage}": stage for stage in ("stage2", "stage3")})


@pytest.fixture(scope="module")
def two(home, tmp_path_factory):
    """What two processes left: each stage; `grown-*`, begun by one; `.shrunk-*.work`, stopped after the checkpoint of step 2."""
    out = tmp_path_factory.mktemp("two")
    stop_after_2(home, {out / f"grown-{stage}": stage for stage in ("stage2", "stage3")})
    assert together(all_of_it, home, out) == [0, 0]
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_on_two_processes_is_the_stage_on_one(home, two, stage):
    assert_close(home, stage, two / stage)


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_a_run_goes_on_with_another_number_of_processes(home, two, stage):
    """1 -> 2 and 2 -> 1, from the checkpoint of step 2 on: same rows, same corruption, same losses."""
    if not RESUMES:
        pytest.skip("transformers before 5.20 cannot resume on two CPU processes")
    assert_close(home, stage, two / f"grown-{stage}")
    saved = two / f".shrunk-{stage}.work" / "checkpoint-2"
    assert (saved / "rng_state_1.pth").is_file(), "two processes wrote it"
    assert steps_of(lambda: go(home, stage, two / f"shrunk-{stage}")) == [3, 4, 5]
    assert_close(home, stage, two / f"shrunk-{stage}")


def one_dies(rank, home, out):
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            stop_at(patch, 4, signal.SIGKILL)
        go(home, "stage2", out / "stage2")


def test_a_dead_process_ends_the_run_with_a_word_and_the_checkpoint_is_whole(home, tmp_path):
    start = time.monotonic()
    assert together(one_dies, home, tmp_path) == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 60
    word = (tmp_path / "error-0").read_text()
    assert word.startswith(TrainingError.__name__) and "another process of this run" in word
    assert find_checkpoint(tmp_path / ".stage2.work").name == "checkpoint-2"
    assert_close(home, "stage2", go(home, "stage2", tmp_path / "stage2"))


def launch_environment(name):
    """What `accelerate launch` tells its processes of the sharding in a launch file."""
    parser = launch_command_parser()
    config = str(NOTEBOOKS / "profiles/accelerate" / f"{name}.yaml")
    arguments = ["--config_file", config, "-m", "cocoa_lib.run"]
    environment = prepare_multi_gpu_env(_validate_launch_command(parser.parse_args(arguments))[0])
    return {key: value for key, value in environment.items() if "FSDP" in key}


def shard_on_cpu(patch, **changes):
    """FSDP as the launch file asks for it. Accelerate turns it on where there are GPUs only; nothing below it minds a CPU."""
    for key, value in (launch_environment("fsdp_1x8") | changes).items():
        patch.setenv(key, value)
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    patch.setattr(AcceleratorState, "__init__", init)


# Recipes that could set the processes at odds: a row each, where one has a picture (to restore) and the other none; an adapter,
# under which nothing asks for the gradient of what a text's first layer reads.
MIXED = {"batch_size": 2, "image_weight": 0.5, "sources": "captions", "patch_fill": "learned"}
SHARDED = {stage: (stage, {}) for stage in STAGES} | {
    "pictures": ("stage2", MIXED),
    "adapter": ("stage3", {"lora_r": 4, "lora_dropout": 0.0}),
    "chunks": ("stage3", {"mini_batch_size": 2}),  # two on each process, of rows sorted by length
}


def go_as(name, home, out):
    """The recipe of that name; of "pictures" every other row has none."""
    stage, more = SHARDED[name]
    with pytest.MonkeyPatch.context() as patch:
        if name == "pictures":
            rows = corpus.captions(home / "world")[:]
            rows[::2] = [row | {"image": None, "text": "what is there"} for row in rows[::2]]
            patch.setattr(corpus, "captions", lambda data: rows)
        go(home, stage, out, **more)


def all_sharded(rank, home, out):
    with pytest.MonkeyPatch.context() as patch:
        shard_on_cpu(patch)
        for name in SHARDED:
            go_as(name, home, out / name)
        stop_after_2(home, {out / "regrown": "stage3"})


def one_is_spoilt(rank, home, out):
    """A weight in the other process's share is no number after step 2: both see it before anything is saved."""
    original = Watch.on_step_end

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if rank == 1 and state.global_step == 2:
            max(model.parameters(), key=torch.Tensor.numel).to_local().data.fill_(torch.nan)
        original(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        shard_on_cpu(patch)
        patch.setattr(Watch, "on_step_end", on_step_end)
        with pytest.raises(TrainingError, match="the weights .* are not finite at step 2"):
            go(home, "stage2", out / "spoilt")


def test_a_spoilt_share_stops_every_process(home, tmp_path):
    assert together(one_is_spoilt, home, tmp_path) == [0, 0], read_errors(tmp_path)
    assert not list(tmp_path.glob(".spoilt.work/checkpoint-*"))


def sharded_further(rank, home, out):
    with pytest.MonkeyPatch.context() as patch:
        shard_on_cpu(patch)
        assert steps_of(lambda: go(home, "stage3", out / "regrown")) == [3, 4, 5]


@pytest.fixture(scope="module")
def shards(home, tmp_path_factory):
    """What two processes left, each with half of the weights; `.regrown.work` stopped after step 2."""
    out = tmp_path_factory.mktemp("shards")
    assert together(all_sharded, home, out) == [0, 0], read_errors(out)
    return out


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_stage_is_the_stage_on_one_process(home, shards, tmp_path, name):
    stage, more = SHARDED[name]
    alone = home
    if more:
        alone = tmp_path
        for part in ("causal", "world"):
            (alone / part).symlink_to(home / part)
        go_as(name, alone, alone / stage)
    assert_close(alone, stage, shards / name)


def test_a_sharded_run_goes_on_with_another_number_of_processes(home, shards):
    saved = shards / ".regrown.work" / "checkpoint-2"
    parts = list((saved / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert len(parts) == 2 and (saved / "complete.json").is_file()
    assert together(sharded_further, home, shards, n=4) == [0] * 4, read_errors(shards)
    assert_close(home, "stage3", shards / "regrown")


ASKED = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
ASKED |= {"cpu_ram_efficient_loading": False, "mixed_precision_policy": None}
WRONG = [{"fsdp_version": 1}, {"state_dict_type": "FULL"}, {"cpu_ram_efficient_loading": True}]


@pytest.mark.parametrize("wrong", WRONG)
def test_another_kind_of_sharding_is_refused(wrong):
    plugin = Namespace(**ASKED | wrong)
    trainer = Namespace(accelerator=Namespace(state=Namespace(fsdp_plugin=plugin)))
    with pytest.raises(TrainingError, match="needs fsdp_version: 2.*fsdp_1x8.yaml"):
        shard(trainer, None, None)


def test_a_layer_is_gathered_at_a_time_in_bf16_and_sums_of_gradients_are_float32(home):
    """accelerate's own policy casts what the module returns, so losses would be read off a grid of 0.03."""
    half = {name: torch.bfloat16 for name in ("param_dtype", "reduce_dtype", "output_dtype")}
    plugin = Namespace(**ASKED | {"mixed_precision_policy": MixedPrecisionPolicy(**half)})
    model = open_backbone(home / "causal", bidirectional=False)
    module = Reconstruction(model, layout="causal")
    trainer = Namespace(accelerator=Namespace(state=Namespace(fsdp_plugin=plugin)), model=module)
    trainer.is_world_process_zero = lambda: True
    kept, its_model, _ = shard(trainer, model, None)
    assert plugin.transformer_cls_names_to_wrap == ["Qwen2VLDecoderLayer"]
    assert kept is not module and kept.model is its_model, "whole, and its own weights"
    asked = plugin.mixed_precision_policy
    dtypes = (asked.param_dtype, asked.reduce_dtype, asked.output_dtype)
    assert dtypes == (torch.bfloat16, torch.float32, None)


@pytest.mark.parametrize("name, kind, machines, processes", [
    ("ddp_1x8", DistributedType.MULTI_GPU, 1, 8), ("ddp_4x8", DistributedType.MULTI_GPU, 4, 32),
    ("fsdp_1x8", DistributedType.FSDP, 1, 8), ("fsdp_4x8", DistributedType.FSDP, 4, 32),
])  # fmt: skip
def test_accelerate_reads_its_launch_files(name, kind, machines, processes):
    """By accelerate's own loader, which refuses unknown keys; the paper's batches divide over the processes."""
    config = load_config_from_file(str(NOTEBOOKS / "profiles/accelerate" / f"{name}.yaml"))
    found = (config.distributed_type, config.num_machines, config.num_processes)
    assert found == (kind, machines, processes)
    for stage in ("stage1", "stage2", "stage3"):
        assert load_profile("paper")[stage]["batch_size"] % processes == 0
    if kind == DistributedType.FSDP:  # the tests above ran with one of them
        assert launch_environment(name) == launch_environment("fsdp_1x8")


@pytest.mark.parametrize("visible, count", [(None, 8), ("3", 1), ("2,5", 2), ("", 0), ("-1", 0)])
def test_make_counts_the_gpus_that_a_user_may_have(tmp_path, monkeypatch, visible, count):
    list_gpus = "#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i: H100; done\n"
    (tmp_path / "nvidia-smi").write_text(list_gpus)
    (tmp_path / "nvidia-smi").chmod(0o755)
    for name in ("CUDA_VISIBLE_DEVICES", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = ["make", "-s", "--eval", "gpus: ; @echo $(GPUS)", "gpus"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(count), done.stderr


def test_a_stage_launched_from_a_notebook_is_the_stage(tmp_path, monkeypatch):
    """Two CPU processes stand for two GPUs: `run.stage` starts accelerate itself and shows its lines."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = {"n_pairs": 64, "n_queries": 8, "n_corpus": 16}
    values, lines = {"benchmark": sizes, "stage3": tiny("stage3")}, []
    two = Run("smoke", "contrastive", changes=values | {"launch": {"processes": 2}}, runs=tmp_path)
    out = two.stage("stage3", show_progress=lines.append)
    assert any(line.startswith("step 5 of 5, loss") for line in lines)
    one = Run("smoke", "contrastive", changes=values, runs=tmp_path)
    one = one.stage("stage3", show_progress=False)
    a, b = pd.read_csv(out / "log.csv"), pd.read_csv(one / "log.csv")
    assert np.allclose(a["loss"], b["loss"], rtol=1e-4)
    odd = values | {"launch": {"processes": 2}, "stage3": tiny("stage3") | {"batch_size": 7}}
    said = "on several processes: batch_size 7 does not divide over 2"
    with pytest.raises(TrainingError, match=said):
        Run("smoke", "contrastive", changes=odd, runs=tmp_path).stage("stage3", show_progress=False)


def plan_graph(folder, *options):
    """What snakemake would do, from a copy of the repository's files in `folder`."""
    for name in ("Snakefile", "cocoa_lib", "notebooks", "data"):
        if not (folder / name).exists():
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "2", *options]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_the_grid_is_a_process_an_arm_and_seed_and_shared_stages_are_made_once(tmp_path):
    slurm = ("--workflow-profile", "notebooks/profiles/slurm")
    done = plan_graph(tmp_path, *slurm, "--config", "profile=long")
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.M)
    n_runs = sum(load_profile("long")["grid"].values())
    assert jobs.count("run") == n_runs and jobs.count("shared") == 6 and jobs.count("notebook") == 6
    settings = yaml.safe_load((NOTEBOOKS / "profiles/slurm/config.yaml").read_text("utf-8"))
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    rules = set(re.findall(r"^rule (\w+):", text, re.M))
    assert set(settings["set-resources"]) == rules - {"all"}, "each step says what it needs"
    for rule in re.split(r"^rule ", text, flags=re.M)[1:]:
        assert ("gpu=1" in rule) == ("SLOT" in rule)


def test_the_graph_refuses_a_wrong_name_and_takes_a_file_with_a_space(tmp_path):
    done = plan_graph(tmp_path, "--config", "profile=smoke", "model=nope")
    assert done.returncode != 0 and "model 'nope': no such folder here" in done.stdout + done.stderr
    table = tmp_path / "my pairs (1); x.jsonl"
    table.touch()
    done = plan_graph(tmp_path, "-p", "--config", "profile=smoke", f"data={table}", "seeds=3")
    assert done.returncode == 0, done.stderr
    assert "seed3" in done.stdout and "'--data=my pairs (1); x.jsonl'" in done.stdout


@pytest.mark.parametrize(
    "visible, cards", [(None, ["0", "1", "2"]), ("7,4,GPU-3fe1", ["4", "7", "GPU-3fe1"])]
)
def test_each_gpu_has_one_step_at_a_time(tmp_path, monkeypatch, visible, cards):
    """What the graph puts before each step where `make` counts several GPUs. Of a user's choice, no other."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    lines = re.search(r"^GPUS = .*?^SLOT = .*?$", text, re.M | re.S)[0]
    names = {"os": os, "shlex": shlex, "config": {"gpus": "3"}, "PLACE": str(tmp_path)}
    exec(lines, names)  # the Snakefile's own
    command = ["bash", "-c", f"{names['SLOT']} echo $CUDA_VISIBLE_DEVICES; sleep 2"]
    steps = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(step.communicate()[0].strip() for step in steps) == cards
