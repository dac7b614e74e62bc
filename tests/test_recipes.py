"""Recipes: unknown names, impossible values, layouts and losses, the sources' numbers."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import TypeAdapter

from cocoa_lib.attention import LAYOUTS
from cocoa_lib.recipes import RECIPES, RecipeError, make_recipe
from cocoa_lib.reconstruction import TEXT_LOSSES


@pytest.mark.parametrize(
    "stage, values, message",
    [
        ("stage9", {}, "stage: unknown name 'stage9'; did you mean 'stage\\d'"),
        ("stage1", {"stepz": 3}, "stage1: unknown name 'stepz'; did you mean 'steps'"),
        ("stage1", [1], r"stage1: expected names and values, got \[1\]"),
        ("stage1", {"preset": "figur"}, "unknown name 'figur'; did you mean 'figure'"),
        ("stage2", {"preset": "figure"}, r"stage2.preset \(stage 1 only\)"),
        ("stage1", {"objective": "nmtp"}, "'nmtp'; did you mean 'mntp'.*Known: mntp, mlm$"),
        ("stage2", {"sources": "caption"}, "did you mean 'captions'"),
        ("stage3", {"layout": "eos_bridged"}, "layout: unknown name 'eos_bridged'"),
        ("stage1", {"steps": "many"}, "stage1.steps: .*valid integer, got 'many'"),
        ("stage1", {"steps": True}, "stage1.steps: .*valid integer, got True"),
        ("stage1", {"packing": "yes"}, "stage1.packing: .*valid boolean, got 'yes'"),
        ("stage1", {"learning_rate": float("nan")}, "learning_rate: .*finite number, got nan"),
        ("stage1", {"learning_rate": 10**400}, "learning_rate: "),
        ("stage1", {"text_mask_rate": 1.5}, "less than or equal to 1, got 1.5"),
        ("stage3", {"save_steps": 0}, "save_steps: .*greater than or equal to 1, got 0"),
        ("stage1", {"steps": [[["x"] * 99] * 99] * 99}, "stage1.steps: .*valid integer, got "),
        ("stage3", {"temperature": 0}, "temperature: .*greater than or equal to 0.001, got 0"),
    ],
)
def test_what_no_stage_can_train_with_is_refused(stage, values, message):
    with pytest.raises(RecipeError, match=message) as error:
        make_recipe(stage, values)
    assert len(str(error.value)) < 1000


def test_values_reach_the_recipe_and_a_preset_gives_way():
    recipe = make_recipe("stage1", {"preset": "moca", "patch_mask_rate": 0, "steps": 7})
    assert (recipe.text_mask_rate, recipe.objective, recipe.steps) == (0.4, "mlm", 7)
    assert recipe.patch_mask_rate == 0.0 and type(recipe.patch_mask_rate) is float
    again = make_recipe("stage1", dataclasses.asdict(recipe))
    assert again == recipe and hash(again) == hash(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.steps = 8


def test_recipes_know_the_layouts_and_losses_that_the_method_has():
    for layout in LAYOUTS:
        assert make_recipe("stage2", {"layout": layout}).layout == layout
    for objective in TEXT_LOSSES:
        assert make_recipe("stage1", {"objective": objective}).objective == objective


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_number_has_a_range_and_every_default_lies_in_it(recipe):
    recipe()
    schema = TypeAdapter(recipe).json_schema()["properties"]
    for name, field in schema.items():
        if field.get("type") in ("integer", "number"):
            assert "minimum" in field, name


def test_the_defaults_are_the_scripts_numbers():
    one, two, three = (make_recipe(f"stage{i}") for i in (1, 2, 3))
    assert (one.text_mask_rate, one.patch_mask_rate, one.image_weight) == (0.2, 0.3, 0.5)
    assert (one.steps, one.batch_size, one.warmup_steps) == (3000, 128, 100)
    assert (two.text_mask_rate, two.layout, two.batch_size) == (0.7, "eos_bridged", 64)
    assert (three.temperature, three.batch_size, three.steps) == (0.02, 1024, 2000)
    assert (three.warmup_steps, three.mini_batch_size, three.pooling) == (200, 8, "eos")
    for recipe in (one, two, three):
        rate = (recipe.learning_rate, recipe.schedule, recipe.max_length)
        assert rate == (2e-5, "linear", 4096)
        assert (recipe.lora_alpha, recipe.lora_dropout, recipe.dora) == (64, 0.1, True)


def test_a_picture_leaves_room_for_text_and_for_its_copy():
    one, plain = make_recipe("stage1"), make_recipe("stage2")
    both = make_recipe("stage2", {"image_weight": 0.5})
    assert [r.image_limit(4096) for r in (one, plain, both)] == [1280] * 3
    assert [r.image_limit(64) for r in (one, plain, both)] == [32, 32, 24]
