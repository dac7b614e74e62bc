"""Sphinx: the notebooks and docs as pages that load nothing from elsewhere. `make site` builds them."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

from cocoa_lib import __version__
from cocoa_lib.show.panel import SCRIPT

project, release = "CoCoA, the notebook collection", __version__
extensions = ["myst_nb"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build"]
suppress_warnings = [
    "myst.xref_missing",
    "myst.header",
    "mystnb.unknown_mime_type",
    "toc.not_included",
]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js: dict[str, Any] = {}  # no kernel, no widgets, no scripts from elsewhere
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None),
    ("html", "text/html", 0),
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "CoCoA"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_show_search_summary = False  # it fetches pages, which browsers refuse from a disk
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = True  # build_site.py writes it: licences and provenance
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}


def write_math(self: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers draw themselves."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def write_policy(html: str) -> str:
    """Give a page a content security policy: its own files, and inline scripts that are known.

    Known are those of the theme and the one of the explorers. A script inside an output of a notebook
    is not among them, whatever a user's text held, so it does not run.
    """
    soup = BeautifulSoup(html, "html.parser")
    for output in soup.select(".cell_output"):
        output.decompose()
    scripts = {SCRIPT} | {tag.string or "" for tag in soup.find_all("script", src=False)}
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in scripts)
    allowed = " ".join(sorted(f"'sha256-{each.decode()}'" for each in hashes))
    policy = (  # file: for pages opened from a disk, of which browsers differ in what 'self' is
        "default-src 'none'; img-src 'self' file: data:; font-src 'self' file:; "
        f"style-src 'self' file: 'unsafe-inline'; script-src 'self' file: {allowed}; "
        "connect-src 'self' file:; base-uri 'none'; form-action 'self' file:"
    )
    tag = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return re.sub(r"<head>", f"<head>{tag}", html, count=1)


def finish(app: Sphinx, error: Exception | None) -> None:
    """Give every page its policy, and drop what no page needs."""
    if error is None:
        for path in Path(app.outdir).rglob("*.html"):
            html = path.read_text(encoding="utf-8")
            path.write_text(write_policy(html), encoding="utf-8")
        for name in ("objects.inv", ".buildinfo", "_static/scripts/furo.js.map"):
            (Path(app.outdir) / name).unlink(missing_ok=True)
        shutil.rmtree(Path(app.outdir) / "_sources", ignore_errors=True)


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("build-finished", finish)
