"""`make verify` finds what was altered, added or lost, and a table that its ranks do not give."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import verify  # noqa: E402


@pytest.fixture
def tree(tmp_path):
    """reports/ with one report, data/ and a page with a table, as `--write` leaves them."""
    report = tmp_path / "reports" / "laptop"
    (report / "figures").mkdir(parents=True)
    shutil.copy(ROOT / "reports" / "laptop" / "ranks.parquet", report)
    for suffix in (".png", ".svg", ".txt"):
        (report / "figures" / f"forest{suffix}").write_text("x")
    folder = tmp_path / "data" / "größe x"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("1\n")
    (tmp_path / "data" / ".partial").write_text("half")
    page = "Before.\n<!-- reports/laptop: cocoa contrastive -->\nold\n<!-- end -->\nAfter.\n"
    (tmp_path / "README.md").write_text(page)
    assert verify.main(["--root", str(tmp_path), "--write", "--without-run"]) == 0
    return tmp_path


def check(tree) -> list[str]:
    return [line.removeprefix(f"{tree}/") for line in verify.verify(tree, run=False)]


def test_what_is_as_written_passes(tree, capsys):
    assert check(tree) == [] and verify.main(["--root", str(tree), "--without-run"]) == 0
    assert "as committed" in capsys.readouterr().out
    manifest = (tree / "data" / "MANIFEST.sha256").read_text(encoding="utf-8")
    assert len(manifest.splitlines()) == 1, "hidden files are not listed"
    _, mark, head, _, cocoa, contrastive, end, last = (tree / "README.md").read_text().splitlines()
    assert mark == "<!-- reports/laptop: cocoa contrastive -->"
    assert (end, last) == ("<!-- end -->", "After.")
    ranks = pd.read_parquet(tree / "reports" / "laptop" / "ranks.parquet")
    seeds = ranks.groupby("arm")["seed"].nunique()
    mean = 100 * (ranks[ranks["arm"] == "cocoa"]["rank"] == 1).mean()  # tasks are of one size
    assert head.startswith("| arm | seeds |") and f"| {mean:.1f} |" in cocoa
    assert cocoa.startswith(f"| cocoa | {seeds['cocoa']} |")
    assert contrastive.startswith(f"| contrastive | {seeds['contrastive']} |")


def test_altered_lost_and_added_files_are_named(tree, capsys):
    (tree / "data" / "größe x" / "a.csv").write_text("2\n")
    (tree / "reports" / "laptop" / "figures" / "forest.svg").unlink()
    (tree / "reports" / "new.txt").write_text("")
    assert check(tree) == [
        "reports/laptop/figures/forest.svg: missing",
        "reports/new.txt: not in the manifest",
        "data/größe x/a.csv: altered",
        "reports/laptop/figures/forest.png: no .svg beside it",
    ]
    assert verify.main(["--root", str(tree), "--without-run"]) == 1
    assert "altered" in capsys.readouterr().out


def test_ranks_that_changed_under_their_tables_fail(tree):
    path = tree / "reports" / "laptop" / "ranks.parquet"
    ranks = pd.read_parquet(path)
    ranks.loc[ranks["arm"] == "cocoa", "rank"] = 1
    ranks.to_parquet(path)
    verify.write_manifest(tree / "reports")
    summary, page = check(tree)
    assert "summary.md: not what the ranks beside it give" in summary
    assert "README.md: a table does not follow from its ranks" in page


def test_a_lost_manifest_or_record_is_said(tree):
    (tree / "data" / "MANIFEST.sha256").write_text("nonsense\n")
    assert "MANIFEST.sha256: not lines of hash and name" in "\n".join(check(tree))
    (tree / "data" / "MANIFEST.sha256").unlink()
    assert "MANIFEST.sha256: no such file" in "\n".join(check(tree))
    assert "smoke_arm.json: no such file" in "\n".join(verify.verify(tree))


RUN = {"arm": "contrastive", "data": "d", "loss": [3.0, 2.0], "hits": 3, "queries": 9}
RUN |= {"weights_sha256": "w", "where": {"machine": "m"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"data": "e"}, "data is e, was d"),
        ({"loss": [3.0, 2.1]}, "losses"),
        ({"loss": [3.0]}, "losses"),
        ({"loss": [3.0, float("nan")]}, "losses"),
        ({"weights_sha256": "v"}, "other weights than recorded"),
        ({"weights_sha256": "v", "where": {"machine": "n"}}, None),
        ({"loss": [3.0, 2.01], "where": {"machine": "n"}}, None),
        ({"weights_sha256": "x", "where": {"machine": "o"}}, None),
        ({"weights_sha256": "w", "where": {"machine": "o"}}, "other weights than recorded"),
    ],
)
def test_a_smoke_run_is_compared_by_bits_at_home_and_by_loss_elsewhere(change, words):
    other = RUN | {"weights_sha256": "x", "where": {"machine": "o"}}
    found = verify.compare_runs(copy.deepcopy(RUN) | change, [RUN, other])
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def test_writing_keeps_the_records_of_other_machines(tree, monkeypatch):
    other, path = RUN | {"where": {"machine": "o"}}, tree / "reports" / verify.SMOKE
    for found in (RUN, other, RUN | {"weights_sha256": "new"}):
        monkeypatch.setattr(verify, "run_smoke", lambda folder, found=found: found)
        assert verify.main(["--root", str(tree), "--write"]) == 0
    assert json.loads(path.read_text(encoding="utf-8")) == [other, RUN | {"weights_sha256": "new"}]
