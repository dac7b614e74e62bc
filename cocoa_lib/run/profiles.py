"""Profiles and notebooks: one YAML a profile, checked; papermill runs a notebook with what it declares.

A profile (`notebooks/profiles/NAME.yaml`) has sections; a notebook's `parameters` cell declares which of them it takes
(`stage1 = {...}`), with the smoke profile's values as defaults. Papermill only warns of unknown names, so names are
checked here, stage recipes down to each value. The arms of the ablation are rows of `notebooks/arms.csv`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..recipes import RECIPES, RecipeError, make_recipe, unknown_name

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = ROOT / "notebooks"
SECTIONS = tuple(
    "benchmark backbone causal stage1 stage2 stage3 evaluation seeds arms sweeps pairs".split()
)


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
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # no UTF-8, an impossible date, endless nesting
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
    return next(
        (
            load_profile(name)
            for name in names
            if (NOTEBOOKS / "profiles" / f"{name}.yaml").is_file()
        ),
        {},
    )


def declared_parameters(notebook: Path) -> dict[str, str]:
    """Name -> default, as written, of the notebook's `parameters` cell."""
    import papermill

    found = papermill.inspect_notebook(str(notebook))
    if not found:
        raise RecipeError(f"{notebook}: no cell tagged 'parameters'")
    return {name: entry["default"] for name, entry in found.items()}


def notebook_parameters(
    notebook: Path, profile: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """The profile's sections that the notebook declares, then the overrides. An override it does not declare is an error."""
    declared = declared_parameters(notebook)
    for name in overrides:
        if name not in declared:
            raise unknown_name(name, list(declared), str(notebook))
    for stage in RECIPES:
        if stage in overrides:
            make_recipe(stage, overrides[stage])
    return {name: value for name, value in profile.items() if name in declared} | overrides


def run_notebook(
    notebook: Path, out: Path, profile: str, overrides: dict[str, Any], *, progress: bool = True
) -> Path:
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
        cell_outputs = [
            o
            for o in outputs
            if not re.match(r"\s*\d+%\|", o.get("data", {}).get("text/plain", ""))
        ]
        if cell.cell_type == "code":
            cell.outputs = cell_outputs
    nbformat.write(content, notebook)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_lib.run.profiles", description="Run a notebook with a profile."
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="smoke")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="override a parameter (YAML value)",
    )
    args = parser.parse_args(argv)
    overrides = {}
    for pair in args.set:
        name, _, value = pair.partition("=")
        overrides[name] = yaml.safe_load(value)
    run_notebook(args.notebook, args.out, args.profile, overrides)


if __name__ == "__main__":
    main()
