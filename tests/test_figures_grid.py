"""The grid's figures: what is drawn is what the table says."""

from __future__ import annotations

import pandas as pd
import pytest

from cocoa_lib import figures


def test_effect_table_writes_every_difference_and_marks_the_clear_ones():
    table = pd.DataFrame(
        [("a", "vqa", 3.04, 1.0, 5.0), ("a", "ood", -2.0, -4.0, 0.5), ("b", "vqa", 0.0, -1.0, 1.0),
         ("b", "ood", -9.0, -10.0, -8.0)],
        columns=["arm", "group", "difference", "low", "high"],
    )  # fmt: skip
    figure = figures.effect_table(table, baseline="base")
    drawn = {(t.get_position(), t.get_text()): t.get_weight() for t in figure.axes[0].texts}
    assert drawn == {
        ((0, 0), "+3.0"): "bold",
        ((1, 0), "-2.0"): "normal",
        ((0, 1), "+0.0"): "normal",
        ((1, 1), "-9.0"): "bold",
    }
    assert "b, ood: -9.0" in figure.alt


def test_cost_score_draws_minutes_against_points(tmp_path):
    table = pd.DataFrame({"arm": ["a", "b"], "seconds": [60.0, 600.0], "value": [20.0, 30.0], "low": [18.0, float("nan")],
                          "high": [23.0, float("nan")]})  # fmt: skip
    figure = figures.cost_score(table, title="t")
    line, _, (bars,) = figure.axes[0].containers[0]
    assert line.get_xydata().tolist() == [[1, 20], [10, 30]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[18, 23], [30, 30]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b"]
    first, second = (figures.save(figures.cost_score(table, title="t"), tmp_path / name, "x") for name in "12")
    for suffix in (".png", ".svg"):
        assert first.with_suffix(suffix).read_bytes() == second.with_suffix(suffix).read_bytes()


def test_an_effect_table_needs_every_cell():
    table = pd.DataFrame([("a", "vqa", 1.0, 0.0, 2.0)], columns=["arm", "group", "difference", "low", "high"])
    with pytest.raises(ValueError, match="duplicate"):
        figures.effect_table(pd.concat([table, table]), baseline="base")
