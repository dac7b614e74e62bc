"""The README says what the committed tables say, and shows pictures that are there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORTS = sorted(path.parent for path in (ROOT / "reports").glob("*/results"))


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.name)
def test_the_readmes_table_is_the_reports(report):
    from publish import summary

    table = summary(report)
    assert (report / "summary.md").read_text(encoding="utf-8").strip() == table
    if report.name == "laptop":
        for line in table.splitlines():
            assert line in README, line


def test_the_readmes_emoji_table_is_the_reports():
    from cocoa_lib import analysis

    results, _ = analysis.gather_results(ROOT / "reports" / "laptop-emoji_pairs")
    scores = results[results["metric"] == "p@1"].pivot_table(index="task", columns="arm", values="value")
    for label, task in (
        ("text to image", "TextToImage"),
        ("image to text", "ImageToText"),
        ("group (10 classes)", "Class"),
    ):
        cells = [
            f"{scores.loc[task + part, 'cocoa']:.1f} / {scores.loc[task + part, 'contrastive']:.1f}"
            for part in ("Seen", "Unseen")
        ]
        assert f"| {label} | {cells[0]} | {cells[1]} |" in README


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
