"""Arms compared: choose a metric and a group of tasks; runs in a page without a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np
import pandas as pd
from IPython.display import HTML

from .figures import COLOURS
from .panel import still

WIDTH = 220  # pixels of the drawn scale


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
    ends = np.nan_to_num([table["low"].min(), table["high"].max(), 0.0])
    left, right = np.floor(ends.min()) - 1, np.ceil(ends.max()) + 1
    rows = "".join(
        f"<tr><td>{escape(str(row.arm))}</td><td>{row.score:.1f}</td>"
        f"<td>{interval_svg(row.low, row.difference, row.high, left, right)}</td>"
        f"<td>{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]</td><td>{row.n_seeds}</td></tr>"
        for row in table.itertuples()
    )
    head = f"<th>arm</th><th>score, %</th><th>arm - {escape(baseline)}, {left:+.0f} to {right:+.0f}</th>"
    return (
        f"<table><thead><tr>{head}<th>points [95 % interval]</th><th>seeds</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def explore_arms(tables: Mapping[tuple[str, str], pd.DataFrame], baseline: str) -> HTML:
    """Make the arms explorer: menus for metric and group of tasks, the table with drawn intervals.

    tables: (metric, group) -> table of `arms_html`. All combinations are needed.
    """
    metrics, groups = (list(dict.fromkeys(each)) for each in zip(*tables, strict=True))
    found = {"\t".join(key): arms_html(table, baseline) for key, table in tables.items()}
    cases = {"metric": dict.fromkeys(metrics), "tasks": dict.fromkeys(groups)}
    return HTML(still(cases, found))
