"""Profiles and arms: sizes and recipes a profile, what differs an arm.

`notebooks/profiles/NAME.yaml` holds sections; `extends: OTHER` takes over another profile's.
`notebooks/arms.yaml` holds, for each arm, a hypothesis and the values that differ; `stage1: off`
leaves a stage out. A run's values are the profile's, then the arm's, then its `changes`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..recipes import RECIPES, RecipeError, make_recipe, unknown_name

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
STAGES = ("stage1", "stage2", "stage3")
# Sections beside the recipes, and the type of each value. `launch`: how several GPUs are used.
SETTINGS: dict[str, dict[str, type]] = {
    "benchmark": {"n_pairs": int, "n_queries": int, "n_corpus": int, "seed": int},
    "pairs": {
        **dict.fromkeys("image_column text_column class_column image_root on_bad_row".split(), str),
        "n_eval": int,
        "max_side": int,
    },
    "backbone": {
        **dict.fromkeys("seed hidden_size layers heads vision_dim vision_layers".split(), int),
        "effort": float,
    },
    "evaluation": {"n_queries": int, "batch_size": int, "dtype": str, "tasks": list},
    "launch": {"processes": int, "config_file": str},
}
CHANGEABLE = (*SETTINGS, *RECIPES)
SECTIONS = (*CHANGEABLE, "grid", "extends")


@dataclass(frozen=True)
class Arm:
    """What differs from the profile: section -> values; False where a stage is left out."""

    name: str
    hypothesis: str
    changes: dict[str, dict[str, Any] | bool] = field(default_factory=dict)


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
    if section not in CHANGEABLE:
        raise unknown_name(str(section), list(CHANGEABLE), where)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{where}: {section} must be names and values, such as {{steps: 5}}; found "
            f"{values!r:.60}"
        )
    if section in RECIPES:
        try:
            make_recipe(section, values)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        return
    for name, value in values.items():
        if name not in SETTINGS[section]:
            raise unknown_name(str(name), list(SETTINGS[section]), f"{where}: {section}")
        if type(value) is not (kind := SETTINGS[section][name]):
            raise RecipeError(
                f"{where}: {section}.{name}: expected {kind.__name__}, found {value!r:.60}"
            )


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Merge the sections of several layers: later values win, a stage that is off stays off."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            before = merged.get(section, {})
            off = values is False or before is False
            merged[section] = False if off else {**before, **values}
    return merged


def load_profile(name: str, folder: Path = PROFILES) -> dict[str, Any]:
    """Read a profile's sections, those of the profile that it extends included.

    All values are checked. Raises RecipeError naming the profile, section and value that is wrong.
    """
    seen: list[str] = []
    layers: list[dict[str, Any]] = []
    while name:
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        where = str(folder / f"{seen[-1]}.yaml") if seen else "profile"
        if name not in known or name in seen:
            raise unknown_name(str(name), [one for one in known if one not in seen], where)
        seen.append(name)
        path = folder / f"{name}.yaml"
        layer = read_yaml(path)
        name = layer.pop("extends", "")
        for section, values in layer.items():
            if section == "grid":
                _check_grid(values, str(path))
            else:
                check_values(section, values, str(path))
        layers.insert(0, layer)
    grids = [layer.pop("grid") for layer in layers if "grid" in layer]
    return merge(*layers) | {"grid": grids[-1] if grids else {}}


def _check_grid(grid: Any, where: str) -> None:
    """Check arm -> number of seeds."""
    if not isinstance(grid, dict):
        raise RecipeError(f"{where}: grid must be arm: number of seeds, found {grid!r:.60}")
    arms = read_arms()
    for arm, seeds in grid.items():
        if arm not in arms:
            raise unknown_name(str(arm), list(arms), f"{where}: grid")
        if type(seeds) is not int or seeds < 1:
            raise RecipeError(
                f"{where}: grid.{arm}: expected a number of seeds from 1, found {seeds!r}"
            )


def read_arms(path: Path = NOTEBOOKS / "arms.yaml") -> dict[str, Arm]:
    """Read the arms by name. Raises RecipeError naming the arm and value that is wrong."""
    arms = {}
    for name, values in read_yaml(path).items():
        where = f"{path}, {name}"
        if not re.fullmatch(r"[A-Za-z0-9_]+", str(name)):  # it names folders
            raise RecipeError(f"{path}: an arm's name is letters, digits and _; found {name!r:.40}")
        if not isinstance(values, dict) or not isinstance(values.get("hypothesis"), str):
            raise RecipeError(f"{where}: expected a hypothesis in one sentence, and what differs")
        changes = {section: part for section, part in values.items() if section != "hypothesis"}
        for section, part in changes.items():
            if not (part is False and section in ("stage1", "stage2")):
                check_values(section, part, where)
        arms[name] = Arm(name, values["hypothesis"], changes)
    return arms
