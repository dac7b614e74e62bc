"""`Run`: six names say what a run is; all else follows from them.

Notebooks, the graph (Snakefile) and `python -m cocoa_lib.run` all use this one object:

    run = Run(profile="laptop", arm="cocoa", seed=0, model="", data="", changes=None)
    run.stage("stage3")   # trains what is missing, or opens what is there
    run.evaluate()        # ranks of every query
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
import yaml

from ..data.pairs import build_pairs
from ..data.tables import Task, fingerprint
from ..embedder import CocoaEmbedder
from ..evaluate.probe import probe
from ..evaluate.results import read_ranks, write_ranks
from ..evaluate.score import evaluate
from ..evaluate.tasks import choose_tasks
from ..items import InputError
from ..kernels import flush_denormals, join_processes
from ..recipes import Recipe, RecipeError, make_recipe, unknown_name
from ..store.checkpoint import META, CheckpointError, provenance, read_meta, read_note
from ..store.files import locked, write_whole
from ..world.build import build
from ..world.pretrain import train_backbone
from ..world.schedule import Schedule
from . import launch, names
from .profiles import ROOT, STAGES, check_values, load_profile, merge, read_arms
from .stage import Progress, check_recipe, run_stage

CHECKPOINTS = ROOT / "data" / "checkpoints"  # of profile laptop, seed 0: scripts/ship.py


class Run:
    """One arm with one seed at one scale.

    profile: a file of `notebooks/profiles`.
    arm: one of `notebooks/arms.yaml`.
    seed: order of rows, what is hidden, dropout.
    model: "" for the small backbone, else a folder or hub name of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL.
    data: "" for the built-in world; a folder in MMEB's layout; "MMEB" for data/MMEB, where
        `python -m cocoa_lib.data.download` leaves it; a .jsonl or .csv file of pictures and texts,
        or a folder of named folders of pictures.
    changes: section -> values over the profile's and the arm's, as {"stage3": {"steps": 500}}.
    runs: where runs lie, `runs/` of the repository unless given.
    retrain: train, rather than open what data/checkpoints holds of profile laptop, seed 0.

    Relative paths start at the working directory, or else at the repository's root. Raises
    RecipeError, InputError or CheckpointError for a name, type, model or data that cannot be
    used.
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
        retrain: bool = False,
    ) -> None:
        changes = {} if changes is None else changes
        names.check_types(
            dict(zip(names.NAMES, (profile, arm, seed, model, data, changes), strict=True))
        )
        self.profile, self.arm, self.seed, self.changes = profile, arm, seed, changes
        for section, values in changes.items():
            check_values(section, values, "changes")
        profile_values, arms = load_profile(profile), read_arms()
        self.grid: dict[str, int] = profile_values.pop("grid")
        if arm not in arms:
            raise unknown_name(arm, list(arms), "arm")
        self.hypothesis: str = arms[arm].pop("hypothesis")
        self._differs = arms[arm]
        self.values = merge(profile_values, self._differs, changes)
        self.stages = tuple(stage for stage in STAGES if self.values.get(stage) is not False)
        self.model, self.source = names.find_model(model), names.find_data(data)
        self.built_in = not data  # the built-in world, whose ground truth is known
        for name, given, section in (("model", model, "backbone"), ("data", data, "benchmark")):
            if not given and section not in self.values:
                raise RecipeError(f"profile {profile} has no built-in {section}; give {name}")
        self.runs = Path(os.path.relpath(ROOT / "runs") if runs is None else runs)
        self.retrain = retrain

    @classmethod
    def from_namespace(cls, namespace: Mapping[str, Any]) -> Self:
        """Make the `Run` of a notebook's `parameters` cell: `Run.from_namespace(globals())`.

        Raises RecipeError for a name that papermill injected and no notebook has.
        """
        names.check_injected(namespace.get("In", ()))
        return cls(**{name: namespace[name] for name in names.NAMES if name in namespace})

    def __repr__(self) -> str:
        given = {name: value for name, value in self.names().items() if value not in ("", {})}
        return f"Run({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def other(self, **changed: Any) -> Self:
        """Make the same run but for some of the six names, e.g. `run.other(arm="contrastive")`."""
        return type(self)(**self.names() | changed, runs=self.runs, retrain=self.retrain)

    def names(self) -> dict[str, Any]:
        """The six names, paths from the repository's root; enough to make the run again."""
        return {name: getattr(self, "source" if name == "data" else name) for name in names.NAMES}

    def arguments(self) -> list[str]:
        """The six names, and which checkpoints, as `python -m cocoa_lib.run STEP` takes them."""
        given = self.names() | {"changes": _write_yaml(self.changes), "runs": str(self.runs)}
        words = [f"--{name}={value}" for name, value in given.items() if value not in ("", "{}")]
        return words + ["--no-retrain"] * self.opens_shipped

    def parameters(self) -> list[str]:
        """The six names as papermill takes them."""
        words: list[str] = []
        for name, value in self.names().items():
            words += ["-p", name, str(value)] if name != "changes" and value != "" else []
        return words + (["-y", _write_yaml({"changes": self.changes})] if self.changes else [])

    # --- its recipes, and where it lies ---

    def recipe(self, stage: str) -> Recipe:
        """Make a stage's recipe: the profile's values, then the arm's, then `changes`."""
        if stage not in self.stages and stage in STAGES:
            raise RecipeError(f"arm {self.arm} has no {stage}; it has {', '.join(self.stages)}")
        return make_recipe(stage, self.values.get(stage))

    def parent(self, stage: str) -> Path | str:
        """Where a stage starts from: the stage before it, or the backbone's folder or hub name."""
        before = [one for one in self.stages if one < stage]
        return self.folder(before[-1]) if before else self.backbone

    @cached_property
    def opens_shipped(self) -> bool:
        """Does it start from data/checkpoints? Not where `runs` holds stages that were trained."""
        names = (self.profile, self.seed, self.model, self.source, self.changes)
        if self.retrain or names != ("laptop", 0, "", "", {}) or not CHECKPOINTS.is_dir():
            return False
        return not any((self.runs / self.profile / "seed0").glob(f"stage?/*/{META}"))

    @cached_property
    def root(self) -> Path:
        """Folder of the run: runs/PROFILE[-MODEL][-DATA][-HASH]; arms and seeds are below it.

        What starts from data/checkpoints lies apart, in runs/shipped/PROFILE.
        """
        given = {"model": self.model, "data": self.source, "changes": self.changes}
        if not any(given.values()):
            return self.runs / ("shipped" if self.opens_shipped else "") / self.profile
        words = [names.slug(Path(name).name) for name in (self.model, self.source) if name]
        return self.runs / "-".join([self.profile, *words, names.digest(given)])

    def folder(self, step: str) -> Path:
        """Where a stage's checkpoint lies, shipped or trained, or the tables of "evaluate".

        Arms that agree up to a stage share its folder.
        """
        shipped = self._find_shipped(step)
        if shipped and any(shipped[-1].glob("*.safetensors")):  # some are left out for their size
            return shipped[-1]
        return self._place(step)

    def _find_shipped(self, stage: str) -> list[Path]:
        """Find the shipped folders of the stages up to this one; [] where one is not there."""
        if stage not in self.stages or not self.opens_shipped:
            return []
        places = {one: self._place(one).name for one in self.stages if one <= stage}
        found = [CHECKPOINTS / (one if name == "base" else name) for one, name in places.items()]
        whole = all((folder / META).is_file() for folder in found)
        return [Path(os.path.relpath(folder)) for folder in found] if whole else []

    def _place(self, step: str) -> Path:
        """Where a step leaves what it makes."""
        place = self.root / f"seed{self.seed}" / step
        if step in ("stage3", "evaluate"):
            return place / self.arm
        if step not in STAGES:
            raise unknown_name(step, [*STAGES, "evaluate"], "folder")
        sections = [name for name in ("backbone", "stage1", "stage2") if name <= step]
        differs = {name: self._differs[name] for name in sections if name in self._differs}
        if not differs:
            return place / "base"
        words = [
            f"no_{name}" if part is False else "_".join(map(str, part.values()))
            for name, part in differs.items()
        ]
        return place / f"{names.slug('-'.join(words))}-{names.digest(differs)}"

    @property
    def _shipped(self) -> bool:
        """Does neither the arm nor `changes` ask for another backbone?"""
        return not merge(self._differs, self.changes).get("backbone")

    @property
    def backbone(self) -> Path | str:
        """The causal checkpoint: `model`, the shipped one, or another, trained here."""
        if self.model:
            here = ROOT / self.model
            return Path(os.path.relpath(here)) if here.is_dir() else self.model
        if self._shipped:
            return Path(os.path.relpath(ROOT / "data" / "backbone"))
        made = self.values["backbone"]
        words = names.slug("_".join(f"{name}{value}" for name, value in made.items()))
        return self.runs / "backbones" / f"{words}-{names.digest(made)}"

    def done(self, step: str) -> bool:
        """Tell whether a stage's checkpoint, "evaluate" or "probe" is finished."""
        place = self.folder("evaluate" if step == "probe" else step)
        return (place / {"evaluate": "run.json", "probe": "probe.csv"}.get(step, META)).is_file()

    # --- what it reads ---

    @cached_property
    def data(self) -> Path:
        """The data folder in MMEB's layout; the built-in world or a user's pairs are written."""
        if self.built_in:
            settings = self.values["benchmark"]
            words = [f"{key.removeprefix('n_')}{n}" for key, n in sorted(settings.items())]
            return self._write("-".join(["world", *words]), partial(build, **settings))
        source = Path(os.path.relpath(ROOT / self.source))
        if source.is_dir() and any(source.glob("*/*/*.parquet")):  # train/ or eval/
            return source
        settings = dict(self.values.get("pairs", {}))
        name = f"{names.slug(source.stem)}-{names.digest([self.source, settings])}"
        if "image_root" in settings:
            root = settings["image_root"]
            settings["image_root"] = ROOT / (names.find_path(root) or root)
        return self._write(name, partial(build_pairs, source, **settings))

    def _write(self, name: str, write: Callable[..., Any]) -> Path:
        """Write a data folder aside and rename it; compare a finished one with what is asked."""
        folder, aside = self.runs / "data" / name, self.runs / "data" / f".{name}.partial"
        try:
            if not folder.is_dir():
                with locked(self.runs / "data" / f".{name}.work", InputError):
                    shutil.rmtree(aside, ignore_errors=True)
                    write(root=aside)
                    os.replace(aside, folder)
            write(root=folder)
        except ValueError as error:  # other settings, or a source that has changed since
            raise InputError(str(error)) from error
        return folder

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The evaluation tasks of the data, or those that `evaluation.tasks` names."""
        chosen = self.values.get("evaluation", {}).get("tasks", ["all"])
        return choose_tasks(chosen, str(self.data))

    # --- what it does ---

    def prepare(self) -> None:
        """Write the data, and train the backbone where it is another one."""
        with join_processes().main_process_first():
            self.data  # noqa: B018 - written when it is first asked for
        if not (self.model or self._shipped):
            settings = dict(self.values["backbone"])
            seed = settings.pop("seed")
            train_backbone(Path(self.backbone), Schedule(**settings), seed=seed)

    def stage(self, stage: str, *, show_progress: Progress = True) -> Path:
        """Train a stage, and those before it, where they are missing; return its checkpoint folder.

        On a machine with several GPUs it starts `accelerate launch`. `show_progress`: a bar
        (launched: each line by tqdm.write), nothing, or a function that takes lines. Raises what
        `run_stage` raises, and CheckpointError for a shipped checkpoint of another recipe.
        """
        recipe, shipped = self.recipe(stage), self._find_shipped(stage)
        if shipped and self.folder(stage) == shipped[-1]:
            for one, folder in zip(self.stages, shipped, strict=False):
                check_recipe(one, self.recipe(one), folder)
            return shipped[-1]
        if before := [one for one in self.stages if one < stage]:
            self.stage(before[-1], show_progress=show_progress)
        self.prepare()
        self._launch(stage, show_progress)
        places = {"parent": self.parent(stage), "data": self.data, "out": self.folder(stage)}
        how = {"seed": self.seed, "allow_parent": True, "show_progress": show_progress}
        return run_stage(stage, recipe, **places, **how)

    def evaluate(self, *, show_progress: Progress = True) -> pd.DataFrame:
        """Rank the right candidate of every query, a row each: arm, seed, task, query, rank, ...

        Trains what is missing. Writes ranks.parquet and run.json into `folder("evaluate")`.
        """
        self.stage("stage3", show_progress=show_progress)
        self.prepare()
        self._launch("evaluate", show_progress)
        out = self.folder("evaluate")
        settings = {"batch_size": 64, "dtype": "float32"} | self.values.get("evaluation", {})
        facts = self._gather_facts(settings | {"tasks": [task.name for task in self.tasks]})
        if self.done("evaluate"):
            found, same = read_note(out / "run.json"), ("data_sha256", "evaluation", "sha256")
            if any(found.get(name) != facts[name] for name in same):
                raise CheckpointError(f"{out}: ranks of another run; delete the folder")
            return read_ranks(out)
        state = join_processes()
        dtype = getattr(torch, settings.pop("dtype"))
        settings.pop("tasks", None)
        with flush_denormals():
            ranks = evaluate(
                CocoaEmbedder.load(self.folder("stage3"), dtype=dtype),
                self.data,
                tasks=self.tasks,
                cache_dir=out / "embeddings",
                show_progress=show_progress is True and state.is_main_process,
                **settings,
            )
        if state.is_main_process:
            write_ranks(out, ranks, facts)
        state.wait_for_everyone()
        return read_ranks(out)

    def probe(self) -> pd.DataFrame:
        """Probe what the state at EOS holds: arm, seed, measure, value, low, high, majority, n.

        Of the built-in world only, whose content is known: InputError elsewhere.
        """
        if not self.built_in:
            raise InputError(f"{self!r}: probes need the ground truth of the built-in world")
        path = self.folder("evaluate") / "probe.csv"
        if not path.is_file():
            table = probe(CocoaEmbedder.load(self.stage("stage3")), self.data)
            table = table.assign(arm=self.arm, seed=self.seed)[["arm", "seed", *table.columns]]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda aside: table.to_csv(aside, index=False))
        return pd.read_csv(path)

    def _launch(self, step: str, show_progress: Progress) -> None:
        """Do a step that is missing by `accelerate launch`, where there are several GPUs."""
        settings = self.values.get("launch", {})
        if not self.done(step) and launch.count_processes(settings) > 1:
            launch.launch(launch.command(settings, step, self.arguments()), show_progress)

    def _gather_facts(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """What produces the ranks: names, recipes, seconds a stage, hashes, commits, versions."""
        places = {stage: [self.folder(stage), *self._find_shipped(stage)] for stage in self.stages}
        metas = {stage: read_meta(place[-1], check=False) for stage, place in places.items()}
        return {
            **self.names(),
            "hypothesis": self.hypothesis,
            "recipes": {stage: meta["run"]["recipe"] for stage, meta in metas.items()},
            "seconds": {stage: meta["train_seconds"] for stage, meta in metas.items()},
            "commits": {stage: meta["commit"] for stage, meta in metas.items()},
            "sha256": {stage: meta["weights_sha256"] for stage, meta in metas.items()},
            "backbone_sha256": metas[self.stages[0]]["run"]["parent_sha256"],
            "data_sha256": fingerprint(self.data),
            **provenance(),
            "evaluation": evaluation,
        }


def _write_yaml(values: dict[str, Any]) -> str:
    """One line of YAML; JSON's 1e-05 would be read as a text."""
    return yaml.safe_dump(values, default_flow_style=True, width=float("inf")).strip()
