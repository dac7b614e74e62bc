"""Explorer: arms compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from ..data.tables import META_TASKS
from ..evaluate import effects as analysis
from .figures import COLOURS
from .panel import _explorer

HITS = {
    "p@1": 1,
    "hit@5": 5,
}  # metrics of the results that ask whether the right candidate is among the first k
GROUPS = ("overall", *META_TASKS, "ind", "ood")


def _interval_svg(row: Mapping[str, Any], left: float, right: float) -> str:
    """A difference and its interval between `left` and `right` points, marked as in `figures.forest`, which is too slow here."""
    low, middle, high, zero = (
        220 * (x - left) / (right - left) for x in (row["low"], row["difference"], row["high"], 0)
    )
    clear = row["n_seeds"] > 1 and (row["low"] > 0 or row["high"] < 0)
    colour = COLOURS[0] if clear else "grey"
    fill = colour if analysis.certain(row) else "white"
    mark = (
        f'<circle cx="{middle:.1f}" cy="8" r="4"'
        if clear
        else f'<path d="M {middle:.1f} 3 l 5 5 l -5 5 l -5 -5 z"'
    )
    return (
        f'<svg role="img" aria-label="{analysis.said(row)}" width="220" height="16">'
        f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="16" stroke="black"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="8" y2="8" stroke="{colour}" stroke-width="2"/>'
        f'{mark} stroke="{colour}" fill="{fill}"/></svg>'
    )


def ablation_html(
    effects: pd.DataFrame, scores: pd.Series, *, baseline: str, metric: str, group: str
) -> str:
    """Arms less `baseline`, drawn and in numbers: effects of `analysis.paired_effects`, scores: arm -> mean, percent.

    The p-values stay corrected for all arms they were computed with: choosing what to look at is no reason for less.
    """
    left, right = (
        np.floor(min(effects["low"].min(), 0)) - 1,
        np.ceil(max(effects["high"].max(), 0)) + 1,
    )  # room at the edges
    table = pd.DataFrame({
        "arm": effects["arm"].map(escape),
        f"{left:+.0f} to {right:+.0f} points": [_interval_svg(row, left, right) for row in effects.to_dict("records")],
        f"{metric}, %": [f"{scores[arm]:.1f}" for arm in effects["arm"]],
        "difference": [f"{value:+.1f}" for value in effects["difference"]],
        "95 % interval": [f"{low:+.1f} to {high:+.1f}" for low, high in zip(effects["low"], effects["high"], strict=True)],
        "p, corrected": [f"{p:.3f}" for p in effects["p_holm"]],
        "gain over baseline": [analysis.verdict(row) for row in effects.to_dict("records")],
        "seeds": effects["n_seeds"],
        "queries a seed": effects["n_queries"],
    })  # fmt: skip
    with pd.option_context("display.max_colwidth", None):  # else pandas cuts the drawings
        html = table.to_html(index=False, border=0, escape=False)
    return (
        f"{html}<p>{metric}, {group}. Bar: 95 % interval; upright line: 0. Circle: excludes 0 (filled: once corrected, too); "
        f"diamond: contains 0. Baseline {escape(baseline)}: {scores[baseline]:.1f} %. Corrected for all arms that this panel was "
        "given, not for trying metrics and groups: what is clear only in one of many is a hint.</p>"
    )


def ablation_explorer(
    results: pd.DataFrame, per_query: pd.DataFrame, baseline: str, *, n_boot: int = 2000
) -> widgets.VBox:
    """Choose arms, metric and group of tasks: see paired differences to the baseline, with intervals, and the scores.

    results, per_query: `analysis.gather_results`, `gather_ranks`. Differences are resampled here, once; answers only draw.
    Raises what `analysis.paired_effects` raises.
    """
    present = [g for g in GROUPS if g not in META_TASKS or (per_query["meta_task"] == g).any()]
    if per_query["in_distribution"].nunique() < 2:
        present = [g for g in present if g not in ("ind", "ood")]
    effects, scores = {}, {}
    for metric, k in HITS.items():
        as_first = per_query.assign(
            rank=-(-per_query["rank"] // k)
        )  # 1 where the rank is at most k
        values = results[results["metric"] == metric].assign(
            metric="p@1"
        )  # `arm_scores` averages what has this name
        scores[metric] = analysis.arm_scores(values).groupby("arm").mean(numeric_only=True)
        for group in present:
            effects[metric, group] = analysis.paired_effects(
                as_first, baseline, group=group, n_boot=n_boot
            )
    arms = list(effects["p@1", "overall"]["arm"])
    controls = {
        "arms": widgets.SelectMultiple(
            options=arms, value=arms, rows=min(8, len(arms)), description="arms"
        ),
        "metric": widgets.Dropdown(options=list(HITS), description="metric"),
        "group": widgets.Dropdown(options=present, description="tasks"),
    }

    def answer(arms: Sequence[str], metric: str, group: str) -> dict[str, str]:
        if not arms:
            raise ValueError(
                "no arm is chosen; choose one or more (Ctrl or Shift adds to a choice)"
            )
        table = effects[metric, group]
        chosen = table[table["arm"].isin(arms)]
        how = {"baseline": baseline, "metric": metric, "group": group}
        return {"ablation": ablation_html(chosen, scores[metric][group], **how)}

    return _explorer(controls, answer, ["ablation"])
