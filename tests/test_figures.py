"""Figures: each looks as it did, the title is the message, the same data give the same bytes.

The pictures in `nightly/baseline/` are figures shrunk eight times, so that a font's hinting does not
count and a missing bar does. After a change that is meant: `python tests/test_figures.py` writes them.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from cocoa_lib.show import figures

DRAWN_BY = "3.11"  # matplotlib, whose versions differ in where text and axes come to lie
BASELINE = Path(__file__).parent / "nightly" / "baseline"
NAN = float("nan")
NAMES, LOSSES = ["A1", "A2", "EOS", "B1"], ["loss", "image_loss"]
MASKS = {"all": np.ones((4, 4)), "two": np.eye(4) + 2 * np.eye(4)[::-1]}
LOG = pd.DataFrame({"step": range(1, 7), "loss": [4.0, 2, 3, 1, 2, 1]})
LOG["image_loss"] = LOG["loss"] / 9
WORDS = ["first", "second", "third"]
SCENES = [Image.fromarray(np.full((8, 8, 3), shade, dtype=np.uint8)) for shade in (10, 90, 170)]
SERIES = pd.DataFrame(
    {"label": list("aabb"), "x": [2000, 1000, 1000, 2000], "value": [20.0, 30, 24, 25]}
)
SERIES = SERIES.assign(low=[18.0, 29, 20, NAN], high=[23.0, 31, 26, NAN])
SCORES = SERIES.assign(task=["Digits", "Count", "Digits", "Count"])
COSTS = SERIES.drop(columns="label").rename(columns={"x": "cost"}).assign(arm=list("abcd"))
EFFECTS = pd.DataFrame({"arm": ["full", "half", "one"], "difference": [3.0, -0.5, 4.0]})
EFFECTS = EFFECTS.assign(low=[1.0, -2, 2], high=[5.5, 1.5, 6], n_seeds=[3, 3, 1])
EFFECTS["group"] = ["planned", "others", "others"]
POINTS = {"before": np.arange(8.0).reshape(4, 2), "after": np.arange(8.0).reshape(4, 2)[::-1] ** 2}
TABLE = pd.DataFrame([[0.0, -5.0], [2.5, 1.0]], index=["causal", "strict"], columns=["EOS", "B"])
CASES = {
    "masks": lambda: figures.draw_masks(MASKS, NAMES, title="t"),
    "training": lambda: figures.draw_training({"one": LOG}, LOSSES, title="t", chance=3.5),
    "pictures": lambda: figures.draw_pictures(SCENES, WORDS, columns=2, title="t"),
    "scores": lambda: figures.draw_scores(SCORES, title="t"),
    "forest": lambda: figures.draw_forest(EFFECTS, title="t", xlabel="points"),
    "map": lambda: figures.draw_map(POINTS, ["x", "y", "x", "y"], title="t"),
    "heat": lambda: figures.draw_heat({"p": TABLE, "q": TABLE}, title="t", unit="u", signed=True),
    "tradeoff": lambda: figures.draw_tradeoff(COSTS, ["a", "b"], title="t", xlabel="seconds"),
    "curves": lambda: figures.draw_curves(SERIES, title="t", xlabel="steps", log=True),
}


def shrink(figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=150)
    image = Image.open(file).convert("RGB")
    return image.resize((image.width // 8, image.height // 8), Image.Resampling.BOX)


@pytest.mark.skipif(not matplotlib.__version__.startswith(DRAWN_BY), reason="another matplotlib")
@pytest.mark.parametrize("name", CASES)
def test_it_looks_as_it_did_and_says_so_in_words(name):
    figure = CASES[name]()
    assert figure.get_suptitle() == "t" and figure.alt.startswith("t. ") and "\n" not in figure.alt
    with Image.open(BASELINE / f"{name}.png") as image:
        now, then = np.asarray(shrink(figure), dtype=int), np.asarray(image, dtype=int)
    assert now.shape == then.shape and (np.abs(now - then).max(-1) > 64).mean() < 0.005


def test_show_displays_the_saved_png_with_alt_text_and_caption_and_the_same_bytes_twice(
    tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    for name in "ab":
        figures.show(CASES["forest"](), "n = 3 <seeds>", tmp_path / "figures" / name)
    image, caption = shown[:2]
    assert image.alt == CASES["forest"]().alt and image.data[:4] == b"\x89PNG"
    assert caption.data == '<p class="figure-caption">n = 3 &lt;seeds&gt;</p>'
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert files["a.png"] == files["b.png"] == image.data and files["a.svg"] == files["b.svg"]


def test_forest_fills_what_excludes_zero_over_several_seeds():
    (axis,) = CASES["forest"]().axes
    marks = axis.collections[1]
    assert marks.get_offsets()[:, 0].tolist() == EFFECTS["difference"].tolist()
    assert [to_hex(face) for face in marks.get_facecolors()] == [
        figures.COLOURS[0].lower(),
        "#ffffff",
        "#ffffff",
    ]
    said = [text.get_text() for text in axis.texts]
    assert "+3.0 [+1.0, +5.5]  n = 3" in said and "planned" in said and said.count("others") == 1


def test_heat_writes_every_number_and_bold_where_asked():
    bold = TABLE.abs() > 2
    figure = figures.draw_heat({"": TABLE}, title="t", unit="u", fmt="+.1f", signed=True, bold=bold)
    texts = [(text.get_text(), text.get_weight()) for text in figure.axes[0].texts]
    assert texts == [("+0.0", "normal"), ("-5.0", "bold"), ("+2.5", "bold"), ("+1.0", "normal")]


def test_names_of_curves_do_not_overlap_and_36_tasks_fit_a_page():
    close = SERIES.assign(value=[20.0, 30, 24, 20.01])
    names = figures.draw_curves(close, title="t", xlabel="x").axes[0].texts
    assert [text.get_text().strip() for text in names] == ["a", "b"]
    assert names[1].get_position()[1] - names[0].get_position()[1] > 0.5
    many = pd.concat([SCORES[:1].assign(task=f"task {i}") for i in range(36)])
    assert figures.draw_scores(many, title="t").get_size_inches()[1] < 12


if __name__ == "__main__":
    for each, draw in CASES.items():
        shrink(draw()).save(BASELINE / f"{each}.png")
