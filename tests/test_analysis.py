"""Analysis: hand-computed cases, and intervals tried on simulated grids whose true effect is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from cocoa_lib.evaluate import effects as analysis
from cocoa_lib.evaluate.effects import paired_effects, verdict
from cocoa_lib.evaluate.score import score_ranks, write_results

# name, meta-task, in distribution
TASKS = (("A", "classification", True), ("B", "classification", False), ("C", "vqa", True))


def per_query(hits: dict[str, np.ndarray], tasks=TASKS) -> pd.DataFrame:
    """arm -> hits (seeds, tasks, queries), as the table that `gather_ranks` gives."""
    parts = []
    for arm, array in hits.items():
        k, t, q = np.indices(array.shape).reshape(3, -1)
        part = pd.DataFrame({"arm": arm, "seed": k, "task": t, "query": q, "rank": np.where(array.ravel(), 1, 3)})
        parts.append(part)
    table = pd.concat(parts, ignore_index=True).assign(n_candidates=10)
    for column, at in (("meta_task", 1), ("in_distribution", 2), ("task", 0)):
        table[column] = np.array([task[at] for task in tasks])[table["task"]]
    return table


LUCK = {  # of a seed: mean 0, variance 1
    "uniform": lambda rng, size: rng.uniform(-(3**0.5), 3**0.5, size),
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size) - 1,
}


def grid(rng, effects: dict[str, float], *, seeds=5, queries=60, seed_spread=0.05, luck="uniform") -> pd.DataFrame:
    """A grid whose mean difference to an arm "base" is known exactly: all parts of the probabilities have mean 0 and stay
    clear of 0 and 1. Queries differ in difficulty, and in what an arm does for them, alike in all seeds."""
    difficulty = rng.uniform(-0.15, 0.15, (1, 3, queries))
    hits = {}
    for arm, effect in {"base": 0.0, **effects}.items():
        own = rng.uniform(-0.15, 0.15, (1, 3, queries))
        by_seed = LUCK[luck](rng, (seeds, 1, 1)) * seed_spread
        hits[arm] = rng.random((seeds, 3, queries)) < 0.45 + effect + difficulty + own + by_seed
    return per_query(hits)


# Geometry


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    assert analysis.effective_rank(np.tile(rng.normal(size=7), (50, 1))) == pytest.approx(1, abs=1e-4)
    assert analysis.effective_rank(np.eye(6)) == pytest.approx(6)
    assert 15.5 < analysis.effective_rank(rng.normal(size=(4000, 16))) <= 16
    # singular values 3 and 1: shares 3/4 and 1/4
    by_hand = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert analysis.effective_rank(np.diag([3.0, 1.0])) == pytest.approx(by_hand)
    assert analysis.effective_rank(5 + rng.normal(size=(4000, 16))) < 8  # a large common direction is a collapse


def test_alignment_and_uniformity_by_hand():
    x = np.array([[2.0, 0], [0, 3]])
    assert analysis.alignment(x, 5 * x) == pytest.approx(0)
    assert analysis.alignment(x, -x) == pytest.approx(4)
    assert analysis.alignment(x, x[::-1]) == pytest.approx(2)
    assert analysis.uniformity(x) == pytest.approx(-4)  # one pair, squared distance 2
    three = np.array([[1.0, 0], [0, 1], [-1, 0]])  # squared distances 2, 2, 4
    assert analysis.uniformity(three) == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3))
    assert analysis.uniformity(np.ones((1500, 3))) == pytest.approx(0)  # more than one block


@pytest.mark.parametrize("bad", [np.zeros((3, 2)), np.full((3, 2), np.nan), np.ones(3), np.ones((0, 2))])
def test_geometry_refuses_what_has_none(bad):
    for measure in (analysis.effective_rank, analysis.uniformity, lambda x: analysis.alignment(x, x)):
        with pytest.raises(ValueError, match="zero|finite"):
            measure(bad)


def test_geometry_needs_pairs():
    with pytest.raises(ValueError, match="equal shapes"):
        analysis.alignment(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="two vectors"):
        analysis.uniformity(np.ones((1, 3)))


# Results of a grid


def write_grid(root, runs, tasks=TASKS):
    """Files of runs {(arm, seed): {task: ranks}} by mmeb's own writer."""
    for (arm, seed), ranks_of in runs.items():
        results, ranks = [], []
        for name, meta, known in tasks:
            facts = {"task": name, "meta_task": meta, "in_distribution": known}
            tail = {"ties": 0, "n_candidates": 5, "evaluator": "test"}
            results += [{**facts, **row, **tail} for row in score_ranks(np.array(ranks_of[name]), n_boot=10)]
            queries = range(len(ranks_of[name]))
            ranks.append(pd.DataFrame({"task": name, "query": queries, "rank": ranks_of[name], "n_candidates": 5}))
        write_results(pd.DataFrame(results), pd.concat(ranks), root / "results" / arm / f"seed{seed}", {})


@pytest.fixture
def run(tmp_path):
    low, high = {"A": [1, 2], "B": [2, 2, 2, 1], "C": [3, 3]}, {"A": [1, 1], "B": [2, 1, 1, 1], "C": [1, 3]}
    write_grid(tmp_path, {("base", 0): low, ("base", 1): low, ("full", 0): high, ("full", 1): low})
    return tmp_path


def test_gather_reads_arms_and_seeds(run):
    (run / "results" / "full" / "notes").mkdir()
    (run / "results" / ".cache" / "seed0").mkdir(parents=True)
    results = analysis.gather_results(run, expected=[("full", 1)])
    ranks = analysis.gather_ranks(run, results)
    assert len(results) == 4 * 3 * 4 and len(ranks) == 4 * 8
    assert list(results.columns[:2]) == list(ranks.columns[:2]) == ["arm", "seed"]
    assert set(zip(ranks["arm"], ranks["seed"], strict=True)) == {("base", 0), ("base", 1), ("full", 0), ("full", 1)}
    assert set(zip(ranks["task"], ranks["meta_task"], ranks["in_distribution"], strict=True)) == set(TASKS)
    assert paired_effects(ranks, "base", n_boot=50)["difference"].tolist() == pytest.approx([25.0])


def test_gather_names_all_that_is_missing(run):
    folder = run / "results"
    (folder / "full" / "seed1" / "results.csv").unlink()
    (folder / "base" / "seed0" / "per_query.parquet").unlink()
    (folder / "mlm").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        analysis.gather_results(run, expected=[("full", 4)])
    for part in ("arm full, seed 1: no results.csv;", "arm base, seed 0: no per_query.parquet;", "arm mlm: no seed"):
        assert part in f"{error.value};"
    assert "arm full, seed 4: no results.csv and no per_query.parquet" in str(error.value)
    assert "base, seed 1" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no results of any arm"):
        analysis.gather_results(run / "elsewhere")


@pytest.mark.parametrize("name", ["results.csv", "per_query.parquet"])
@pytest.mark.parametrize("content", [b"", b"PAR1 torn"])
def test_gather_names_a_torn_file(run, name, content):
    (run / "results" / "full" / "seed1" / name).write_bytes(content)
    with pytest.raises(ValueError, match="arm full, seed 1"):
        analysis.gather_ranks(run, analysis.gather_results(run))


def test_gather_takes_the_strings_of_any_pandas_and_names_a_lost_column(run):
    path, plain = run / "results" / "full" / "seed0" / "per_query.parquet", analysis.gather_results(run)
    before, table = analysis.gather_ranks(run, plain), pq.read_table(path)
    kind = pa.string() if pa.types.is_large_string(table.schema.field("task").type) else pa.large_string()
    pq.write_table(table.set_column(0, "task", table["task"].cast(kind)), path)
    pd.testing.assert_frame_equal(analysis.gather_ranks(run, plain), before)
    pq.write_table(table.drop_columns(["rank"]), path)
    with pytest.raises(ValueError, match="arm full, seed 0: not readable as results .*rank"):
        analysis.gather_ranks(run, plain)


def test_gather_refuses_files_of_different_tasks(run):
    path = run / "results" / "full" / "seed0" / "per_query.parquet"
    table = pd.read_parquet(path)
    table[table["task"] != "C"].to_parquet(path)
    with pytest.raises(ValueError, match="arm full, seed 0: only one of the files has task C"):
        analysis.gather_ranks(run, analysis.gather_results(run))


def test_arm_scores_do_not_weight_tasks_by_queries(run):
    results = analysis.gather_results(run)
    scores = analysis.arm_scores(results.sample(frac=1, random_state=0))
    assert scores[["arm", "seed"]].to_numpy().tolist() == [["base", 0], ["base", 1], ["full", 0], ["full", 1]]
    full = scores.iloc[2]  # A 100, B 75, C 50; 6 of 8 queries right by chance of the numbers, as is the mean
    assert full["classification"] == pytest.approx(87.5) and full["vqa"] == pytest.approx(50)
    assert full["ind"] == pytest.approx(75) and full["ood"] == pytest.approx(75)
    assert np.isnan(full["retrieval"]) and np.isnan(full["grounding"])
    base = scores.iloc[0]  # A 50, B 25, C 0
    assert base["classification"] == pytest.approx(37.5)  # pooled over queries it would be 2 / 6
    assert base["overall"] == pytest.approx(25)
    lacking = results[~((results["arm"] == "full") & (results["seed"] == 1) & (results["task"] == "B"))]
    with pytest.raises(ValueError, match="arm full, seed 1 has no P@1 of B"):
        analysis.arm_scores(lacking)
    with pytest.raises(ValueError, match="more than one row of arm base, seed 0, task A"):
        analysis.arm_scores(pd.concat([results, results]))


# Effects


def test_difference_by_hand_unweighted_over_tasks():
    hits = {arm: np.zeros((2, 3, 8), bool) for arm in ("base", "x")}
    hits["x"][:, 0] = True  # task A: + 100
    hits["base"][0, 1, :4] = True  # task B: - 50 in one seed, 0 in the other
    table = per_query(hits)
    table = table[(table["task"] != "A") | (table["query"] < 2)]  # A has 2 queries, B and C 8
    effect = paired_effects(table, "base").iloc[0]
    assert effect["difference"] == pytest.approx((100 - 25 + 0) / 3)
    assert effect["n_seeds"] == 2 and effect["n_queries"] == 18
    by_group = {"ind": 50, "ood": -25, "classification": 37.5, "vqa": 0}
    for group, value in by_group.items():
        assert paired_effects(table, "base", group=group).iloc[0]["difference"] == pytest.approx(value)
    assert paired_effects(table, "base", group="vqa").iloc[0][["low", "high", "p"]].tolist() == [0, 0, 1]


def test_queries_are_crossed_with_seeds():
    """What belongs to a query is the same in all seeds: more seeds must not narrow it."""
    rng, q = np.random.default_rng(1), 400
    wins = rng.random((1, 1, q)) < 0.3
    hits = {"base": np.zeros((8, 1, q), bool), "x": np.repeat(wins, 8, axis=0)}
    effect = paired_effects(per_query(hits), "base", n_boot=4000).iloc[0]
    half = 1.96 * 100 * wins.std() / np.sqrt(q)
    assert (effect["high"] - effect["low"]) / 2 == pytest.approx(half, rel=0.08)  # nested: 2.8 times narrower


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_widen_as_in_student_t(seeds):
    q, share = 1000, np.array([0.2, 0.5, 0.4, 0.45, 0.3])[:seeds]
    hits = {"base": np.zeros((seeds, 1, q), bool), "x": np.zeros((seeds, 1, q), bool)}
    for k, part in enumerate(share):
        hits["x"][k, 0, : round(part * q)] = True
    effect = paired_effects(per_query(hits), "base", n_boot=10000).iloc[0]
    by_t = analysis.seed_interval(100 * share)
    assert effect["difference"] == pytest.approx(by_t["difference"])
    assert effect["high"] - effect["low"] == pytest.approx(by_t["high"] - by_t["low"], rel=0.15)


def test_interval_covers_the_known_effect_and_a_null_is_rarely_supported():
    covered, supported, detected = [], [], []
    for i in range(100):
        table = grid(np.random.default_rng([3, i]), {"gain": 0.2, "null": 0.0, "loss": -0.1})
        effects = paired_effects(table, "base", n_boot=400, seed=i).set_index("arm")
        true = pd.Series({"gain": 20.0, "null": 0.0, "loss": -10.0})
        covered += list((effects["low"] <= true[effects.index]) & (true[effects.index] <= effects["high"]))
        supported.append(effects.loc["null", "low"] > 0)
        detected.append(effects.loc["gain", "low"] > 0)
        assert verdict(effects.loc["loss"]) != "supported"
    assert 0.92 <= np.mean(covered) <= 0.99
    assert np.mean(supported) <= 0.05
    assert np.mean(detected) >= 0.9


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("luck, least", [("normal", 0.93), ("skewed", 0.87)])
def test_few_seeds_cover_as_notebook_05_says(seeds, luck, least):
    """An arm with luck less a baseline with little: the skew is not halved by that of a second arm."""
    covered = []
    for i in range(100):
        rng = np.random.default_rng([4, i])
        calm = grid(rng, {}, seeds=seeds, seed_spread=0)
        lucky = grid(rng, {name: 0.0 for name in "wxyz"}, seeds=seeds, seed_spread=0.08, luck=luck)
        effects = paired_effects(pd.concat([calm, lucky[lucky["arm"] != "base"]]), "base", n_boot=200, seed=i)
        covered += list((effects["low"] <= 0) & (effects["high"] >= 0))
    print(f"{seeds} seeds, {luck} luck: a nominal 95 % holds {np.mean(covered):.1%}")
    assert least <= np.mean(covered) <= 0.99


def test_verdicts_do_not_hang_on_the_random_numbers():
    """The ends of an interval move by some hundredths of its width where other numbers are drawn."""
    table = grid(np.random.default_rng(8), {"x": 0.1})
    ends = np.array([paired_effects(table, "base", seed=k)[["low", "high"]].to_numpy()[0] for k in range(8)])
    assert np.ptp(ends, axis=0).max() < 0.05 * np.diff(ends.mean(axis=0))[0]


def test_order_of_rows_and_other_arms_change_no_interval():
    table = grid(np.random.default_rng(5), {"x": 0.1, "y": 0.0}, queries=20)
    effects = paired_effects(table, "base", n_boot=200)
    pd.testing.assert_frame_equal(effects, paired_effects(table.sample(frac=1, random_state=1), "base", n_boot=200))
    alone = paired_effects(table[table["arm"] != "y"], "base", n_boot=200)
    pd.testing.assert_frame_equal(effects.drop(columns="p_holm").head(1), alone.drop(columns="p_holm"))
    assert not effects.equals(paired_effects(table, "base", n_boot=200, seed=1))


def test_pairs_only_seeds_that_both_have():
    table = grid(np.random.default_rng(5), {"x": 0.1, "y": 0.0}, queries=20)
    fewer = table[(table["arm"] != "x") | (table["seed"] < 3)]
    effects = paired_effects(fewer, "base", n_boot=100)
    assert effects["n_seeds"].tolist() == [3, 5]
    same = table[table["seed"] < 3]
    assert effects["difference"][0] == pytest.approx(paired_effects(same, "base", n_boot=100)["difference"][0])
    one = paired_effects(table[table["seed"] == 0], "base", n_boot=100)
    assert set(one["n_seeds"]) == {1} and np.isfinite(one[["low", "high"]]).all(axis=None)


def test_a_contrast_of_two_arms_is_their_paired_effect_and_four_are_an_interaction():
    table = grid(np.random.default_rng(5), {"x": 0.1, "few": -0.2, "x_few": 0.2}, queries=20)
    effect = paired_effects(table, "base", n_boot=200).set_index("arm").loc["x"]
    two = analysis.contrast(table, {"x": 1, "base": -1}, n_boot=200)
    assert all(two[name] == effect[name] for name in two)
    four = analysis.contrast(table, {"x_few": 1, "few": -1, "x": -1, "base": 1}, n_boot=200)
    few = analysis.contrast(table, {"x_few": 1, "few": -1}, n_boot=200)
    assert four["difference"] == pytest.approx(few["difference"] - two["difference"])
    assert four["high"] - four["low"] > two["high"] - two["low"], "a difference of differences is less certain"
    with pytest.raises(ValueError, match="no results of arm nobody"):
        analysis.contrast(table, {"nobody": 1, "base": -1})


def test_runs_that_do_not_compare_are_refused():
    table = grid(np.random.default_rng(5), {"x": 0.1}, queries=20)
    row = (table["arm"] == "x") & (table["seed"] == 2) & (table["task"] == "B") & (table["query"] == 7)
    for bad, message in (
        (table[~row], "arm x, seed 2 has no rank of query 7 of B"),
        (pd.concat([table, table[row]]), "more than one row of arm x, seed 2, task B, query 7"),
        (table.assign(n_candidates=np.where(row, 3, 10)), "task B, query 7: .* different numbers of candidates"),
        (table[table["arm"] == "base"], "another arm"),
        (table[table["arm"] == "x"], "baseline 'base' and another arm are needed; there are x"),
        (table[(table["arm"] == "x") == (table["seed"] > 2)], "arms x, base have no seed in common"),
    ):
        with pytest.raises(ValueError, match=message):
            paired_effects(bad, "base", n_boot=10)
    with pytest.raises(ValueError, match="no query in group 'speech'"):
        paired_effects(table, "base", group="speech")


def test_holm_by_hand():
    assert analysis.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert analysis.holm([0.6, 0.5]) == pytest.approx([1, 1])
    table = grid(np.random.default_rng(5), {"x": 0.3, "y": 0.0, "z": 0.05}, queries=20)
    effects = paired_effects(table, "base", n_boot=500)
    assert effects["p_holm"].tolist() == pytest.approx(analysis.holm(effects["p"]))
    assert effects["p"].min() >= 2 / (500 * analysis.SEED_DRAWS + 1)


def test_verdict_rule():
    def of(low, high, **row):
        return verdict({"low": low, "high": high, "n_seeds": 5, "p_holm": 0.01, **row})

    assert of(0.1, 2) == "supported"
    assert of(0, 2) == of(-1, 2) == of(float("nan"), float("nan")) == "undecided"
    assert of(-2, 0) == of(-2, -1) == "not supported"
    assert of(0.1, 2, n_seeds=1) == of(-2, -1, n_seeds=1) == "undecided"
    assert of(0.1, 2, p_holm=0.05) == "undecided" and of(-2, -1, p_holm=0.2) == "not supported"


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_seed_interval_is_the_t_test_of_scipy(n):
    values = np.random.default_rng(n).normal(1, 2, n)
    row, test = analysis.seed_interval(values), stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    assert (row["low"], row["high"], row["p"]) == pytest.approx((low, high, test.pvalue), rel=1e-9)


def test_seed_interval_by_hand():
    row, half = analysis.seed_interval([1, 2, 3]), 4.302653 / 3**0.5
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((2, 2 - half, 2 + half))
    assert (
        row["p"] == pytest.approx(0.0741799, abs=1e-6) and row["n_seeds"] == 3
    )  # t = 2 / (1 / sqrt 3), 2 degrees of freedom
    one = analysis.seed_interval([7])
    assert one["difference"] == 7 and np.isnan([one["low"], one["high"], one["p"]]).all()
    same = analysis.seed_interval([2, 2])
    assert same["difference"] == 2 and np.isnan([same["low"], same["high"], same["p"]]).all(), (
        "two equal seeds prove nothing"
    )
    for bad in ([], [1, np.nan]):
        with pytest.raises(ValueError, match="finite values"):
            analysis.seed_interval(bad)


def test_effects_are_said_in_one_way():
    assert analysis.said({"difference": 1.84, "low": -1.66, "high": 4.7}) == "+1.8 [-1.7, +4.7]"


# Probes


def test_probe_reads_what_is_there_and_no_more():
    rng = np.random.default_rng(0)
    y = rng.choice(["red", "blue", "green"], p=[0.6, 0.2, 0.2], size=600)
    noise = rng.normal(size=(600, 8)) * 1000
    marked = noise.copy()
    marked[:, 2] = (y == "red") * 1e-3  # standardised, a small feature counts as much as a large one
    marked[:, 5] = (y == "blue") * 1e-3
    probe = analysis.linear_probe(marked[:400], y[:400], marked[400:], y[400:])
    assert probe.accuracy > 98 and probe.n == 200
    assert probe.majority == pytest.approx(100 * np.mean(y[400:] == "red"))
    assert probe == analysis.linear_probe(marked[:400], y[:400], marked[400:], y[400:])
    nothing = analysis.linear_probe(noise[:400], y[:400], noise[400:], y[400:])
    assert nothing.low < nothing.majority and nothing.accuracy < nothing.majority + 5
    with pytest.raises(ValueError, match="class"):
        analysis.linear_probe(marked[:5], ["red"] * 5, marked[5:9], y[5:9])
    with pytest.raises(ValueError, match="inconsistent"):
        analysis.linear_probe(marked[:400], y[:400], marked[400:], y[400:401])


def test_majority_comes_from_training():
    x = np.array([[0.0], [0], [1], [0], [1], [1]])
    probe = analysis.linear_probe(x[:3], [0, 0, 1], x[3:], [0, 1, 1])
    assert probe.accuracy == 100 and probe.majority == pytest.approx(100 / 3)


def test_wilson_interval_by_hand():
    z, n, p = 1.959964, 10, 0.8
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    x, y = np.array([[0.0]] * 5 + [[1.0]] * 5), np.array([0] * 5 + [1] * 5)

    def probe(right):
        return analysis.linear_probe(x, y, x, np.where(np.arange(10) < right, y, 1 - y))

    assert [probe(8).low, probe(8).high] == pytest.approx([100 * (centre - half), 100 * (centre + half)], rel=1e-5)
    assert probe(0).low == 0 and probe(10).high == 100


@pytest.mark.parametrize(
    "row, stands",
    [
        ({"low": 1, "high": 2, "p_holm": 0.04, "n_seeds": 3}, True),
        ({"low": -2, "high": -1, "p_holm": 0.04, "n_seeds": 3}, True),
        ({"low": -1, "high": 2, "p_holm": 0.04, "n_seeds": 3}, False),
        ({"low": 1, "high": 2, "p_holm": 0.05, "n_seeds": 3}, False),
        ({"low": 1, "high": 2, "p_holm": 0.04, "n_seeds": 1}, False),
    ],
)
def test_what_stands_after_correction(row, stands):
    assert analysis.certain(row) is stands
