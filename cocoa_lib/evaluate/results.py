"""The tables of a run and of a report: ranks.parquet, run.json or runs.jsonl, probes.

What follows from ranks is not stored: `score_tasks`, `score_averages`, `score_arms` and
`paired_effects` compute it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..store.files import write_json, write_whole
from .effects import format_effect, paired_effects
from .score import RANKS, RUN, score_arms

PROBES = [*RUN, "measure", "value", "low", "high", "majority", "n"]


def write_ranks(folder: str | Path, ranks: pd.DataFrame, facts: Mapping[str, Any]) -> None:
    """Write one run's ranks.parquet and, last, run.json: where that is, both are.

    ranks: what `evaluate` returns. facts: what made them, with `arm` and `seed`, which become the
    first columns of the table.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    ranks = ranks.assign(arm=facts["arm"], seed=facts["seed"])[[*RUN, *RANKS]]
    _write_parquet(folder / "ranks.parquet", ranks)
    write_json(folder / "run.json", dict(facts))


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda aside: table.to_parquet(aside, index=False, compression="zstd"))


def _find_runs(folder: Path) -> list[Path]:
    """Find the folders below `folder` that hold a finished run's ranks."""
    found = sorted(path.parent for path in folder.rglob("ranks.parquet"))
    if not (found := [path for path in found if (path / "run.json").is_file()]):
        raise FileNotFoundError(f"{folder}: no results; expected ranks.parquet beside run.json")
    return found


def read_ranks(folder: str | Path) -> pd.DataFrame:
    """Read the ranks of a report folder, or of all runs below a run's root: arm, seed, then RANKS.

    Raises FileNotFoundError where there are none, ValueError for a file that is not such a table.
    """
    whole = Path(folder) / "ranks.parquet"
    files = [whole] if whole.is_file() else [run / whole.name for run in _find_runs(Path(folder))]
    table = pd.concat(pd.read_parquet(path, columns=[*RUN, *RANKS]) for path in files)
    return table.sort_values(RUN, kind="stable", ignore_index=True)


def read_runs(folder: str | Path) -> pd.DataFrame:
    """Read what made the ranks, a row a run: arm, seed, commit, recipes, seconds, versions, ...

    A report's runs.jsonl, or the run.json of all runs below a run's root. A cell may be a dict.
    """
    table = pd.DataFrame(map(json.loads, _read_notes(Path(folder))))
    return table.sort_values(RUN, kind="stable", ignore_index=True)


def _read_notes(folder: Path) -> list[str]:
    if (path := folder / "runs.jsonl").is_file():
        return path.read_text(encoding="utf-8").splitlines()
    return [(run / "run.json").read_text(encoding="utf-8") for run in _find_runs(folder)]


def read_probes(folder: str | Path) -> pd.DataFrame:
    """Read a report's probes.csv, or the probe.csv of all runs below a run's root; may be empty.

    Columns: arm, seed, measure, value, low, high, majority, n.
    """
    folder = Path(folder)
    whole = folder / "probes.csv"
    files = [whole] if whole.is_file() else sorted(folder.rglob("probe.csv"))
    tables = [pd.read_csv(path) for path in files]
    if not tables:
        return pd.DataFrame(columns=PROBES)
    return pd.concat(tables)[PROBES].sort_values(RUN, kind="stable", ignore_index=True)


def write_report(run_root: str | Path, out: str | Path) -> Path:
    """Write a report of all runs below `run_root`; return its folder.

    OUT/{ranks.parquet, runs.jsonl, probes.csv, summary.md, figures/}: the tables as `read_ranks`,
    `read_runs` and `read_probes` give them, the summary of `summarise`, and a copy of
    run_root/figures where there are any. What was in `out` stays where it is not written anew.
    """
    run_root, out = Path(run_root), Path(out)
    ranks, probes = read_ranks(run_root), read_probes(run_root)
    out.mkdir(parents=True, exist_ok=True)
    _write_parquet(out / "ranks.parquet", ranks)
    lines = sorted(
        map(json.loads, _read_notes(run_root)), key=lambda run: [run[name] for name in RUN]
    )
    texts = {
        "runs.jsonl": "".join(f"{json.dumps(line)}\n" for line in lines),
        "summary.md": summarise(ranks),
    }
    if len(probes):
        texts["probes.csv"] = probes.to_csv(index=False)
    for name, text in texts.items():
        write_whole(out / name, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
    if (run_root / "figures").is_dir() and run_root != out:
        shutil.copytree(run_root / "figures", out / "figures", dirs_exist_ok=True)
    return out


def average_arms(scores: pd.DataFrame) -> pd.DataFrame:
    """Average `score_arms` over seeds: a row an arm, the best first; its seeds, then the averages."""
    means = scores.groupby("arm").mean(numeric_only=True).drop(columns="seed")
    means = means.dropna(axis="columns", how="all").sort_values("overall", ascending=False)
    means.insert(0, "seeds", scores.groupby("arm").size())
    return means


def summarise(ranks: pd.DataFrame, baseline: str = "contrastive") -> str:
    """Summarise the arms as a Markdown table: means over seeds, and the difference to `baseline`.

    Arms are ordered by their overall score. The interval is that of `paired_effects`.
    """
    means, differences = average_arms(score_arms(ranks)), {}
    if baseline in means.index and len(means) > 1:
        effects = paired_effects(ranks, baseline)
        differences = {row.arm: format_effect(row) for row in effects.itertuples()}
    head = ["arm", *means.columns, f"minus {baseline} [95 % interval]"]
    lines = [head, ["---"] * len(head)]
    for arm, seeds, *values in means.itertuples():
        shown = [f"{value:.1f}" for value in values]
        lines.append([arm, str(seeds), *shown, differences.get(arm, "")])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
