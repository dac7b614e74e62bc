"""What a run is, said by six names: its recipes, where it lies, what it reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from ..data.pairs import build_pairs
from ..data.tables import Task
from ..evaluate.tasks import choose_tasks
from ..items import InputError
from ..recipes import Recipe, RecipeError, make_recipe, unknown_name
from ..store.checkpoint import META
from ..store.files import locked
from ..world.build import build
from .names import (
    NAMES,
    check_injected,
    check_types,
    digest,
    find_data,
    find_model,
    find_path,
    is_pairs,
    slug,
)
from .profiles import (
    ROOT,
    STAGES,
    check_values,
    load_profile,
    merge,
    read_arms,
)

SHIPPED = ROOT / "data" / "backbone"


class RunSpec:
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
    ) -> None:
        given = (profile, arm, seed, model, data, changes)
        check_types(dict(zip(NAMES, given, strict=True)))
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

    @classmethod
    def from_namespace(
        cls, namespace: Mapping[str, Any], *, runs: str | Path | None = None
    ) -> Self:
        """Make the `Run` of a notebook's `parameters` cell: `Run.from_namespace(globals())`.

        Raises RecipeError for a name that papermill injected and no notebook has, or a whole
        profile.
        """
        check_injected(namespace.get("In", ()))
        return cls(**{name: namespace[name] for name in NAMES if name in namespace}, runs=runs)

    def __repr__(self) -> str:
        names = {"profile": self.profile, "arm": self.arm, "seed": self.seed}
        given = {"model": self.model, "data": self.source, "changes": self.changes}
        shown = names | {name: value for name, value in given.items() if value}
        return f"Run({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def other(self, **names: Any) -> Self:
        """Make the same run but for some of the six names, e.g. `run.other(arm="contrastive")`."""
        own = {name: getattr(self, name) for name in NAMES if name != "data"}
        return type(self)(**own | {"data": self.source} | names, runs=self.runs)

    # --- what it is ---

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
        """Make a stage's recipe: the profile's values, then the arm's, then `changes`."""
        if stage not in self.stages and stage in STAGES:
            raise RecipeError(f"arm {self.arm} has no {stage}; it has {', '.join(self.stages)}")
        return make_recipe(stage, self.values.get(stage))

    def parent(self, stage: str) -> Path | str:
        """Give the folder or hub name that a stage starts from: the stage before it, or the
        backbone.
        """
        before = [one for one in self.stages if one < stage]
        return self.folder(before[-1]) if before else self.backbone

    # --- where it lies ---

    @cached_property
    def root(self) -> Path:
        """Folder of the run: runs/PROFILE[-MODEL][-DATA][-HASH]; arms and seeds are below it."""
        given = {"model": self.model, "data": self.source, "changes": self.changes}
        if not any(given.values()):
            return self.runs / self.profile
        words = [slug(Path(name).name) for name in (self.model, self.source) if name]
        return self.runs / "-".join([self.profile, *words, digest(given)])

    def folder(self, step: str) -> Path:
        """Give the folder of a stage's checkpoint, or of "evaluate".

        Arms that agree up to a stage share its folder.
        """
        place = self.root / f"seed{self.seed}" / step
        if step in ("stage3", "evaluate"):
            return place / self.arm
        if step not in ("stage1", "stage2"):
            raise unknown_name(step, [*STAGES, "evaluate"], "folder")
        sections = [name for name in ("backbone", "stage1", "stage2") if name <= step]
        differs = {
            name: part for name in sections if (part := self._arm.changes.get(name, {})) != {}
        }
        if not differs:
            return place / "base"
        words = [
            f"no_{name}" if part is False else "_".join(map(str, part.values()))
            for name, part in differs.items()
        ]
        return place / f"{slug('-'.join(words))}-{digest(differs)}"

    @property
    def _shipped(self) -> bool:
        """Does neither the arm nor `changes` ask for another backbone?"""
        return not merge(self._arm.changes, self.changes).get("backbone")

    @property
    def backbone(self) -> Path | str:
        """The causal checkpoint: `model`, the shipped one, or another that the run trains."""
        if self.model:
            here = ROOT / self.model
            return Path(os.path.relpath(here)) if here.is_dir() else self.model
        if self._shipped:
            return Path(os.path.relpath(SHIPPED))
        made = self.values["backbone"]
        words = slug("_".join(f"{name}{value}" for name, value in made.items()))
        return self.runs / "backbones" / f"{words}-{digest(made)}"

    def done(self, step: str) -> bool:
        """Tell whether a stage's checkpoint, "evaluate" or "probe" is finished."""
        place = self.folder("evaluate" if step == "probe" else step)
        return (place / {"evaluate": "run.json", "probe": "probe.csv"}.get(step, META)).is_file()

    # --- what it reads ---

    @cached_property
    def data(self) -> Path:
        """The data folder in MMEB's layout; written where it is the built-in world, or a user's
        pairs.
        """
        if self.built_in:
            settings = self.values["benchmark"]
            words = [f"{key.removeprefix('n_')}{n}" for key, n in sorted(settings.items())]
            return self._write("-".join(["world", *words]), partial(build, **settings))
        source = Path(os.path.relpath(ROOT / self.source))
        if not is_pairs(source):
            return source
        settings = dict(self.values.get("pairs", {}))
        name = f"{slug(source.stem)}-{digest([self.source, settings])}"
        if "image_root" in settings:
            settings["image_root"] = ROOT / (
                find_path(settings["image_root"]) or settings["image_root"]
            )
        return self._write(name, partial(build_pairs, source, **settings))

    def _write(self, name: str, write: Callable[..., Any]) -> Path:
        """Write a data folder aside and rename it; compare a finished one with what is asked
        for.
        """
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
        names = self.values.get("evaluation", {}).get("tasks", ["all"])
        return choose_tasks(names, str(self.data))

    # --- how it is said elsewhere ---

    def names(self) -> dict[str, Any]:
        """The six names, paths from the repository's root; enough to make the run again."""
        return {name: getattr(self, "source" if name == "data" else name) for name in NAMES}

    def arguments(self) -> list[str]:
        """The six names, and where runs lie, as `python -m cocoa_lib.run STEP` takes them."""
        given = self.names() | {"changes": json.dumps(self.changes), "runs": str(self.runs)}
        return [f"--{name}={value}" for name, value in given.items() if value not in ("", "{}")]

    def parameters(self) -> list[str]:
        """The six names as papermill takes them."""
        given = {
            name: value for name, value in self.names().items() if name != "changes" and value != ""
        }
        words = [word for name, value in given.items() for word in ("-p", name, str(value))]
        return words + (["-y", json.dumps({"changes": self.changes})] if self.changes else [])
