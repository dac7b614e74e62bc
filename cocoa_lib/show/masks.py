"""Masks as pictures and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from torch import BoolTensor, LongTensor

from ..attention import EOS, LAYOUTS, PAD, SEGMENT_NAMES, A, B, dense_mask
from .figures import COLOURS
from .panel import _explorer, _slider


def reachability(mask: BoolTensor, layers: int) -> BoolTensor:
    """What can have flowed where: (..., L, L) bool, [q, k] = after `layers` layers the state at q may depend on k.

    The residual stream carries a token's own state, so reach starts as the identity and grows by one step of the
    mask a layer. `layers` >= 0.
    """
    eye = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device).expand(mask.shape)
    step = (mask | eye).float()
    reach = eye.float()
    for _ in range(layers):
        reach = (step @ reach > 0).float()
    return reach.bool()


def segments(n_a: int, n_b: int, *, pad_left: int = 0, pad_right: int = 0) -> LongTensor:
    """Segment ids (1, L) of a row with `n_a` input tokens, one EOS and `n_b` tokens to reconstruct."""
    return torch.tensor([[PAD] * pad_left + [A] * n_a + [EOS] + [B] * n_b + [PAD] * pad_right])


def token_names(segment_ids: LongTensor) -> list[str]:
    """One row of segment ids (L,) -> readable names: A1, A2, EOS, B1, ...; padding is PAD."""
    names, count = [], Counter()
    for segment in segment_ids.tolist():
        count[segment] += 1
        names.append(SEGMENT_NAMES[segment] + (str(count[segment]) if segment in (A, B) else ""))
    return names


def describe(layout: str, segment_ids: LongTensor, query: int, key: int, layers: int = 1) -> str:
    """One cell of the mask in words: may `query` look at `key`, and if not, from which layer on can it know it."""
    names = token_names(segment_ids)
    mask = dense_mask(layout, segment_ids[None])[0, 0]
    if mask[query, key]:
        return f"{names[query]} may look at {names[key]}."
    if segment_ids[key] == PAD:
        return f"{names[query]} may not look at {names[key]}: padding is seen by nobody."
    for depth in range(1, layers + 1):
        if reachability(mask, depth)[query, key]:
            between = (
                (mask[query] & reachability(mask, depth - 1)[:, key]).nonzero().flatten().tolist()
            )
            through = next((names[i] for i in between if segment_ids[i] == EOS), names[between[0]])
            return f"{names[query]} may not look at {names[key]}; it can know it through {through} after {depth} layers."
    return (
        f"{names[query]} may not look at {names[key]}, and cannot know it within {layers} layer(s)."
    )


DIRECT, INDIRECT, NEVER = COLOURS[0], COLOURS[1], "#eeeeee"
CELL = 14  # pixels a cell of a mask


def layers_until_known(mask: BoolTensor, layers: int) -> np.ndarray:
    """mask (L, L) -> (L, L) int: after how many layers a query can know a key, 1 = looks at it, 0 = not within `layers`.

    What a token knows of itself without looking does not count.
    """
    depth, others = mask.int().numpy(), ~np.eye(len(mask), dtype=bool)
    for n in range(2, layers + 1):
        depth[reachability(mask, n).numpy() & (depth == 0) & others] = n
    return depth


def _grid(
    title: str, names: Sequence[str], depth: np.ndarray, words: Sequence[Sequence[str]], chosen: tuple[int, int],
    shown: int,
) -> str:  # fmt: skip
    """One mask as SVG: depth (L, L) = layers until known, 0 = never; cells above `shown` stay empty; hover: words."""
    n, left = len(names), 44
    parts = []
    for i, name in enumerate(names):
        middle = left + i * CELL + CELL * 0.7
        parts.append(f'<text x="{left - 4}" y="{middle:.0f}" text-anchor="end">{name}</text>')
        parts.append(
            f'<text transform="translate({middle:.0f},{left - 4}) rotate(-90)">{name}</text>'
        )
    for q in range(n):
        for k in range(n):
            layers = int(depth[q, k])
            colour = NEVER if not 0 < layers <= shown else DIRECT if layers == 1 else INDIRECT
            parts.append(
                f'<rect x="{left + k * CELL}" y="{left + q * CELL}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{colour}"><title>{words[q][k]}</title></rect>'
            )
    q, k = chosen
    parts.append(f'<rect x="{left + k * CELL - 1}" y="{left + q * CELL - 1}" width="{CELL + 1}" height="{CELL + 1}" '
                 'fill="none" stroke="black" stroke-width="2.5" pointer-events="none"/>')  # fmt: skip
    side = left + n * CELL + 2
    svg = f'<svg role="img" aria-label="{title}" width="{side}" height="{side}" font-size="9" font-family="sans-serif">'
    return f'<div style="margin-right:24px"><b>{title}</b><br>{svg}{"".join(parts)}</svg></div>'


def mask_html(layout: str, segment_ids: LongTensor, *, layers: int, query: int, key: int) -> str:
    """A layout, who can know whom after `layers` layers, its cost, and one cell in words; segment_ids (L,)."""
    mask = dense_mask(layout, segment_ids[None])[0, 0]
    names, total = token_names(segment_ids), len(segment_ids) ** 2
    depth = layers_until_known(mask, layers)
    pairs = int(mask.sum())
    words = [[f"{q} looks at {k}" if depth[i, j] == 1 else f"{q} does not know {k} by then" for j, k in enumerate(names)]
             for i, q in enumerate(names)]  # fmt: skip
    for q, k in np.argwhere(
        depth > 1
    ):  # only where there is more to say: a sentence for each cell would be slow
        words[q][k] = describe(layout, segment_ids, q, k, layers)
    sentence = describe(layout, segment_ids, query, key, layers)
    plural = "s" * (layers != 1)
    return (
        f'<div style="display:flex;flex-wrap:wrap">{_grid("rows look at columns", names, depth, words, (query, key), 1)}'
        f"{_grid(f'known after {layers} layer{plural}', names, depth, words, (query, key), layers)}</div>"
        f'<p><span style="color:{DIRECT}">&#9632;</span> looks &nbsp; <span style="color:{INDIRECT}">&#9632;</span> '
        f"knows through others &nbsp; <span>&#9633;</span> never. Hover a cell to read it.</p>"
        f"<p>Cost: {pairs} of {len(names)} x {len(names)} = {total} pairs a layer and head, "
        f'<b>{pairs / total:.0%}</b>.</p><p aria-live="polite"><b>{escape(sentence)}</b></p>'
    )


def mask_explorer() -> widgets.VBox:
    """Layout, sizes, padding and depth by hand: the mask, its reachability, its cost, and any cell in words."""
    controls = {
        "layout": widgets.Dropdown(
            options=list(LAYOUTS), value="eos_bridged", description="layout"
        ),
        "n_a": _slider(4, 1, 10, "tokens of A"),
        "n_b": _slider(4, 1, 10, "tokens of B"),
        "padding": widgets.Dropdown(options=["right", "left"], description="padding side"),
        "n_pad": _slider(0, 0, 4, "padding tokens"),
        "layers": _slider(1, 1, 8, "layers"),
        "query": widgets.Dropdown(description="query (row)"),
        "key": widgets.Dropdown(description="key (column)"),
    }

    def row(n_a: int, n_b: int, padding: str, n_pad: int) -> LongTensor:
        return segments(n_a, n_b, **{f"pad_{padding}": n_pad})[0]

    def rename(change: Any = None) -> None:
        """The tokens to choose from follow the sizes; a chosen one that still exists stays chosen."""
        names = token_names(
            row(*(controls[name].value for name in ("n_a", "n_b", "padding", "n_pad")))
        )
        for name, start in (("query", "B1"), ("key", "A1")):
            control = controls[name]
            chosen = control.label if control.label in names else start
            control.options = list(zip(names, range(len(names)), strict=True))
            control.index = names.index(chosen)

    rename()
    for name in ("n_a", "n_b", "padding", "n_pad"):
        controls[name].observe(rename, "value")

    def answer(
        layout: str, n_a: int, n_b: int, padding: str, n_pad: int, layers: int, query: int, key: int
    ):
        ids = row(n_a, n_b, padding, n_pad)
        last = len(ids) - 1  # while sizes change, a chosen place can be out of range for a moment
        return {
            "mask": mask_html(
                layout, ids, layers=layers, query=min(query, last), key=min(key, last)
            )
        }

    return _explorer(controls, answer, ["mask"])
