"""Every figure: what is drawn is the table, same data give the same bytes, and it looks as it looked when last seen.

The pictures in `baseline/` are figures shrunk eight times, so that a font's hinting does not count and a missing bar
does. After a change that is meant, look at the new figures and write them with `python tests/test_figures.py`.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from cocoa_lib.show import figures

DRAWN_BY = "3.11"  # matplotlib, whose versions differ in where text and axes come to lie
BASELINE = Path(__file__).parent / "baseline"
NAN = float("nan")
TRIANGLE = np.tril(np.ones((4, 4), dtype=bool))
SQUARE = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
NAMES = ["A1", "A2", "EOS", "B1"]
DEPTH = np.array([[1, 1, 1, 0], [1, 1, 1, 2], [1, 1, 1, 1], [2, 0, 3, 1]])
LOG = pd.DataFrame({"step": [1, 2, 3, 4], "loss": [4.0, 2.0, 3.0, 1.0], "image_loss": [1.0, 0.5, 0.4, 0.2]})
SCENES = [Image.fromarray(np.full((8, 8, 3), shade, dtype=np.uint8)) for shade in (10, 90, 170, 250)]
TASKS = pd.DataFrame(
    [("Digits", "a", 50.0, 40.0, 61.0), ("Count", "a", 20.0, 15.0, 22.0), ("Count", "b", 30.0, NAN, NAN)],
    columns=["task", "label", "value", "low", "high"],
)
EFFECTS = pd.DataFrame(
    [
        ("full", 3.0, 1.0, 5.5, 0.01, 3, 600),
        ("half", -0.5, -2.0, 1.5, 0.9, 3, 600),
        ("none", -4.0, -6.0, -1.0, 0.07, 3, 600),
    ],
    columns=["arm", "difference", "low", "high", "p_holm", "n_seeds", "n_queries"],
)
BARS = pd.DataFrame(
    [("a", "vqa", 30.0, 25.0, 36.0), ("b", "ood", 20.0, 10.0, 27.0), ("b", "vqa", 40.0, 38.0, 41.0),
     ("a", "ood", 60.0, 50.0, 61.0)],
    columns=["label", "meta_task", "value", "low", "high"],
)  # fmt: skip
POINTS = {"before": np.arange(8.0).reshape(4, 2), "after": np.arange(8.0).reshape(4, 2)[::-1] ** 2}
PANELS = {"A": pd.DataFrame([[0.0, 0.5], [1.0, 0.25]], index=["causal", "strict"], columns=["on EOS", "on B"])}
COST = pd.DataFrame(
    [("full", "1:1", 128, 1.0, 1.0), ("full", "1:1", 512, 1.0, 1.0), ("bridge", "1:1", 128, 0.52, 0.75),
     ("bridge", "1:1", 512, 0.5, 0.6)],
    columns=["layout", "ratio", "length", "cells", "blocks"],
)  # fmt: skip
COSINE = np.array([[0.9, 0.3, 0.2], [0.3, 0.2, 0.8], [0.0, 0.1, 0.7]])
GROUPS = EFFECTS.assign(group="vqa")
TIMES = pd.DataFrame(
    {"arm": ["a", "b"], "cost": [1.0, 10.0], "value": [20.0, 30.0], "low": [18.0, NAN], "high": [23.0, NAN]}
)

SWEEP = pd.DataFrame({"label": ["a", "a", "b", "b"], "x": [2000, 1000, 1000, 2000], "value": [20.0, 30, 24, 25],
                      "low": [18.0, 30, 20, np.nan], "high": [23.0, 31, 26, np.nan]})  # fmt: skip
LEVEL = {"value": 22.0, "low": 21.0, "high": 23.0}
RESTORED = [("a ", None), ("red", "red"), (" circle", " star"), (" at the left", None)]
CASES = {
    "masks": lambda: figures.masks({"causal": TRIANGLE, "blocks": SQUARE}, NAMES),
    "training_curves": lambda: figures.training_curves({"one": LOG}, ["loss", "image_loss"], smooth=3, chance=3.5),
    "pictures": lambda: figures.pictures(SCENES[:3], ["first", "second", "third"], columns=2),
    "reconstructions": lambda: figures.reconstructions(SCENES[:2], SCENES[1:3], SCENES[2:]),
    "restored_text": lambda: figures.restored_text([RESTORED, RESTORED[:2]], width=20),
    "task_scores": lambda: figures.task_scores(TASKS, order=["Count", "Digits"], title="t"),
    "forest": lambda: figures.forest(EFFECTS, baseline="base"),
    "meta_task_bars": lambda: figures.meta_task_bars({"t": BARS}),
    "embedding_map": lambda: figures.embedding_map(POINTS, ["x", "y", "x", "y"]),
    "token_masks": lambda: figures.token_masks({"causal": TRIANGLE, "blocks": SQUARE, "all": TRIANGLE | True}, NAMES, "AAEB"),
    "reach_grid": lambda: figures.reach_grid({"bridge": DEPTH}, [1, 2], NAMES),
    "effects": lambda: figures.effects(PANELS, unit="change"),
    "cost": lambda: figures.cost(COST, block=128),
    "similarity": lambda: figures.similarity(COSINE),
    "effect_table": lambda: figures.effect_table(GROUPS, baseline="base"),
    "cost_score": lambda: figures.cost_score(TIMES, named=["a", "b"], title="t", xlabel="minutes"),
    "curves": lambda: figures.curves(SWEEP, xlabel="pairs", title="t", log=True, reference=("none", LEVEL)),
}  # fmt: skip
every_figure = pytest.mark.parametrize("name", CASES)


def shrunk(figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB").reduce(8)


@every_figure
def test_a_shown_figure_has_the_pixels_of_a_saved_one(name, tmp_path):
    shown = Image.open(io.BytesIO(figures.show(CASES[name]()).data)).convert("RGB")
    saved = Image.open(figures.save(CASES[name](), tmp_path, name)).convert("RGB")
    assert shown.size == saved.size and (np.asarray(shown) == np.asarray(saved)).all()


def test_the_word_at_a_collapsed_models_loss_stands_inside_the_axes():
    log = pd.DataFrame({"step": range(6), "loss": np.linspace(9.0, 4.0, 6)})
    for chance, side in ((3.0, "bottom"), (12.0, "top")):
        (word,) = (text for text in figures.training_curves({"a": log}, ["loss"], chance=chance).axes[0].texts
                   if text.get_text() == "collapsed")  # fmt: skip
        assert word.get_va() == side


def test_queries_and_targets_show_the_one_picture_and_both_sides_in_words(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "red.png")
    picture, words = str(tmp_path / "red.png"), {"text": "<|image_1|> find\n", "image": None}
    pairs = [({"text": "<|image_1|>\nWhat?", "image": picture}, words), (words, {"text": "", "image": picture})]
    assert not figures.queries_and_targets([]).axes[0].images  # a folder without such a pair
    pairs += [({"text": None, "image": picture}, words)]
    left, right = figures.queries_and_targets(pairs).axes[:2]
    assert [axis.texts[0].get_text() for axis in (left, right)] == [
        "this picture, What? →\nfind",
        "find → this picture",
    ]
    assert all((axis.images[0].get_array() == (255, 0, 0)).all() for axis in (left, right))


def test_the_locked_matplotlib_drew_the_baselines():
    lock = (Path(__file__).parent.parent / "requirements.lock").read_text(encoding="utf-8")
    assert f"\nmatplotlib=={DRAWN_BY}." in lock, "else every comparison below is skipped"


@every_figure
def test_it_looks_as_it_did(name):
    if matplotlib.__version__.split(".")[:2] != DRAWN_BY.split("."):
        pytest.skip(f"the baseline was drawn by matplotlib {DRAWN_BY}")
    new, old = shrunk(CASES[name]()), Image.open(BASELINE / f"{name}.png")
    assert all(abs(a - b) <= 2 for a, b in zip(new.size, old.size, strict=True)), "another size"
    apart = np.abs(np.asarray(new.resize(old.size), dtype=int) - np.asarray(old, dtype=int))
    assert apart.mean() < 1 and apart.max() < 32, f"mean {apart.mean():.2f}, largest {apart.max()} of 255"


@every_figure
def test_the_same_data_give_the_same_bytes(name, tmp_path):
    for folder in ("first", "second"):
        figures.save(CASES[name](), tmp_path / folder, name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == [f"{name}.png", f"{name}.svg", f"{name}.txt"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    assert b"<dc:date>" not in (tmp_path / "first" / f"{name}.svg").read_bytes()
    assert len((tmp_path / "first" / f"{name}.txt").read_text()) > 30, "the alt text says what is shown"


def test_a_notebook_shows_the_figure_with_its_alt_text(tmp_path, monkeypatch):
    monkeypatch.setattr("cocoa_lib.run.profiles.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = figures.show(CASES["forest"](), "forest", "drawn")
    assert shown.data == (tmp_path / "drawn" / "forest.png").read_bytes()
    assert shown.alt == CASES["forest"]().alt and "half -0.5 [-2.0, +1.5]" in shown.alt
    assert figures.show(CASES["forest"]()).data and len(list(tmp_path.iterdir())) == 1, (
        "nothing is saved without a folder"
    )


def drawn(axis) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


def labels(axis, which: str) -> list[str]:
    return [text.get_text() for text in getattr(axis, f"get_{which}ticklabels")()]


def test_masks():
    figure = CASES["masks"]()
    for axis, title, pattern in zip(figure.axes, ("causal", "blocks"), (TRIANGLE, SQUARE), strict=True):
        assert axis.get_title(loc="left") == title and (drawn(axis) == pattern).all()
        assert labels(axis, "x") == labels(axis, "y") == NAMES
    assert "causal: 62% of cells" in figure.alt and "blocks: 50% of cells" in figure.alt


def test_training_curves_draw_raw_and_smoothed_values():
    figure = CASES["training_curves"]()
    raw, smooth, chance = figure.axes[0].lines
    assert raw.get_xydata().tolist() == LOG[["step", "loss"]].to_numpy().tolist()
    assert (
        smooth.get_ydata()[1:-1].tolist() == [3.0, 2.0] and np.isnan(smooth.get_ydata()[[0, -1]]).all()
    )  # whole windows
    assert smooth.get_linewidth() > raw.get_linewidth()
    assert chance.get_ydata() == [3.5, 3.5]
    figure.draw_without_rendering()
    label = next(text for text in figure.axes[0].texts if text.get_text() == "collapsed")
    assert label.get_window_extent().x1 <= figure.axes[0].bbox.x1, "the label stands inside, wherever steps end"
    assert figure.axes[1].lines[0].get_ydata().tolist() == LOG["image_loss"].tolist()
    assert (
        "mean of 3" in figure.axes[0].get_title(loc="left")
        and "one, loss ends at 1.00; one, image_loss ends at" in figure.alt
    )
    lacks = figures.training_curves({"one": LOG, "two": LOG.drop(columns="image_loss")}, ["loss", "image_loss"])
    assert [len(axis.lines) for axis in lacks.axes] == [4, 2], "a log without a column has no curve of it"


def test_restored_text_marks_what_is_right_and_says_what_stood_there():
    figure = CASES["restored_text"]()
    texts = {text.get_text(): (text.get_color(), text.get_position()) for text in figure.axes[0].texts}
    assert texts[" [red\u2713]"][0] == figures.COLOURS[2] and texts["[circle\u2717 star]"][0] == figures.COLOURS[5]
    assert texts[" [red\u2713]"][1] == (2, 4), "the second sample, after an empty line"
    assert texts["[circle\u2717 star]"][1] == (0, 1), "the next line"
    assert all(x + len(text) <= 20 for text, (_, (x, _)) in texts.items()) and "2 of 3 are right" in figure.alt


def test_restored_text_draws_a_line_break_as_a_sign():
    figure = figures.restored_text([[("a", None), ("\n", " red"), ("\n", "\n"), ("b\nc", None)]])
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "a",
        " [\u21b5\u2717 red]",
        " [\u21b5\u2713]",
        "b\u21b5c",
    ]


def test_pictures_stand_over_their_texts():
    axes = CASES["pictures"]().axes
    assert len(axes) == 4 and not axes[3].images
    for axis, image, text in zip(axes, SCENES[:3], ("first", "second", "third"), strict=False):
        assert (drawn(axis) == np.asarray(image)).all() and [t.get_text() for t in axis.texts] == [text]


def test_reconstructions_have_a_row_a_step():
    axes = np.array(CASES["reconstructions"]().axes).reshape(3, 2)
    assert [int(drawn(axis)[0, 0, 0]) for axis in axes.flat] == [10, 90, 90, 170, 170, 250]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["original", "seen by the model", "reconstructed"]


def ends(container, dimension: int) -> list[list[float]]:
    """Where the bars of an errorbar container end, [low, high] a point."""
    return [segment[:, dimension].tolist() for segment in container[2][0].get_segments()]


def test_task_scores_draw_values_and_intervals():
    figure = CASES["task_scores"]()
    axis = figure.axes[0]
    assert labels(axis, "y") == ["Count", "Digits"] and axis.get_ylim() == (1.5, -0.5)
    a, b = axis.containers
    assert a[0].get_xdata().tolist() == [20, 50] and ends(a, 0) == [[15, 22], [40, 61]]
    assert np.round(a[0].get_ydata()).tolist() == [0, 1]
    assert b[0].get_xdata()[0] == 30 and np.isnan(b[0].get_xdata()[1]) and not b[2], "no interval, no bar"
    assert a.get_label() == "a" and b.get_label() == "b" and "a 35.0; b 30.0" in figure.alt


def test_forest_draws_differences_and_their_intervals():
    axis = CASES["forest"]().axes[0]
    zero = axis.lines[-1]
    assert zero.get_xdata() == [0, 0] and labels(axis, "y") == ["full", "half", "none"]
    for i, row in enumerate(EFFECTS.itertuples()):
        bar, point = axis.lines[2 * i : 2 * i + 2]
        assert list(bar.get_xdata()) == [row.low, row.high] and list(bar.get_ydata()) == [i, i]
        assert list(point.get_xdata()) == [row.difference] and list(point.get_ydata()) == [i]
        clear = row.arm != "half"
        assert (point.get_marker(), to_hex(bar.get_color())) == (("o", "#0072b2") if clear else ("D", "#808080"))
    assert axis.texts[1].get_text() == "-0.5 [-2.0, +1.5]"
    assert "n = 3 seeds x 600 queries" in axis.get_title(loc="left")


def test_meta_task_bars_are_as_high_as_the_table_says():
    axis = CASES["meta_task_bars"]().axes[0]
    assert labels(axis, "x") == ["vqa", "ood"]
    bars = {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers[::2]}
    assert bars == {"a": [30, 60], "b": [40, 20]}, "rows may stand in any order"
    assert [ends(c, 1) for c in axis.containers[1::2]] == [[[25, 36], [50, 61]], [[38, 41], [10, 27]]]
    assert [text.get_text() for text in axis.texts] == ["30.0", "60.0", "40.0", "20.0"]
    centres = [bar.get_x() + bar.get_width() / 2 for c in axis.containers[::2] for bar in c]
    assert np.round(centres).tolist() == [0, 1, 0, 1], "each bar stands at its group"
    assert axis.get_ylim()[1] == 1.25 * 61 and axis.get_legend() is not None
    plain, one = figures.meta_task_bars(
        {"t": BARS.drop(columns=["low", "high"]), "one": BARS[BARS["label"] == "b"]}
    ).axes
    assert len(plain.containers) == 2 and plain.get_title(loc="left") == "t"
    assert one.get_title(loc="left") == "one" and one.get_legend() is None, "one label needs no legend"


def test_embedding_map_puts_each_point_in_its_group():
    figure = CASES["embedding_map"]()
    for axis, (title, points) in zip(figure.axes, POINTS.items(), strict=True):
        assert axis.get_title(loc="left") == title
        found = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        assert found == {"x": points[::2].tolist(), "y": points[1::2].tolist()}
    assert "4 embeddings" in figure.alt


def test_token_masks():
    figure = CASES["token_masks"]()
    for axis, pattern in zip(figure.axes, (TRIANGLE, SQUARE, TRIANGLE | True), strict=False):
        assert (drawn(axis) == pattern).all() and labels(axis, "x") == labels(axis, "y") == NAMES
        assert f"{pattern.mean():.0%} of pairs" in axis.get_title(loc="left")
        assert {line.get_xdata()[0] for line in axis.lines if line.get_ydata() == [0, 1]} == {-0.5, 1.5, 2.5}
    assert len(figure.axes) == 4 and not figure.axes[3].images and "2 of A, 1 of E, 1 of B" in figure.alt


def test_the_tokens_of_a_picture_share_one_label():
    names = ["start", *["pad"] * 4, "end", "a", "a"]
    axis = figures.token_masks({"all": np.ones((8, 8), dtype=bool)}, names, "AAAAAAEB").axes[0]
    assert labels(axis, "x") == ["start", "pad x 4", "end", "a", "a"]
    assert axis.get_xticks().tolist() == [0, 2.5, 5, 6, 7]


def test_reach_grid_shows_what_is_known_by_then():
    one, two = CASES["reach_grid"]().axes
    assert (drawn(one) == (DEPTH == 1)).all()
    assert drawn(two).tolist() == [[1, 1, 1, 0], [1, 1, 1, 2], [1, 1, 1, 1], [2, 0, 0, 1]], "3 layers are more than 2"
    assert [axis.get_title(loc="left") for axis in (one, two)] == ["after 1 layer", "after 2 layers"]


def test_effects_write_their_numbers():
    figure = CASES["effects"]()
    axis = figure.axes[0]
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): "0", (1, 0): "0.5", (0, 1): "1", (1, 1): "0.25"}  # fmt: skip
    shades = drawn(axis)
    assert shades[0, 0] == 0 and shades[1, 1] < shades[0, 1] < shades[1, 0]
    assert figure.alt.endswith("at A: causal on EOS.")


def test_cost_draws_shares_against_length():
    axis = CASES["cost"]().axes[0]
    found = {(to_hex(line.get_color()), line.get_marker()): line.get_xydata().tolist() for line in axis.lines}
    assert found == {
        ("#0072b2", "None"): [[128, 100], [512, 100]],
        ("#0072b2", "o"): [[128, 100], [512, 100]],
        ("#e69f00", "None"): [[128, 52], [512, 50]],
        ("#e69f00", "s"): [[128, 75], [512, 60]],
    }
    assert sorted(text.get_text().strip() for text in axis.texts) == ["bridge 60 %", "full 100 %"]


def test_effect_table_writes_every_difference_and_marks_the_clear_ones():
    table = pd.DataFrame(
        [("a", "vqa", 3.04, 1.0, 5.0), ("a", "ood", -2.0, -4.0, 0.5), ("b", "vqa", 0.0, -1.0, 1.0),
         ("b", "ood", -9.0, -10.0, -8.0)],
        columns=["arm", "group", "difference", "low", "high"],
    )  # fmt: skip
    figure = figures.effect_table(table, baseline="base")
    drawn = {(text.get_position(), text.get_text()): text.get_weight() for text in figure.axes[0].texts}
    middle = ((0.5, 0.5), (1.5, 0.5), (0.5, 1.5), (1.5, 1.5))
    texts = (("+3.0", "bold"), ("-2.0", "normal"), ("+0.0", "normal"), ("-9.0", "bold"))
    assert drawn == {(at, text): weight for at, (text, weight) in zip(middle, texts, strict=True)}
    assert "b, ood: -9.0" in figure.alt
    corrected = figures.effect_table(table.assign(p_holm=[0.2, 0.04, 0.9, 0.01], n_seeds=3), baseline="base").axes[0]
    assert [text.get_text() for text in corrected.texts] == ["+3.0", "-2.0", "+0.0", "-9.0*"], "a star needs both"
    assert "corrected for all cells, too (1 of 4)" in corrected.get_xlabel()
    gap = figures.effect_table(table.iloc[1:], baseline="base").axes[0]  # an arm that lacks a group
    assert gap.collections[0].get_clim() == pytest.approx((-14.4, 14.4)), "the scale is that of what is there"
    assert [(text.get_text(), text.get_weight()) for text in gap.texts] == [
        ("-2.0", "normal"),
        ("-9.0", "bold"),
        ("+0.0", "normal"),
    ]
    with pytest.raises(ValueError, match="duplicate"):
        figures.effect_table(pd.concat([table, table]), baseline="base")


def test_of_many_arms_the_chosen_are_named_and_all_stand_at_their_cost():
    rows = [{"arm": f"arm{i}", "cost": 1367.0, "value": 27 + i / 10, "low": 25.0, "high": 29.0} for i in range(13)]
    table = pd.DataFrame([*rows, {**rows[0], "arm": "cocoa_stage1_longer", "cost": 2000.0, "value": 44.0}])
    named = ["cocoa_stage1_longer", "arm0", "arm1", "arm9"]
    figure = figures.cost_score(table, named=named, title="t", xlabel="steps")
    axis = figure.axes[0]
    (points,) = [line.get_xydata() for line in axis.lines if line.get_marker() == "o"]
    bars = [segment[0, 0] for segment in axis.containers[0][2][0].get_segments()]
    assert points[:, 0].tolist() == bars and points[:, 1].tolist() == [27, 27.1, 27.9, 44]
    assert len(set(bars)) == 4 and np.allclose(bars, [1367, 1367, 1367, 2000], rtol=0.02), "no interval hides another"
    (rest,) = [line for line in axis.lines if line.get_label() == "the other arms"]
    assert set(rest.get_xdata()) == {1367} and len(rest.get_ydata()) == 10
    assert figure.alt.count("1,367") == 13, "the text of the figure lists all"
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert list(boxes) == ["arm0", "arm1", "arm9", "cocoa_stage1_longer"]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2)), "names do not overlap"
    assert all(figure.bbox.contains(*corner) for box in boxes.values() for corner in box.corners())


def test_cost_score_draws_cost_against_points():
    axis = CASES["cost_score"]().axes[0]
    _, _, (bars,) = axis.containers[0]
    assert [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "o"] == [[[1, 20], [10, 30]]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[18, 23], [30, 30]]
    assert [text.get_text() for text in axis.texts] == ["a", "b"]
    close = TIMES.assign(value=[50.0, 50.1], low=NAN, high=NAN)
    bottom, top = figures.cost_score(close, named=["a", "b"], title="t", xlabel="minutes").axes[0].get_ylim()
    assert top - bottom == pytest.approx(5), "a tenth of a point does not fill the figure"


def test_an_interval_of_one_seed_is_not_drawn_as_certain():
    row = {"arm": "a", "difference": -2, "low": -3, "high": -1, "p_holm": 0.01, "n_queries": 9}
    figure = figures.forest(pd.DataFrame([row | {"n_seeds": 1}, row | {"n_seeds": 3}]), baseline="b")
    marks = [line.get_marker() for line in figure.axes[0].lines if line.get_marker() in ("o", "D")]
    assert marks == ["D", "o"]


def test_only_what_stands_after_correction_is_filled():
    marks = {line.get_xdata()[0]: line for line in CASES["forest"]().axes[0].lines if line.get_marker() in ("o", "D")}
    looks = {x: (line.get_marker(), line.get_markerfacecolor() == figures.COLOURS[0]) for x, line in marks.items()}
    assert looks == {3.0: ("o", True), -0.5: ("D", False), -4.0: ("o", False)}


def test_a_meta_task_without_tasks_is_left_out():
    table = pd.DataFrame({"label": "m", "meta_task": ["retrieval", "vqa"], "value": [50.0, np.nan]})
    figure = figures.meta_task_bars({"t": table})
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["retrieval"] and "nan" not in figure.alt


def test_curves_join_points_in_the_order_of_x_and_name_each_line():
    figure = CASES["curves"]()
    axis = figure.axes[0]
    figure.canvas.draw()
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert left < SWEEP["x"].min() and SWEEP["x"].max() < right, "all that is drawn lies inside the axes"
    assert bottom < SWEEP["low"].min() and SWEEP["high"].max() < top
    a, b = (line.get_xydata() for line, *_ in axis.containers)
    assert a[:, 1].tolist() == [30, 20] and b[:, 1].tolist() == [24, 25]
    assert a[:, 0] == pytest.approx([1000, 2000], rel=0.01) and b[:, 0] == pytest.approx([1000, 2000], rel=0.01)
    assert (a[:, 0] < b[:, 0]).all(), "bars at the same x stand side by side"
    bars = axis.containers[0][2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [[30, 31], [18, 23]]
    assert [text.get_text() for text in axis.texts] == ["a", "b"]
    assert axis.get_title(loc="left").endswith("grey line and band: none, 22.0") and "none, 22.0" in figure.alt
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1,000", "2,000"]


def test_names_of_lines_that_end_together_do_not_overlap():
    level = [{"label": name, "x": x, "value": 30.0 + 0.01 * i, "low": 28.0, "high": 32.0}
             for i, name in enumerate("abc") for x in (1, 2)]  # fmt: skip
    figure = figures.curves(pd.DataFrame(level), xlabel="x", title="t")
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 3 and all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:], strict=False))


def test_a_long_name_of_a_row_wraps():
    """Else it takes the drawing's room."""
    name = "half the width, another backbone, 1,100 contrastive steps"
    axis = figures.forest(EFFECTS.assign(arm=["a", "b", name]), baseline="x").axes[0]
    assert labels(axis, "y")[-1] == "half the width, another backbone,\n1,100 contrastive steps"
    table = pd.DataFrame([(name, "vqa", 3.0, 1.0, 5.0)], columns=["arm", "group", "difference", "low", "high"])
    assert "\n" in labels(figures.effect_table(table, baseline="x").axes[0], "y")[0]


def test_a_forest_of_arms_with_different_numbers_of_seeds_says_so():
    table = pd.DataFrame(
        {
            "arm": ["a", "b"],
            "difference": [1.0, 2],
            "low": [0.0, 1],
            "high": [2.0, 3],
            "p_holm": 0.5,
            "n_seeds": [5, 3],
            "n_queries": 9,
        }
    )
    axis = figures.forest(table, baseline="x").axes[0]
    assert axis.get_title(loc="left").startswith("n = 3 to 5 seeds x 9 queries")
    assert [text.get_text()[-7:] for text in axis.texts] == ["5 seeds", "3 seeds"]


def test_similarity_counts_the_rows_that_find_their_own():
    figure = CASES["similarity"]()
    assert (drawn(figure.axes[0]) == COSINE).all() and figure.axes[0].get_title(
        loc="left"
    ) == "2 of 3 are nearest to their own text"


if __name__ == "__main__":
    BASELINE.mkdir(exist_ok=True)
    for case, draw in CASES.items():
        shrunk(draw()).save(BASELINE / f"{case}.png", optimize=True)
