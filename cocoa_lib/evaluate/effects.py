"""What the grid of arms says: geometry of embeddings, paired effects with intervals, verdicts, linear probes.

Scores, differences and accuracies are in percent or percentage points. Every random step has a seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..data.tables import META_TASKS, Task
from .tasks import groups


def effective_rank(embeddings: np.ndarray) -> float:
    """exp of the entropy of the singular values divided by their sum; (N, H) -> 1 to min(N, H). Roy and Vetterli 2007.

    Uncentred: a collapsed set (all vectors the same) gives 1, where centring would leave 0 / 0, and a large common
    direction counts as the partial collapse that it is. For the spread about the mean, pass `x - x.mean(0)`.
    Raises ValueError for values that are not finite, or all zero.
    """
    from scipy import (
        stats,  # in functions, here and below: a second, for which first pictures need not wait
    )

    singular = np.linalg.svd(_matrix(embeddings), compute_uv=False)
    if not singular.sum():
        raise ValueError("all embeddings are zero, so they have no effective rank")
    return float(np.exp(stats.entropy(singular)))  # entropy divides by the sum


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared distance of the pairs x[i], y[i] at length 1; (N, H) twice -> 0 (same) to 4. Wang and Isola 2020.

    Raises ValueError for different shapes, and vectors that are zero or not finite.
    """
    x, y = _normalised(x), _normalised(y)
    if x.shape != y.shape:
        raise ValueError(f"pairs need equal shapes, found {x.shape} and {y.shape}")
    return float(np.mean(np.sum((x - y) ** 2, axis=1)))


def uniformity(x: np.ndarray) -> float:
    """log of the mean of exp(-2 squared distance) over the pairs of distinct rows at length 1. Wang and Isola 2020.

    (N, H) -> 0 for a collapsed set; about -4 for a uniform one of high dimension. Raises ValueError for fewer than two
    rows, and vectors that are zero or not finite.
    """
    x = _normalised(x)
    if len(x) < 2:
        raise ValueError("uniformity needs at least two vectors")
    # At length 1 the squared distance is 2 - 2 cosine. The N pairs of a row with itself are taken off again.
    total = sum(np.exp(4 * (x[i : i + 1024] @ x.T - 1)).sum() for i in range(0, len(x), 1024))
    return float(np.log((total - len(x)) / (len(x) * (len(x) - 1))))


def _matrix(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"expected a finite, non-empty array (N, H), found shape {x.shape}")
    return x


def _normalised(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x := _matrix(x), axis=1, keepdims=True)
    for row in np.flatnonzero(lengths == 0)[:1]:
        raise ValueError(f"vector {row} is zero and has no direction")
    return x / lengths


def gather_results(run: str | Path, *, expected: Iterable[tuple[str, int]] = ()) -> pd.DataFrame:
    """RUN/results/<arm>/seed<k>/results.csv of all arms and seeds: columns as `mmeb.evaluate` gives them, with arm (str) and
    seed (int) in front.

    `expected`: (arm, seed) that must be there. Raises FileNotFoundError naming every arm and seed that lacks this file or
    per_query.parquet; ValueError for a file that cannot be read.
    """
    root = Path(run) / "results"
    arms = {path.name for path in root.glob("*") if path.is_dir() and not path.name.startswith(".")}
    numbers = [(path.parent.name, path.name[4:]) for path in root.glob("*/seed*")]
    found = {(arm, int(number)) for arm, number in numbers if arm in arms and number.isdigit()}
    missing = [f"arm {arm}: no seed" for arm in sorted(arms - {arm for arm, _ in found})]
    pieces = sorted(found | set(expected))
    for arm, seed in pieces:
        folder = root / arm / f"seed{seed}"
        lost = [
            name for name in ("results.csv", "per_query.parquet") if not (folder / name).is_file()
        ]
        missing += [f"arm {arm}, seed {seed}: no {' and no '.join(lost)}"] if lost else []
    if missing or not pieces:
        raise FileNotFoundError(f"{root}: {'; '.join(missing) or 'no results of any arm'}")
    parts = {}
    for arm, seed in pieces:
        with _readable(root, arm, seed) as folder:
            table = parts[arm, seed] = pd.read_csv(folder / "results.csv")
            if lost := {"task", "meta_task", "in_distribution"} - set(table):
                raise ValueError(f"results.csv has no column {', '.join(sorted(lost))}")
    return _together(parts)


def gather_ranks(run: str | Path, results: pd.DataFrame) -> pd.DataFrame:
    """RUN/results/<arm>/seed<k>/per_query.parquet of the arms and seeds of `results` (`gather_results` of this run): columns
    as `mmeb.evaluate` gives them, with arm and seed in front and meta_task and in_distribution behind.

    Raises ValueError for a file that cannot be read, or whose tasks are not those of results.csv beside it.
    """
    root, parts, columns = Path(run) / "results", {}, ["task", "query", "rank", "n_candidates"]
    for (arm, seed), tasks in results.groupby(["arm", "seed"])["task"].unique().items():
        with _readable(root, arm, seed) as folder:
            ranks = parts[arm, seed] = pd.read_parquet(
                folder / "per_query.parquet", columns=columns
            )
        if differ := sorted({*ranks["task"].unique()} ^ {*tasks}):
            raise ValueError(
                f"{folder}, arm {arm}, seed {seed}: only one of the files has task {', '.join(differ)}"
            )
    facts = results.drop_duplicates("task").set_index("task")[["meta_task", "in_distribution"]]
    return _together(parts).join(facts, on="task")


@contextmanager
def _readable(root: Path, arm: str, seed: int) -> Iterator[Path]:
    folder = root / arm / f"seed{seed}"
    try:
        yield folder
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"{folder}, arm {arm}, seed {seed}: not readable as results ({error})"
        ) from error


def _together(parts: dict[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """One table, with arm and seed in front."""
    return (
        pd.concat(parts, names=["arm", "seed"]).reset_index(["arm", "seed"]).reset_index(drop=True)
    )


def arm_scores(results: pd.DataFrame) -> pd.DataFrame:
    """P@1 in percent: arm, seed, classification, vqa, retrieval, grounding, ind, ood, overall; a row an arm and seed.

    Unweighted means over tasks (`mmeb.groups`), nan over none. Raises ValueError if a run lacks a task that another
    has, since their means would not compare, or has it twice.
    """
    scores = results[results["metric"] == "p@1"]
    _check_once(scores, ["arm", "seed", "task"])
    facts = scores.drop_duplicates("task").sort_values("task")
    tasks = [
        Task(row.task, row.meta_task, bool(row.in_distribution), 0) for row in facts.itertuples()
    ]
    wide = scores.pivot(index=["arm", "seed"], columns="task", values="value")
    for (arm, seed), part in wide[wide.isna().any(axis=1)].head(1).iterrows():
        lost = ", ".join(part.index[part.isna()])
        raise ValueError(f"arm {arm}, seed {seed} has no P@1 of {lost}, which other runs have")
    return pd.DataFrame(
        {name: wide[names].mean(axis=1) for name, names in groups(tasks).items()}
    ).reset_index()


SEED_DRAWS = 20  # resamples of seeds for one of queries


def paired_effects(
    per_query: pd.DataFrame,
    baseline: str,
    *,
    group: str = "overall",
    n_boot: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Arms less the baseline in points of P@1: arm, difference, low, high, p, p_holm, n_seeds, n_queries (a seed).

    per_query as of `gather_ranks`; group: "overall", "ind", "ood" or a meta-task. Differences are paired by seed, task
    and query over the seeds that both arms have, then averaged without weights over tasks. low, high: 95 % percentile
    interval; p: two-sided bootstrap p (at least 2 / n_boot / SEED_DRAWS), p_holm: corrected for the number of arms in the
    table. Tasks are not resampled: the interval speaks of new seeds and new queries of these tasks.

    1. All runs answer the same queries, so seeds and queries are crossed, not nested: what is peculiar to a query comes
       back in every seed. Queries drawn anew inside each seed would average it out, and intervals become too narrow. So
       a resample draws the queries of each task once for all seeds, and the seeds once for all queries, and adds the two
       deviations from the observed mean. That counts what is peculiar to one seed at one query twice, so that intervals
       are rather too wide; drawing cells by both at once (Owen's pigeonhole bootstrap, 2007) would count it three times.
    2. The mean of n resampled seeds spreads too little if n is small: with 5, a nominal 95 % holds some 85 % where seeds
       dominate. Its deviation is multiplied by sqrt(n / chi2(n - 1)), drawn anew each time, which mends the variance and
       gives the tails of Student's t: with seeds alone this is `seed_interval`, an eighth narrower for two seeds. One seed:
       only queries are resampled.
    3. These tails are what makes the ends of an interval jump between random numbers, so that each resample of queries
       meets SEED_DRAWS ones of seeds, which cost next to nothing.

    Raises ValueError for an unknown baseline or group, a repeated query, runs on different queries or candidates.
    """
    hits = _hits(per_query, group)  # (arm, seed) x (task, query)
    arms = hits.index.unique("arm")
    if baseline not in arms or len(arms) < 2:
        raise ValueError(
            f"baseline {baseline!r} and another arm are needed; there are {', '.join(map(str, arms))}"
        )
    others = arms.drop(baseline)
    rows = _combine(hits, [{arm: 1, baseline: -1} for arm in others], n_boot, seed)
    table = pd.DataFrame([{"arm": arm, **row} for arm, row in zip(others, rows, strict=True)])
    table.insert(5, "p_holm", holm(table["p"]))
    return table


def contrast(
    per_query: pd.DataFrame,
    weights: Mapping[str, float],
    *,
    group: str = "overall",
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """A weighted sum of arms in points of P@1, e.g. the gain with few pairs less the gain with all of them.

    weights: arm -> factor, as {"cocoa_few": 1, "contrastive_few": -1, "cocoa": -1, "contrastive": 1}. Returns difference,
    low, high, p, n_seeds, n_queries, computed and resampled as in `paired_effects`. Raises what that raises.
    """
    return _combine(_hits(per_query, group), [weights], n_boot, seed)[0]


def _combine(
    hits: pd.DataFrame, sums: list[Mapping[str, float]], n_boot: int, seed: int
) -> list[dict[str, Any]]:
    """One row for each weighted sum of arms; all of them on the same resamples."""
    task_of = hits.columns.get_level_values("task")
    points = (
        100 / task_of.nunique() / pd.Series(task_of).groupby(task_of).transform("size").to_numpy()
    )  # (Q,)
    deltas = [_weighted(hits, weights) * points for weights in sums]  # (S, Q) each
    cells = np.stack(
        [delta.mean(axis=0) for delta in deltas], axis=1
    )  # (Q, sums): a column adds up to the difference
    rng, of_queries = np.random.default_rng(seed), np.zeros((n_boot, len(sums)))
    for task in task_of.unique():
        part = cells[task_of == task]
        draws = (
            rng.integers(len(part), size=(n_boot, len(part)))
            + len(part) * np.arange(n_boot)[:, None]
        )
        of_queries += np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape) @ part
    rows = []
    for by_seed, drawn in zip([delta.sum(axis=1) for delta in deltas], of_queries.T, strict=True):
        of_seeds = _seed_draws(n, n_boot, seed) @ by_seed if (n := len(by_seed)) > 1 else 0.0
        boot = np.round(drawn + of_seeds, 9).ravel()  # so that a sum of zero is zero
        low, high = np.percentile(boot, [2.5, 97.5])
        p = min(1.0, 2 * (1 + min((boot <= 0).sum(), (boot >= 0).sum())) / (len(boot) + 1))
        facts = {"difference": by_seed.mean(), "low": low, "high": high, "p": p}
        rows.append(facts | {"n_seeds": len(by_seed), "n_queries": len(task_of)})
    return rows


def _weighted(hits: pd.DataFrame, weights: Mapping[str, float]) -> np.ndarray:
    """(seeds that all these arms have, queries): the weighted sum of their hits."""
    if lost := sorted(set(weights) - set(hits.index.unique("arm"))):
        raise ValueError(f"no results of arm {', '.join(lost)}")
    shared = sorted(set.intersection(*(set(hits.loc[arm].index) for arm in weights)))
    if not shared:
        raise ValueError(f"arms {', '.join(weights)} have no seed in common")
    return np.sum(
        [factor * hits.loc[arm].loc[shared].to_numpy() for arm, factor in weights.items()], axis=0
    )


@lru_cache(maxsize=8)
def _seed_draws(n: int, n_boot: int, seed: int) -> np.ndarray:
    """(SEED_DRAWS, n_boot, n) weights of n seeds' values, less their mean; the same for all arms with n seeds."""
    rng, size = np.random.default_rng([seed, n]), (SEED_DRAWS, n_boot)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=size) / n - 1 / n
    return drawn * np.sqrt(n / rng.chisquare(n - 1, size=size))[..., None]


def _hits(per_query: pd.DataFrame, group: str) -> pd.DataFrame:
    """1.0 where the right candidate is first: rows (arm, seed), columns (task, query), sorted, without gaps."""
    chosen = per_query
    if group in ("ind", "ood"):
        chosen = per_query[per_query["in_distribution"].astype(bool) == (group == "ind")]
    elif group != "overall":
        chosen = per_query[per_query["meta_task"] == group]
    if chosen.empty:
        raise ValueError(
            f"no query in group {group!r}; groups: overall, ind, ood, {', '.join(META_TASKS)}"
        )
    _check_once(chosen, ["arm", "seed", "task", "query"])
    pools = chosen.drop_duplicates(["task", "query", "n_candidates"])
    for row in pools[pools.duplicated(["task", "query"])].head(1).itertuples():
        raise ValueError(
            f"task {row.task}, query {row.query}: runs rank among different numbers of candidates"
        )
    ranks = chosen.set_index(["arm", "seed", "task", "query"])["rank"].unstack(["task", "query"])
    ranks = ranks.sort_index(axis=0).sort_index(axis=1)
    for i, j in np.argwhere(ranks.isna().to_numpy())[:1]:
        (arm, k), (task, query) = ranks.index[i], ranks.columns[j]
        raise ValueError(
            f"arm {arm}, seed {k} has no rank of query {query} of {task}; all runs need the same queries"
        )
    return (ranks == 1).astype(float)


def _check_once(table: pd.DataFrame, keys: list[str]) -> None:
    for row in table.loc[table.duplicated(keys), keys].head(1).itertuples(index=False):
        raise ValueError(
            f"more than one row of {', '.join(f'{k} {v}' for k, v in zip(keys, row, strict=True))}"
        )


def holm(p: Iterable[float]) -> np.ndarray:
    """Holm's correction (1979) of (n,) p-values, in their order: the i-th smallest times n - i + 1, made monotone."""
    p = np.asarray(list(p), dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def certain(row: Mapping[str, Any]) -> bool:
    """Does a difference, up or down, stand once corrected? Several seeds, an interval without 0, p_holm < 0.05."""
    return row["n_seeds"] > 1 and (row["low"] > 0 or row["high"] < 0) and row["p_holm"] < 0.05


def verdict(row: Mapping[str, Any]) -> str:
    """A claimed gain from a row of effects: "supported", "not supported" or "undecided".

    Supported: certain, and up. Not supported: high <= 0. Undecided: anything else, and any interval of a single seed, which says
    nothing of other seeds.
    """
    if certain(row) and row["low"] > 0:
        return "supported"
    return "not supported" if row["n_seeds"] > 1 and row["high"] <= 0 else "undecided"


def seed_interval(values: Iterable[float]) -> dict[str, Any]:
    """Of a value a seed (n,), against zero, by Student's t: difference (the mean), low, high (95 %), p, n_seeds.

    One value, or values without any spread, give nan for low, high and p: they do not say how sure they are. Raises ValueError
    for no values, or values that are not finite.
    """
    from scipy.special import (  # scipy.stats, which has the test whole, takes a second to import
        stdtr,
        stdtrit,
    )

    values = np.asarray(list(values), dtype=float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected finite values, found {values.tolist()}")
    facts = {"difference": float(values.mean()), "n_seeds": len(values)}
    if np.ptp(values) == 0:
        return facts | dict.fromkeys(("low", "high", "p"), float("nan"))
    mean, error, freedom = values.mean(), values.std(ddof=1) / len(values) ** 0.5, len(values) - 1
    low, high = mean + stdtrit(freedom, [0.025, 0.975]) * error
    return facts | {
        "low": float(low),
        "high": float(high),
        "p": float(2 * stdtr(freedom, -abs(mean / error))),
    }


def said(row: Mapping[str, Any], places: int = 1) -> str:
    """A row of effects as texts and tables write it: "+1.8 [-1.7, +4.7]"."""
    return f"{row['difference']:+.{places}f} [{row['low']:+.{places}f}, {row['high']:+.{places}f}]"


def tested(p: float) -> str:
    """A p-value as texts and tables write it."""
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


class Probe(NamedTuple):
    accuracy: float  # percent of the test rows
    low: float  # 95 % Wilson interval over test rows
    high: float
    majority: float  # percent right for the answer that is most frequent in training
    n: int  # test rows


def linear_probe(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> Probe:
    """What a linear classifier reads from frozen embeddings (N, H) of labels (N,): logistic regression, L2, C = 1.

    Features are standardised by the training rows; no randomness. Labels that training lacks count as errors. Raises
    scikit-learn's ValueError for different lengths, values that are not finite, or a single class in training.
    """
    from scipy import stats
    from sklearn.linear_model import (
        LogisticRegression,  # here: figures import this module and need none of it
    )
    from sklearn.metrics import accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train_x, train_y)
    classes, counts = np.unique(train_y, return_counts=True)
    right = int(accuracy_score(test_y, model.predict(test_x), normalize=False))
    majority = 100 * float(np.mean(np.asarray(test_y) == classes[counts.argmax()]))
    interval = stats.binomtest(right, len(test_y)).proportion_ci(method="wilson")  # 1927
    low, high = 100 * float(interval.low), 100 * float(interval.high)
    return Probe(100 * right / len(test_y), low, high, majority, len(test_y))


def training_costs(run: str | Path, arms: Mapping[str, Any]) -> pd.DataFrame:
    """Seconds of training of all stages that an arm has, from the checkpoints of a run: arm, seed, seconds.

    arms: name -> `profiles.Arm`. Stages that arms share count in full for each, as they would if it were run alone.
    """
    rows = []
    for folder in sorted(path for path in Path(run).glob("seed*") if path.name[4:].isdigit()):
        for name, arm in arms.items():
            stages = [
                stage for stage in ("stage1", "stage2", "stage3") if getattr(arm, stage) is not None
            ]
            metas = [folder / stage / arm.key(stage) / "cocoa.json" for stage in stages]
            if all(meta.is_file() for meta in metas):
                seconds = sum(
                    json.loads(meta.read_text(encoding="utf-8"))["train_seconds"] for meta in metas
                )
                rows.append({"arm": name, "seed": int(folder.name[4:]), "seconds": seconds})
    return pd.DataFrame(rows, columns=["arm", "seed", "seconds"])
