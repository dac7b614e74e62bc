"""Explorer: attention from and to EOS over the picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
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
from ..items import InputError, load_image
from .figures import COLOURS
from .panel import _explorer, _img, _png_uri, _slider
from .restored import cells_image

DIRECTIONS = {"from EOS: what EOS looks at": "from_eos", "to EOS: who looks at EOS": "to_eos"}
UPLOADED = -1  # the value of `sample` that stands for the user's own picture


class EosAttention(NamedTuple):
    batch: Batch  # of one item
    from_eos: np.ndarray  # (layers, heads, L): weight that EOS gives to each token, sums to 1
    to_eos: np.ndarray  # (layers, heads, L): weight that each token gives to EOS


@torch.no_grad()
def eos_attention(model, inputs: Inputs, item: Mapping[str, Any]) -> EosAttention:
    """The attention weights from and to EOS of one {text, image} item, in the model's own mode, all layers and heads.

    Only eager attention computes weights one can look at, so the language model uses it for this one pass. Only the row
    and the column of EOS are kept: O(L) and not O(L^2) numbers a head. Raises InputError for an unusable item.
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


def _cells(weights: np.ndarray, top: float, image: Image.Image, title: str) -> str:
    """weights (rows, columns) of merged cells over a picture as SVG: the area of a square is its weight, `top` fills."""
    rows, columns = weights.shape
    side = max(8, min(64, 288 // max(rows, columns)))
    width, height = columns * side, rows * side
    parts = [f'<image href="{_png_uri(image)}" width="{width}" height="{height}" preserveAspectRatio="none" '
             'opacity="0.6" style="image-rendering:pixelated"/>']  # fmt: skip
    for (y, x), weight in np.ndenumerate(weights):
        parts.append(
            f'<rect x="{x * side}" y="{y * side}" width="{side}" height="{side}" fill="none" stroke="#888"/>'
        )
        a = (side - 2) * (weight / top) ** 0.5 if top > 0 else 0
        parts.append(
            f'<rect class="weight" x="{(x + 0.5) * side - a / 2:.1f}" y="{(y + 0.5) * side - a / 2:.1f}" '
            f'width="{a:.1f}" height="{a:.1f}" fill="{COLOURS[0]}" fill-opacity="0.8" stroke="white"/>'
            f'<rect x="{x * side}" y="{y * side}" width="{side}" height="{side}" fill="transparent">'
            f"<title>row {y + 1}, column {x + 1}: {weight:.2%}</title></rect>"
        )
    y, x = np.unravel_index(weights.argmax(), weights.shape)
    label = f"{title} as {rows} x {columns} cells; largest weight {weights.max():.1%} at row {y + 1}, column {x + 1}"
    return (
        f'<figure style="margin:4px"><svg role="img" aria-label="{label}" width="{width}" height="{height}">'
        f"{''.join(parts)}</svg><figcaption>{title}, {rows} x {columns} cells</figcaption></figure>"
    )


def _bar(name: str, weight: float, top: float) -> str:
    width = 90 * weight / top if top > 0 else 0
    return (
        '<div style="display:flex;align-items:center;break-inside:avoid"><span style="width:84px;overflow:hidden;'
        f'white-space:pre;text-align:right;margin-right:4px">{escape(name)}</span><span class="bar" style="width:'
        f'{width:.1f}px;height:10px;background:{COLOURS[0]}"></span>&nbsp;{weight:.1%}</div>'
    )


def attention_html(
    found: EosAttention, inputs: Inputs, *, layer: int, head: int | None, direction: str
) -> str:
    """Weights from or to EOS over the picture's cells and beside the other tokens, all on one scale.

    layer: from 1; head: from 1, None is the mean over heads; direction: "from_eos" or "to_eos".
    """
    heads = getattr(found, direction)[layer - 1]  # (heads, L)
    weights = heads.mean(0) if head is None else heads[head - 1]
    batch, top = found.batch, float(weights.max())
    ids, at_picture = batch["input_ids"][0].tolist(), batch["mm_token_type_ids"][0].numpy() == 1
    pictures, start, patch = "", 0, 0
    for number, grid in enumerate(batch.get("image_grid_thw", ()), start=1):
        rows, columns = (grid[1:] // inputs.image_processor.merge_size).tolist()
        cells = weights[at_picture][start : start + rows * columns].reshape(rows, columns)
        image = Image.fromarray(cells_image(batch["pixel_values"][patch:], grid, inputs))
        title = f"picture {number}"
        pictures += _img(image, f"{title} as the model gets it") + _cells(cells, top, image, title)
        start, patch = start + rows * columns, patch + int(grid.prod())
    spoken = {
        inputs.eos_id: "EOS",
        inputs.vision_start_id: "picture starts",
        inputs.vision_end_id: "picture ends",
    }
    spoken |= {token: inputs.tokenizer.decode([token]) for token in ids if token not in spoken}
    names = [
        spoken[token] if spoken[token].strip() else "space" for token in ids
    ]  # a line break is a space too
    bars = "".join(_bar(names[i], float(weights[i]), top) for i in np.flatnonzero(~at_picture))
    eos = batch["segment_ids"][0].numpy() == EOS
    parts = {"the picture": at_picture, "EOS itself": eos, "the other tokens": ~at_picture & ~eos}
    if direction == "from_eos":
        shares = ", ".join(
            f"<b>{weights[at].sum():.0%}</b> to {name}" for name, at in parts.items() if at.any()
        )
        sentence = f"EOS gives {shares}."
    else:
        means = {name: weights[at].mean() for name, at in parts.items() if at.any()}
        shares = ", ".join(f"<b>{mean:.0%}</b> by {name}" for name, mean in means.items())
        sentence = f"Given to EOS, of each token's 100 %, on average: {shares}."
    which = f"mean over {len(heads)} heads" if head is None else f"head {head} of {len(heads)}"
    return (
        f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{pictures}</div>'
        f'<div style="columns:240px;font-size:12px;max-width:960px">{bars}</div>'
        f'<p aria-live="polite">Layer {layer}, {which}. {sentence} The largest square or bar is {top:.1%}; hover a cell '
        "to read it.</p>"
    )


def _uploaded(files: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The value of a FileUpload -> its picture, under `load_image`'s limits; an InputError names the user's file."""
    if not files:
        raise InputError(
            "no picture is uploaded yet; press 'Upload' and choose one, or choose a sample"
        )
    stream = io.BytesIO(files[0]["content"])
    try:
        return load_image(stream)
    except InputError as error:
        raise InputError(str(error).replace(str(stream), str(files[0]["name"]))) from None


def attention_explorer(model, inputs: Inputs, items: Sequence[Mapping[str, Any]]) -> widgets.VBox:
    """Choose a sample, upload a picture or type a text: see what EOS looks at, or who looks at EOS, by layer and head.

    items: {text, image}. The forward pass is made once a sample; another layer or head only draws anew.
    """
    text = language_model(model)
    samples = [
        (f"{i + 1}: {str(item.get('text') or 'picture alone')[:40]}", i)
        for i, item in enumerate(items)
    ]
    heads = [
        ("mean over heads", None),
        *((str(h + 1), h + 1) for h in range(text.config.num_attention_heads)),
    ]
    sample = widgets.Dropdown(
        options=[*samples, ("your uploaded picture", UPLOADED)], description="sample"
    )
    upload = widgets.FileUpload(accept="image/*", description="Upload a picture")
    upload.observe(
        lambda change: setattr(sample, "value", UPLOADED if change["new"] else sample.value),
        "value",
    )
    controls = {
        "sample": sample,
        "upload": upload,
        "words": widgets.Text(
            placeholder="your own text", description="or type", continuous_update=False
        ),
        "layer": _slider(len(text.layers), 1, len(text.layers), "layer"),
        "head": widgets.Dropdown(options=heads, description="head"),
        "direction": widgets.Dropdown(options=list(DIRECTIONS.items()), description="direction"),
    }

    @lru_cache(maxsize=8)
    def found(sample: int, words: str, content: bytes) -> EosAttention:
        item = (
            {"text": "", "image": _uploaded(upload.value)}
            if sample == UPLOADED
            else dict(items[sample])
        )
        return eos_attention(model, inputs, {**item, "text": words or item.get("text")})

    def answer(sample: int, upload: Any, words: str, **how: Any) -> dict[str, str]:
        content = bytes(upload[0]["content"]) if upload and sample == UPLOADED else b""
        return {"attention": attention_html(found(sample, words.strip(), content), inputs, **how)}

    return _explorer(controls, answer, ["attention"])
