"""Beyond one machine: stages on two processes, a process that dies, resuming on another number of them, launch files."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace as Namespace

import numpy as np
import pandas as pd
import pytest
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
from torch.distributed.fsdp import MixedPrecisionPolicy

from cocoa_lib.backbone import open_backbone
from cocoa_lib.data import corpus
from cocoa_lib.inputs import Inputs
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run.profiles import NOTEBOOKS, ROOT, load_profile
from cocoa_lib.run.resume import COMPLETE, TrainingError, Watch, explained, last_whole_checkpoint
from cocoa_lib.run.sharding import shard
from cocoa_lib.run.stage import _finish, run_stage
from cocoa_lib.run.trainers import PlainTrainer
from cocoa_lib.store.checkpoint import read_meta, save_checkpoint
from cocoa_lib.store.files import locked
from cocoa_lib.world.backbone import new_backbone
from cocoa_lib.world.build import build

TINY = {"steps": 5, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "max_length": 128, "save_steps": 2,
        "logging_steps": 1}  # fmt: skip
STAGES = ("stage1", "stage2", "stage3")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `world`, the random model `init`, and each stage from it on one process, seed 0, uninterrupted."""
    folder = tmp_path_factory.mktemp("scale")
    torch.set_num_threads(1)
    build(folder / "world", seed=0, n_pairs=48, n_queries=8, n_corpus=16)
    rows = [*corpus.captions(folder / "world"), *corpus.questions(folder / "world")]
    model, inputs = new_backbone(
        [row["text"] + row["target"] for row in rows], vocab_size=400, image_pixels=1024, seed=0, hidden_size=64,
        layers=2, heads=2, vision_dim=32, vision_layers=1, patch_size=8,
    )  # fmt: skip
    save_checkpoint(folder / "init", model, inputs, {"stage": "init"})
    for stage in STAGES:
        go(folder, stage, folder / stage)
    return folder


def tiny(stage):
    # mini_batch_size: half of the batch, so two chunks on one process and one on each of two
    return TINY | ({"mini_batch_size": 4, "temperature": 0.1} if stage == "stage3" else {})


def go(home, stage, out, **more):
    return run_stage(stage, make_recipe(stage, tiny(stage) | more), parent=home / "init", data=home / "world", out=out,
                     allow_parent=True, show_progress=False)  # fmt: skip


def assert_close(home, stage, folder):
    """Losses to 1e-4, and weights apart by less than a hundredth of the way that training moved them."""
    one, other = pd.read_csv(home / stage / "log.csv"), pd.read_csv(folder / "log.csv")
    assert one["step"].tolist() == other["step"].tolist() == [1, 2, 3, 4, 5]
    assert np.allclose(one["loss"], other["loss"], rtol=1e-4)
    start, a, b = (load_file(path / "model.safetensors") for path in (home / "init", home / stage, folder))
    far = lambda x, y: sum((x[name] - y[name]).norm() ** 2 for name in start) ** 0.5  # noqa: E731
    assert far(a, b) < 1e-2 * far(a, start)


def stop_at(patch, step, how):
    """At the loss of `step`, raise `how` or send that signal to this process."""
    original = PlainTrainer.checked

    def checked(self, loss):
        if self.state.global_step + 1 == step:
            if isinstance(how, BaseException):
                raise how
            os.kill(os.getpid(), how)
        return original(self, loss)

    patch.setattr(PlainTrainer, "checked", checked)


def steps_of(run):
    """The steps whose loss this process computes while `run` lasts."""
    steps, original = [], PlainTrainer.checked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PlainTrainer, "checked",
            lambda self, loss: (steps.append(self.state.global_step + 1), original(self, loss))[1],
        )  # fmt: skip
        run()
    return steps


RESUMES = Version(transformers.__version__) >= Version("5.20")  # before, it asks torch for a device cpu:0


# --- two processes ------------------------------------------------------------------------------------------------------


def member(rank, port, n, work, home, out):
    """One of `n` processes; what it raises is its last word in OUT/error-RANK."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    torch.set_num_threads(1)
    try:
        work(rank, home, out)
    except BaseException as error:
        (out / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def together(work, home, out, n=2):
    """Run `work` in `n` gloo processes of one run; exit codes in order of rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cocoa_lib.run"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [context.Process(target=member, args=(rank, port, n, work, home, out)) for rank in range(n)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.exitcode is None:
            child.kill()
    return [child.exitcode for child in children]


def all_of_it(rank, home, out):
    for stage in STAGES:
        go(home, stage, out / stage)
    for stage in ("stage2", "stage3") if RESUMES else ():  # one process had begun these
        assert steps_of(lambda stage=stage: go(home, stage, out / f"grown-{stage}")) == [3, 4, 5]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4, RuntimeError("stopped"))
        for stage in ("stage2", "stage3"):
            with pytest.raises(RuntimeError, match="stopped"):
                go(home, stage, out / f"shrunk-{stage}")


@pytest.fixture(scope="module")
def two(home, tmp_path_factory):
    """What two processes left: each stage; `grown-*`, begun by one; `.shrunk-*.work`, stopped after the checkpoint of step 2."""
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4, RuntimeError("stopped"))
        for stage in ("stage2", "stage3"):
            with pytest.raises(RuntimeError, match="stopped"):
                go(home, stage, out / f"grown-{stage}")
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
    assert word.startswith(TrainingError.__name__) and "another process of this run" in word and "after step 3" in word
    assert last_whole_checkpoint(tmp_path / ".stage2.work").name == "checkpoint-2"
    assert_close(home, "stage2", go(home, "stage2", tmp_path / "stage2"))


def a_worker_is_killed(rank, home, out):
    """In stage 3, at its third batch, once a checkpoint is whole, as the system does when memory is short."""
    original, made = Inputs.collate, []

    def collate(self, *args, **kwargs):
        worker = torch.utils.data.get_worker_info()
        made.append(1)
        if worker is not None and worker.id == 0 and len(made) > 4:  # two a batch
            while not (out / ".stage3.work" / "checkpoint-2" / COMPLETE).exists():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    multiprocessing.set_start_method("fork", force=True)  # the workers' too, or they would not know the patch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inputs, "collate", collate)
        go(home, "stage3", out / "stage3", workers=2)


def test_a_killed_worker_ends_the_run_and_the_same_command_goes_on(home, tmp_path):
    """In a process of its own: until it ends torch's handler of SIGCHLD raises wherever that is."""
    start = time.monotonic()
    assert together(a_worker_is_killed, home, tmp_path, n=1) == [1]
    assert time.monotonic() - start < 60 and not (tmp_path / "stage3").exists()
    word = (tmp_path / "error-0").read_text()
    assert word.startswith(f"{TrainingError.__name__}: a worker that reads pictures was killed (after step "), word
    assert "Run the same command: it goes on" in word
    steps = steps_of(lambda: go(home, "stage3", tmp_path / "stage3", workers=2))
    assert steps in ([3, 4, 5], [5]), "from the newest checkpoint"
    assert_close(home, "stage3", tmp_path / "stage3")


@pytest.mark.parametrize("workers, said", [(2, TrainingError), (0, BrokenPipeError)])
def test_a_lost_connection_is_a_workers_only_where_there_are_workers(workers, said, tmp_path):
    trainer = Namespace(state=Namespace(global_step=3), args=Namespace(dataloader_num_workers=workers))
    with pytest.raises(said), explained(trainer, Namespace(process_index=0, num_processes=1), tmp_path):
        raise BrokenPipeError


def the_last_word(rank, home, out, finish):
    """Stage 2, with `finish` for what the main process does last; anywhere else the others would wait a second for it."""
    restore = Watch.restore

    def impatient(self):
        restore(self)
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "restore", impatient)
        patch.setattr("cocoa_lib.run.stage._finish", finish)
        go(home, "stage2", out / "stage2")


def slow_to_save(rank, home, out, original=_finish):
    def finish(*args):
        time.sleep(3)
        original(*args)

    the_last_word(rank, home, out, finish)


def dies_saving(rank, home, out):
    the_last_word(rank, home, out, lambda *args: os.kill(os.getpid(), signal.SIGKILL))


def test_a_slow_disk_costs_no_finished_run(home, tmp_path):
    assert together(slow_to_save, home, tmp_path) == [0, 0], [path.read_text() for path in tmp_path.glob("error-*")]
    assert_close(home, "stage2", tmp_path / "stage2")


def test_a_death_while_the_others_wait_for_the_folder_ends_them(home, tmp_path):
    start = time.monotonic()
    assert together(dies_saving, home, tmp_path) == [-signal.SIGKILL, 1]
    assert time.monotonic() - start < 60
    assert "another process of this run died" in (tmp_path / "error-1").read_text()


# --- sharded weights ----------------------------------------------------------------------------------------------------


def launch_environment(name):
    """What `accelerate launch` tells its processes of the sharding in a launch file."""
    parser = launch_command_parser()
    arguments = ["--config_file", str(NOTEBOOKS / "profiles/accelerate" / f"{name}.yaml"), "-m", "cocoa_lib.run"]
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
SHARDED = {stage: (stage, {}) for stage in STAGES} | {
    "pictures": ("stage2", {"batch_size": 2, "image_weight": 0.5, "sources": "captions", "patch_fill": "learned"}),
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
        stop_at(patch, 4, RuntimeError("stopped"))
        for name in ("regrown", "foreign"):
            with pytest.raises(RuntimeError, match="stopped"):
                go(home, "stage3", out / name)


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
        with pytest.raises(TrainingError, match="1 weights, .* are not finite at step 2"):
            go(home, "stage2", out / "spoilt")


def test_a_spoilt_share_stops_every_process(home, tmp_path):
    assert together(one_is_spoilt, home, tmp_path) == [0, 0], [path.read_text() for path in tmp_path.glob("error-*")]
    assert not list(tmp_path.glob(".spoilt.work/checkpoint-*"))


def sharded_further(rank, home, out):
    with pytest.MonkeyPatch.context() as patch:
        shard_on_cpu(patch)
        assert steps_of(lambda: go(home, "stage3", out / "regrown")) == [3, 4, 5]


@pytest.fixture(scope="module")
def shards(home, tmp_path_factory):
    """What two processes left, each with half of the weights; `.regrown.work` and `.foreign.work` stopped after step 2."""
    out = tmp_path_factory.mktemp("shards")
    assert together(all_sharded, home, out) == [0, 0], [path.read_text() for path in out.glob("error-*")]
    return out


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_stage_is_the_stage_on_one_process(home, shards, tmp_path, name):
    stage, more = SHARDED[name]
    alone = home
    if more:
        alone = tmp_path
        for part in ("init", "world"):
            (alone / part).symlink_to(home / part)
        go_as(name, alone, alone / stage)
    assert_close(alone, stage, shards / name)


def test_a_sharded_run_goes_on_with_another_number_of_processes(home, shards):
    saved = shards / ".regrown.work" / "checkpoint-2"
    parts = {path.relative_to(saved).as_posix() for path in (saved / "pytorch_model_fsdp_0").glob("*.distcp")}
    assert len(parts) == 2 and parts <= set(json.loads((saved / "complete.json").read_text())), (
        "each a half, with its hash"
    )
    assert together(sharded_further, home, shards, n=4) == [0] * 4, [p.read_text() for p in shards.glob("error-*")]
    assert_close(home, "stage3", shards / "regrown")


def test_a_sharded_run_does_not_go_on_whole(home, shards):
    with pytest.raises(
        TrainingError, match=r"checkpoint-2 was written by a run that was sharded.*delete .*\.foreign\.work"
    ):
        go(home, "stage3", shards / "foreign")


@pytest.mark.parametrize(
    "wrong", [{"fsdp_version": 1}, {"state_dict_type": "FULL_STATE_DICT"}, {"cpu_ram_efficient_loading": True}]
)
def test_another_kind_of_sharding_is_refused(wrong):
    asked = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False} | wrong
    trainer = Namespace(accelerator=Namespace(state=Namespace(fsdp_plugin=Namespace(**asked))))
    with pytest.raises(TrainingError, match="sharded training needs fsdp_version: 2.*fsdp_1x8.yaml"):
        shard(trainer, None, None)


def test_a_layer_of_the_language_model_is_gathered_at_a_time(home):
    asked = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}
    plugin, module = (
        Namespace(**asked),
        Reconstruction(open_backbone(home / "init", bidirectional=False), layout="causal"),
    )
    trainer = Namespace(accelerator=Namespace(state=Namespace(fsdp_plugin=plugin)), model=module)
    trainer.is_world_process_zero = lambda: True
    kept, model, _ = shard(trainer, module.model, None)
    assert plugin.transformer_cls_names_to_wrap == ["Qwen2VLDecoderLayer"]
    assert kept is not module and kept.model is model, "whole, and its own weights"


def test_the_model_is_in_bf16_when_sharded_and_the_sums_of_gradients_are_not(home):
    """accelerate's own policy casts what the module returns, so losses would be read off a grid of 0.03."""
    ours = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = Namespace(**ours, mixed_precision_policy=policy)
    module = Reconstruction(open_backbone(home / "init", bidirectional=False), layout="causal")
    trainer = Namespace(accelerator=Namespace(state=Namespace(fsdp_plugin=plugin)), model=module)
    trainer.is_world_process_zero = lambda: False
    shard(trainer, module.model, None)
    asked = plugin.mixed_precision_policy
    assert (asked.param_dtype, asked.reduce_dtype, asked.output_dtype) == (torch.bfloat16, torch.float32, None)


# --- launch files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind, machines, processes", [
    ("ddp_1x8", DistributedType.MULTI_GPU, 1, 8), ("ddp_4x8", DistributedType.MULTI_GPU, 4, 32),
    ("fsdp_1x8", DistributedType.FSDP, 1, 8), ("fsdp_4x8", DistributedType.FSDP, 4, 32),
])  # fmt: skip
def test_accelerate_reads_its_launch_files(name, kind, machines, processes):
    """By accelerate's own loader, which refuses unknown keys; the paper's batches divide over the processes."""
    config = load_config_from_file(str(NOTEBOOKS / "profiles/accelerate" / f"{name}.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    for stage in ("stage1", "stage2", "stage3"):
        assert load_profile("paper")[stage]["batch_size"] % processes == 0
    if kind == DistributedType.FSDP:
        assert launch_environment(name) == launch_environment("fsdp_1x8")  # which the tests above ran with


@pytest.mark.parametrize("stage", STAGES)
def test_accelerate_launches_a_stage_with_a_launch_file(home, stage, tmp_path):
    """The documented line, on two processes of a CPU. (No --cpu, which starts one: without a GPU the file's kind takes gloo.)"""
    out = tmp_path / stage
    launch = (
        f"-m accelerate.commands.accelerate_cli launch --config_file {NOTEBOOKS / 'profiles/accelerate/ddp_1x8.yaml'}"
    )
    line = f"{launch} --num_processes 2 --main_process_port 0 -m cocoa_lib.run {stage} --allow-parent"
    command = [sys.executable, *shlex.split(line), "--recipe", json.dumps(tiny(stage))]
    command += ["--parent", str(home / "init"), "--data", str(home / "world"), "--out", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(out)) == 2, "each process names the folder when it is done"
    assert read_meta(out)["run"]["stage"] == stage and not list(tmp_path.glob(".*"))  # reading compares all hashes
    assert_close(home, stage, out)


@pytest.mark.parametrize("name, at_least", [("cluster", 5), ("scaling", 3)])
def test_the_docs_name_what_there_is(name, at_least):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:notebooks|tests|cocoa_lib|data|benchmarks|scripts)/[\w./-]+\.(?:yaml|py|md)", text))
    assert len(named) >= at_least and [path for path in named if not (ROOT / path).is_file()] == []


@pytest.fixture(scope="module")
def cluster_jobs(tmp_path_factory):
    """rule -> resources of its jobs, from a dry run with the SLURM profile in an empty folder beside the repository's files."""
    folder = tmp_path_factory.mktemp("cluster")
    for name in ("Snakefile", "cocoa_lib", "notebooks", "data"):
        (folder / name).symlink_to(ROOT / name)
    command = ["-m", "snakemake", "-n", "--workflow-profile", "notebooks/profiles/slurm", "--config", "profile=gpu"]
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs: dict[str, list[dict[str, str]]] = {}
    for rule, resources in re.findall(
        r"^(?:local)?rule (\w+):.*?^    resources: (.*?)$", done.stdout + done.stderr, re.M | re.S
    ):
        jobs.setdefault(rule, []).append(dict(pair.split("=") for pair in resources.split(", ")))
    return jobs


@pytest.mark.parametrize("pairs", [[], ["pairs=my/pairs.csv"]])
def test_an_arm_with_a_backbone_of_its_own_starts_from_it(tmp_path, pairs):
    """A dry run: the graph trains that shape on the same data, and the arm's first stage starts from it; no other arm does."""
    for name in ("Snakefile", "cocoa_lib", "notebooks", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "pairs.csv").touch()
    run = "runs/gpu-pairs" if pairs else "runs/gpu"
    wanted = [f"{run}/results/{arm}/seed0/results.csv" for arm in ("cocoa_half", "contrastive_half", "contrastive")]
    command = ["-m", "snakemake", "-n", "-p", "--cores", "1", "--config", "profile=gpu", *pairs, "--", *wanted]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, parent = f"{run}/backbones/heads2_hidden_size64", r"cocoa_lib\.train (stage\d) --parent (\S+) .*?--out (\S+)"
    starts = {(stage, out.split("/")[-1]): start for stage, start, out in re.findall(parent, done.stdout)}
    made = [line for line in done.stdout.splitlines() if "retrain=true" in line]
    assert len(made) == 1 and f"backbone_folder={shape}" in made[0] and '"hidden_size": 64, ' in made[0]
    assert ("my/pairs.csv" in made[0]) == bool(pairs)
    assert starts["stage3", "contrastive_half"] == shape and starts["stage3", "contrastive"] == "data/backbone"
    assert [start for (stage, _), start in starts.items() if stage == "stage1"] == [shape]


def test_the_grid_is_one_job_a_step_on_a_cluster(cluster_jobs):
    profile = load_profile("gpu")
    runs = 5 * len(profile["arms"]) + 3 * len(profile["sweeps"])  # sweeps have the first three seeds
    assert len(cluster_jobs["evaluate"]) == runs and len(cluster_jobs["stage"]) > runs
    for rule, jobs in cluster_jobs.items():
        trains = rule in ("shape", "pretraining", "contrastive", "stage", "evaluate", "probe")
        for job in jobs:
            assert (job["slurm_partition"], job.get("gpu")) == (("gpu", "1") if trains else ("cpu", None)), rule
            assert int(job["mem_mb"]) >= 8000 and 30 <= int(job["runtime"]) <= 1440 and job["slurm_account"], rule


def test_resources_are_set_for_rules_that_exist(cluster_jobs):
    profile = yaml.safe_load((NOTEBOOKS / "profiles/slurm/config.yaml").read_text(encoding="utf-8"))
    rules = set(re.findall(r"^rule (\w+):", (ROOT / "Snakefile").read_text(encoding="utf-8"), re.M))
    assert set(profile["set-resources"]) <= rules
    assert rules - set(profile["set-resources"]) <= {"all", "masks"}, "every other step says what it needs"


@pytest.mark.parametrize("visible, cards", [(None, ["0", "1", "2"]), ("7,4,GPU-3fe1", ["4", "7", "GPU-3fe1"])])
def test_each_gpu_has_one_step_at_a_time(tmp_path, monkeypatch, visible, cards):
    """What the graph puts before each step where `make` counts several GPUs; tried without any. Of a user's choice, no other."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    lines = re.search(r"^GPUS = .*?^SLOT = .*?$", (ROOT / "Snakefile").read_text(encoding="utf-8"), re.M | re.S)[0]
    names = {"os": os, "shlex": shlex, "config": {"gpus": "3"}, "RUN": str(tmp_path)}
    exec(lines, names)  # the Snakefile's own
    command = ["bash", "-c", f"{names['SLOT']} echo $CUDA_VISIBLE_DEVICES; sleep 2"]
    steps = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(step.communicate()[0].strip() for step in steps) == cards


@pytest.mark.parametrize("visible, count", [(None, 8), ("3", 1), ("2,5", 2), ("", 0), ("-1", 0)])
def test_make_counts_the_gpus_that_a_user_may_have(tmp_path, visible, count):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i: H100; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "MAKEFLAGS")
    }
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = ["make", "-s", "--eval", "gpus: ; @echo $(GPUS)", "gpus"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(count), done.stderr


def test_every_step_that_trains_or_encodes_waits_for_a_gpu():
    rules = re.split(r"^rule ", (ROOT / "Snakefile").read_text(encoding="utf-8"), flags=re.M)[1:]
    on_gpu = {rule.partition(":")[0] for rule in rules if "gpu=1" in rule}
    assert on_gpu == {"shape", "pretraining", "contrastive", "stage", "evaluate", "probe"}


@pytest.mark.parametrize(
    "arms, message",
    [
        (
            "[contrastive, cocoa, cocao_strict]",
            "arms and sweeps: unknown name 'cocao_strict'; did you mean 'cocoa_strict'",
        ),
        ("[contrastive, stage1_only]", "arms must hold cocoa"),
    ],
)
def test_a_profile_with_arms_that_cannot_run_is_refused(tmp_path, arms, message):
    for name in ("Snakefile", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("cocoa_lib", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    smoke = (NOTEBOOKS / "profiles" / "smoke.yaml").read_text(encoding="utf-8")
    (tmp_path / "notebooks" / "profiles" / "mine.yaml").write_text(re.sub(r"(?m)^arms: .*", f"arms: {arms}", smoke))
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--config", "profile=mine"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode != 0 and message in done.stdout + done.stderr


STUB = """#!/bin/bash
# Stands for `python -m cocoa_lib.MODULE ...`: writes down the call, makes what it would, fails where it is told to.
echo "$*" >> calls
if [ -f broken ] && [[ "$*" == *"$(cat broken)"* ]]; then echo "out of memory: lower batch_size" >&2; exit 1; fi
while [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; [ "$1" = -m ] && module=$2; shift; done
case $module in cocoa_lib.run) mkdir -p "$out";; cocoa_lib.evaluate) touch "$out/results.csv";; *) touch "$out";; esac
"""


@pytest.fixture
def graph(tmp_path):
    """The graph in a folder of its own, with steps that only make their files: (run snakemake, set the arms)."""
    for name in ("cocoa_lib", "notebooks", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    (tmp_path / "Snakefile").write_text(text.replace("PYTHON = shlex.quote(sys.executable)", 'PYTHON = "./stub"'))
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    flags = re.search(r"snakemake --cores \$\(CORES\) (.*?) \$\(SNAKEFLAGS\)", (ROOT / "Makefile").read_text())[
        1
    ].split()

    def arms(names):
        smoke = (NOTEBOOKS / "profiles" / "smoke.yaml").read_text(encoding="utf-8")
        smoke = re.sub(r"(?m)^arms: .*", f"arms: [{names}]", re.sub(r"(?m)^seeds: .*", "seeds: [0]", smoke))
        (tmp_path / "notebooks" / "profiles" / "mine.yaml").write_text(smoke)

    def run(*options, config=()):
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "2",
            *flags,
            *options,
            "--config",
            "profile=mine",
            *config,
        ]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    return run, arms


def test_pairs_read_in_another_way_are_not_taken_for_those_read_before(graph, tmp_path):
    run, arms = graph
    arms("contrastive, cocoa")
    (tmp_path / "my" / "animals").mkdir(parents=True)
    (tmp_path / "my" / "animals" / "cat.png").write_bytes(b"a")
    made = run("--until", "benchmark", config=["pairs=my"])
    assert made.returncode == 0, made.stderr

    def planned(*more):
        return "rule benchmark" in run("-n", "--until", "benchmark", config=["pairs=my", *more]).stdout

    assert not planned() and planned("text_column=title") and planned("on_bad_row=skip")
    (tmp_path / "my" / "animals" / "dog.png").write_bytes(b"b")  # the folder itself is as old as before
    assert planned()


def test_a_failed_step_is_reported_and_retried_alone(graph, tmp_path):
    run, arms = graph
    arms("contrastive_causal, contrastive, cocoa")
    (tmp_path / "broken").write_text('"layout": "causal"')
    failed = run()
    assert failed.returncode != 0 and "out of memory: lower batch_size" in failed.stderr, (
        "the end of the step's own log"
    )
    there = {path.parent.parent.name for path in tmp_path.glob("runs/mine/results/*/seed0/results.csv")}
    assert there == {"contrastive", "cocoa"} and not list(
        tmp_path.glob("runs/mine/notebooks/05*")
    )  # the others went on
    (tmp_path / "broken").unlink()
    (tmp_path / "calls").unlink()
    assert run().returncode == 0
    calls = [re.search(r"cocoa_lib\.(\w+)", call)[1] for call in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(calls) == ["mmeb", "probe", "profiles", "train"]  # notebook 05 is the last


def test_another_arm_makes_its_own_steps_alone(graph, tmp_path):
    run, arms = graph
    arms("contrastive, cocoa")
    assert run().returncode == 0
    assert "Nothing to be done" in run("-n").stderr + run("-n").stdout
    (tmp_path / "calls").unlink()
    arms("contrastive, cocoa, contrastive_causal")
    assert run().returncode == 0
    assert len((tmp_path / "calls").read_text().splitlines()) == 4  # its stage 3, evaluation and probe, and notebook 05
    profile = tmp_path / "notebooks" / "profiles" / "mine.yaml"
    profile.write_text(re.sub(r"(?m)^(stage3: .*steps: )\d+", r"\g<1>7", profile.read_text()))
    jobs = run("-n").stdout
    assert "rule contrastive:" in jobs and "rule benchmark:" not in jobs and "rule pretraining:" not in jobs


def test_a_dry_run_beside_a_run_is_answered(graph, tmp_path):
    run, arms = graph
    arms("contrastive, cocoa")
    assert run("-n").returncode == 0 and not (tmp_path / "runs").exists()
    with locked(tmp_path / "runs" / "mine", RuntimeError):
        assert run("-n").returncode == 0
        refused = run()
        assert refused.returncode != 0 and "another run" in refused.stdout + refused.stderr


def test_a_file_of_pairs_with_a_space_in_its_name(tmp_path):
    for name in ("Snakefile", "cocoa_lib", "notebooks", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my pairs (1); x.csv").touch()
    options = "-m snakemake -n -p --cores 1 --config profile=smoke".split()
    command = [sys.executable, *options, "pairs=my pairs (1); x.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--out runs/smoke-my_pairs_1_x/notebooks/00_data_and_backbone.ipynb" in done.stdout
