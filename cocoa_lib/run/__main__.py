"""`python -m cocoa_lib.run STAGE`: one stage of training."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from ..recipes import Recipe, make_recipe
from ..store.checkpoint import META
from .sharding import join_processes
from .stage import BUILDERS, run_stage


def print_estimate(stage: str, recipe: Recipe, source: str | Path, data: Path) -> None:
    """What the stage will need here, on the main process: `estimate.report`, or in a line why there is none."""
    from . import estimate

    state = join_processes()
    if not state.is_main_process:
        return
    n, sharded, memory = state.num_processes, parse_flag_from_env("ACCELERATE_USE_FSDP"), math.inf
    if state.device.type == "cuda":
        memory = torch.cuda.get_device_properties(state.device).total_memory / 1e9
    try:
        item = estimate.measure(data)
        lines = estimate.report(source, stage, recipe, item, memory, n, sharded=sharded)
    except (
        OSError,
        ValueError,
    ) as error:  # no config.json, no pairs, an unreadable picture, another family of models
        lines = [f"no estimate of memory and time: {str(error).splitlines()[0]}"]
    else:
        speed = f"{estimate.usual_utilisation(recipe):.0%} of {estimate.PEAK / 1e12:.0f} TFLOP/s"
        lines = [
            f"estimated for one of {n} device(s), hours at {speed}; an item: {item}",
            estimate.HEAD,
            *lines,
        ]
    print(*lines, sep="\n", flush=True)  # noqa: T201


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_lib.run", description="Run one stage of CoCoA."
    )
    parser.add_argument("stage", choices=sorted(BUILDERS))
    parser.add_argument(
        "--parent", required=True, help="checkpoint folder or hub name to start from"
    )
    parser.add_argument("--data", required=True, help="folder of the benchmark or of MMEB-train")
    parser.add_argument("--out", required=True)
    parser.add_argument("--profile", help="take the recipe of notebooks/profiles/NAME.yaml")
    parser.add_argument(
        "--recipe", default="{}", help="recipe values as JSON, e.g. '{\"steps\": 200}'"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--allow-parent", action="store_true", help="accept a parent of another stage (ablations)"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    from .profiles import load_profile

    values = load_profile(args.profile).get(args.stage, {}) if args.profile else {}
    recipe = make_recipe(args.stage, values | json.loads(args.recipe))
    # Where memory and hours can run out: on a GPU, or with the profile of the real models; the small model needs no warning.
    if (torch.cuda.is_available() or args.profile == "paper") and not (
        Path(args.out) / META
    ).is_file():
        print_estimate(args.stage, recipe, args.parent, Path(args.data))
    folder = run_stage(
        args.stage,
        recipe,
        parent=args.parent,
        data=args.data,
        out=args.out,
        seed=args.seed,
        allow_parent=args.allow_parent,
    )
    print(folder)  # noqa: T201


if __name__ == "__main__":
    main()
