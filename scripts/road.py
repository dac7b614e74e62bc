"""Where the minutes of `make reproduce` go: `python scripts/road.py runs/laptop [OUT.csv]`.

Snakemake writes a file a step below RUN/times (its `benchmark`); here they are added up by kind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

COLUMNS = ["step", "times", "CPU minutes", "minutes by the clock", "largest memory, MB"]


def read_times(run: Path) -> pd.DataFrame:
    """One row a kind of step, the most expensive first, and their sum. Raises SystemExit without any."""
    paths = sorted((run / "times").rglob("*.tsv"))
    if not paths:
        raise SystemExit(f"{run}: no times; run `make reproduce` first")
    parts = [pd.read_csv(path, sep="\t").assign(step=path.parent.name) for path in paths]
    times = (
        pd.concat(parts)
        .groupby("step")
        .agg(
            n=("s", "size"), cpu=("cpu_time", "sum"), clock=("s", "sum"), memory=("max_rss", "max")
        )
    )
    times = times.sort_values("cpu", ascending=False)
    total = pd.DataFrame(
        {
            "n": times.n.sum(),
            "cpu": times.cpu.sum(),
            "clock": times.clock.sum(),
            "memory": times.memory.max(),
        },
        index=["all"],
    )
    times = pd.concat([times, total])
    times[["cpu", "clock"]] = (times[["cpu", "clock"]] / 60).round(1)
    times["memory"] = times["memory"].round(-1).astype(int)
    return times.rename_axis("step").reset_index().set_axis(COLUMNS, axis=1)


def main() -> None:
    times = read_times(Path(sys.argv[1]))
    print(times.to_string(index=False))
    if len(sys.argv) > 2:
        times.to_csv(sys.argv[2], index=False)


if __name__ == "__main__":
    main()
