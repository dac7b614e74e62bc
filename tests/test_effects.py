"""Effects: hand-computed cases, and intervals tried on simulated grids whose effect is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cocoa_lib.evaluate.effects import contrast, format_effect, is_significant, paired_effects

# name, meta-task, in distribution
TASKS = (("A", "classification", True), ("B", "classification", False), ("C", "vqa", True))


def make_ranks(hits: dict[str, np.ndarray], tasks=TASKS) -> pd.DataFrame:
    """arm -> hits (seeds, tasks, queries), as the table that `read_ranks` gives."""
    parts = []
    for arm, array in hits.items():
        k, t, q = np.indices(array.shape).reshape(3, -1)
        part = {"arm": arm, "seed": k, "task": t, "query": q, "rank": np.where(array.ravel(), 1, 3)}
        parts.append(pd.DataFrame(part))
    table = pd.concat(parts, ignore_index=True).assign(n_candidates=10)
    for column, at in (("meta_task", 1), ("in_distribution", 2), ("task", 0)):
        table[column] = np.array([task[at] for task in tasks])[table["task"]]
    return table


LUCK = {  # of a seed: mean 0, variance 1
    "uniform": lambda rng, size: rng.uniform(-(3**0.5), 3**0.5, size),
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size) - 1,
}


def make_grid(
    rng, effects: dict[str, float], *, seeds=5, queries=60, spread=0.05, luck="uniform"
) -> pd.DataFrame:
    """Simulate a grid whose mean differences to an arm "base" are known exactly.

    All parts of the probabilities have mean 0 and stay clear of 0 and 1. Queries differ in
    difficulty, and in what an arm does for them, alike in all seeds.
    """
    difficulty, hits = rng.uniform(-0.15, 0.15, (1, 3, queries)), {}
    for arm, effect in {"base": 0.0, **effects}.items():
        own = rng.uniform(-0.15, 0.15, (1, 3, queries))
        by_seed = LUCK[luck](rng, (seeds, 1, 1)) * spread
        hits[arm] = rng.random((seeds, 3, queries)) < 0.45 + effect + difficulty + own + by_seed
    return make_ranks(hits)


def test_difference_by_hand_unweighted_over_tasks():
    hits = {arm: np.zeros((2, 3, 8), bool) for arm in ("base", "x")}
    hits["x"][:, 0] = True  # task A: + 100
    hits["base"][0, 1, :4] = True  # task B: - 50 in one seed, 0 in the other
    table = make_ranks(hits)
    table = table[(table["task"] != "A") | (table["query"] < 2)]  # A has 2 queries, B and C 8
    effect = paired_effects(table, "base").iloc[0]
    assert effect["difference"] == pytest.approx((100 - 25 + 0) / 3)
    assert effect["n_seeds"] == 2 and effect["n_queries"] == 18
    for group, value in {"ind": 50, "ood": -25, "classification": 37.5, "vqa": 0}.items():
        row = paired_effects(table, "base", group=group).iloc[0]
        assert row["difference"] == pytest.approx(value)
    assert row[["low", "high"]].tolist() == [0, 0]


def test_queries_are_crossed_with_seeds():
    """What belongs to a query is the same in all seeds: more seeds must not narrow it."""
    rng, q = np.random.default_rng(1), 400
    wins = rng.random((1, 1, q)) < 0.3
    hits = {"base": np.zeros((8, 1, q), bool), "x": np.repeat(wins, 8, axis=0)}
    effect = paired_effects(make_ranks(hits), "base", n_boot=4000).iloc[0]
    half = 1.96 * 100 * wins.std() / np.sqrt(q)  # nested, it would be 2.8 times narrower
    assert (effect["high"] - effect["low"]) / 2 == pytest.approx(half, rel=0.08)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_widen_as_in_scipys_t_test(seeds):
    q, share = 1000, np.array([0.2, 0.5, 0.4, 0.45, 0.3])[:seeds]
    hits = {"base": np.zeros((seeds, 1, q), bool), "x": np.zeros((seeds, 1, q), bool)}
    for k, part in enumerate(share):
        hits["x"][k, 0, : round(part * q)] = True
    effect = paired_effects(make_ranks(hits), "base", n_boot=10000).iloc[0]
    interval = stats.ttest_1samp(100 * share, 0).confidence_interval()
    assert effect["difference"] == pytest.approx(100 * share.mean())
    width = effect["high"] - effect["low"]
    assert width == pytest.approx(interval.high - interval.low, rel=0.15)


def test_order_of_rows_and_other_arms_change_no_interval():
    table = make_grid(np.random.default_rng(5), {"x": 0.1, "y": 0.0}, queries=20)
    effects = paired_effects(table, "base", n_boot=200)
    mixed = table.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(effects, paired_effects(mixed, "base", n_boot=200))
    alone = paired_effects(table[table["arm"] != "y"], "base", n_boot=200)
    pd.testing.assert_frame_equal(effects.head(1), alone)
    assert not effects.equals(paired_effects(table, "base", n_boot=200, seed=1))


def test_pairs_only_seeds_that_both_have():
    table = make_grid(np.random.default_rng(5), {"x": 0.1, "y": 0.0}, queries=20)
    fewer = table[(table["arm"] != "x") | (table["seed"] < 3)]
    effects = paired_effects(fewer, "base", n_boot=100)
    assert effects["n_seeds"].tolist() == [3, 5]
    same = paired_effects(table[table["seed"] < 3], "base", n_boot=100)
    assert effects["difference"][0] == pytest.approx(same["difference"][0])
    one = paired_effects(table[table["seed"] == 0], "base", n_boot=100)
    assert set(one["n_seeds"]) == {1} and np.isfinite(one[["low", "high"]]).all(axis=None)


def test_a_contrast_of_two_arms_is_their_paired_effect_and_four_are_an_interaction():
    arms = {"x": 0.1, "few": -0.2, "x_few": 0.2}
    table = make_grid(np.random.default_rng(5), arms, queries=20)
    effect = paired_effects(table, "base").set_index("arm").loc["x"]
    two = contrast(table, {"x": 1, "base": -1})
    assert all(two[name] == effect[name] for name in two)
    four = contrast(table, {"x_few": 1, "few": -1, "x": -1, "base": 1})
    few = contrast(table, {"x_few": 1, "few": -1})
    assert four["difference"] == pytest.approx(few["difference"] - two["difference"])
    assert four["high"] - four["low"] > two["high"] - two["low"], "less is known of it"
    with pytest.raises(ValueError, match="no results of arm nobody"):
        contrast(table, {"nobody": 1, "base": -1})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, row: t[~row], "'x', .*2.* have no rank of task and query .*'B', .*7"),
        (lambda t, row: pd.concat([t, t[row]]), "duplicate entries"),
        (lambda t, row: t.assign(n_candidates=np.where(row, 3, 10)), "numbers of candidates"),
        (lambda t, row: t[t["arm"] == "base"], "an arm beside the baseline 'base'"),
        (lambda t, row: t[t["arm"] == "x"], "no results of arm base"),
        (lambda t, row: t[(t["arm"] == "x") == (t["seed"] > 2)], "have no seed in common"),
    ],
)
def test_runs_that_do_not_compare_are_refused(spoil, message):
    table = make_grid(np.random.default_rng(5), {"x": 0.1}, queries=20)
    row = (table["arm"] == "x") & (table["seed"] == 2) & (table["task"] == "B")
    with pytest.raises(ValueError, match=message):
        paired_effects(spoil(table, row & (table["query"] == 7)), "base", n_boot=10)
    with pytest.raises(ValueError, match="no query in group 'speech'"):
        paired_effects(table, "base", group="speech")


def test_an_effect_is_written_and_significant_over_several_seeds():
    rows = [(1.84, -1.66, 4.7, 3), (1, 0.1, 2, 3), (-1, -2, -0.1, 3), (1, 0.1, 2, 1), (1, 0, 2, 3)]
    table = pd.DataFrame(rows, columns=["difference", "low", "high", "n_seeds"])
    assert is_significant(table).tolist() == [False, True, True, False, False]
    by_row = [bool(is_significant(row)) for row in table.itertuples()]
    assert by_row == is_significant(table).tolist()
    assert format_effect(table.iloc[0]) == "+1.8 [-1.7, +4.7]"
