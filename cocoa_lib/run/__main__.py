"""`python -m cocoa_lib.run STEP`: a stage, the evaluation, the probes, or all of a run.

Also under `accelerate launch` and `torchrun`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers.utils.logging import disable_progress_bar

from ..items import InputError
from ..kernels import join_processes
from ..recipes import RecipeError
from ..store.checkpoint import CheckpointError
from .launch import MESSAGE
from .profiles import STAGES
from .resume import TrainingError
from .run import Run

logger = logging.getLogger(__name__)
STEPS = ("prepare", *STAGES, "evaluate", "probe", "all")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cocoa_lib.run", description=__doc__)
    parser.add_argument("step", choices=STEPS, help="trains what it needs and is not there")
    parser.add_argument("--profile", default="laptop", help="a file of notebooks/profiles")
    parser.add_argument("--arm", default="cocoa", help="an arm of notebooks/arms.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="", help="folder or hub name of a Qwen-VL")
    parser.add_argument("--data", default="", help="folder, table, or MMEB")
    parser.add_argument("--changes", default="{}", help="e.g. '{stage3: {steps: 500}}'")
    parser.add_argument("--runs", help="where runs lie; default: runs/ of the repository")
    words = {"default": True, "help": "--no-retrain opens data/checkpoints, as notebooks do"}
    parser.add_argument("--retrain", action=argparse.BooleanOptionalAction, **words)
    return parser


def do_step(run: Run, step: str) -> Path | str:
    """Do one step; return where it lies."""
    show = sys.stderr.isatty() or logger.info
    if step == "prepare":
        run.prepare()
        return run.backbone
    if step in STAGES:
        return run.stage(step, show_progress=show)
    if step != "probe":
        run.evaluate(show_progress=show)
    if step != "evaluate" and (step == "probe" or run.built_in):
        run.probe()
    return run.folder("evaluate")


def main(argv: Sequence[str] | None = None) -> None:
    """Do a step; a clear error is one line on stderr and exit status 1."""
    given = vars(build_parser().parse_args(argv))
    step, state = given.pop("step"), join_processes()
    level = logging.INFO if state.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        run = Run(**given | {"changes": yaml.safe_load(given["changes"])})
        found = do_step(run, step)
    except (RecipeError, InputError, CheckpointError, TrainingError, OSError) as error:
        sys.exit(MESSAGE + " ".join(str(error).split("\n")))
    if state.is_main_process:
        print(found)  # noqa: T201


if __name__ == "__main__":
    main()
