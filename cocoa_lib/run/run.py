"""`Run`: six names say what a run is; where it lies, what it trains and what it reads follow from them.

Notebooks, the graph (Snakefile) and `python -m cocoa_lib.run` all use this one object:

    run = Run(profile="laptop", arm="cocoa", seed=0, model="", data="", changes=None)
    run.stage("stage3")   # trains what is missing, or opens what is there
    run.evaluate()        # ranks of every query
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.pairs import build_pairs
from ..data.tables import Task
from ..evaluate.tasks import choose_tasks
from ..items import InputError
from ..recipes import Recipe, RecipeError, make_recipe, unknown_name
from ..store.checkpoint import META, CheckpointError
from ..world.build import build
from . import checks, launch, results
from .backbone import train_backbone
from .profiles import (
    PROFILES,
    ROOT,
    SECTIONS,
    STAGES,
    check_values,
    load_profile,
    merge,
    read_arms,
    read_yaml,
)
from .stage import Progress, run_stage

NAMES: dict[str, tuple[type, ...]] = {
    "profile": (str,),
    "arm": (str,),
    "seed": (int,),
    "model": (str,),
    "data": (str,),
    "changes": (dict, type(None)),
}
SHIPPED = ROOT / "data" / "backbone"


class Run:
    """One arm with one seed at one scale.

    profile: a file of `notebooks/profiles`; arm: one of `notebooks/arms.yaml`; seed: order of rows, what is hidden.
    model: "" for the small backbone, else a folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
    data: "" for the built-in world; a folder in MMEB's layout; "MMEB" for data/MMEB, where `python -m
    cocoa_lib.data.download` leaves it; a .jsonl or .csv file, or a folder of named folders, of pictures and texts.
    changes: section -> values over the profile's and the arm's, such as {"stage3": {"steps": 500}}.
    runs: where runs lie, `runs/` of the repository unless given. Relative paths start at the working directory or else
    at the repository's root.

    Raises RecipeError, InputError or CheckpointError for a name, type, model or data that cannot be used.
    """

    def __init__(
        self,
        profile: str = "laptop",
        arm: str = "cocoa",
        seed: int = 0,
        model: str = "",
        data: str = "",
        changes: Mapping[str, Any] | None = None,
        *,
        runs: str | Path | None = None,
    ) -> None:
        given = (profile, arm, seed, model, data, changes)
        _check_types(dict(zip(NAMES, given, strict=True)))
        self.profile, self.arm, self.seed, self.changes = profile, arm, seed, dict(changes or {})
        for section, values in self.changes.items():
            check_values(section, values, "changes")
        profile_values = load_profile(profile)
        self.grid: dict[str, int] = profile_values.pop("grid")
        arms = read_arms()
        if arm not in arms:
            raise unknown_name(arm, list(arms), "arm")
        self._arm = arms[arm]
        self.values = merge(profile_values, self._arm.changes, self.changes)
        self.model, self.source = find_model(model), find_data(data)
        for name, section in (("model", "backbone"), ("data", "benchmark")):
            if not given[list(NAMES).index(name)] and section not in self.values:
                raise RecipeError(f"profile {profile} has no built-in {section}; give {name}")
        self.runs = Path(os.path.relpath(ROOT / "runs") if runs is None else runs)
        self._checked = False

    @classmethod
    def from_namespace(cls, namespace: Mapping[str, Any], *, runs: str | Path | None = None) -> Run:
        """The `Run` of a notebook's `parameters` cell: `Run.from_namespace(globals())`.

        Raises RecipeError for a name that papermill injected and no notebook has, and where it injected a profile.
        """
        _check_injected(namespace.get("In", ()))
        return cls(**{name: namespace[name] for name in NAMES if name in namespace}, runs=runs)

    def __repr__(self) -> str:
        names = {"profile": self.profile, "arm": self.arm, "seed": self.seed}
        given = {"model": self.model, "data": self.source, "changes": self.changes}
        shown = names | {name: value for name, value in given.items() if value}
        return f"Run({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def other(self, **names: Any) -> Run:
        """The same run but for some of the six names, e.g. `run.other(arm="contrastive")`."""
        own = {name: getattr(self, name) for name in NAMES if name != "data"}
        return Run(**own | {"data": self.source} | names, runs=self.runs)

    # --- what it is -----------------------------------------------------------------------------------------------

    @property
    def hypothesis(self) -> str:
        """What the arm is to show, in one sentence."""
        return self._arm.hypothesis

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this arm has, in order."""
        return tuple(stage for stage in STAGES if self.values.get(stage) is not False)

    @property
    def built_in(self) -> bool:
        """True where the data are the built-in world, whose ground truth is known."""
        return not self.source

    def recipe(self, stage: str) -> Recipe:
        """A stage's recipe: the profile's values, then the arm's, then `changes`."""
        if stage not in self.stages and stage in STAGES:
            raise RecipeError(f"arm {self.arm} has no {stage}; it has {', '.join(self.stages)}")
        return make_recipe(stage, self.values.get(stage))

    def parent(self, stage: str) -> Path | str:
        """The folder or hub name that a stage starts from: the arm's stage before it, else the backbone."""
        before = [one for one in self.stages if one < stage]
        return self.folder(before[-1]) if before else self.backbone

    # --- where it lies --------------------------------------------------------------------------------------------

    @cached_property
    def root(self) -> Path:
        """Folder of the run: runs/PROFILE[-MODEL][-DATA][-HASH]; arms and seeds are below it."""
        given = {"model": self.model, "data": self.source, "changes": self.changes}
        if not any(given.values()):
            return self.runs / self.profile
        words = [_slug(Path(name).name) for name in (self.model, self.source) if name]
        return self.runs / "-".join([self.profile, *words, _digest(given)])

    def folder(self, step: str) -> Path:
        """Where a stage's checkpoint, or "evaluate", lies. Arms that agree up to a stage share its folder."""
        place = self.root / f"seed{self.seed}" / step
        if step in ("stage3", "evaluate"):
            return place / self.arm
        if step not in ("stage1", "stage2"):
            raise unknown_name(step, [*STAGES, "evaluate"], "folder")
        sections = [name for name in ("backbone", "causal", "stage1", "stage2") if name <= step]
        differs = {
            name: part for name in sections if (part := self._arm.changes.get(name, {})) != {}
        }
        if not differs:
            return place / "base"
        words = [
            f"no_{name}" if part is False else "_".join(map(str, part.values()))
            for name, part in differs.items()
        ]
        return place / f"{_slug('-'.join(words))}-{_digest(differs)}"

    @property
    def _shipped(self) -> bool:
        """Is the shipped backbone the one that this run's sections `backbone` and `causal` describe?"""
        changed = merge(self._arm.changes, self.changes)
        return not any(changed.get(section) for section in ("backbone", "causal"))

    @property
    def backbone(self) -> Path | str:
        """The causal checkpoint: `model`, the shipped data/backbone, or one of another shape that the run trains."""
        if self.model:
            here = ROOT / self.model
            return Path(os.path.relpath(here)) if here.is_dir() else self.model
        if self._shipped:
            return Path(os.path.relpath(SHIPPED))
        made = {name: self.values[name] for name in ("backbone", "causal")}
        words = _slug("_".join(str(value) for value in made["backbone"].values()))
        return self.runs / "backbones" / f"{words}-{_digest(made)}"

    # --- what it reads --------------------------------------------------------------------------------------------

    @cached_property
    def data(self) -> Path:
        """The data folder in MMEB's layout; the built-in world, or a user's pairs, are written where it is missing."""
        if not self.source:
            settings = self.values["benchmark"]
            name = "-".join(f"{key.removeprefix('n_')}{n}" for key, n in sorted(settings.items()))
            folder = self.runs / "data" / f"world-{name}"
            build(folder, **settings)
            return folder
        source = Path(os.path.relpath(ROOT / self.source))
        if not is_pairs(source):
            return source
        settings = dict(self.values.get("pairs", {}))
        if "image_root" in settings:
            settings["image_root"] = ROOT / find_path(settings["image_root"])
        label = _digest({"data": self.source, **self.values.get("pairs", {})})
        folder = self.runs / "data" / f"{_slug(source.stem)}-{label}"
        build_pairs(source, folder, **settings)
        return folder

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The evaluation tasks of the data, or those that `evaluation.tasks` names."""
        names = self.values.get("evaluation", {}).get("tasks", ["all"])
        return choose_tasks(names, str(self.data))

    # --- what it does ---------------------------------------------------------------------------------------------

    def done(self, step: str) -> bool:
        """True where a stage's checkpoint, "evaluate" or "probe" is finished."""
        if step in STAGES:
            return (self.folder(step) / META).is_file()
        return (
            self.folder("evaluate") / {"evaluate": "run.json", "probe": "probe.csv"}[step]
        ).is_file()

    def check(self) -> None:
        """Raise a clear error, before anything trains, for a model, data or folder that this run cannot use."""
        if not self._checked:
            checks.check_run(self)
            self._checked = True

    def stage(
        self, stage: str, *, show_progress: bool = True, say: Callable[[str], None] | None = None
    ) -> Path:
        """Train a stage, and those before it, where they are missing; return its checkpoint folder.

        On a machine with several GPUs it starts `accelerate launch`, whose lines go to `say` (tqdm.write unless given).
        Raises what `check` and `run_stage` raise.
        """
        recipe = self.recipe(stage)
        self.check()
        before = [one for one in self.stages if one < stage]
        if before:
            self.stage(before[-1], show_progress=show_progress, say=say)
        elif not self.model and not self._shipped:
            self._train_backbone()
        if not self.done(stage) and launch.processes(self) > 1:
            launch.start(self, stage, say)
        with checks.explain_memory(self, stage):
            return run_stage(
                stage, recipe, parent=self.parent(stage), data=self.data, out=self.folder(stage),
                seed=self.seed, allow_parent=True, show_progress=show_progress,
            )  # fmt: skip

    def evaluate(
        self, *, show_progress: bool = True, say: Callable[[str], None] | None = None
    ) -> pd.DataFrame:
        """Ranks of the right candidates: arm, seed, task, query, rank, n_candidates, ties; one row a query.

        Trains what is missing. Writes ranks.parquet and run.json into `folder("evaluate")`.
        """
        self.stage("stage3", show_progress=show_progress, say=say)
        if not self.done("evaluate") and launch.processes(self) > 1:
            launch.start(self, "evaluate", say)
        return results.evaluate_run(self, show_progress=show_progress)

    def probe(self) -> pd.DataFrame:
        """What the state at EOS holds: arm, seed, measure, value, low, high, majority, n. Of the built-in world only."""
        if not self.built_in:
            raise InputError(
                f"{self!r}: probes need the ground truth of the built-in world (data '')"
            )
        self.stage("stage3")
        return results.probe_run(self)

    def _train_backbone(self) -> None:
        shape = dict(self.values["backbone"])
        n_corpus, seed = shape.pop("n_corpus"), shape.pop("seed")
        settings = {"n_pairs": 800, "n_queries": 200, "n_corpus": n_corpus, "seed": seed}
        corpus = self.runs / "data" / f"corpus-{n_corpus}-seed{seed}"
        build(corpus, **settings)
        train_backbone(corpus, Path(self.backbone), shape, self.recipe("causal"), seed=seed)

    def names(self) -> dict[str, Any]:
        """The six names, as they were given; enough to make the run again."""
        return {name: getattr(self, name) for name in NAMES if name != "data"} | {
            "data": self.source
        }


def _check_types(given: Mapping[str, Any]) -> None:
    """Raise RecipeError for a value of another type than its name has."""
    for name, value in given.items():
        if type(value) in NAMES[name]:
            continue
        if name == "changes" and isinstance(value, str):
            raise RecipeError(
                f"changes is the text {value!r:.60}, not names and values; pass it with -y: "
                "-y '{changes: {stage3: {steps: 500}}}'"
            )
        raise RecipeError(f"{name}: expected {NAMES[name][0].__name__}, found {value!r:.60}")
    if given["seed"] < 0:
        raise RecipeError(f"seed: expected a whole number from 0, found {given['seed']}")


def _check_injected(cells: Sequence[str]) -> None:
    """Raise RecipeError for names that papermill injected (`In`: a kernel's cells so far) and no notebook has."""
    injected: dict[str, Any] = {}
    for cell in cells:
        if cell.startswith("# Parameters\n"):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    injected[node.targets[0].id] = ast.literal_eval(node.value)
    unknown = [name for name in injected if name not in NAMES]
    if not unknown:
        return
    known = f"the parameters of every notebook are {', '.join(NAMES)}"
    if set(unknown) <= set(SECTIONS):
        layers = {path.stem: read_yaml(path) for path in PROFILES.glob("*.yaml")}
        same = [
            name
            for name, layer in layers.items()
            if layer == {key: injected[key] for key in unknown}
        ]
        if same:
            raise RecipeError(
                f"{same[0]}.yaml is a profile: pass it by name, -p profile {same[0]}; {known}"
            )
        section = unknown[0]
        raise RecipeError(
            f"{section} is a section of a profile, not a parameter: pass -y '{{changes: {{{section}: ...}}}}', or name a "
            f"profile, -p profile NAME; {known}"
        )
    raise unknown_name(unknown[0], list(NAMES), "papermill's parameters")


def find_path(name: str) -> str | None:
    """A file or folder as a path from the repository's root, absolute where it is outside; None where nothing is.

    Relative names start at the working directory, or else at the repository's root.
    """
    for start in (Path.cwd(), ROOT):
        path = Path(os.path.abspath(start / Path(name).expanduser()))
        if path.exists():
            return (
                path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
            )
    return None


def find_model(name: str) -> str:
    """A model folder as a path (see `find_path`), or a hub name as it is. Raises CheckpointError for neither."""
    if not name:
        return ""
    if (path := find_path(name)) is not None:
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"model {name!r}: no such folder here, and not a hub name such as Qwen/Qwen2-VL-2B-Instruct"
        )
    return name


def find_data(name: str) -> str:
    """A data folder or table as a path (see `find_path`). Raises InputError saying what `data` takes."""
    if not name:
        return ""
    path = find_path("data/MMEB" if name == "MMEB" else name)
    if path is None and name == "MMEB":
        raise InputError(
            "data MMEB: not there yet; run `python -m cocoa_lib.data.download --out data/MMEB`"
        )
    if path is None:
        raise InputError(
            f"data {name!r}: no such file or folder; data takes a folder in MMEB's layout, MMEB, a .jsonl or .csv file of "
            "pictures and texts, or a folder of named folders of pictures"
        )
    return path


def is_pairs(source: Path) -> bool:
    """True for a user's own pictures and texts, False for a folder in MMEB's layout."""
    tables = ("train/*/*.parquet", "eval/*/*.parquet", "corpus/*.parquet", "manifest.json")
    return not source.is_dir() or not any(next(source.glob(table), None) for table in tables)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _slug(words: str) -> str:
    """Letters, digits, dots and dashes, 40 at most: names folders, stands in commands."""
    return re.sub(r"[^\w.-]+", "_", words)[:40].strip("._-") or "run"
