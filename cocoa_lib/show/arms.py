"""Arms compared: tables over seeds, and an explorer that needs no kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from scipy import stats

from ..data.tables import META_TASKS
from ..evaluate.effects import format_effect, is_significant, paired_effects
from ..evaluate.results import average_arms
from ..evaluate.score import list_tasks, score_arms
from ..evaluate.tasks import group_tasks
from .figures import COLOURS
from .panel import still

REPORTS = Path(__file__).resolve().parents[2] / "reports"
GROUPS = ("overall", *META_TASKS, "ind", "ood")
METRICS = {"p@1": 1, "hit@5": 5}  # is the right candidate among the first so many
NAMES = {"cocoa": "CoCoA", "contrastive": "contrastive learning alone"}
WIDTH = 220  # pixels of the drawn scale


def find_report(run: Any, arms: Sequence[str]) -> Path:
    """Find the tables of a run: its committed report, or its own folder, in which `arms` are then made."""
    report = REPORTS / run.root.name
    if (report / "ranks.parquet").is_file() and not any(run.root.rglob("run.json")):
        return report
    for arm in dict.fromkeys(arms):
        each = run.other(arm=arm)
        each.evaluate(show_progress=False)
        if run.built_in:
            each.probe()
    return run.root


def over_seeds(table: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """Average a column over seeds: `keys`, value, low, high (95 %, Student's t; nan for one seed)."""
    groups = table.groupby(list(keys), sort=False)[value]
    found = groups.agg(["mean", "sem", "size"]).rename(columns={"mean": "value"})
    half = found.pop("sem") * stats.t.ppf(0.975, found.pop("size") - 1)
    return found.assign(low=found["value"] - half, high=found["value"] + half).reset_index()


def tabulate_arms(scores: pd.DataFrame) -> pd.DataFrame:
    """Tabulate mean scores over seeds, the best arm first."""
    return average_arms(scores).round(1)


def list_hypotheses(runs: pd.DataFrame) -> str:
    """List what each arm is to show, in Markdown, folded."""
    rows = runs.drop_duplicates("arm").itertuples()
    lines = "\n".join(f"- `{row.arm}`: {row.hypothesis}" for row in rows)
    return f"<details><summary>What each arm is to show</summary>\n\n{lines}\n\n</details>"


def list_groups(ranks: pd.DataFrame) -> list[str]:
    """List MMEB's averages that have a task in `ranks`."""
    groups = group_tasks(list_tasks(ranks))
    return [group for group in GROUPS if groups[group]]


def compare_groups(ranks: pd.DataFrame, arm: str, baseline: str) -> pd.DataFrame:
    """Compare two arms overall (planned) and by kind of task (exploratory), as `draw_forest` takes it."""
    two = ranks[ranks["arm"].isin([arm, baseline])]
    rows = []
    for group in list_groups(two):
        kind = "planned" if group == "overall" else "exploratory"
        rows.append(paired_effects(two, baseline, group=group).assign(arm=group, group=kind))
    return pd.concat(rows, ignore_index=True)


def say_effect(effects: pd.DataFrame, arm: str, baseline: str) -> str:
    """Say the first row of `compare_groups` in one sentence; of one seed, what came out."""
    row, names = effects.iloc[0], [NAMES.get(name, name) for name in (arm, baseline)]
    if row.n_seeds == 1:
        side = "above" if row.difference > 0 else "below"
        return f"In one seed {names[0]} is {abs(row.difference):.1f} points {side} {names[1]}"
    if is_significant(row):
        return f"{names[0]} is {'better' if row.low > 0 else 'worse'} than {names[1]} overall"
    return f"{names[0]} and {names[1]} cannot be told apart overall"


def learning_curve(scores: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Collect the score against contrastive steps of arms that differ in these alone, for `draw_curves`.

    Columns label (the shortest arm's name), arm, x, value, low, high; empty where no two arms do.
    """
    rows = []
    for run in runs.drop_duplicates("arm").to_dict("records"):
        stage3 = dict(run["recipes"]["stage3"])
        steps, _ = stage3.pop("steps"), stage3.pop("warmup_steps", None)
        same = run["recipes"] | {"stage3": stage3}
        same["from"] = run.get("backbone"), run.get("backbone_sha256")
        rows.append((repr(sorted(same.items())), run["arm"], steps))
    lines = pd.DataFrame(rows, columns=["label", "arm", "x"])
    lines = lines[lines.groupby("label")["x"].transform("nunique") > 1]
    shortest = lines.groupby("label")["arm"].transform(lambda arms: min(arms, key=len))
    curve = lines.assign(label=shortest).sort_values("label", kind="stable")
    return curve.merge(over_seeds(scores, ["arm"], "overall"), on="arm")


def say_curve(ranks: pd.DataFrame, curve: pd.DataFrame, arm: str, baseline: str) -> str:
    """Say in one sentence where the line of `arm` stands to that of `baseline`, step by step.

    curve: of `learning_curve`. Empty where the two lines have no number of steps in common.
    """
    lines = [curve[curve["label"] == label].set_index("x")["arm"] for label in (arm, baseline)]
    parts: dict[str, list[str]] = {}
    for x in sorted(set(lines[0].index) & set(lines[1].index)):
        two = ranks[ranks["arm"].isin([lines[0][x], lines[1][x]])]
        row = paired_effects(two, lines[1][x]).iloc[0]
        word = "level" if not is_significant(row) else "ahead" if row.low > 0 else "behind"
        parts.setdefault(word, []).append(f"{x:,}")
    said = " and ".join(f"{word} after {', '.join(steps)}" for word, steps in parts.items())
    return f"{NAMES.get(arm, arm)} is {said} contrastive steps" if said else ""


def tables_of_arms(
    ranks: pd.DataFrame, baseline: str, *, n_boot: int = 500
) -> dict[tuple[str, str], pd.DataFrame]:
    """Compare all arms with the baseline: (metric, group) -> arm, score, difference, low, high, n_seeds."""
    tables = {}
    for metric, k in METRICS.items():
        hits = ranks.assign(rank=-(-ranks["rank"] // k))  # 1 where the rank is at most k
        scores = score_arms(hits).groupby("arm").mean(numeric_only=True)
        for group in list_groups(ranks):
            table = paired_effects(hits, baseline, group=group, n_boot=n_boot)
            tables[metric, group] = table.assign(score=table["arm"].map(scores[group]))
    return tables


def split_by_group(tables: Mapping[tuple[str, str], pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Turn `tables_of_arms` into arms x groups: `difference` in points, `clear` where 0 lies outside."""
    parts = {group: tables["p@1", group].set_index("arm") for _, group in tables}
    difference = pd.DataFrame({group: part["difference"] for group, part in parts.items()})
    difference = difference.sort_values("overall", ascending=False)
    clear = pd.DataFrame({group: is_significant(part) for group, part in parts.items()})
    return {"difference": difference, "clear": clear.loc[difference.index]}


def compare_probes(probes: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Collect what a linear classifier reads, for `draw_scores`: task, label (arm), value, low, high."""
    probes = probes[probes["arm"].isin(arms)].dropna(subset="low")
    probes = probes.rename(columns={"measure": "task", "arm": "label"})
    own = probes.drop_duplicates(["task", "label"]).reset_index(drop=True)
    return over_seeds(probes, ["task", "label"], "value").fillna(own[["low", "high"]])


def tabulate_costs(scores: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Collect seconds of training, all stages, and score of each arm: arm, cost, value, low, high.

    Empty where the runs have not recorded their seconds.
    """
    if "seconds" not in runs:
        return pd.DataFrame()
    costs = runs.assign(cost=runs["seconds"].map(lambda each: sum(each.values())))
    costs = costs.groupby("arm", as_index=False)["cost"].mean()
    return costs.merge(over_seeds(scores, ["arm"], "overall"), on="arm")


def interval_svg(low: float, middle: float, high: float, left: float, right: float) -> str:
    """Draw a difference and its interval on a scale from `left` to `right`; blue if 0 is outside."""
    x = [WIDTH * (value - left) / (right - left) for value in (low, middle, high, 0)]
    colour = COLOURS[0] if low > 0 or high < 0 else "#777777"
    return (
        f'<svg role="img" aria-label="{middle:+.1f}, {low:+.1f} to {high:+.1f}" width="{WIDTH}" '
        f'height="16" viewBox="0 0 {WIDTH} 16">'
        f'<line x1="{x[3]:.1f}" x2="{x[3]:.1f}" y1="0" y2="16" stroke="currentColor"/>'
        f'<line x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="8" y2="8" stroke="{colour}" stroke-width="2"/>'
        f'<circle cx="{x[1]:.1f}" cy="8" r="4" fill="{colour}"/></svg>'
    )


def arms_html(table: pd.DataFrame, baseline: str) -> str:
    """Show arms against the baseline, the best first: arm, score, difference, low, high, n_seeds."""
    table = table.sort_values("difference", ascending=False)
    left, right = np.floor(min(table["low"].min(), 0)) - 1, np.ceil(max(table["high"].max(), 0)) + 1
    rows = ""
    for row in table.itertuples():
        drawn = interval_svg(row.low, row.difference, row.high, left, right)
        cells = (escape(str(row.arm)), f"{row.score:.1f}", drawn, format_effect(row), row.n_seeds)
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = f"<th>arm</th><th>score, %</th><th>arm - {escape(baseline)}, {left:+.0f} to {right:+.0f}</th>"
    return (
        f"<table><thead><tr>{head}<th>points [95 % interval]</th><th>seeds</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def explore_arms(tables: Mapping[tuple[str, str], pd.DataFrame], baseline: str) -> HTML:
    """Make the arms explorer of `tables_of_arms`: menus for metric and tasks, drawn intervals."""
    metrics, groups = (list(dict.fromkeys(each)) for each in zip(*tables, strict=True))
    found = {"\t".join(key): arms_html(table, baseline) for key, table in tables.items()}
    return HTML(still({"metric": dict.fromkeys(metrics), "tasks": dict.fromkeys(groups)}, found))
