"""Tables of a run and of a report: the same whichever they are read from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from mmeb_files import make_ranks

from cocoa_lib.data.tables import Task
from cocoa_lib.evaluate import read_probes, read_ranks, read_runs, write_ranks, write_report
from cocoa_lib.evaluate.results import summarise
from cocoa_lib.evaluate.score import RANKS, score_arms

NAMES = (("A", "classification", True), ("B", "classification", False), ("C", "vqa", True))
TASKS = [Task(*fields, 9) for fields in NAMES]
LOW = make_ranks({"A": [1, 2], "B": [2, 2, 2, 1], "C": [3, 3]}, TASKS)
HIGH = make_ranks({"A": [1, 1], "B": [2, 1, 1, 1], "C": [1, 3]}, TASKS)


@pytest.fixture
def root(tmp_path):
    """A run's root with three finished runs, a probe, and an unfinished run."""
    for arm, seed, ranks in (("base", 0, LOW), ("base", 1, LOW), ("full", 0, HIGH)):
        folder = tmp_path / f"seed{seed}" / "evaluate" / arm
        facts = {"arm": arm, "seed": seed, "recipes": {"stage3": {"steps": 5}}}
        write_ranks(folder, ranks, facts | ({"note": "x"} if arm == "full" else {}))
    table = pd.DataFrame({"measure": ["kind"], "value": [50.0], "low": [np.nan], "high": [np.nan]})
    table = table.assign(majority=20.0, n=9, arm="full", seed=0)
    table.to_csv(tmp_path / "seed0" / "evaluate" / "full" / "probe.csv", index=False)
    work = tmp_path / "seed1" / "stage3" / ".full.work"  # a stage at work has a run.json of its own
    work.mkdir(parents=True)
    (work / "run.json").write_text("{}")
    return tmp_path


def test_a_report_reads_as_the_runs_it_is_of(root, tmp_path):
    (root / "figures").mkdir()
    (root / "figures" / "a.txt").write_text("alt")
    report = write_report(root, tmp_path / "report")
    for read in (read_ranks, read_runs, read_probes):
        pd.testing.assert_frame_equal(read(report), read(root))
    names = {path.name for path in report.iterdir()}
    assert names == {"ranks.parquet", "runs.jsonl", "probes.csv", "summary.md", "figures"}
    ranks, runs = read_ranks(root), read_runs(report)
    assert list(ranks.columns) == ["arm", "seed", *RANKS] and len(ranks) == 3 * 8
    assert runs[["arm", "seed"]].values.tolist() == [["base", 0], ["base", 1], ["full", 0]]
    assert runs["recipes"][0] == {"stage3": {"steps": 5}} and pd.isna(runs["note"][0])
    assert '"note"' not in (report / "runs.jsonl").read_text().splitlines()[0]
    before = (report / "summary.md").read_text()
    write_report(report, report)
    assert (report / "summary.md").read_text() == before
    pd.testing.assert_frame_equal(read_ranks(report), ranks)


def test_one_runs_folder_is_read_too_and_a_run_is_there_once_whole(root):
    folder = root / "seed0" / "evaluate" / "full"
    assert set(read_ranks(folder)["arm"]) == {"full"} and len(read_probes(folder)) == 1
    (folder / "run.json").unlink()
    assert set(read_ranks(root)["arm"]) == {"base"}, "run.json is written last"
    with pytest.raises(FileNotFoundError, match="no results"):
        read_ranks(root / "nowhere")
    assert read_probes(root / "seed1").empty


def test_no_old_facts_beside_new_ranks(tmp_path, monkeypatch):
    write_ranks(tmp_path, LOW, {"arm": "a", "seed": 0})

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("cocoa_lib.evaluate.results.write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        write_ranks(tmp_path, HIGH, {"arm": "a", "seed": 0})
    assert not (tmp_path / "run.json").exists()


def test_arms_are_averaged_over_tasks_without_weights(root):
    scores = score_arms(read_ranks(root))
    assert scores[["arm", "seed"]].values.tolist() == [["base", 0], ["base", 1], ["full", 0]]
    full = scores.iloc[2]  # A 100, B 75, C 50
    assert (full["classification"], full["vqa"], full["ind"], full["ood"]) == (87.5, 50, 75, 75)
    assert np.isnan(full["retrieval"]) and np.isnan(full["grounding"])
    base = scores.iloc[0]  # A 50, B 25, C 0
    assert base["classification"] == 37.5, "pooled over queries it would be 2 / 6"
    assert base["overall"] == 25
    ranks = read_ranks(root)
    with pytest.raises(ValueError, match="'arm': 'full', 'seed': 0} has no ranks of B"):
        score_arms(ranks[(ranks["arm"] != "full") | (ranks["task"] != "B")])


def test_the_summary_has_an_arm_a_row(root):
    lines = summarise(read_ranks(root), "base").splitlines()
    assert lines[0] == (
        "| arm | seeds | classification | vqa | ind | ood | overall | minus base [95 % interval] |"
    )
    assert lines[2].startswith("| full | 1 | 87.5 | 50.0 | 75.0 | 75.0 | 75.0 | +50.0 [+")
    assert lines[3] == "| base | 2 | 37.5 | 0.0 | 25.0 | 25.0 | 25.0 |  |"
