"""What the other tests show on a CPU, on a GPU: the same losses, Flex's backward pass, bf16, the launch files, `encode`.

    python -m pytest -m gpu tests/nightly/test_gpu.py

`make test` hides GPUs from its tests, since committed outputs are a CPU's: there, as on a machine without one, these are skipped.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_scale
import torch
from PIL import Image
from test_scale import STAGES, go

from cocoa_lib import kernels
from cocoa_lib.attention import LAYOUTS
from cocoa_lib.backbone import hidden_states, language_model, set_bidirectional
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding
from cocoa_lib.kernels import PICTURES, compile_layers
from cocoa_lib.run.profiles import NOTEBOOKS

home = test_scale.home
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def losses(folder):
    return pd.read_csv(folder / "log.csv")["loss"].to_numpy()


def command(home, stage, out, *before, **environment):
    """The stage in a process of its own, behind `before`, begun."""
    worker = Path(__file__).with_name("stage_worker.py")
    words = [sys.executable, *before, worker, home, stage, out]
    return subprocess.Popen(
        list(map(str, words)), env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def elsewhere(home, tmp_path_factory):
    """Each stage from the same start on the CPU, and by each launch file on one GPU: (kind, stage) -> folder."""
    out = tmp_path_factory.mktemp("elsewhere")
    running = {}
    for stage in STAGES:
        running["cpu", stage] = command(home, stage, out / f"cpu-{stage}", CUDA_VISIBLE_DEVICES="")
        for kind in ("ddp_1x8", "fsdp_1x8"):
            launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
            launch += [
                NOTEBOOKS / f"profiles/accelerate/{kind}.yaml",
                "--num_processes",
                1,
                "--main_process_port",
                0,
            ]
            running[kind, stage] = command(home, stage, out / f"{kind}-{stage}", *launch)
    words = {key: process.communicate(timeout=180)[1][-2000:] for key, process in running.items()}
    failed = {key: words[key] for key, process in running.items() if process.returncode}
    return {key: failed.get(key) or out / "-".join(key) for key in running}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["cpu", "ddp_1x8", "fsdp_1x8"])
def test_a_stage_has_the_losses_of_one_gpu(home, elsewhere, kind, stage):
    """Also of a CPU; convolutions of a GPU round to TF32."""
    folder = elsewhere[kind, stage]
    assert not isinstance(folder, str), folder
    assert np.allclose(losses(folder), losses(home / stage), rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_as_float32_does(home, tmp_path, stage):
    run = go(home, stage, tmp_path / "bf16", bf16=True)
    assert np.allclose(losses(run), losses(home / stage), rtol=0.02)
    assert not np.array_equal(losses(run), losses(home / stage))


@pytest.mark.parametrize("changes", [{"attn_implementation": "flex_attention"}, {"packing": True}, {"torch_compile": True}],
                         ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_a_faster_way_changes_no_loss(home, tmp_path, changes):
    """Flex's backward pass, packed rows and compiled layers, each a stage 2."""
    run = go(home, "stage2", tmp_path / "run", **changes)
    assert np.allclose(losses(run), losses(home / "stage2"), rtol=1e-3)


def test_flex_is_the_dense_mask_for_every_layout_with_gradients(small):
    model, inputs = set_bidirectional(copy.deepcopy(small[0]).cuda(), True), small[1]
    items = [
        {"text": "a large red circle", "image": Image.new("RGB", (64, 48), "red")},
        {"text": "a blue 7"},
    ]
    batch = {
        name: value.cuda()
        for name, value in inputs.collate(items, ["a red circle", "a blue 7 at the bottom"]).items()
    }
    real = batch["attention_mask"].bool()
    for layout in LAYOUTS:
        found = []
        for implementation in ("sdpa", "flex_attention"):
            language_model(model).config._attn_implementation = implementation
            states = hidden_states(model, batch, layout)[real]
            model.zero_grad()
            states.square().sum().backward()
            weight = language_model(model).layers[0].self_attn.q_proj.weight
            found.append((states.detach(), weight.grad.clone()))
        for one, other in zip(*found, strict=True):
            assert (one - other).abs().max() < 1e-4 * one.abs().max(), layout


def test_encode_gives_the_vectors_of_a_cpu(small):
    embedder = CocoaEmbedder(
        EosEmbedding(set_bidirectional(copy.deepcopy(small[0]), True), small[1])
    )
    items = [Image.new("RGB", (64, 32 + i), "red") for i in range(9)] + [
        "a red circle " * (1 + i % 5) for i in range(40)
    ]
    wanted = embedder.encode(items)
    embedder.module.cuda()
    assert np.allclose(embedder.encode(items), wanted, atol=1e-3)
    embedder.module.to(torch.bfloat16)
    assert (embedder.encode(items) * wanted).sum(axis=1).min() > 0.99


@pytest.mark.parametrize("compiled", [False, True])
def test_pictures_of_different_sizes_are_attended_to_in_one_call(small, compiled, monkeypatch):
    """In bf16, by torch's kernel for rows of different lengths; transformers takes them singly."""
    model, inputs = set_bidirectional(copy.deepcopy(small[0]).cuda(), True), small[1]
    noise = [
        np.random.default_rng(i).integers(0, 255, (32, 32 * (1 + i), 3), dtype=np.uint8)
        for i in range(3)
    ]
    batch = inputs.collate([{"text": "a", "image": Image.fromarray(values)} for values in noise])
    batch = {name: value.cuda() for name, value in batch.items()}
    calls, kernel = [], kernels.varlen_attn
    monkeypatch.setattr(
        "cocoa_lib.kernels.varlen_attn",
        lambda *args, **how: calls.append(1) or kernel(*args, **how),
    )
    found = []
    for implementation in ("sdpa", PICTURES):
        model.model.visual.config._attn_implementation = implementation
        if compiled and implementation == PICTURES:
            compile_layers(model)
        with torch.autocast("cuda", torch.bfloat16):
            states = hidden_states(model, batch)
        model.zero_grad()
        states.float().square().sum().backward()
        found.append(
            [states.detach(), *(p.grad.clone() for p in model.model.visual.blocks.parameters())]
        )
    assert compiled or len(calls) == len(model.model.visual.blocks)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()
