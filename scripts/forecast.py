"""Say how long a profile's grid will take here, by step times measured now.

    python scripts/forecast.py PROFILE [--cores 2]

Each stage is trained for a few steps twice, in a folder that goes away; the difference is the
time of its steps. The evaluation and the probes are measured once. What is finished counts
nothing; arms that share a stage share its time.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

from cocoa_lib.run import Run
from cocoa_lib.run.profiles import STAGES
from cocoa_lib.run.stage import run_stage

SHORT, LONG = 3, 13  # steps


def measure_step(run: Run, stage: str, parent: Path, folder: Path) -> float:
    """Seconds of a step of this stage, with the run's recipe."""
    seconds = []
    for steps in (SHORT, LONG):
        one = run.other(
            changes=run.changes | {stage: run.changes.get(stage, {}) | {"steps": steps}}
        )
        began, out = time.monotonic(), folder / f"{stage}-{steps}"
        places = {"parent": parent, "data": run.data, "out": out}
        run_stage(stage, one.recipe(stage), **places, allow_parent=True, show_progress=False)
        seconds.append(time.monotonic() - began)
    return (seconds[1] - seconds[0]) / (LONG - SHORT)


def measure_evaluation(run: Run, folder: Path) -> float:
    """Seconds of the evaluation and the probes of a run that has trained for a step."""
    one = run.other(arm="contrastive", changes=run.changes | {"stage3": {"steps": 1}})
    one.runs, one.data = folder, run.data
    one.stage("stage3", show_progress=False)
    began = time.monotonic()
    one.evaluate(show_progress=False)
    if one.built_in:
        one.probe()
    return time.monotonic() - began


def count_steps(runs: list[Run]) -> dict[str, int]:
    """Stage -> steps that are still to be done, a shared stage once."""
    open_stages = {
        run.folder(stage): (stage, run.recipe(stage).steps)
        for run in runs
        for stage in run.stages
        if not run.done(stage)
    }
    return {stage: sum(n for name, n in open_stages.values() if name == stage) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("--cores", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    main_run = Run(args.profile, retrain=True)
    runs = [
        main_run.other(arm=arm, seed=seed) for arm, n in main_run.grid.items() for seed in range(n)
    ]
    main_run.prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = {
            stage: measure_step(main_run, stage, main_run.backbone, folder) for stage in STAGES
        }
        evaluation = measure_evaluation(main_run, folder)
    steps, total = count_steps(runs), 0.0
    for stage, n in steps.items():
        total += n * rates[stage]
        print(f"{stage}: {n:,} steps of {rates[stage]:.2f} s: {n * rates[stage] / 3600:.1f} h")  # noqa: T201
    left = sum(not run.done("evaluate") for run in runs)
    total += left * evaluation
    print(f"evaluation: {left} of {evaluation:.0f} s: {left * evaluation / 3600:.1f} h")  # noqa: T201
    print(
        f"{len(runs)} runs, {left} to do: {total / 3600:.1f} h on one core, "
        f"{total / 3600 / args.cores:.1f} h on {args.cores}"
    )  # noqa: T201


if __name__ == "__main__":
    main()
