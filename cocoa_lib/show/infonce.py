"""The contrastive loss on a few pairs: what each query is told, and what the temperature does."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
import numpy as np
import pandas as pd
from scipy.special import log_softmax

from .panel import Explorer, img
from .retrieval import Item, words_of


def matrix_html(cosine: np.ndarray, pairs: Sequence[tuple[Item, Item]], temperature: float) -> str:
    """Show softmax(cosine / temperature) of n queries (rows) over n targets, and the loss of each."""
    logits, places = log_softmax(cosine / temperature, axis=1), [*range(1, len(pairs) + 1)]
    table, names = pd.DataFrame(100 * np.exp(logits), places, places), []
    for pair in pairs:
        words = " &rarr; ".join(escape(words_of(item, 30) or "picture") for item in pair)
        image = pair[0]["image"] or pair[1]["image"]
        names.append((img(image, "picture", 32) if image else "") + words)
    table.insert(0, "query &rarr; target", names)
    table["loss"] = -np.diag(logits)
    style = table.style.set_uuid("matrix").format("{:.0f}", places).format("{:.2f}", "loss")
    style.background_gradient("Blues", axis=None, vmin=0, vmax=100, subset=places)
    for i in places:
        style.set_properties(subset=([i], [i]), **{"font-weight": "bold"})
    loss = table["loss"].mean()
    return (
        f"{style.to_html()}<p>Percent that each query (row) gives each target (column) at temperature "
        f"{temperature:g}. Mean loss {loss:.2f}; ln {len(pairs)} = {np.log(len(pairs)):.2f} is a "
        "collapsed model's.</p>"
    )


def explore_temperature(cosine: np.ndarray, pairs: Sequence[tuple[Item, Item]]) -> Explorer:
    """Move the temperature: see the matrix of `info_nce` on these pairs and each pair's loss.

    cosine (n, n): queries in rows, their targets in the same order in columns.
    """
    slider = widgets.FloatLogSlider(
        value=0.05, min=-2, max=0.5, description="temperature", continuous_update=False
    )
    cases = {"temperature": {str(value): value for value in (0.05, 0.02, 0.2, 1.0)}}
    return Explorer(
        {"temperature": slider}, lambda temperature: matrix_html(cosine, pairs, temperature), cases
    )
