"""The explorers: small ipywidgets panels that answer a question at once, and the plain HTML that they show.

Each explorer is a VBox with `controls` (name -> widget), `outputs` (name -> HTML widget) and `error` (HTML): it can be
driven without a browser, and what it shows is a string made by a function that a page without a kernel uses as it is
(`mask_html`, `reconstruction_html`, `attention_html`, `ablation_html`, `retrieval_html`). Nothing is loaded from
elsewhere; text of users is escaped; an answer that fails says so in `error`. Sliders answer when let go, and all
controls work from the keyboard.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import BoolTensor, LongTensor, Tensor, nn

from . import analysis
from .attention import EOS, LAYOUTS, dense_mask, describe, reachability, segments, token_names
from .backbone import hidden_states, language_model
from .batches import stage1_batch, stage2_batch
from .corruption import IGNORE, hide_cells
from .figures import COLOURS
from .inputs import Batch, Inputs
from .items import InputError, item_images, load_image
from .mmeb import META_TASKS, row_items
from .recipes import make_recipe

DIRECT, INDIRECT, NEVER = COLOURS[0], COLOURS[1], "#eeeeee"
CELL = 14  # pixels a cell of a mask


def _explorer(controls: dict[str, widgets.Widget], answer: Callable[..., dict[str, str]], names: Sequence[str]):
    """Controls, an area for errors and one HTML area a name; `answer(**values)` gives each area's HTML."""
    outputs = {name: widgets.HTML(layout=widgets.Layout(width="auto", overflow="auto")) for name in names}
    error = widgets.HTML(layout=widgets.Layout(width="auto"))

    def update(**values: Any) -> None:
        try:
            answers, message = answer(**values), ""
        except Exception as failure:  # whatever fails must be read here, not in a log
            answers = dict.fromkeys(names, "")
            message = f'<p role="alert"><b>Cannot show this:</b> {escape(str(failure) or type(failure).__name__)}</p>'
        error.value = message
        for name, html in answers.items():
            outputs[name].value = html

    strays = widgets.interactive_output(update, controls)  # holds only what a library prints
    strays.layout = widgets.Layout(max_height="6em", overflow="auto")
    for control in controls.values():
        control.layout = widgets.Layout(width="300px")
        if control.style.has_trait("description_width"):  # a button has none
            control.style.description_width = "110px"
    panel = widgets.HBox(list(controls.values()), layout=widgets.Layout(flex_flow="row wrap", width="auto"))
    box = widgets.VBox([panel, error, *outputs.values(), strays], layout=widgets.Layout(width="auto"))
    box.controls, box.outputs, box.error = controls, outputs, error
    return box


def _png_uri(image: Image.Image) -> str:
    """A picture as an address that needs no other file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _img(image: Image.Image, alt: str) -> str:
    style = "width:112px;display:block;image-rendering:pixelated"
    return f'<img src="{_png_uri(image)}" alt="{escape(alt)}" style="{style}">'


def _slider(value: float, low: float, high: float, name: str, step: float = 1) -> widgets.Widget:
    kind = widgets.IntSlider if step == 1 else widgets.FloatSlider
    return kind(value=value, min=low, max=high, step=step, description=name, continuous_update=False)


# ---- masks ----------------------------------------------------------------------------------------------------------


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
        parts.append(f'<text transform="translate({middle:.0f},{left - 4}) rotate(-90)">{name}</text>')
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
    for q, k in np.argwhere(depth > 1):  # only where there is more to say: a sentence for each cell would be slow
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
        "layout": widgets.Dropdown(options=list(LAYOUTS), value="eos_bridged", description="layout"),
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
        names = token_names(row(*(controls[name].value for name in ("n_a", "n_b", "padding", "n_pad"))))
        for name, start in (("query", "B1"), ("key", "A1")):
            control = controls[name]
            chosen = control.label if control.label in names else start
            control.options = list(zip(names, range(len(names)), strict=True))
            control.index = names.index(chosen)

    rename()
    for name in ("n_a", "n_b", "padding", "n_pad"):
        controls[name].observe(rename, "value")

    def answer(layout: str, n_a: int, n_b: int, padding: str, n_pad: int, layers: int, query: int, key: int):
        ids = row(n_a, n_b, padding, n_pad)
        last = len(ids) - 1  # while sizes change, a chosen place can be out of range for a moment
        return {"mask": mask_html(layout, ids, layers=layers, query=min(query, last), key=min(key, last))}

    return _explorer(controls, answer, ["mask"])


# ---- reconstruction -------------------------------------------------------------------------------------------------


def cells_image(pixels: Tensor, grid: Tensor, inputs: Inputs) -> np.ndarray:
    """Patches (patches, D), as the processor orders them, and grid (3,) of the first picture -> (H, W, 3) uint8."""
    processor = inputs.image_processor
    m, p = processor.merge_size, processor.patch_size
    t, h, w = grid.tolist()
    patches = pixels[: t * h * w].float().reshape(t, h // m, w // m, m, m, 3, -1, p, p)[0, ..., 0, :, :]  # frame 0
    image = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(h * p, w * p, 3)
    image = image * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return (image.clamp(0, 1) * 255).round().byte().numpy()


@torch.no_grad()
def reconstruct(
    model, inputs: Inputs, row: dict[str, Any], *, text_rate: float, patch_rate: float = 0.0, draw: int = 0,
    layout: str = "bidirectional", objective: str = "mntp", decoder: nn.Module | None = None,
    fill: Tensor | None = None,
) -> tuple[Batch, list[int], dict[str, Tensor]]:  # fmt: skip
    """Hide words and cells of {text, image, target}: (batch, predicted ids of the hidden words, patches by title).

    `bidirectional` is stage 1's input, any other layout stage 2's (A, EOS, B). `fill` (D,) replaces the recipe's noise,
    for a stage-1 run with a learned one. Patches (patches, D): the original, what was seen, what the decoder predicts.
    """
    rows, rates = [{**row, "draw": draw}], {"text_mask_rate": text_rate}
    if layout == "bidirectional":
        batch = stage1_batch(rows, inputs, make_recipe("stage1", {**rates, "patch_mask_rate": patch_rate}), 0)
    else:
        batch = stage2_batch(rows, inputs, make_recipe("stage2", rates), 0)
    visible, patches, merge = dict(batch), {}, inputs.image_processor.merge_size
    if "pixel_values" in batch:
        patches["original"] = batch["pixel_values"]
    if "hidden_cells" in batch:
        fill = batch["patch_fill"] if fill is None else fill
        visible["pixel_values"] = hide_cells(batch["pixel_values"], batch["hidden_cells"], fill, merge)
        patches["seen by the model"] = visible["pixel_values"]
    hidden = hidden_states(model, visible, layout)
    places = (batch["labels"][0] != IGNORE).nonzero().flatten() - int(objective == "mntp")  # MNTP: one before
    predicted = model.lm_head(hidden[0, places]).argmax(-1).tolist()
    if decoder is not None and "hidden_cells" in batch:
        guess = decoder(hidden, model, batch, layout).reshape(batch["pixel_values"].shape)
        at = batch["hidden_cells"].repeat_interleave(merge**2)[:, None]
        patches["hidden cells predicted"] = torch.where(at, guess, batch["pixel_values"])
    return batch, predicted, patches


def cell_errors(restored: Sequence[tuple[Batch, list[int], dict[str, Tensor]]], merge_size: int) -> tuple[float, float]:
    """Mean squared error on hidden cells, in normalised pixels: of the decoder, and of the average patch of these pictures.

    restored: what `reconstruct` returns, with a decoder; merge_size x merge_size patches are a cell.
    """
    parts = [
        (batch["hidden_cells"].repeat_interleave(merge_size**2), each)
        for batch, _, each in restored
        if "hidden_cells" in batch
    ]
    at = torch.cat([hidden for hidden, _ in parts])
    truth, guess = (torch.cat([each[title] for _, each in parts]) for title in ("original", "hidden cells predicted"))
    errors = [((truth - values) ** 2)[at].mean() for values in (guess, truth.mean(0))]
    return float(errors[0]), float(errors[1])


def count_right(
    model, inputs: Inputs, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Any], **how: Any
) -> np.ndarray:
    """Hidden tokens of each row that come back exactly with the given picture, and how many were hidden: (rows, 2) int.

    how: what `reconstruct` takes. The same tokens are hidden whatever the pictures are.
    """
    right = []
    for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        batch, words, _ = reconstruct(model, inputs, {**row, "image": picture}, draw=i, **how)
        truth = batch["labels"][batch["labels"] != IGNORE].tolist()
        right.append((sum(a == b for a, b in zip(words, truth, strict=True)), len(truth)))
    return np.array(right)


def restored_words(batch: Batch, predicted: Sequence[int], inputs: Inputs) -> list[tuple[str, str | None]]:
    """The text of a batch of one, token by token: (as restored, what stood there), or (text, None) where nothing was hidden."""
    guesses, words = iter(predicted), []
    special = {*inputs.tokenizer.all_special_ids, inputs.image_pad_id}
    for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
        if label != IGNORE:
            words.append((inputs.tokenizer.decode([next(guesses)]), inputs.tokenizer.decode([label])))
        elif token == inputs.eos_id:
            words.append((" [EOS] ", None))
        elif token not in special:
            words.append((inputs.tokenizer.decode([token]), None))
    return words


def reconstruction_html(batch: Batch, predicted: Sequence[int], patches: Mapping[str, Tensor], inputs: Inputs) -> str:
    """Hidden words in place, each with what was predicted, and the first picture: original, seen, predicted."""
    words, right = [], 0
    for text, truth in restored_words(batch, predicted, inputs):
        if truth is None:
            words.append(escape(text))
            continue
        right += (hit := text == truth)
        colour, mark = (COLOURS[2], "&#10003;") if hit else (COLOURS[5], "&#10007;")
        was = "" if hit else f" <small>(was &ldquo;{escape(truth)}&rdquo;)</small>"
        words.append(f'<span style="border-bottom:3px solid {colour}"><b>{escape(text)}</b>{mark}{was}</span>')
    pictures = ""
    for title, each in patches.items():
        image = Image.fromarray(cells_image(each, batch["image_grid_thw"][0], inputs))
        pictures += f'<figure style="margin:4px">{_img(image, title)}<figcaption>{title}</figcaption></figure>'
    return (
        f'<div style="display:flex;flex-wrap:wrap">{pictures}</div><p style="white-space:pre-wrap">{"".join(words)}</p>'
        f"<p>{right} of {len(predicted)} hidden tokens come back (&#10003;); in brackets: what stood there.</p>"
    )


def reconstruction_explorer(
    model, inputs: Inputs, rows: Sequence[dict[str, Any]], decoder: nn.Module | None = None, *,
    layout: str = "bidirectional", objective: str = "mntp", fill: Tensor | None = None,
) -> widgets.VBox:  # fmt: skip
    """Choose a sample and how much of it to hide, or type another caption for it: see what comes back.

    rows: {text, image, target}; decoder: the `PatchDecoder` trained with the model, or None to show words only.
    """
    stage1 = layout == "bidirectional"
    samples = [(f"{i + 1}: {str(row['target'])[:40]}", i) for i, row in enumerate(rows)]
    controls = {
        "sample": widgets.Dropdown(options=samples, description="sample"),
        "text_rate": _slider(0.2 if stage1 else 0.7, 0.0, 1.0, "words hidden", 0.05),
        "patch_rate": _slider(0.5 if stage1 else 0.0, 0.0, 1.0, "cells hidden", 0.05),
        "draw": _slider(0, 0, 20, "draw"),
        "words": widgets.Text(placeholder="your own caption", description="or type", continuous_update=False),
    }
    controls["patch_rate"].disabled = not stage1  # stage 2 hides no cells

    def answer(sample: int, words: str, **how: Any) -> dict[str, str]:
        row = {**rows[sample], "target": words.strip() or rows[sample]["target"]}
        found = reconstruct(model, inputs, row, layout=layout, objective=objective, decoder=decoder, fill=fill, **how)
        return {"reconstruction": reconstruction_html(*found, inputs)}

    return _explorer(controls, answer, ["reconstruction"])


# ---- attention of a checkpoint --------------------------------------------------------------------------------------

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
        parts.append(f'<rect x="{x * side}" y="{y * side}" width="{side}" height="{side}" fill="none" stroke="#888"/>')
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


def attention_html(found: EosAttention, inputs: Inputs, *, layer: int, head: int | None, direction: str) -> str:
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
    spoken = {inputs.eos_id: "EOS", inputs.vision_start_id: "picture starts", inputs.vision_end_id: "picture ends"}
    spoken |= {token: inputs.tokenizer.decode([token]) for token in ids if token not in spoken}
    names = [spoken[token] if spoken[token].strip() else "space" for token in ids]  # a line break is a space too
    bars = "".join(_bar(names[i], float(weights[i]), top) for i in np.flatnonzero(~at_picture))
    eos = batch["segment_ids"][0].numpy() == EOS
    parts = {"the picture": at_picture, "EOS itself": eos, "the other tokens": ~at_picture & ~eos}
    if direction == "from_eos":
        shares = ", ".join(f"<b>{weights[at].sum():.0%}</b> to {name}" for name, at in parts.items() if at.any())
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
        raise InputError("no picture is uploaded yet; press 'Upload' and choose one, or choose a sample")
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
    samples = [(f"{i + 1}: {str(item.get('text') or 'picture alone')[:40]}", i) for i, item in enumerate(items)]
    heads = [("mean over heads", None), *((str(h + 1), h + 1) for h in range(text.config.num_attention_heads))]
    sample = widgets.Dropdown(options=[*samples, ("your uploaded picture", UPLOADED)], description="sample")
    upload = widgets.FileUpload(accept="image/*", description="Upload a picture")
    upload.observe(lambda change: setattr(sample, "value", UPLOADED if change["new"] else sample.value), "value")
    controls = {
        "sample": sample,
        "upload": upload,
        "words": widgets.Text(placeholder="your own text", description="or type", continuous_update=False),
        "layer": _slider(len(text.layers), 1, len(text.layers), "layer"),
        "head": widgets.Dropdown(options=heads, description="head"),
        "direction": widgets.Dropdown(options=list(DIRECTIONS.items()), description="direction"),
    }

    @lru_cache(maxsize=8)
    def found(sample: int, words: str, content: bytes) -> EosAttention:
        item = {"text": "", "image": _uploaded(upload.value)} if sample == UPLOADED else dict(items[sample])
        return eos_attention(model, inputs, {**item, "text": words or item.get("text")})

    def answer(sample: int, upload: Any, words: str, **how: Any) -> dict[str, str]:
        content = bytes(upload[0]["content"]) if upload and sample == UPLOADED else b""
        return {"attention": attention_html(found(sample, words.strip(), content), inputs, **how)}

    return _explorer(controls, answer, ["attention"])


# ---- ablations ------------------------------------------------------------------------------------------------------

HITS = {"p@1": 1, "hit@5": 5}  # metrics of the results that ask whether the right candidate is among the first k
GROUPS = ("overall", *META_TASKS, "ind", "ood")


def _interval_svg(row: Mapping[str, Any], left: float, right: float) -> str:
    """A difference and its interval between `left` and `right` points, marked as in `figures.forest`, which is too slow here."""
    low, middle, high, zero = (
        220 * (x - left) / (right - left) for x in (row["low"], row["difference"], row["high"], 0)
    )
    clear = row["n_seeds"] > 1 and (row["low"] > 0 or row["high"] < 0)
    colour = COLOURS[0] if clear else "grey"
    fill = colour if analysis.certain(row) else "white"
    mark = f'<circle cx="{middle:.1f}" cy="8" r="4"' if clear else f'<path d="M {middle:.1f} 3 l 5 5 l -5 5 l -5 -5 z"'
    return (
        f'<svg role="img" aria-label="{analysis.said(row)}" width="220" height="16">'
        f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="16" stroke="black"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="8" y2="8" stroke="{colour}" stroke-width="2"/>'
        f'{mark} stroke="{colour}" fill="{fill}"/></svg>'
    )


def ablation_html(effects: pd.DataFrame, scores: pd.Series, *, baseline: str, metric: str, group: str) -> str:
    """Arms less `baseline`, drawn and in numbers: effects of `analysis.paired_effects`, scores: arm -> mean, percent.

    The p-values stay corrected for all arms they were computed with: choosing what to look at is no reason for less.
    """
    left, right = (
        np.floor(min(effects["low"].min(), 0)) - 1,
        np.ceil(max(effects["high"].max(), 0)) + 1,
    )  # room at the edges
    table = pd.DataFrame({
        "arm": effects["arm"].map(escape),
        f"{left:+.0f} to {right:+.0f} points": [_interval_svg(row, left, right) for row in effects.to_dict("records")],
        f"{metric}, %": [f"{scores[arm]:.1f}" for arm in effects["arm"]],
        "difference": [f"{value:+.1f}" for value in effects["difference"]],
        "95 % interval": [f"{low:+.1f} to {high:+.1f}" for low, high in zip(effects["low"], effects["high"], strict=True)],
        "p, corrected": [f"{p:.3f}" for p in effects["p_holm"]],
        "gain over baseline": [analysis.verdict(row) for row in effects.to_dict("records")],
        "seeds": effects["n_seeds"],
        "queries a seed": effects["n_queries"],
    })  # fmt: skip
    with pd.option_context("display.max_colwidth", None):  # else pandas cuts the drawings
        html = table.to_html(index=False, border=0, escape=False)
    return (
        f"{html}<p>{metric}, {group}. Bar: 95 % interval; upright line: 0. Circle: excludes 0 (filled: once corrected, too); "
        f"diamond: contains 0. Baseline {escape(baseline)}: {scores[baseline]:.1f} %. Corrected for all arms that this panel was "
        "given, not for trying metrics and groups: what is clear only in one of many is a hint.</p>"
    )


def ablation_explorer(
    results: pd.DataFrame, per_query: pd.DataFrame, baseline: str, *, n_boot: int = 2000
) -> widgets.VBox:
    """Choose arms, metric and group of tasks: see paired differences to the baseline, with intervals, and the scores.

    results, per_query: `analysis.gather_results`, `gather_ranks`. Differences are resampled here, once; answers only draw.
    Raises what `analysis.paired_effects` raises.
    """
    present = [g for g in GROUPS if g not in META_TASKS or (per_query["meta_task"] == g).any()]
    if per_query["in_distribution"].nunique() < 2:
        present = [g for g in present if g not in ("ind", "ood")]
    effects, scores = {}, {}
    for metric, k in HITS.items():
        as_first = per_query.assign(rank=-(-per_query["rank"] // k))  # 1 where the rank is at most k
        values = results[results["metric"] == metric].assign(metric="p@1")  # `arm_scores` averages what has this name
        scores[metric] = analysis.arm_scores(values).groupby("arm").mean(numeric_only=True)
        for group in present:
            effects[metric, group] = analysis.paired_effects(as_first, baseline, group=group, n_boot=n_boot)
    arms = list(effects["p@1", "overall"]["arm"])
    controls = {
        "arms": widgets.SelectMultiple(options=arms, value=arms, rows=min(8, len(arms)), description="arms"),
        "metric": widgets.Dropdown(options=list(HITS), description="metric"),
        "group": widgets.Dropdown(options=present, description="tasks"),
    }

    def answer(arms: Sequence[str], metric: str, group: str) -> dict[str, str]:
        if not arms:
            raise ValueError("no arm is chosen; choose one or more (Ctrl or Shift adds to a choice)")
        table = effects[metric, group]
        chosen = table[table["arm"].isin(arms)]
        how = {"baseline": baseline, "metric": metric, "group": group}
        return {"ablation": ablation_html(chosen, scores[metric][group], **how)}

    return _explorer(controls, answer, ["ablation"])


# ---- retrieval ------------------------------------------------------------------------------------------------------


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
        mark, border = (" &#10003; right", f"3px solid {COLOURS[2]}") if place == 1 else ("", "1px solid #ccc")
        cards.append(_card(candidate, f"{place}.{mark}", f"picture of candidate {place}", border))
    return f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{"".join(cards)}</div>'


def retrieval_html(
    query: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], scores: Sequence[float], right: int, k: int = 5
) -> str:
    """A query and its `k` best candidates as self-contained HTML, the right one marked, and added if it ranks lower.

    query, candidates: {"text", "image": path or None}; scores: one a candidate; right: its index. A tie counts against
    the right one, as in `mmeb.rank`. Raises ValueError where lengths differ, InputError for an unreadable picture.
    """
    if len(scores) != len(candidates) or not 0 <= right < len(candidates):
        raise ValueError(f"{len(candidates)} candidates, {len(scores)} scores, right one at {right}: they do not fit")
    order = sorted(range(len(candidates)), key=lambda i: (-float(scores[i]), i == right))
    rank = order.index(right) + 1
    cards = [_card(query, "query", "the query's picture", "1px dashed grey")]
    for place, i in enumerate(order, start=1):
        if place <= k or i == right:
            mark, border = (" &#10003; right", f"3px solid {COLOURS[2]}") if i == right else ("", "1px solid #ccc")
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
        return {"retrieval": retrieval_html(*items, scores[task][query], 0, k)}  # MMEB: the right one comes first

    return _explorer({"task": task, "query": query, "k": _slider(k, 1, 10, "candidates")}, answer, ["retrieval"])
