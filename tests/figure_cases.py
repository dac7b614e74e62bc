"""One small call of each figure: name -> function that draws it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from PIL import Image

from cocoa_lib.show import figures

NAN = float("nan")
NAMES = ["A1", "A2", "EOS", "B1"]
MASKS = {
    "bridge": np.array([[1, 1, 1, 0], [1, 1, 1, 2], [1, 1, 1, 1], [2, 0, 1, 1]]),
    "all": np.ones((4, 4)),
}
LOG = pd.DataFrame(
    {"step": [1, 2, 3, 4], "loss": [4.0, 2.0, 3.0, 1.0], "image_loss": [1.0, 0.5, 0.4, 0.2]}
)
SCENES = [Image.fromarray(np.full((8, 8, 3), shade, dtype=np.uint8)) for shade in (10, 90, 170)]
SCORES = pd.DataFrame(
    [
        ("Digits", "a", 50.0, 40.0, 61.0),
        ("Count", "a", 20.0, 15.0, 22.0),
        ("Count", "b", 30.0, NAN, NAN),
    ],
    columns=["task", "label", "value", "low", "high"],
)
EFFECTS = pd.DataFrame(
    [
        ("full", 3.0, 1.0, 5.5, 3, "planned"),
        ("half", -0.5, -2.0, 1.5, 3, "others"),
        ("one", 4.0, 2.0, 6.0, 1, "others"),
    ],
    columns=["arm", "difference", "low", "high", "n_seeds", "group"],
)
POINTS = {"before": np.arange(8.0).reshape(4, 2), "after": np.arange(8.0).reshape(4, 2)[::-1] ** 2}
TABLE = pd.DataFrame([[0.0, -5.0], [2.5, 1.0]], index=["causal", "strict"], columns=["EOS", "B"])
COSTS = pd.DataFrame(
    {"arm": ["a", "b", "c"], "cost": [1.0, 10.0, 5.0], "value": [20.0, 30.0, 25.0], "low": [18.0, NAN, NAN],
     "high": [23.0, NAN, NAN]}
)  # fmt: skip
CURVES = pd.DataFrame({"label": ["a", "a", "b", "b"], "x": [2000, 1000, 1000, 2000], "value": [20.0, 30, 24, 25],
                       "low": [18.0, 29, 20, NAN], "high": [23.0, 31, 26, NAN]})  # fmt: skip

CASES = {
    "masks": lambda: figures.draw_masks(MASKS, NAMES, title="t"),
    "training": lambda: figures.draw_training(
        {"one": LOG}, ["loss", "image_loss"], title="t", smooth=3, chance=3.5
    ),
    "pictures": lambda: figures.draw_pictures(
        SCENES, ["first", "second", "third"], columns=2, title="t"
    ),
    "scores": lambda: figures.draw_scores(SCORES, title="t"),
    "forest": lambda: figures.draw_forest(EFFECTS, title="t", xlabel="points"),
    "map": lambda: figures.draw_map(POINTS, ["x", "y", "x", "y"], title="t"),
    "heat": lambda: figures.draw_heat({"p": TABLE, "q": TABLE}, title="t", unit="u", signed=True),
    "tradeoff": lambda: figures.draw_tradeoff(COSTS, ["a", "b"], title="t", xlabel="seconds"),
    "curves": lambda: figures.draw_curves(CURVES, title="t", xlabel="steps", log=True),
}
