"""Queries, candidates and what is found: cards, ranked lists, and an explorer to search by hand."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from ..data.tables import Task, list_items, load_eval
from ..embedder import CocoaEmbedder
from ..items import PLACEHOLDER, item_images, load_image
from .figures import COLOURS
from .panel import Explorer, ask_words, img, wrap

Item = Mapping[str, Any]  # {"text": str, "image": path, PIL.Image, list of these or None}
QUERY, RIGHT = "1px dashed grey", f"3px solid {COLOURS[2]}"
CARD = "margin:4px;padding:4px;width:112px;box-sizing:border-box;overflow-wrap:anywhere;font-size:12px;border:"


def words_of(item: Item, most: int = 160) -> str:
    """Give an item's text without the marks for pictures, shortened to `most` characters."""
    text = " ".join(PLACEHOLDER.sub(" ", item.get("text") or "").split())
    return text if len(text) <= most else text[: most - 4].rstrip() + " ..."


def card(item: Item, title: str, border: str = "1px solid #ccc") -> str:
    """Show an item: title, its pictures, its text. Raises InputError for an unreadable picture."""
    images = "".join(img(image, title, 100) for image in item_images(dict(item)))
    return f'<div style="{CARD}{border}"><b>{title}</b>{images}<div>{escape(words_of(item))}</div></div>'


def pairs_html(pairs: Iterable[tuple[Item, Item]]) -> str:
    """Show pairs: each query with its target below it."""
    cards = ((card(query, "query", QUERY), card(target, "target")) for query, target in pairs)
    return wrap("".join(f"<div>{query}{target}</div>" for query, target in cards))


def candidates_html(query: Item, candidates: Sequence[Item]) -> str:
    """Show a query and its candidates in the order given; the first is the right one."""
    cards = [card(query, "query", QUERY), card(candidates[0], "right", RIGHT)]
    cards += [card(item, f"wrong {i}") for i, item in enumerate(candidates[1:], start=1)]
    return wrap("".join(cards))


def ranked_html(
    query: Item,
    candidates: Sequence[Item],
    scores: Sequence[float],
    *,
    right: int | None = None,
    k: int = 5,
) -> str:
    """Show a query and its `k` best candidates; the right one is marked, and added if it ranks lower.

    scores: one a candidate; right: index of the right one, if known. A tie counts against it.
    """
    order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i == right))
    cards, found = [card(query, "query", QUERY)], ""
    for place, i in enumerate(order, start=1):
        title = f"{place}. {scores[i]:.2f}"
        if i == right:
            cards.append(card(candidates[i], f"{title} &#10003; right", RIGHT))
            found = f"<p>The right one ranks <b>{place}</b> of {len(candidates)}.</p>"
        elif place <= k:
            cards.append(card(candidates[i], title))
    return wrap("".join(cards)) + found


def read_task(data: Path, task: Task, n: int) -> tuple[list[Item], list[Item], list[np.ndarray]]:
    """Read the first `n` queries of a task: queries, distinct candidates, and of each query which."""
    rows = load_eval(data, task.name)
    found = list_items(rows, np.arange(min(n, len(rows))), task.name, data / "images")
    n_queries = len(found.queries)
    return found.items[:n_queries], found.items[n_queries:], found.candidates


def list_collection(
    data: Path, task: Task, n: int
) -> tuple[list[tuple[Item, int | None]], list[Item]]:
    """Read a task as a collection to search: queries with the index of their right item, and items.

    At most `n` items: the right ones of the queries first, then others.
    """
    queries, items, index = read_task(data, task, min(n, 20))
    own = [each[0] for each in index]
    chosen = list(dict.fromkeys([*own, *np.concatenate(index)]))[:n]
    right = [chosen.index(i) for i in own]
    return list(zip(queries, right, strict=True)), [items[i] for i in chosen]


def find_confusions(
    embedder: CocoaEmbedder, data: Path, tasks: Sequence[Task]
) -> tuple[Task, pd.DataFrame, list[tuple[Item, list[Item], np.ndarray]]]:
    """Find what is taken for what, in the task with the fewest candidates a query of its kind.

    Returns the task, a table of the 8 most frequent truths (rows) against the 8 most frequent
    choices for them, shared names first in both, and the queries that go wrong: (query, candidates,
    scores), the right candidate first.
    """
    task = min(tasks, key=lambda task: (task.meta_task != "classification", task.n_candidates))
    queries, items, index = read_task(data, task, 200)
    asked, vectors, pairs, wrong = embedder.encode(queries), embedder.encode(items), [], []
    names = [words_of(item, 24) or f"picture {i + 1}" for i, item in enumerate(items)]
    for query, vector, chosen in zip(queries, asked, index, strict=True):
        scores = vectors[chosen] @ vector
        pairs.append((names[chosen[0]], names[chosen[scores.argmax()]]))
        if scores.argmax():
            wrong.append((query, [items[i] for i in chosen], scores))
    table = pd.DataFrame(pairs, columns=["truth", "choice"])
    frequent = table["truth"].value_counts().index[:8]
    table = pd.crosstab(table["truth"], table["choice"]).loc[frequent]
    chosen = table.sum().sort_values(ascending=False, kind="stable").index[:8]
    shared = [name for name in frequent if name in chosen]
    rows, columns = (
        shared + [name for name in n if name not in shared] for n in (frequent, chosen)
    )
    return task, table.loc[rows, columns], wrong


def ask_item(items: Sequence[Item]) -> dict[str, widgets.Widget]:
    """Make controls that choose one of `items`, or make one: query, words, upload, for `own_item`."""
    names = [f"{i + 1}: {words_of(item, 36) or 'a picture'}" for i, item in enumerate(items)]
    return {
        "query": widgets.Dropdown(
            options=[(name, i) for i, name in enumerate(names)], description="query"
        ),
        "words": ask_words(),
        "upload": widgets.FileUpload(accept="image/*", description="or upload"),
    }


def own_item(words: str, upload: Sequence[Mapping[str, Any]]) -> Item | None:
    """Make an item of the values of `ask_item`: what is typed and uploaded; None where nothing is.

    Raises InputError for an unreadable picture.
    """
    image = load_image(io.BytesIO(upload[0]["content"])) if upload else None
    return {"text": words.strip(), "image": image} if words.strip() or image else None


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
    controls = ask_item([query for query, _ in queries])
    controls["k"] = widgets.IntSlider(5, 1, 10, description="show", continuous_update=False)

    def answer(query: int, words: str, upload: Sequence, k: int) -> str:
        own = own_item(words, upload)
        item, right = (own, None) if own else queries[query]
        return ranked_html(item, items, vectors @ encode([dict(item)])[0], right=right, k=k)

    return Explorer(controls, answer, {"query": dict(controls["query"].options[:8])})
