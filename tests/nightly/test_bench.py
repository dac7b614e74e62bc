"""The measurements measure what they say, the page is made from their records, the GPU script runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import common  # noqa: E402
import page  # noqa: E402
import road  # noqa: E402
import rows  # noqa: E402
import step  # noqa: E402

RECORDS = {path.stem: json.loads(path.read_text()) for path in common.RESULTS.glob("*.json")}


def test_the_page_is_what_its_records_make():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text) == text, "run `python benchmarks/page.py`"
    assert len(text.splitlines()) <= 120
    damaged = text.replace("| stage 1 |", "| stage 9 |", 1)
    assert damaged != text and page.render(damaged) == text


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_record_lies_between_its_lowest_and_highest(name):
    content = RECORDS[name]
    assert content["machine"] and content["results"]
    for line in content["results"]:
        assert line["lowest"] <= line["ratio"] <= line["highest"] and line["text"], line


def test_bench_has_twelve_rows_and_a_record_of_each(tmp_path):
    assert len(rows.rows(str(tmp_path))) == 12
    assert {line["name"] for line in RECORDS["bench"]["results"]} == set(rows.rows(""))


def test_sides_run_in_turn_after_a_round_that_is_not_counted():
    order, clock = [], iter(range(100))
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = common.in_turn(sides, 3, clock=lambda: next(clock))
    assert order == list("abababab") and seconds == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert len(common.in_turn(sides, 3, warm=True)["a"]) == 3 and order == list("ababababababab")


def test_a_ratio_is_taken_within_each_round():
    line = common.record("x", "", [1.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert (line["ratio"], line["lowest"], line["highest"], line["n"]) == (2.0, 1.0, 3.0, 3)


def take_megabytes(n: int):
    np.ones((1 << 20) * 40)  # set-up, which does not count
    return lambda: np.ones((1 << 17) * n)


def test_a_peak_is_of_its_step_alone():
    assert [round(found / 2**20) for found in common.peaks(take_megabytes, 64, n=2)] == [64, 64]


def test_every_way_of_a_step_has_the_losses_of_the_step_before(tmp_path, monkeypatch):
    """Profile smoke; and a way that is wrong is found out."""
    run = step.few_rows(tmp_path, "smoke")
    ways = ["before", "packing", "pictures", "patches", "positions", "norms", "now"]
    for name in step.STAGES:
        for line in step.compare(run, name, ways, steps=4):
            assert line["gap"] < 1e-4, line
    spoil = lambda model: model.model.visual.patch_embed.proj.weight.data.zero_()  # noqa: E731
    monkeypatch.setitem(step.WAYS, "wrong", step.Way("", step.KEPT, spoil))
    (line,) = step.compare(run, "stage1", ["before", "wrong"], steps=2)
    assert line["gap"] > 1e-3


def test_the_road_is_added_up_by_kind(tmp_path):
    for name, seconds in {"run/a": 60, "run/b": 30, "notebook/00": 12}.items():
        path = tmp_path / "times" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"s\th:m:s\tmax_rss\tcpu_time\n{seconds}\t0:01:00\t812.3\t{2 * seconds}\n")
    table = road.read_times(tmp_path).set_index("step")
    assert table.index.tolist() == ["run", "notebook", "all"]
    assert table.loc["run"].tolist() == [2, 3.0, 1.5, 810]
    assert table.loc["all", "CPU minutes"] == 3.4


def test_the_gpu_script_is_rehearsed_on_a_cpu(tmp_path):
    """All its parts in smoke size: the tests are collected, steps taken, the six notebooks run."""
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/gpu.sh"), str(tmp_path), "--smoke"], capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    steps = json.loads((tmp_path / "gpu_steps.json").read_text())
    names = {line["name"] for line in steps["results"]}
    assert steps["not_measured"] == {} and "stage3, compiled, 2 rows of 64" in names
    assert len(list((tmp_path / "notebooks").glob("0*.ipynb"))) == 6
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 64 << 20
