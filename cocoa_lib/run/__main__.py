"""`python -m cocoa_lib.run STEP`: a stage, the evaluation, the probes, or all of a run; also under `accelerate launch`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from ..items import InputError
from ..recipes import RecipeError
from ..store.checkpoint import CheckpointError
from .launch import MESSAGE
from .profiles import STAGES
from .resume import TrainingError
from .run import Run
from .sharding import join_processes

STEPS = (*STAGES, "evaluate", "probe", "all")


def parse_changes(text: str) -> Any:
    """Changes as JSON or YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"not YAML or JSON: {error}") from error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_lib.run", description="Run a step of CoCoA."
    )
    parser.add_argument("step", choices=STEPS, help="trains what it needs and is not there")
    parser.add_argument("--profile", default="laptop", help="a file of notebooks/profiles")
    parser.add_argument("--arm", default="cocoa", help="an arm of notebooks/arms.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", default="", help="folder or hub name of a Qwen-VL; default: the small backbone"
    )
    parser.add_argument(
        "--data", default="", help="folder, table, or MMEB; default: the built-in world"
    )
    parser.add_argument("--changes", type=parse_changes, help="e.g. '{stage3: {steps: 500}}'")
    parser.add_argument("--runs", help="where runs lie; default: runs/ of the repository")
    return parser


def do_step(run: Run, step: str) -> None:
    """Do one step; print where it lies."""
    shown = sys.stderr.isatty()
    if step in STAGES:
        print(run.stage(step, show_progress=shown))  # noqa: T201
    if step in ("evaluate", "all"):
        run.evaluate(show_progress=shown)
        print(run.folder("evaluate"))  # noqa: T201
    if step == "probe" or (step == "all" and run.built_in):
        print(run.probe().to_string(index=False))  # noqa: T201


def main(argv: Sequence[str] | None = None) -> None:
    """Run a step; a clear error is one line on stderr and exit status 1."""
    given = vars(build_parser().parse_args(argv))
    step = given.pop("step")
    state = join_processes()
    logging.basicConfig(
        level=logging.INFO if state.is_main_process else logging.WARNING, format="%(message)s"
    )
    try:
        do_step(Run(**given), step)
    except (RecipeError, InputError, CheckpointError, TrainingError) as error:
        sys.exit(
            MESSAGE + " ".join(str(error).splitlines()) if state.num_processes > 1 else f"{error}"
        )


if __name__ == "__main__":
    main()
