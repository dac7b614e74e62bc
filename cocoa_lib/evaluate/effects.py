"""Effects between arms: paired differences of Precision@1 with 95 % intervals.

Differences are in percentage points. No p-values and no correction for multiple comparisons: the
primary question is one comparison, all others are exploratory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from .score import list_tasks
from .tasks import group_tasks

SEED_DRAWS = 20  # resamples of seeds for one of queries


def paired_effects(
    ranks: pd.DataFrame,
    baseline: str,
    *,
    group: str = "overall",
    n_boot: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare arms with the baseline: arm, difference, low, high, n_seeds, n_queries (a seed).

    ranks: as `read_ranks` gives them; group: "overall", "ind", "ood" or a meta-task. Differences in
    points of P@1 are paired by seed, task and query over the seeds that both arms have, then
    averaged without weights over tasks. low, high: 95 % percentile interval of a hierarchical
    bootstrap. Tasks are not resampled: the interval speaks of new seeds and new queries of these.

    1. All runs answer the same queries, so seeds and queries are crossed, not nested: what is
       peculiar to a query comes back in every seed. A resample therefore draws the queries of each
       task once for all seeds, and the seeds once for all queries, and adds the two deviations from
       the observed mean. What is peculiar to one seed at one query is counted twice, so intervals
       are rather too wide; Owen's pigeonhole bootstrap (2007) would count it three times.
    2. The mean of n resampled seeds spreads too little if n is small: with 5, a nominal 95 % holds
       some 85 %. Its deviation is multiplied by sqrt(n / chi2(n - 1)), which mends the variance and
       gives the tails of Student's t. With one seed only queries are resampled.
    3. These tails make the ends of an interval jump between random numbers, so each resample of
       queries meets SEED_DRAWS ones of seeds, which cost next to nothing.

    Raises ValueError for an unknown baseline or group, a repeated query, runs on different queries
    or candidates.
    """
    hits = _read_hits(ranks, group)
    others = hits.index.unique("arm").drop(baseline, errors="ignore")
    if others.empty:
        raise ValueError(f"an arm beside the baseline {baseline!r} is needed")
    rows = _combine(hits, [{arm: 1, baseline: -1} for arm in others], n_boot, seed)
    return pd.DataFrame([{"arm": arm, **row} for arm, row in zip(others, rows, strict=True)])


def contrast(ranks: pd.DataFrame, weights: Mapping[str, float]) -> dict[str, Any]:
    """Compute a weighted sum of arms in points of P@1: difference, low, high, n_seeds, n_queries.

    weights: arm -> factor, such as {"cocoa_few": 1, "contrastive_few": -1, "cocoa": -1,
    "contrastive": 1}. Resampled as in `paired_effects`, whose errors it raises.
    """
    return _combine(_read_hits(ranks, "overall"), [weights], n_boot=2000, seed=0)[0]


def _combine(
    hits: pd.DataFrame, sums: list[Mapping[str, float]], n_boot: int, seed: int
) -> list[dict[str, Any]]:
    """Compute one row for each weighted sum of arms, all of them on the same resamples."""
    task_of = hits.columns.get_level_values("task")
    per_task = pd.Series(task_of).groupby(task_of).transform("size").to_numpy()
    points = 100 / task_of.nunique() / per_task  # (Q,)
    deltas = [_weigh(hits, weights) * points for weights in sums]  # (S, Q) each
    cells = np.stack([delta.mean(axis=0) for delta in deltas], axis=1)  # (Q, sums)
    rng, of_queries = np.random.default_rng(seed), np.zeros((n_boot, len(sums)))
    for task in task_of.unique():
        part = cells[task_of == task]
        draws = rng.integers(len(part), size=(n_boot, len(part)))
        draws += len(part) * np.arange(n_boot)[:, None]
        of_queries += np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape) @ part
    rows = []
    for delta, drawn in zip(deltas, of_queries.T, strict=True):
        by_seed = delta.sum(axis=1)  # (S,)
        of_seeds = _draw_seeds(n, n_boot, seed) @ by_seed if (n := len(by_seed)) > 1 else 0.0
        boot = np.round(drawn + of_seeds, 9).ravel()  # so that a sum of zero is zero
        low, high = np.percentile(boot, [2.5, 97.5])
        facts = {"difference": by_seed.mean(), "low": low, "high": high}
        rows.append(facts | {"n_seeds": len(by_seed), "n_queries": len(task_of)})
    return rows


def _weigh(hits: pd.DataFrame, weights: Mapping[str, float]) -> np.ndarray:
    """Sum the weighted hits of arms over the seeds that all of them have: (seeds, queries)."""
    if lost := sorted(set(weights) - set(hits.index.unique("arm"))):
        raise ValueError(f"no results of arm {', '.join(lost)}")
    shared = sorted(set.intersection(*(set(hits.loc[arm].index) for arm in weights)))
    if not shared:
        raise ValueError(f"arms {', '.join(weights)} have no seed in common")
    parts = [factor * hits.loc[arm].loc[shared].to_numpy() for arm, factor in weights.items()]
    return np.sum(parts, axis=0)


@lru_cache(maxsize=8)
def _draw_seeds(n: int, n_boot: int, seed: int) -> np.ndarray:
    """Draw weights of n seeds' values, less their mean: (SEED_DRAWS, n_boot, n)."""
    rng, size = np.random.default_rng([seed, n]), (SEED_DRAWS, n_boot)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=size) / n - 1 / n
    return drawn * np.sqrt(n / rng.chisquare(n - 1, size=size))[..., None]


def _read_hits(ranks: pd.DataFrame, group: str) -> pd.DataFrame:
    """Make a table of 1.0 where the right candidate is first: rows (arm, seed), columns (task, query)."""
    groups = group_tasks(list_tasks(ranks))
    if not groups.get(group):
        raise ValueError(f"no query in group {group!r}; groups: {', '.join(groups)}")
    chosen = ranks[ranks["task"].isin(groups[group])]
    if chosen.groupby(["task", "query"], observed=True)["n_candidates"].nunique().max() > 1:
        raise ValueError("runs rank a query among different numbers of candidates")
    # pandas refuses two ranks of one query in a run.
    hits = chosen.set_index(["arm", "seed", "task", "query"])["rank"].unstack(["task", "query"])
    hits = hits.sort_index(axis=0).sort_index(axis=1)
    for run, ranked in hits.notna().iterrows():
        if not ranked.all():
            raise ValueError(
                f"arm and seed {run} have no rank of task and query {ranked.idxmin()}; all runs "
                "need the same queries"
            )
    return (hits == 1).astype(float)


def is_significant(row: Any) -> Any:
    """Tell whether a difference of several seeds has an interval without 0; of a table, row by row."""
    return (row.n_seeds > 1) & ((row.low > 0) | (row.high < 0))


def format_effect(row: Any) -> str:
    """Write a row of effects as tables do: "+1.8 [-1.7, +4.7]"."""
    return f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"
