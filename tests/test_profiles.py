"""Profiles, arms and notebooks fit together: unknown names are errors, notebook defaults are the smoke profile."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import nbformat
import pytest

from cocoa_lib.attention import LAYOUTS
from cocoa_lib.recipes import RANGES, RECIPES, RecipeError, make_recipe
from cocoa_lib.run.arms import read_arms
from cocoa_lib.run.profiles import (
    NOTEBOOKS,
    declared_parameters,
    load_profile,
    notebook_parameters,
    profile_of,
    tidy_notebook,
)

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


def test_there_are_six_numbered_notebooks():
    assert [path.name[:2] for path in ALL] == ["00", "01", "02", "03", "04", "05"]


@pytest.mark.parametrize("notebook", ALL, ids=lambda path: path.stem)
def test_defaults_are_the_smoke_profile(notebook):
    smoke = load_profile("smoke")
    for name, default in declared_parameters(notebook).items():
        if name in smoke:
            assert ast.literal_eval(default) == smoke[name], name


@pytest.mark.parametrize("notebook", ALL, ids=lambda path: path.stem)
def test_every_name_of_the_parameters_cell_is_found(notebook):
    """papermill's reader drops a parameter whose comment confuses it; the cell itself is the truth."""
    cells = nbformat.read(notebook, as_version=4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    names = {target.id for node in ast.parse(source).body for target in node.targets}
    assert names == set(declared_parameters(notebook))


@pytest.mark.parametrize("name", sorted(file.stem for file in (NOTEBOOKS / "profiles").glob("*.yaml")))
def test_profiles_are_whole(name):
    profile = load_profile(name)
    arms, sweeps = profile["arms"], profile.get("sweeps", [])
    assert {*arms, *sweeps} <= set(read_arms()) and not set(arms) & set(sweeps) and profile["seeds"]
    for stage in ("stage1", "stage2", "stage3"):
        make_recipe(stage, profile[stage])


def test_the_paper_profile_is_the_published_recipe():
    profile = load_profile("paper")
    one, two, three = (make_recipe(stage, profile[stage]) for stage in ("stage1", "stage2", "stage3"))
    assert (one.text_mask_rate, one.patch_mask_rate, one.image_weight) == (0.2, 0.3, 0.5)
    assert (two.text_mask_rate, two.layout, two.batch_size) == (0.7, "eos_bridged", 64)
    assert (three.temperature, three.batch_size, three.steps, three.warmup_steps) == (0.02, 1024, 2000, 200)
    for recipe in (one, two, three):
        assert (recipe.learning_rate, recipe.schedule, recipe.lora_r, recipe.lora_alpha, recipe.dora) == (
            2e-5,
            "linear",
            8,
            64,
            True,
        )


@pytest.mark.parametrize(
    "stage, values, message",
    [
        ("stage1", {"patch_fill": "gaussian"}, "Stage1Recipe.patch_fill: unknown name 'gaussian' Known: noise, zero, learned"),
        ("stage1", {"objective": "nmtp"}, "objective: unknown name 'nmtp'; did you mean 'mntp'"),
        ("stage2", {"sources": "caption"}, "sources: unknown name 'caption'; did you mean 'captions'"),
        ("stage3", {"layout": "casual"}, "layout: unknown name 'casual'; did you mean 'causal'"),
        ("stage3", {"layout": "eos_bridged"}, "Stage3Recipe.layout: unknown name 'eos_bridged'"),
        ("stage3", {"pooling": "max"}, "pooling: unknown name 'max'"),
        ("causal", {"layout": "bidirectional"}, "CausalRecipe.layout: unknown name"),
        ("causal", {"schedule": "linaer"}, "schedule: unknown name 'linaer'; did you mean 'linear'"),
    ],
)  # fmt: skip
def test_a_word_that_no_stage_knows_does_not_train_as_something_else(stage, values, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(stage, values)


@pytest.mark.parametrize(
    "stage, values, message",
    [
        ("stage3", {"save_steps": 0}, "Stage3Recipe.save_steps must be at least 1, got 0"),
        ("stage1", {"text_mask_rate": 1.5}, "Stage1Recipe.text_mask_rate must be in 0..1, got 1.5"),
        ("stage1", {"patch_mask_rate": -0.3}, "patch_mask_rate must be in 0..1, got -0.3"),
        ("stage2", {"patch_mask_rate": 1.1}, "patch_mask_rate must be in 0..1, got 1.1"),
        ("stage1", {"image_weight": -0.5}, "image_weight must be at least 0, got -0.5"),
        ("stage1", {"decoder_layers": -1}, "decoder_layers must be at least 0, got -1"),
        ("stage2", {"lora_r": -1}, "lora_r must be at least 0, got -1"),
        ("stage2", {"lora_dropout": 2}, "lora_dropout must be in 0..1, got 2"),
        ("stage3", {"temperature": 0}, "temperature must be at least 0.001, got 0"),
        ("stage3", {"mini_batch_size": 0}, "mini_batch_size must be at least 1, got 0"),
        ("stage3", {"max_per_subset": 0}, "max_per_subset must be at least 1, got 0"),
        ("causal", {"max_grad_norm": -1.0}, "max_grad_norm must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_a_number_that_no_stage_can_train_with_is_refused(stage, values, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(stage, values)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_number_of_a_recipe_has_a_range(recipe):
    numbers = {field.name for field in dataclasses.fields(recipe) if type(field.default) in (int, float)}
    assert numbers <= RANGES.keys()


def test_recipes_know_the_layouts_that_attention_has():
    assert set(get_args(get_type_hints(RECIPES["stage2"])["layout"])) == set(LAYOUTS)


def test_unknown_names_are_errors_that_help(tmp_path):
    with pytest.raises(RecipeError, match="unknown name 'laptp'; did you mean 'laptop'"):
        load_profile("laptp")
    (tmp_path / "mine.yaml").write_text("stage1: {stepz: 3}")
    with pytest.raises(RecipeError, match="unknown name 'stepz'; did you mean 'steps'"):
        load_profile("mine", tmp_path)
    (tmp_path / "mine.yaml").write_text("stage9: {}")
    with pytest.raises(RecipeError, match="unknown name 'stage9'"):
        load_profile("mine", tmp_path)
    (tmp_path / "mine.yaml").write_text("stage1: {steps: many}")
    with pytest.raises(RecipeError, match="stage1.steps: expected int, got 'many'"):
        load_profile("mine", tmp_path)
    with pytest.raises(RecipeError, match="unknown name 'sed'; did you mean 'seed'"):
        notebook_parameters(NOTEBOOKS / "02_reconstruction_pretraining.ipynb", {}, {"sed": 1})


def test_arms_share_what_is_the_same():
    arms = read_arms()
    assert (
        arms["cocoa"].key("stage1") == arms["stage1_only"].key("stage1") == arms["cocoa_strict"].key("stage1") == "base"
    )
    assert (
        arms["cocoa"].key("stage2")
        == "base"
        != arms["cocoa_strict"].key("stage2")
        != arms["no_truncation"].key("stage2")
    )
    assert arms["stage2_only"].key("stage2") != "base", "stage 2 from the backbone is not stage 2 from stage 1"
    assert len({arm.key("stage3") for arm in arms.values()}) == len(arms)
    for stage in ("stage1", "stage2"):
        assert arms["cocoa_half"].key(stage) != "base", "a stage from another backbone is another"


def test_a_bad_arm_names_its_line_and_column(tmp_path):
    path = tmp_path / "arms.csv"
    path.write_text('arm,stage1,stage2,stage3,hypothesis\nx,{},-,"{""stepz"": 1}",none\n')
    with pytest.raises(RecipeError, match="line 2, column stage3.*stepz"):
        read_arms(path)
    path.write_text("arm,stage1,stage2,stage3,hypothesis,backbone\nx,-,-,{},none,half\n")
    with pytest.raises(RecipeError, match="line 2, column backbone: Expecting value"):
        read_arms(path)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"arm,stage1,stage2,stage3,hypothesis\nx,-,-,{},\xff\n", "not a table in UTF-8"),
        (b"arm,stage1,stage2,stage3\nx,-,-,{}\n", "no column hypothesis; found arm, stage1"),
        (b"", "no column arm, stage1, stage2, stage3, hypothesis; found none"),
        (b"arm,stage1,stage2,stage3,hypothesis\n$(rm x),-,-,{},\n", r"line 2, column arm: a name of letters.*rm x"),
        (
            b"arm,kind,stage1,stage2,stage3,hypothesis\nx,odd,-,-,{},\n",
            "line 2, column kind: expected arm, budget, sweep",
        ),
        (
            b'arm,backbone,stage1,stage2,stage3,hypothesis\nx,"{""hiden_size"": 8}",-,-,{},\n',
            "line 2, column backbone: .*hiden_size.*did you mean 'hidden_size'",
        ),
        (
            b'arm,backbone,stage1,stage2,stage3,hypothesis\nx,"{""layers"": 0}",-,-,{},\n',
            "line 2, column backbone: expected whole numbers above 0",
        ),
        (
            b"arm,backbone,stage1,stage2,stage3,hypothesis\nx,[1],-,-,{},\n",
            "line 2, column backbone: expected an object",
        ),
        (b"arm,stage1,stage2,stage3,hypothesis\nx,-,-,{},\nx,-,-,{},\n", "line 3, column arm: x stands there twice"),
    ],
)
def test_a_table_of_arms_that_is_none(tmp_path, text, message):
    path = tmp_path / "arms.csv"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match=message):
        read_arms(path)


def test_tidy_notebook_drops_progress_bars_only(tmp_path):
    cell = nbformat.v4.new_code_cell("x")
    texts = ["  0%|          | 0/6 [00:00<?, ?step/s]", "a result of 5%"]
    cell.outputs = [nbformat.v4.new_output("display_data", {"text/plain": text}) for text in texts]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": 1}})
    path = Path(tmp_path / "n.ipynb")
    nbformat.write(notebook, path)
    tidy_notebook(path)
    tidied = nbformat.read(path, as_version=4)
    assert [o.data["text/plain"] for o in tidied.cells[0].outputs] == texts[1:] and "widgets" not in tidied.metadata


def test_a_run_is_of_the_longest_profile_that_its_name_begins_with(monkeypatch, tmp_path):
    (tmp_path / "profiles").mkdir()
    for name, temperature in (("laptop", 0.05), ("laptop-mine", 0.1)):
        (tmp_path / "profiles" / f"{name}.yaml").write_text(f"stage3: {{temperature: {temperature}}}")
    monkeypatch.setattr("cocoa_lib.run.profiles.NOTEBOOKS", tmp_path)
    monkeypatch.setattr("cocoa_lib.run.profiles.load_profile", lambda name: load_profile(name, tmp_path / "profiles"))
    found = {
        name: profile_of(Path("runs") / name) for name in ("laptop-emoji", "laptop-mine", "laptop-mine-emoji", "other")
    }
    temperatures = [
        found[name]["stage3"]["temperature"] for name in ("laptop-emoji", "laptop-mine", "laptop-mine-emoji")
    ]
    assert temperatures == [0.05, 0.1, 0.1] and found["other"] == {}


def test_a_table_of_arms_saved_by_a_spreadsheet(tmp_path):
    path = tmp_path / "arms.csv"
    path.write_text("arm,stage1,stage2,stage3,hypothesis\nx,-,-,{},none\n", encoding="utf-8-sig")
    assert list(read_arms(path)) == ["x"]
