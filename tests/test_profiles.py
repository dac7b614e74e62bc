"""Profiles and arms: what they hold is checked down to each value, and a wrong one is named."""

from __future__ import annotations

import pytest

from cocoa_lib.recipes import RecipeError
from cocoa_lib.run.profiles import load_profile, merge, read_arms


def test_a_later_layer_changes_values_and_a_stage_that_is_off_stays_off():
    layers = (
        {"stage1": {"steps": 1, "bf16": True}},
        {"stage1": {"steps": 2}, "stage2": False},
        {"stage2": {"steps": 3}},
    )
    assert merge(*layers) == {"stage1": {"steps": 2, "bf16": True}, "stage2": False}


@pytest.mark.parametrize(
    "text, message",
    [
        ("stage1: {stepz: 3}", "unknown name 'stepz'; did you mean 'steps'"),
        ("stage9: {}", "unknown name 'stage9'"),
        ("stage1: {steps: many}", "stage1.steps: .*'many'"),
        ("stage1: [1]", "stage1: expected names and values"),
        ("benchmark: {n_pairs: many}", "benchmark.n_pairs: expected int"),
        ("extends: nothing", "mine.yaml: unknown name 'nothing'"),
        ("extends: mine", "unknown name 'mine'"),
        ("grid: {cocao: 5}", "grid: unknown name 'cocao'; did you mean 'cocoa'"),
        ("grid: {cocoa: many}", "grid.cocoa: expected int"),
        ("grid: [cocoa]", "grid: expected names and values"),
        ("[1]", "expected names and values, found list"),
        ("{", "not valid YAML"),
    ],
)
def test_a_profile_that_is_none(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_profile("mine", tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("$(rm x): {hypothesis: a}", r"\$\(rm x\): an arm's name is letters, digits and _"),
        ("x: {stage1: off}", "x: expected a hypothesis in one sentence"),
        ("x: {hypothesis: a, stage3: off}", "x: stage3: expected names and values"),
        ("x: {hypothesis: a, stage3: {stepz: 1}}", "x: .*unknown name 'stepz'"),
        ("x: {hypothesis: a, backbone: {hiden_size: 8}}", "did you mean 'hidden_size'"),
    ],
)
def test_a_table_of_arms_that_is_none(tmp_path, text, message):
    (tmp_path / "arms.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_arms(tmp_path / "arms.yaml")
