"""`Run`: six names say what a run is; all else follows from them.

Notebooks, the graph (Snakefile) and `python -m cocoa_lib.run` all use this one object:

    run = Run(profile="laptop", arm="cocoa", seed=0, model="", data="", changes=None)
    run.stage("stage3")   # trains what is missing, or opens what is there
    run.evaluate()        # ranks of every query
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..items import InputError
from ..world.pretrain import Schedule, train_backbone
from . import checks, launch, results
from .spec import RunSpec
from .stage import Progress, run_stage


class Run(RunSpec):
    """One arm with one seed at one scale: a `RunSpec`, which says how it is made, that can be done."""

    _checked = False

    def check(self) -> None:
        """Raise a clear error for a model, data or folder that this run cannot use."""
        if not self._checked:
            checks.check_run(self)
            self._checked = True

    def prepare(self) -> None:
        """Check the run, write its data, and train the backbone where it is another one."""
        self.check()
        if not (self.model or self._shipped):
            settings = dict(self.values["backbone"])
            seed = settings.pop("seed")
            train_backbone(Path(self.backbone), Schedule(**settings), seed=seed)

    def stage(self, stage: str, *, show_progress: Progress = True) -> Path:
        """Train a stage, and those before it, where they are missing; return its checkpoint folder.

        On a machine with several GPUs it starts `accelerate launch`. `show_progress`: a bar
        (launched: each line by tqdm.write), nothing, or a function that takes lines. Raises what
        `check` and `run_stage` raise.
        """
        recipe = self.recipe(stage)
        if before := [one for one in self.stages if one < stage]:
            self.stage(before[-1], show_progress=show_progress)
        else:
            self.prepare()
        if not self.done(stage) and launch.processes(self) > 1:
            launch.start(self, stage, show_progress)
        places = {"parent": self.parent(stage), "data": self.data, "out": self.folder(stage)}
        with checks.explain_memory(self, stage):
            return run_stage(
                stage,
                recipe,
                **places,
                seed=self.seed,
                allow_parent=True,
                show_progress=show_progress,
            )

    def evaluate(self, *, show_progress: Progress = True) -> pd.DataFrame:
        """Rank the right candidate of every query, a row each: arm, seed, task, query, rank, ...

        Trains what is missing. Writes ranks.parquet and run.json into `folder("evaluate")`.
        """
        self.stage("stage3", show_progress=show_progress)
        if not self.done("evaluate") and launch.processes(self) > 1:
            launch.start(self, "evaluate", show_progress)
        return results.evaluate_run(self, show_progress=show_progress is True)

    def probe(self) -> pd.DataFrame:
        """Probe what the state at EOS holds: arm, seed, measure, value, low, high, majority, n.

        Of the built-in world only, whose content is known: InputError elsewhere.
        """
        if not self.built_in:
            raise InputError(
                f"{self!r}: probes need the ground truth of the built-in world (data '')"
            )
        self.stage("stage3")
        return results.probe_run(self)
