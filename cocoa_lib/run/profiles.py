"""Profiles and arms: sizes and recipes a profile, what differs an arm.

`notebooks/profiles/NAME.yaml` holds sections; `extends: OTHER` takes over another profile's.
`notebooks/arms.yaml` holds, for each arm, a hypothesis and the values that differ; `stage1: off`
leaves a stage out. A run's values are the profile's, then the arm's, then its `changes`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..recipes import RECIPES, RecipeError, make_recipe, unknown_name

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
STAGES = ("stage1", "stage2", "stage3")
SHAPE = "seed hidden_size layers heads vision_dim vision_layers"
PAIRS = "image_column text_column class_column image_root on_bad_row"
# Sections beside the recipes, and the type of each value. `launch`: how several GPUs are used.
SETTINGS: dict[str, dict[str, type]] = {
    "benchmark": {"n_pairs": int, "n_queries": int, "n_corpus": int, "seed": int},
    "pairs": dict.fromkeys(PAIRS.split(), str) | {"n_eval": int, "max_side": int},
    "backbone": dict.fromkeys(SHAPE.split(), int),
    "evaluation": {"n_queries": int, "batch_size": int, "dtype": str, "tasks": list},
    "launch": {"processes": int, "config_file": str},
}
SECTIONS = (*SETTINGS, *RECIPES)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds an object. Raises RecipeError naming the file."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: expected names and values, found {type(found).__name__}")
    return found


def check_values(section: str, values: Any, where: str) -> None:
    """Raise RecipeError for a section, name or type that is not known, saying what is."""
    if section not in SECTIONS:
        raise unknown_name(str(section), list(SECTIONS), where)
    if section in SETTINGS:
        _check_types(values, SETTINGS[section], f"{where}: {section}")
        return
    try:
        make_recipe(section, values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _check_types(values: Any, known: dict[str, type], where: str) -> None:
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected names and values, found {values!r:.60}")
    for name, value in values.items():
        if name not in known:
            raise unknown_name(str(name), list(known), where)
        if type(value) is not known[name]:
            raise RecipeError(
                f"{where}.{name}: expected {known[name].__name__}, found {value!r:.60}"
            )


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Merge the sections of several layers: later values win, a stage that is off stays off."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            before = merged.get(section, {})
            off = values is False or before is False
            merged[section] = False if off else {**before, **(values or {})}
    return merged


def load_profile(
    name: str, folder: Path = PROFILES, *, above: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read a profile's sections and its `grid`, those of the profile that it extends included.

    above: the profiles that extend this one. All values are checked. Raises RecipeError naming the
    profile, section and value that is wrong.
    """
    known = sorted({file.stem for file in folder.glob("*.yaml")} - set(above))
    if name not in known:
        raise unknown_name(str(name), known, f"{above[-1]}.yaml" if above else "profile")
    layer = read_yaml(folder / f"{name}.yaml")
    base = layer.pop("extends", None)
    below = {} if base is None else load_profile(base, folder, above=(*above, name))
    grid = layer.pop("grid", {})
    _check_types(grid, dict.fromkeys(read_arms(), int), f"{name}.yaml: grid")
    for section, values in layer.items():
        check_values(section, values, f"{name}.yaml")
    return merge(below, layer) | {"grid": grid or below.get("grid", {})}


def read_arms(path: Path = NOTEBOOKS / "arms.yaml") -> dict[str, dict[str, Any]]:
    """Read the arms: name -> `hypothesis` and the sections that differ, False where one is off.

    Raises RecipeError naming the arm and value that is wrong.
    """
    arms = read_yaml(path)
    for name, values in arms.items():
        where = f"{path.name}, {name!s:.40}"
        if not re.fullmatch(r"[A-Za-z0-9_]+", str(name)):  # it names folders
            raise RecipeError(f"{where}: an arm's name is letters, digits and _")
        if not isinstance(values, dict) or not isinstance(values.get("hypothesis"), str):
            raise RecipeError(f"{where}: expected a hypothesis in one sentence, and what differs")
        for section, part in values.items():
            off = part is False and section in ("stage1", "stage2")
            if section != "hypothesis" and not off:
                check_values(section, part, where)
    return arms
