"""Figures: what is drawn is the table, the title is the message, the same data give the same bytes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from figure_cases import CASES, CURVES, EFFECTS, MASKS, NAMES, SCORES, TABLE
from matplotlib.colors import to_hex

from cocoa_lib.show import figures


@pytest.fixture(scope="module")
def drawn():
    return {name: draw() for name, draw in CASES.items()}


def labels(axis, which: str) -> list[str]:
    return [tick.get_text() for tick in getattr(axis, f"get_{which}ticklabels")()]


def bars(container, dimension: int) -> list[list[float]]:
    """Ends of the error bars of a container, in order."""
    return [sorted(segment[:, dimension].tolist()) for segment in container[2][0].get_segments()]


def test_a_figure_has_its_message_as_title_and_an_alt_text(drawn):
    for name, figure in drawn.items():
        assert "\n" not in figure.alt, name
        assert figure.get_suptitle() == "t" and figure.alt.startswith("t. "), name


def test_the_same_data_give_the_same_bytes(tmp_path):
    for i in (0, 1):
        figures.save(CASES["forest"](), tmp_path / str(i))
    for kind in ("png", "svg"):
        assert (tmp_path / f"0.{kind}").read_bytes() == (tmp_path / f"1.{kind}").read_bytes()


def test_show_displays_the_png_with_alt_text_then_the_caption(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    figure = CASES["scores"]()
    figures.show(figure, "n = 3 <seeds>", tmp_path / "figures" / "a")
    image, caption = shown
    assert image.data[:4] == b"\x89PNG" and image.alt == figure.alt
    assert caption.data == '<p class="figure-caption">n = 3 &lt;seeds&gt;</p>'
    assert (tmp_path / "figures" / "a.png").read_bytes() == image.data


def test_masks_are_drawn_as_given_and_named(drawn):
    axes = drawn["masks"].axes
    for axis, panel in zip(axes, MASKS.values(), strict=True):
        assert np.array_equal(axis.images[0].get_array(), panel)
    assert labels(axes[0], "x") == NAMES
    words = [text.get_text() for text in drawn["masks"].legends[0].get_texts()]
    assert words == ["looks at it", "knows it through others", "never"]


def test_the_tokens_of_a_picture_share_one_label_and_many_words_have_none():
    names = ["start", *["picture"] * 5, "end", "a", "a", "EOS"]
    assert figures.name_runs(names) == (
        [0.0, 3.0, 6.0, 7.0, 8.0, 9.0], ["start", "picture x 5", "end", "a", "a", "EOS"],
    )  # fmt: skip
    _, few = figures.name_runs([f"w{i}" for i in range(200)] + ["picture"] * 300 + ["EOS"])
    assert few == ["picture x 300", "EOS"], "hundreds of tokens"


def test_training_draws_raw_and_smoothed_values_and_a_collapsed_model(drawn):
    first, _ = drawn["training"].axes
    raw, smooth, level = first.lines
    assert raw.get_ydata().tolist() == [4, 2, 3, 1] and smooth.get_ydata()[1:3].tolist() == [3, 2]
    assert set(level.get_ydata()) == {3.5}


def test_scores_have_a_row_a_task_and_intervals_where_there_are_some(drawn):
    (axis,) = drawn["scores"].axes
    assert labels(axis, "y") == ["Digits", "Count"]
    a, b = axis.containers
    assert bars(a, 0) == [[40, 61], [15, 22]]
    assert b[0].get_xdata()[1] == 30 and not b[2]
    many = pd.concat([SCORES[:1].assign(task=f"task {i}") for i in range(36)])
    figure = figures.draw_scores(many, title="t")
    assert figure.get_size_inches()[1] < 12, "36 tasks fit a page"


def test_forest_fills_what_excludes_zero_over_several_seeds(drawn):
    (axis,) = drawn["forest"].axes
    marks = [line for line in axis.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in marks] == EFFECTS["difference"].tolist()
    assert [to_hex(line.get_markerfacecolor()) for line in marks] == [
        figures.COLOURS[0].lower(),
        "#ffffff",
        "#ffffff",
    ]
    said = [text.get_text() for text in axis.texts]
    assert "+3.0 [+1.0, +5.5]  n = 3" in said and "planned" in said and said.count("others") == 1


def test_heat_writes_every_number_and_bold_where_asked():
    bold = TABLE.abs() > 2
    figure = figures.draw_heat({"": TABLE}, title="t", unit="u", fmt="+.1f", signed=True, bold=bold)
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == ["+0.0", "-5.0", "+2.5", "+1.0"]
    assert [text.get_weight() for text in texts] == ["normal", "bold", "bold", "normal"]


def test_curves_join_points_in_the_order_of_x_and_names_do_not_overlap(drawn):
    (axis,) = drawn["curves"].axes
    assert [c[0].get_xdata().tolist() for c in axis.containers] == [[1000, 2000]] * 2
    assert labels(axis, "x") == ["1,000", "2,000"]
    close = CURVES.assign(value=[20.0, 30, 24, 20.01])
    names = figures.draw_curves(close, title="t", xlabel="x").axes[0].texts
    assert [text.get_text() for text in names] == ["a", "b"] and names[1].xy[1] - names[0].xy[
        1
    ] > 0.5


def test_of_many_arms_the_chosen_are_named_and_all_stand_at_their_cost(drawn):
    (axis,) = drawn["tradeoff"].axes
    assert [text.get_text() for text in axis.texts] == ["a", "b"]
    assert axis.lines[0].get_xdata().tolist() == [5.0]
