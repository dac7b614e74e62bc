"""The estimate, slower parts: the measured peak of a step here, steps of the real shapes on meta."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import test_estimate
import torch
from test_estimate import CHECKPOINTING, CONFIGS, DORA, FULL, SIDE, TEXT, batch_of, trained_module

from cocoa_lib.recipes import make_recipe
from cocoa_lib.run import estimate
from cocoa_lib.run.estimate import SHAPES, Data, build, count_flops, make_item
from cocoa_lib.run.profiles import ROOT, load_profile
from cocoa_lib.world.build import build as build_world
from cocoa_lib.world.scenes import CANVAS

sys.path.insert(0, str(ROOT / "benchmarks"))
from common import peaks  # noqa: E402

small = test_estimate.small


def two_steps(folder, recipe, n):
    """In the second Adam's state is there beside the activations."""
    module = trained_module(folder, recipe)
    optimiser = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            loss = module(**batch_of(module.model, n))["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def prepared(folder, values, n):
    """A step for `peak`, which includes the model; what is allocated once and for all is there after the smaller one."""
    recipe = make_recipe("stage1", values)
    two_steps(folder, recipe, 1)
    return lambda: two_steps(folder, recipe, n)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)
@pytest.mark.parametrize(
    "values", [FULL, DORA, CHECKPOINTING, {"bf16": True}], ids=["full", "dora", "ckpt", "bf16"]
)  # fmt: skip
def test_the_memory_is_the_measured_peak_of_a_small_step(small, values):
    """Stage 1, 8 million parameters, 4 items: within 15 %. On a CPU: what a GPU's allocator leaves in gaps is not in it."""
    values = values | {"batch_size": 4, "text_mask_rate": 12 / TEXT}
    area = (SIDE * 14) ** 2
    recipe, data = make_recipe("stage1", values), Data(text=TEXT, pixels=area, largest=area)
    needs = estimate.estimate(small["2B"], "stage1", recipe, data)
    assert needs["memory"] == pytest.approx(
        peaks(prepared, small["2B"], values, 4, n=1)[0], rel=0.15
    )


def test_items_are_measured(tmp_path):
    build_world(tmp_path / "world", seed=0, n_pairs=64, n_queries=8, n_corpus=8)
    data = estimate.measure(tmp_path / "world")
    assert 0.8 * CANVAS**2 < data.pixels <= data.largest == CANVAS**2
    assert 0.3 < data.share < 0.8 and 2 < data.text < 40


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_a_step_on_meta_at_the_real_shape(name, stage):
    """All weights trained, checkpointed: every weight of the full-size model gets a gradient of its shape."""
    recipe = make_recipe(stage, load_profile("paper")[stage] | {"lora_r": 0})
    module = build(CONFIGS / SHAPES[name], stage, recipe)
    forward, backward = count_flops(
        module, stage, make_item(module, 12, 64, 12 * (stage != "stage3"))
    )
    assert 2 * forward < backward < 4 * forward
    head = (
        ["model.lm_head.weight"] if stage == "stage3" and name == "7B" else []
    )  # the others' is tied
    assert [
        n for n, p in module.named_parameters() if p.grad is None or p.grad.shape != p.shape
    ] == head
