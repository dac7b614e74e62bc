"""How often intervals hold, in many simulated grids: what notebook 05 says of few seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_effects import make_grid

from cocoa_lib.evaluate.effects import is_significant, paired_effects


def test_interval_covers_the_known_effect_and_a_null_is_rarely_supported():
    covered, found = [], []
    true = pd.Series({"gain": 20.0, "null": 0.0, "loss": -10.0})
    for i in range(100):
        table = make_grid(np.random.default_rng([3, i]), {"gain": 0.2, "null": 0.0, "loss": -0.1})
        effects = paired_effects(table, "base", n_boot=400, seed=i).set_index("arm")
        wanted = true[effects.index]
        covered += list((effects["low"] <= wanted) & (wanted <= effects["high"]))
        found.append(is_significant(effects) & (effects["low"] > 0))
    supported = pd.DataFrame(found).mean()
    assert 0.92 <= np.mean(covered) <= 0.99 and supported["loss"] == 0
    assert supported["null"] <= 0.05 and supported["gain"] >= 0.9


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("luck, least", [("normal", 0.93), ("skewed", 0.87)])
def test_few_seeds_cover_as_notebook_05_says(seeds, luck, least):
    """An arm with luck against a baseline with little: its skew is not halved by a second arm's."""
    covered, nothing = [], dict.fromkeys("wxyz", 0.0)
    for i in range(100):
        rng = np.random.default_rng([4, i])
        calm = make_grid(rng, {}, seeds=seeds, spread=0)
        lucky = make_grid(rng, nothing, seeds=seeds, spread=0.08, luck=luck)
        table = pd.concat([calm, lucky[lucky["arm"] != "base"]])
        effects = paired_effects(table, "base", n_boot=200, seed=i)
        covered += list((effects["low"] <= 0) & (effects["high"] >= 0))
    print(f"{seeds} seeds, {luck} luck: a nominal 95 % holds {np.mean(covered):.1%}")
    assert least <= np.mean(covered) <= 0.99


def test_verdicts_do_not_hang_on_the_random_numbers():
    """The ends of an interval move by some hundredths of its width with other numbers."""
    table = make_grid(np.random.default_rng(8), {"x": 0.1})
    parts = [paired_effects(table, "base", seed=k)[["low", "high"]] for k in range(8)]
    ends = np.array([part.to_numpy()[0] for part in parts])
    assert np.ptp(ends, axis=0).max() < 0.05 * np.diff(ends.mean(axis=0))[0]
