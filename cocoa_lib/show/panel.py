"""What all explorers share: the panel of widgets and small pieces of HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
from PIL import Image


def _explorer(
    controls: dict[str, widgets.Widget], answer: Callable[..., dict[str, str]], names: Sequence[str]
):
    """Controls, an area for errors and one HTML area a name; `answer(**values)` gives each area's HTML."""
    outputs = {
        name: widgets.HTML(layout=widgets.Layout(width="auto", overflow="auto")) for name in names
    }
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
    panel = widgets.HBox(
        list(controls.values()), layout=widgets.Layout(flex_flow="row wrap", width="auto")
    )
    box = widgets.VBox(
        [panel, error, *outputs.values(), strays], layout=widgets.Layout(width="auto")
    )
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
    return kind(
        value=value, min=low, max=high, step=step, description=name, continuous_update=False
    )
