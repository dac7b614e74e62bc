"""What the explorers share: a panel of widgets, the same without a kernel, pieces of HTML.

An explorer is a function from the values of a few controls to HTML. `Explorer` makes it live in
Jupyter, and lays precomputed cases beside it for pages without a kernel: `explorer.js` switches
between them.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from PIL import Image

from ..items import load_image

SCRIPT = Path(__file__).with_name("explorer.js").read_text(encoding="utf-8")


class Explorer(widgets.VBox):
    """Show `answer(**values of controls)`, which returns HTML; a page where there is no kernel.

    cases: control -> {label: value} to precompute for that page, all combinations of them; other
    controls keep their first value. What fails is shown in `output`.
    """

    def __init__(
        self,
        controls: Mapping[str, widgets.Widget],
        answer: Callable[..., str],
        cases: Mapping[str, Mapping[str, Any]],
    ) -> None:
        start, found = {name: control.value for name, control in controls.items()}, {}
        for chosen in itertools.product(*(options.items() for options in cases.values())):
            labels, values = zip(*chosen, strict=True)
            found["\t".join(labels)] = answer(**start | dict(zip(cases, values, strict=True)))
        self.controls, self.html = dict(controls), still(cases, found)
        self.output = widgets.HTML(layout={"overflow": "auto"})

        def update(**values: Any) -> None:
            try:
                self.output.value = answer(**values)
            except Exception as failure:  # whatever fails must be read here, not in a log
                said = escape(str(failure) or type(failure).__name__)
                self.output.value = f'<p role="alert"><b>Cannot show this:</b> {said}</p>'

        printed = widgets.interactive_output(update, self.controls)
        row = widgets.HBox([*self.controls.values()], layout={"flex_flow": "row wrap"})
        super().__init__([row, self.output, printed])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Give the live panel; a page without a kernel takes the HTML of the same output."""
        return super()._repr_mimebundle_(**kwargs) | {"text/html": self.html}


def still(cases: Mapping[str, Mapping[str, Any]], found: Mapping[str, str]) -> str:
    """Write precomputed answers as a page part: a menu a control, the first answer shown.

    found: the labels chosen, joined by tabs -> HTML.
    """
    menus = ""
    for name, options in cases.items():
        labels = "".join(f"<option>{escape(label)}</option>" for label in options)
        menus += f'<label>{escape(name)} <select data-name="{name}">{labels}</select></label> '
    return page("cases", menus, next(iter(found.values())), found)


def page(kind: str, menus: str, first: str, data: Any) -> str:
    """Write a part of a page that `explorer.js` brings to life: menus, a first answer, data as JSON."""
    held = json.dumps(data).replace("<", "\\u003c")  # text cannot end the block
    return (
        f'<div class="cocoa-explorer" data-kind="{kind}"><p class="menus" hidden>{menus}</p>'
        f'<div class="answer">{first}</div><script type="application/json">{held}</script></div>'
        f"<script>{SCRIPT}</script>"
    )


def wrap(html: str) -> str:
    """Lay pieces of HTML side by side, wrapping where the page is narrow."""
    return f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{html}</div>'


def picture_uri(image: Image.Image) -> str:
    """Write a picture as an address that needs no other file: PNG where small, else JPEG."""
    file, kind = io.BytesIO(), "PNG" if max(image.size) <= 128 else "JPEG"
    image.convert("RGB").save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def img(picture: str | Path | Image.Image, alt: str, width: int = 112) -> str:
    """Write a picture as an <img>, `width` pixels wide, its pixels kept where it is enlarged.

    Raises InputError for an unreadable file.
    """
    image = load_image(picture)
    image.thumbnail((width, image.height))
    style = f"width:{width}px;max-width:100%;display:block;image-rendering:pixelated"
    return f'<img src="{picture_uri(image)}" alt="{escape(alt)}" style="{style}">'


def figure(html: str, caption: str) -> str:
    """Write a captioned part, for `wrap`."""
    return (
        f'<figure style="margin:4px 12px 4px 0">{html}<figcaption>{caption}</figcaption></figure>'
    )


def ask_words() -> widgets.Text:
    """Make a field for a text of the user's own."""
    return widgets.Text(placeholder="your own text", description="or type", continuous_update=False)
