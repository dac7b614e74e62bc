"""Queries, candidates and what is found: cards, ranked lists, and an explorer to search by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np

from ..items import PLACEHOLDER, item_images
from .figures import COLOURS
from .panel import Explorer, explore, img, menu, read_upload, show_html, slider, thumbnail

Item = Mapping[str, Any]  # {"text": str, "image": path, PIL.Image, list of these or None}
CARD = "margin:4px;padding:4px;width:124px;overflow-wrap:anywhere;font-size:12px;border:"


def words_of(item: Item, most: int = 160) -> str:
    """Give an item's text without the marks for pictures, shortened to `most` characters."""
    text = " ".join(PLACEHOLDER.sub(" ", item.get("text") or "").split())
    return text if len(text) <= most else text[: most - 4].rstrip() + " ..."


def card(item: Item, title: str, border: str = "1px solid #ccc") -> str:
    """Show an item: title, its pictures, its text."""
    images = "".join(
        thumbnail(str(image), title) if isinstance(image, str) else img(image, title)
        for image in item_images(dict(item))
    )
    return f'<div style="{CARD}{border}"><b>{title}</b>{images}<div>{escape(words_of(item))}</div></div>'


def pairs_html(pairs: Iterable[tuple[Item, Item]]) -> str:
    """Show pairs: each query with its target below it."""
    return show_html(
        "".join(
            f"<div>{card(query, 'query', '1px dashed grey')}{card(target, 'target')}</div>"
            for query, target in pairs
        )
    ).data


def ranked_html(
    query: Item,
    candidates: Sequence[Item],
    scores: Sequence[float],
    *,
    right: int | None = None,
    k: int = 5,
) -> str:
    """Show a query and its `k` best candidates; the right one is marked, and added if it ranks lower.

    scores: one a candidate; right: index of the right one, if known. A tie counts against it. Raises
    ValueError where lengths differ, InputError for an unreadable picture.
    """
    if len(scores) != len(candidates):
        raise ValueError(f"{len(candidates)} candidates but {len(scores)} scores")
    order = sorted(range(len(candidates)), key=lambda i: (-float(scores[i]), i == right))
    cards = [card(query, "query", "1px dashed grey")]
    for place, i in enumerate(order, start=1):
        if place <= k or i == right:
            border = f"3px solid {COLOURS[2]}" if i == right else "1px solid #ccc"
            mark = " &#10003; right" * (i == right)
            cards.append(card(candidates[i], f"{place}. {float(scores[i]):.2f}{mark}", border))
    found = (
        ""
        if right is None
        else (f"<p>The right one ranks <b>{order.index(right) + 1}</b> of {len(candidates)}.</p>")
    )
    return show_html("".join(cards)).data + found


def explore_retrieval(
    encode: Callable[[list[dict]], np.ndarray],
    queries: Sequence[tuple[Item, int | None]],
    items: Sequence[Item],
) -> Explorer:
    """Search `items` by one of `queries`, by a typed text or by an uploaded picture.

    encode: items -> unit vectors (N, H), as `CocoaEmbedder.encode`; queries: (item, index of its right
    item or None). The items are encoded once, here.
    """
    vectors = encode([dict(item) for item in items])
    labels = {
        f"{i + 1}: {words_of(query, 36) or 'a picture'}": i for i, (query, _) in enumerate(queries)
    }
    controls = {
        "query": menu(labels, "query"),
        "words": widgets.Text(
            placeholder="your own text", description="or type", continuous_update=False
        ),
        "upload": widgets.FileUpload(accept="image/*", description="or upload a picture"),
        "k": slider(5, 1, 10, "show"),
    }

    @lru_cache(maxsize=64)
    def score(i: int) -> np.ndarray:
        return vectors @ encode([dict(queries[i][0])])[0]

    def answer(query: int, words: str, upload: Sequence, k: int) -> str:
        if not upload and not words.strip():
            return ranked_html(queries[query][0], items, score(query), right=queries[query][1], k=k)
        own = {"text": words.strip(), "image": read_upload(upload) if upload else None}
        return ranked_html(own, items, vectors @ encode([own])[0], k=k)

    return explore(controls, answer, {"query": dict(list(labels.items())[:8])})
