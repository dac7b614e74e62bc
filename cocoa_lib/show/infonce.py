"""The contrastive loss on a few pairs: what each query is told, and what the temperature does."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
import numpy as np
from scipy.special import log_softmax

from .panel import Explorer
from .retrieval import Item, thumbnail, words_of

CELL = "width:52px;height:30px;text-align:center;font-size:11px;border:1px solid #ddd;padding:0;"


def matrix_html(cosine: np.ndarray, pairs: Sequence[tuple[Item, Item]], temperature: float) -> str:
    """Show softmax(cosine / temperature) of n queries (rows) over n targets, and the loss of each."""
    logits = log_softmax(cosine / temperature, axis=1)
    head = "".join(f'<td style="{CELL}">{i + 1}</td>' for i in range(len(pairs)))
    rows = ""
    for i, (query, target) in enumerate(pairs):
        cells = ""
        for j, value in enumerate(np.exp(logits[i])):
            look = f"background:rgba(0,114,178,{0.85 * value:.2f})" + ";font-weight:bold" * (i == j)
            cells += f'<td style="{CELL}{look}">{100 * value:.0f}</td>'
        image = query["image"] or target["image"]
        shown = thumbnail(str(image), "picture", 32) if image else ""
        words = " &rarr; ".join(escape(words_of(item, 30) or "picture") for item in (query, target))
        rows += (
            f'<tr><td>{i + 1}</td><td>{shown}</td><td style="text-align:left">{words}</td>'
            f"{cells}<td>{-logits[i, i]:.2f}</td></tr>"
        )
    loss = -np.diag(logits).mean()
    return (
        f"<table><tr><td></td><td></td><td>query &rarr; target</td>{head}<td>loss</td></tr>{rows}</table>"
        f"<p>Percent that each query (row) gives each target (column) at temperature {temperature:g}. "
        f"Mean loss {loss:.2f}; ln {len(pairs)} = {np.log(len(pairs)):.2f} is a collapsed model's.</p>"
    )


def explore_temperature(cosine: np.ndarray, pairs: Sequence[tuple[Item, Item]]) -> Explorer:
    """Move the temperature: see the matrix of `info_nce` on these pairs and each pair's loss.

    cosine (n, n): queries in rows, their targets in the same order in columns.
    """
    slider = widgets.FloatLogSlider(
        value=0.05, min=-2, max=0.5, description="temperature", continuous_update=False
    )

    def answer(temperature: float) -> str:
        return matrix_html(cosine, pairs, temperature)

    cases = {str(value): value for value in (0.05, 0.02, 0.2, 1.0)}
    return Explorer({"temperature": slider}, answer, {"temperature": cases})
