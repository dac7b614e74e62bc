"""What EOS looks at and who looks at EOS, over the picture's cells and beside the words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..attention import EOS
from ..backbone import hidden_states, language_model
from ..inputs import Batch, Inputs
from .figures import COLOURS
from .panel import Explorer, picture_uri, wrap
from .restored import cells_image
from .retrieval import Item, ask_item, own_item

DIRECTIONS = {"what EOS looks at": "from_eos", "who looks at EOS": "to_eos"}
BOX = "display:flex;align-items:center;break-inside:avoid"
NAME = "width:84px;overflow:hidden;white-space:pre;text-align:right;margin-right:4px"


class EosAttention(NamedTuple):
    batch: Batch  # of one item
    from_eos: np.ndarray  # (layers, heads, L): weight that EOS gives to each token, sums to 1
    to_eos: np.ndarray  # (layers, heads, L): weight that each token gives to EOS


@torch.no_grad()
def measure_attention(model, inputs: Inputs, item: Item) -> EosAttention:
    """Measure the attention from and to EOS of one {text, image} item, in all layers and heads.

    Only eager attention has weights to look at, so the language model uses it for this one pass. Of
    each head, the row and the column of EOS are kept. Raises InputError for an unusable item.
    """
    batch = inputs.collate([dict(item)])
    text, kept = language_model(model), []
    place = int((batch["segment_ids"][0] == EOS).nonzero())

    def keep(module: nn.Module, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1][0].float().cpu()  # (heads, L, L)
        kept.append((weights[:, place], weights[:, :, place]))

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in text.layers]
    usual = text.config._attn_implementation
    text.config._attn_implementation = "eager"
    try:
        hidden_states(model, {name: value.to(model.device) for name, value in batch.items()})
    finally:
        text.config._attn_implementation = usual
        for hook in hooks:
            hook.remove()
    return EosAttention(batch, *(torch.stack(each).numpy() for each in zip(*kept, strict=True)))


def cells_html(weights: np.ndarray, top: float, image: Image.Image) -> str:
    """Draw weights (rows, columns) over a picture: a square's area is its weight, `top` fills a cell."""
    rows, columns = weights.shape
    squares = ""
    for (y, x), weight in np.ndenumerate(weights):
        side = (weight / top) ** 0.5
        corner = f'x="{x + (1 - side) / 2:.3f}" y="{y + (1 - side) / 2:.3f}"'
        squares += (
            f'<rect class="weight" {corner} width="{side:.3f}" height="{side:.3f}">'
            f"<title>row {y + 1}, column {x + 1}: {weight:.2%}</title></rect>"
        )
    label = f"{rows} x {columns} cells, largest weight {weights.max():.1%}"
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {columns} {rows}" width="288" '
        f'style="max-width:100%;margin:4px" fill="{COLOURS[0]}" fill-opacity="0.8" stroke="white" '
        f'stroke-width="0.04"><image href="{picture_uri(image)}" width="{columns}" height="{rows}" '
        'opacity="0.6" preserveAspectRatio="none" style="image-rendering:pixelated"/>'
        f"{squares}</svg>"
    )


def bar_html(name: str, weight: float, top: float) -> str:
    """Draw one token's weight as a bar; `top` is 90 pixels long."""
    look = f"width:{90 * weight / top:.1f}px;height:10px;background:{COLOURS[0]}"
    return (
        f'<div style="{BOX}"><span style="{NAME}">{escape(name)}</span>'
        f'<span class="bar" style="{look}"></span>&nbsp;{weight:.1%}</div>'
    )


def attention_html(
    found: EosAttention, inputs: Inputs, *, layer: int, head: int, direction: str
) -> str:
    """Show the weights of one layer (from 1) and head (from 1; 0 is the mean): picture, bars, shares."""
    heads = getattr(found, direction)[layer - 1]  # (heads, L)
    weights = heads[head - 1] if head else heads.mean(0)
    batch, top = found.batch, float(weights.max())
    at_picture = batch["mm_token_type_ids"][0].numpy() == 1
    pictures, start, patch = "", 0, 0
    for grid in batch.get("image_grid_thw", ()):
        rows, columns = (grid[1:] // inputs.image_processor.merge_size).tolist()
        cells = weights[at_picture][start : start + rows * columns].reshape(rows, columns)
        pictures += cells_html(cells, top, cells_image(batch["pixel_values"][patch:], grid, inputs))
        start, patch = start + rows * columns, patch + int(grid.prod())
    ids, bars = batch["input_ids"][0].tolist(), ""
    eos = batch["segment_ids"][0].numpy() == EOS
    for i in np.flatnonzero(~at_picture):
        name = inputs.tokenizer.decode([ids[i]]).removeprefix("<|").removesuffix("|>").strip()
        bars += bar_html("EOS" if eos[i] else name or "space", float(weights[i]), top)
    # EOS shares its attention out over all tokens; the others each give it a share of theirs.
    looks = direction == "from_eos"
    parts = {"the picture": at_picture, "EOS itself": eos, "the text": ~at_picture & ~eos}
    shares = ", ".join(
        f"{name} {weights[at].sum() / (weights.sum() if looks else at.sum()):.0%}"
        for name, at in parts.items()
        if at.any()
    )
    said = "EOS looks at" if looks else "Share of its attention that EOS gets from"
    which = f"head {head}" if head else f"mean of {len(heads)} heads"
    return (
        wrap(f'{pictures}<div style="columns:240px;font-size:12px;flex:1">{bars}</div>')
        + f'<p aria-live="polite">Layer {layer}, {which}. {said}: {shares}.</p>'
    )


def explore_attention(model, inputs: Inputs, items: Sequence[Item]) -> Explorer:
    """Choose an item, type a text or upload a picture: see attention from and to EOS, by layer and head.

    items: {text, image}. One forward pass an item; another layer or head only draws anew.
    """
    text = language_model(model)
    last, n_heads = len(text.layers), text.config.num_attention_heads
    heads = [("mean", 0), *((f"head {head}", head) for head in range(1, n_heads + 1))]
    controls = ask_item(items) | {
        "layer": widgets.IntSlider(last, 1, last, description="layer", continuous_update=False),
        "head": widgets.Dropdown(options=heads, description="head"),
        "direction": widgets.Dropdown(options=list(DIRECTIONS.items()), description="direction"),
    }
    measured: dict[str, Any] = {"item": None}

    def answer(query: int, words: str, upload: Sequence, **how: Any) -> str:
        item = own_item(words, upload) or items[query]
        if item != measured["item"]:
            measured.update(item=item, found=measure_attention(model, inputs, item))
        return attention_html(measured["found"], inputs, **how)

    layers = {str(n): n for n in sorted({1, (last + 1) // 2, last}, reverse=True)}
    queries = dict(controls["query"].options[:3])
    return Explorer(controls, answer, {"query": queries, "layer": layers, "direction": DIRECTIONS})
