"""Profiles and notebooks: one YAML a profile, checked; papermill runs a notebook with what it declares.

A profile (`notebooks/profiles/NAME.yaml`) has sections; a notebook's `parameters` cell declares which of them it takes
(`stage1 = {...}`), with the smoke profile's values as defaults. Papermill only warns of unknown names, so names are
checked here, stage recipes down to each value. The arms of the ablation are rows of `notebooks/arms.csv`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .recipes import RECIPES, RecipeError, make_recipe, unknown_name

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
KINDS = ("arm", "budget", "sweep")
SHAPE = tuple("hidden_size layers heads vision_dim vision_layers patch_size vocab_size image_pixels seed".split())
SECTIONS = tuple("benchmark backbone causal stage1 stage2 stage3 evaluation seeds arms sweeps pairs".split())


def path(name: str | Path) -> Path:
    """A path of a notebook's parameters: relative ones start at the repository's root, wherever the kernel runs."""
    return Path(os.path.relpath(ROOT / name))


def load_profile(name: str, folder: Path = NOTEBOOKS / "profiles") -> dict[str, Any]:
    """Read and check a profile. Raises RecipeError naming the profile, section and value that is unknown or wrong."""
    path = folder / f"{name}.yaml"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise unknown_name(name, known, "profile")
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no UTF-8, an impossible date, endless nesting
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(profile, dict):
        raise RecipeError(f"{path}: expected sections, found {type(profile).__name__}")
    for section, values in profile.items():
        if section not in SECTIONS:
            raise unknown_name(str(section), list(SECTIONS), str(path))
        if section in RECIPES:
            make_recipe(section, values)
    return profile


def profile_of(run: Path) -> dict[str, Any]:
    """The profile that a run or report folder is named after, NAME or NAME-PAIRS, the longest; {} where there is none."""
    parts = run.name.split("-")
    names = ("-".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((load_profile(name) for name in names if (NOTEBOOKS / "profiles" / f"{name}.yaml").is_file()), {})


def declared_parameters(notebook: Path) -> dict[str, str]:
    """Name -> default, as written, of the notebook's `parameters` cell."""
    import papermill

    found = papermill.inspect_notebook(str(notebook))
    if not found:
        raise RecipeError(f"{notebook}: no cell tagged 'parameters'")
    return {name: entry["default"] for name, entry in found.items()}


def notebook_parameters(notebook: Path, profile: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The profile's sections that the notebook declares, then the overrides. An override it does not declare is an error."""
    declared = declared_parameters(notebook)
    for name in overrides:
        if name not in declared:
            raise unknown_name(name, list(declared), str(notebook))
    for stage in RECIPES:
        if stage in overrides:
            make_recipe(stage, overrides[stage])
    return {name: value for name, value in profile.items() if name in declared} | overrides


def run_notebook(notebook: Path, out: Path, profile: str, overrides: dict[str, Any], *, progress: bool = True) -> Path:
    """Execute `notebook` with a profile into `out`: written aside, renamed when all cells have run.

    Papermill's partial notebook of a failed run stays beside as `NAME.partial.ipynb`, to be looked at.
    """
    import papermill

    parameters = notebook_parameters(notebook, load_profile(profile), overrides)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial.ipynb")
    papermill.execute_notebook(
        str(notebook),
        str(partial),
        cwd=str(NOTEBOOKS),
        parameters=parameters,
        kernel_name="python3",
        progress_bar=progress,
        log_output=False,
    )
    tidy_notebook(partial)
    os.replace(partial, out)
    return out


def tidy_notebook(notebook: Path) -> None:
    """Drop what only a live kernel can show: progress bars left behind and the state of widgets."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        outputs = cell.get("outputs", [])
        cell_outputs = [o for o in outputs if not re.match(r"\s*\d+%\|", o.get("data", {}).get("text/plain", ""))]
        if cell.cell_type == "code":
            cell.outputs = cell_outputs
    nbformat.write(content, notebook)


@dataclass(frozen=True)
class Arm:
    """One row of the ablation: which stages run and what differs from the profile's recipe. None: stage left out.

    kind: "arm" is compared with contrastive learning alone; "budget" has contrastive learning of its own, to be compared with
    contrastive learning alone on the same; "sweep" changes one value of the full method. backbone: what differs from
    the profile's backbone; the graph then trains that one, instead of taking the committed one.
    """

    name: str
    stage1: dict[str, Any] | None
    stage2: dict[str, Any] | None
    stage3: dict[str, Any]
    hypothesis: str
    kind: str = "arm"
    backbone: dict[str, Any] = field(default_factory=dict)

    def key(self, stage: str) -> str:
        """A name shared by arms whose run up to this stage is the same, so that it is trained once."""
        parts = [self.stage1, self.stage2, self.stage3][: ("stage1", "stage2", "stage3").index(stage) + 1]
        if stage == "stage3":
            return self.name
        if self.backbone:
            parts = [self.backbone, *parts]
        elif all(part in (None, {}) for part in parts):
            return (
                "base"
                if all(part == {} for part in parts)
                else "skip" + "".join(str(int(part is not None)) for part in parts)
            )
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def read_arms(path: Path = NOTEBOOKS / "arms.csv") -> dict[str, Arm]:
    """The table of arms by name; each changed value is checked. Raises RecipeError naming the row and column."""
    arms = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path}: not a table in UTF-8 ({error}); save it as UTF-8 .csv") from error
    if lost := [name for name in ("arm", "stage1", "stage2", "stage3", "hypothesis") if name not in columns]:
        raise RecipeError(f"{path}: no column {', '.join(lost)}; found {', '.join(map(str, columns)) or 'none'}")
    for number, row in enumerate(rows, start=2):
        column, stages = "arm", {}
        try:
            if not re.fullmatch(r"[A-Za-z0-9_]+", row["arm"] or ""):  # it names folders, and stands in commands
                raise RecipeError(f"a name of letters, digits and _, found {row['arm']!r:.40}")
            if row["arm"] in arms:
                raise RecipeError(f"{row['arm']} stands there twice")
            for column in ("stage1", "stage2", "stage3"):
                stages[column] = None if row[column] == "-" else json.loads(row[column] or "{}")
                make_recipe(column, stages[column])
            column = "backbone"
            backbone = json.loads(row.get("backbone") or "{}")
            if not isinstance(backbone, dict):
                raise RecipeError(f"expected an object, found {backbone!r:.40}")
            if unknown := [name for name in backbone if name not in SHAPE]:
                raise unknown_name(unknown[0], list(SHAPE), "backbone")
            if not all(type(value) is int and value > 0 for value in backbone.values()):
                raise RecipeError(f"expected whole numbers above 0, found {backbone}")
            column = "kind"
            kind = row.get("kind") or "arm"
            if kind not in KINDS:
                raise RecipeError(f"expected {', '.join(KINDS)}, found {kind!r:.40}")
        except (ValueError, KeyError, RecursionError) as error:
            raise RecipeError(f"{path}, line {number}, column {column}: {error}") from error
        arms[row["arm"]] = Arm(row["arm"], **stages, hypothesis=row["hypothesis"] or "", kind=kind, backbone=backbone)
    return arms


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cocoa_lib.profiles", description="Run a notebook with a profile.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="override a parameter (YAML value)")
    args = parser.parse_args(argv)
    overrides = {}
    for pair in args.set:
        name, _, value = pair.partition("=")
        overrides[name] = yaml.safe_load(value)
    run_notebook(args.notebook, args.out, args.profile, overrides)


if __name__ == "__main__":
    main()
