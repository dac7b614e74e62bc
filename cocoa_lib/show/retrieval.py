"""Explorer: retrieval by typed text or uploaded picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..data.tables import row_items
from ..items import item_images, load_image
from .figures import COLOURS
from .panel import _explorer, _img, _slider


@lru_cache(maxsize=512)
def _thumbnail(path: str, alt: str) -> str:
    image = load_image(path)
    image.thumbnail((112, 112))
    return _img(image, alt)


def _card(item: Mapping[str, Any], title: str, alt: str, border: str) -> str:
    images = "".join(_thumbnail(str(image), alt) for image in item_images(dict(item)))
    return (
        f'<div style="border:{border};margin:4px;padding:4px;width:130px;overflow-wrap:anywhere">'
        f"<b>{title}</b>{images}<div>{escape(str(item.get('text') or ''))}</div></div>"
    )


def candidates_html(query: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> str:
    """A query and its candidates in the order given, the first one marked as right, as self-contained HTML."""
    cards = [_card(query, "query", "the query's picture", "1px dashed grey")]
    for place, candidate in enumerate(candidates, start=1):
        mark, border = (
            (" &#10003; right", f"3px solid {COLOURS[2]}") if place == 1 else ("", "1px solid #ccc")
        )
        cards.append(_card(candidate, f"{place}.{mark}", f"picture of candidate {place}", border))
    return f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{"".join(cards)}</div>'


def retrieval_html(
    query: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
    right: int,
    k: int = 5,
) -> str:
    """A query and its `k` best candidates as self-contained HTML, the right one marked, and added if it ranks lower.

    query, candidates: {"text", "image": path or None}; scores: one a candidate; right: its index. A tie counts against
    the right one, as in `mmeb.rank`. Raises ValueError where lengths differ, InputError for an unreadable picture.
    """
    if len(scores) != len(candidates) or not 0 <= right < len(candidates):
        raise ValueError(
            f"{len(candidates)} candidates, {len(scores)} scores, right one at {right}: they do not fit"
        )
    order = sorted(range(len(candidates)), key=lambda i: (-float(scores[i]), i == right))
    rank = order.index(right) + 1
    cards = [_card(query, "query", "the query's picture", "1px dashed grey")]
    for place, i in enumerate(order, start=1):
        if place <= k or i == right:
            mark, border = (
                (" &#10003; right", f"3px solid {COLOURS[2]}")
                if i == right
                else ("", "1px solid #ccc")
            )
            title = f"{place}. {float(scores[i]):.3f}{mark}"
            cards.append(_card(candidates[i], title, f"picture of candidate {place}", border))
    return (
        f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{"".join(cards)}</div>'
        f"<p>The right candidate ranks <b>{rank}</b> of {len(candidates)}.</p>"
    )


def retrieval_explorer(
    task_rows: Mapping[str, Sequence[Mapping[str, Any]]], scores: Mapping[str, Sequence[Sequence[float]]],
    image_root: str | Path, k: int = 5,
) -> widgets.VBox:  # fmt: skip
    """Choose a task and a query: see its best candidates. MMEB's rows (`mmeb.load_eval`), and one score a candidate."""
    last = {task: max(0, len(rows) - 1) for task, rows in task_rows.items()}
    task = widgets.Dropdown(options=list(task_rows), description="task")
    query = _slider(0, 0, last[task.value], "query")
    task.observe(lambda change: setattr(query, "max", last[change["new"]]), "value")

    def answer(task: str, query: int, k: int) -> dict[str, str]:
        items = row_items(task_rows[task][query], image_root)
        return {
            "retrieval": retrieval_html(*items, scores[task][query], 0, k)
        }  # MMEB: the right one comes first

    return _explorer(
        {"task": task, "query": query, "k": _slider(k, 1, 10, "candidates")}, answer, ["retrieval"]
    )
