"""Search each arm's learning rate and number of contrastive steps on the development queries.

    python scripts/search.py PROFILE --arms contrastive cocoa --rates 3e-4 1e-3 --steps 100 200 400
    python scripts/search.py PROFILE --gather --figure reports/PROFILE/figures/search.svg

A trial is one stage 3 from the arm's own parent, in runs/PROFILE/search, its scores among its
files: the same call goes on where it stopped. Processes with arms that share no stage run at a
time, once the data are there. Each gathers the trials of all arms and seeds.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from cocoa_lib.embedder import CocoaEmbedder
from cocoa_lib.evaluate import evaluate, score_tasks
from cocoa_lib.kernels import flush_denormals
from cocoa_lib.recipes import Recipe
from cocoa_lib.run import Run
from cocoa_lib.run.stage import run_stage
from cocoa_lib.show import figures
from cocoa_lib.store.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["arm", "seed", "learning_rate", "steps", "task", "value", "n"]
TRIAL = ["arm", "learning_rate", "steps"]


def run_trial(run: Run, recipe: Recipe, n_queries: int) -> pd.DataFrame:
    """Train stage 3 by this recipe and score it, or read what is there: COLUMNS, a row a task.

    value: precision@1 in percent on n development queries. Raises what `run_stage` raises, and
    FileNotFoundError for data without development queries.
    """
    name = f"rate{recipe.learning_rate:g}-steps{recipe.steps}"
    out = run.root / "search" / f"seed{run.seed}" / run.arm / name
    places = {"parent": run.parent("stage3"), "data": run.data, "out": out}
    run_stage("stage3", recipe, **places, seed=run.seed, allow_parent=True, show_progress=False)
    if not (path := out / f"dev{n_queries}.csv").is_file():
        chosen = {"tasks": run.tasks, "part": "dev", "n_queries": n_queries}
        with flush_denormals():
            ranks = evaluate(CocoaEmbedder.load(out), run.data, **chosen, show_progress=False)
        scores = score_tasks(ranks).query("metric == 'p@1'")
        names = {"arm": run.arm, "seed": run.seed}
        names |= {"learning_rate": recipe.learning_rate, "steps": recipe.steps}
        table = scores.assign(**names)[COLUMNS]
        write_whole(path, lambda aside: table.to_csv(aside, index=False))
    return pd.read_csv(path)


def search_arm(run: Run, rates: Sequence[float], steps: Sequence[int], n_queries: int) -> None:
    """Run a trial for each rate and number of steps, after the arm's stages before stage 3."""
    run.prepare()
    for stage in run.stages[:-1]:
        run.stage(stage, show_progress=False)
    for rate, n in product(rates, steps):
        recipe = replace(run.recipe("stage3"), learning_rate=rate, steps=n)
        overall = run_trial(run, recipe, n_queries)["value"].mean()
        print(f"{run.arm}, learning rate {rate:g}, {n} steps: {overall:.1f}", flush=True)


def gather(root: Path, n_queries: int) -> pd.DataFrame:
    """Read the finished trials of a run's root, all arms and seeds: COLUMNS, a row a task."""
    paths = sorted((root / "search").glob(f"seed*/*/*/dev{n_queries}.csv"))
    if not paths:
        raise SystemExit(f"{root / 'search'}: no trial of {n_queries} queries; run some first")
    table = pd.concat(map(pd.read_csv, paths))
    return table.sort_values(["seed", *TRIAL], kind="stable", ignore_index=True)


def average_trials(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Average over tasks, unweighted, as `overall` does: a row a trial of this seed, its `value`."""
    return rows[rows["seed"] == seed].groupby(TRIAL, as_index=False)["value"].mean()


def find_best(trials: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Find the best trial of each group; of equal ones the lowest rate, then the fewest steps."""
    return trials.loc[trials.groupby(list(by))["value"].idxmax()]


def draw_steps(trials: pd.DataFrame, n: int, seed: int) -> Figure:
    """Draw overall against contrastive steps, a line an arm, each point at its best rate."""
    points = find_best(trials, ["arm", "steps"]).rename(columns={"arm": "label", "steps": "x"})
    ends = points[points["x"] == points["x"].max()].sort_values("value", ascending=False)
    told = ", ".join(f"{row.label} {row.value:.1f}" for row in ends.itertuples())
    return figures.draw_curves(
        points,
        title=f"After {points['x'].max()} contrastive steps: {told}",
        xlabel=f"contrastive steps (best rate at each point; development queries, {n} a task, "
        f"seed {seed})",
        log=True,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", help="a file of notebooks/profiles")
    parser.add_argument("--arms", nargs="+", default=[], help="arms of notebooks/arms.yaml")
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="learning rates")
    parser.add_argument("--steps", nargs="+", type=int, default=[], help="contrastive steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-queries", type=int, default=200, help="a task")
    parser.add_argument("--gather", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="default: reports/PROFILE/search.csv")
    parser.add_argument("--figure", type=Path, help="learning curves, as PNG and SVG")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = (parser := build_parser()).parse_args(argv)
    if not (args.gather or args.arms and args.rates and args.steps):
        parser.error("give --arms, --rates and --steps, or --gather")
    main_run = Run(args.profile, seed=args.seed)
    for arm in [] if args.gather else args.arms:
        search_arm(main_run.other(arm=arm), args.rates, args.steps, args.n_queries)
    rows = gather(main_run.root, args.n_queries)
    out = args.out or ROOT / "reports" / args.profile / "search.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda aside: rows.to_csv(aside, index=False))
    trials = average_trials(rows, args.seed)
    print(trials.pivot(index=TRIAL[:2], columns="steps", values="value").round(1).to_string())
    best = find_best(trials, ["arm"]).assign(trials=trials.groupby("arm").size().to_numpy())
    print(f"the best of each arm\n{best.round({'value': 1}).to_string(index=False)}")
    if args.figure:
        figures.save(draw_steps(trials, rows["n"].max(), args.seed), args.figure)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
