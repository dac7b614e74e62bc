"""Tiny runs for tests: `home` has a world, a random model and the three stages from it."""

from __future__ import annotations

import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from cocoa_lib.contrastive import pair_features
from cocoa_lib.data import corpus
from cocoa_lib.recipes import make_recipe
from cocoa_lib.run.stage import run_stage
from cocoa_lib.run.trainers import PlainTrainer
from cocoa_lib.store.checkpoint import read_meta, save_checkpoint
from cocoa_lib.world.backbone import new_backbone
from cocoa_lib.world.build import build

STAGES = ("stage1", "stage2", "stage3")
PARENT = {"stage1": "causal", "stage2": "stage1", "stage3": "stage2"}
# Checkpoints at 2 and 4, log rows at 4 and 6: a resumed run must carry half a log row.
TINY = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "max_length": 128}
TINY |= {"save_steps": 2, "logging_steps": 4}
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3}


def tiny(stage, **values):
    extra = {"mini_batch_size": 3, "temperature": 0.1} if stage == "stage3" else {}
    return make_recipe(stage, TINY | extra | values)


def make_start(folder: Path) -> Path:
    """Write `world` and the random model `causal`."""
    torch.set_num_threads(1)
    build(folder / "world", seed=0, n_pairs=64, n_queries=8, n_corpus=16)
    rows = [*corpus.captions(folder / "world"), *corpus.questions(folder / "world")]
    shape = {"hidden_size": 64, "layers": 2, "heads": 2, "vision_dim": 32, "vision_layers": 1}
    shape |= {"patch_size": 8, "vocab_size": 400, "image_pixels": 1024}
    model, inputs = new_backbone([row["text"] + row["target"] for row in rows], seed=0, **shape)
    save_checkpoint(folder / "causal", model, inputs, {"stage": "causal"})
    return folder


def make_home(folder: Path) -> Path:
    """Write a start and the three stages from it, seed 0, uninterrupted."""
    make_start(folder)
    for stage in STAGES:
        go(folder, stage, folder / stage)
    return folder


def go(home, stage, out, recipe=None, **settings):
    places = {"parent": home / PARENT[stage], "data": home / "world", "show_progress": False}
    return run_stage(stage, recipe or tiny(stage), out=out, **places | settings)


def pair_columns(rows, inputs, mini_batch_size):
    """The columns that stage 3's loss is given of rows {anchor, positive}."""
    collate = partial(pair_features, inputs=inputs, mini_batch_size=mini_batch_size)
    batch = SentenceTransformerDataCollator(collate)(rows)
    sides = ("anchor", "positive")
    return [
        {k.removeprefix(f"{s}_"): v for k, v in batch.items() if k.startswith(s)} for s in sides
    ]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(one, other):
    assert (one / "log.csv").read_text() == (other / "log.csv").read_text()
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert read_meta(one)["weights_sha256"] == read_meta(other)["weights_sha256"]


def stop_at(monkeypatch, step, how):
    """At the loss of `step`: raise `how`, or send that signal to this process."""
    original = PlainTrainer.check_loss

    def checked(self, loss):
        if self.state.global_step + 1 == step:
            if isinstance(how, BaseException):
                raise how
            os.kill(os.getpid(), how)
        return original(self, loss)

    monkeypatch.setattr(PlainTrainer, "check_loss", checked)


def fork_server():
    """Child processes from one that has imported the library once, and nothing of this one's state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cocoa_lib.run"])
    return context


def _member(rank, port, n, work, home, out):
    """One of `n` processes; what it raises is its last word in OUT/error-RANK."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        work(rank, home, out)
    except BaseException as error:
        (out / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def together(work, home, out, n=2):
    """Run `work` in `n` gloo processes of one run; exit codes in order of rank."""
    context = fork_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [(rank, port, n, work, home, out) for rank in range(n)]
    children = [context.Process(target=_member, args=each) for each in words]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.exitcode is None:
            child.kill()
    return [child.exitcode for child in children]
