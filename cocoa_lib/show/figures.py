"""Figures in one style: the title is the message, intervals are drawn, colours stay apart in grey.

Each `draw_` function takes tables or arrays and returns a matplotlib Figure; its `alt` attribute says
in words what it shows. `show` puts a figure and its caption into a notebook, `save` writes files.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML, Markdown, display
from IPython.display import Image as Shown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ..evaluate.effects import format_effect, is_significant

# Okabe and Ito's palette, neighbours of different lightness; grey for their yellow, faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777", "#000000")
LIGHT = "#f2f2f2"
MARKERS = "osD^vPX*"
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "cocoa",  # the same ids, so the same bytes
    "svg.fonttype": "path",
}
mpl.rcParams.update(STYLE)


def new(rows: int = 1, columns: int = 1, *, width: float = 6.5, height: float, **kwargs: Any):
    """Open a figure in the project's style: (figure, axes); at least as wide as a page's text."""
    return plt.subplots(rows, columns, figsize=(max(width, 6.5), height), **kwargs)


def save(figure: Figure, path: str | Path) -> Path:
    """Write PATH.png, PATH.svg and the alt text as PATH.txt; the same data give the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Title": figure.alt})
    path.with_suffix(".txt").write_text(f"{figure.alt}\n", encoding="utf-8")
    return path.with_suffix(".png")


def show(figure: Figure, caption: str, path: str | Path | None = None) -> None:
    """Display a figure with its alt text, and its caption below; also save it where `path` says."""
    file = io.BytesIO()
    if path is None:
        figure.savefig(file, metadata={"Software": None})
    # Drawn a second time, a figure can be laid out a hair differently.
    png = file.getvalue() or save(figure, path).read_bytes()
    display(Shown(data=png, alt=figure.alt))
    display(HTML(f'<p class="figure-caption">{escape(caption)}</p>'))


def say(text: str) -> None:
    """Display a sentence in Markdown: what a page says with numbers of its own run."""
    display(Markdown(text))


def _finish(figure: Figure, title: str, alt: str) -> Figure:
    figure.suptitle(textwrap.fill(title, 80), x=0.01, ha="left", fontsize=10)
    figure.alt = " ".join(f"{title}. {alt}".split())
    plt.close(figure)  # shown by `show`, not a second time by pyplot
    return figure


def _name_points(axis: Axes, table: pd.DataFrame) -> None:
    """Write `label` in `colour` right of each point (x, value), moved up where names would overlap."""
    last, gap = -np.inf, np.ptp(axis.get_ylim()) / 14
    for row in table.sort_values("value", kind="stable").itertuples():
        last = max(row.value, last + gap)
        axis.text(row.x, last, f"  {row.label}", va="center", fontsize=8, color=row.colour)


def draw_masks(
    panels: Mapping[str, np.ndarray], names: Sequence[str], *, title: str = "", columns: int = 4
) -> Figure:
    """Draw grids (L, L) of 0 never, 1 looks at, 2 knows through others; rows look at columns.

    names: L token labels, "" for none. Long sequences get wide panels without lines between cells.
    """
    few = len(names) <= 16
    columns = min(columns if few else 2, len(panels))
    rows, side = -(-len(panels) // columns), min(2.2 if few else 3.0, 6.2 / columns)
    figure, axes = new(rows, columns, height=(side + 0.35) * rows + 0.6, squeeze=False)
    colours = {"never": LIGHT, "looks at it": COLOURS[0], "knows it through others": COLOURS[1]}
    look = {"cmap": [*colours.values()], "vmin": 0, "vmax": 2, "cbar": False, "square": True}
    look |= {"linewidths": 0.8 * few, "xticklabels": names, "yticklabels": names}
    for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        sns.heatmap(panel, ax=axis, **look)
        axis.tick_params(length=0, pad=1, labelsize=7)
        axis.tick_params(axis="x", rotation=90)
        axis.tick_params(axis="y", rotation=0)
        axis.set_title(name)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    kinds = list(colours.items())[: 1 + max(int(np.max(panel)) for panel in panels.values())]
    swatches = [Patch(facecolor=c, edgecolor="#777777", label=kind) for kind, c in kinds]
    figure.legend(handles=swatches, loc="outside lower center", ncols=3)
    figure.supylabel("query: looks", fontsize=8)
    shares = (f"{name}: {np.mean(np.asarray(p) > 0):.0%} of pairs" for name, p in panels.items())
    return _finish(figure, title, f"Masks, rows look at columns. {'; '.join(shares)}.")


def draw_training(
    logs: Mapping[str, pd.DataFrame],
    columns: Sequence[str],
    *,
    title: str,
    chance: float | None = None,
) -> Figure:
    """Draw losses against steps: raw values faint, their centred mean over 5 entries solid.

    logs: label -> table with `step` and the columns. chance: the loss of a collapsed model.
    """
    figure, axes = new(1, len(columns), width=3.4 * len(columns), height=2.7, squeeze=False)
    ends = []
    for axis, column in zip(axes[0], columns, strict=True):
        for label, log in logs.items():
            running = log[column].rolling(5, center=True).mean()  # whole windows only
            (line,) = axis.plot(log["step"], running, linewidth=1.8, label=label)
            axis.plot(log["step"], log[column], color=line.get_color(), alpha=0.3, linewidth=1)
            ends.append(f"{label}: {column} ends at {log[column].iloc[-1]:.2f}")
        if chance is not None:
            axis.axhline(chance, color="grey", linestyle=":", linewidth=1, label="collapsed model")
        unit = "squared error" if column == "image_loss" else "cross-entropy, nats"
        axis.set(title=column.replace("_", " "), xlabel="optimiser step", ylabel=unit)
        axis.legend()
    return _finish(figure, title, f"Training curves. {'; '.join(ends)}.")


def draw_pictures(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 6, title: str
) -> Figure:
    """Draw pictures in a grid, each with its text below."""
    texts = [textwrap.shorten(text, 90, placeholder=" ...") for text in captions]
    texts, size = [textwrap.fill(text, 20) for text in texts], max(1.3, min(2.2, 6.5 / columns))
    below = 0.12 * max(text.count("\n") + 1 for text in texts)
    rows = -(-len(images) // columns)
    height = (size + below + 0.05) * rows + 0.25
    figure, axes = new(rows, columns, width=size * columns, height=height, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], anchor="N", frame_on=False)
    for axis, image, text in zip(axes.flat, images, texts, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_xlabel(text, fontsize=7)
    return _finish(figure, title, f"{len(images)} pictures. {'; '.join(captions[:3])}")


def draw_scores(table: pd.DataFrame, *, title: str, xlabel: str = "precision@1, %") -> Figure:
    """Draw a row of dots a task: columns task, label, value, low, high (nan: no interval)."""
    order, labels = (list(dict.fromkeys(table[name])) for name in ("task", "label"))
    figure, axis = new(height=max(0.24, 0.1 * len(labels)) * len(order) + 1.0)
    for i, label in enumerate(labels):
        part, look = table[table["label"] == label], {"color": COLOURS[i % 8]}
        y = part["task"].map(order.index) + (i - (len(labels) - 1) / 2) * 0.6 / len(labels)
        axis.hlines(y, part["low"], part["high"], linewidth=1.3, **look)
        axis.plot(part["value"], y, MARKERS[i % 8], markersize=5, label=label, **look)
    axis.set_yticks(range(len(order)), order)
    axis.set(ylim=(len(order) - 0.5, -0.5), xlim=(-2, 102), xlabel=xlabel)
    axis.grid(axis="y", color="#eeeeee")
    n_columns = min(4, len(labels), max(1, 80 // max(map(len, labels))))
    figure.legend(loc="outside lower center", ncols=n_columns)
    means = table.groupby("label", sort=False)["value"].mean()
    told = "; ".join(f"{label} {value:.1f}" for label, value in means.items())
    return _finish(figure, title, f"Means over {len(order)} rows: {told}.")


def draw_forest(effects: pd.DataFrame, *, title: str, xlabel: str) -> Figure:
    """Draw differences with 95 % intervals: columns arm, difference, low, high, n_seeds, group.

    Rows of one `group` stand together below its name. Filled blue: the interval excludes 0.
    """
    starts = effects["group"].ne(effects["group"].shift()).to_numpy()
    y = np.arange(len(effects)) + np.cumsum(starts)
    clear = is_significant(effects)
    colours, fill = (np.where(clear, COLOURS[0], other) for other in ("grey", "white"))
    figure, axis = new(height=0.28 * (y[-1] + 1) + 0.9)
    axis.hlines(y, effects["low"], effects["high"], colors=colours, linewidth=2)
    axis.scatter(effects["difference"], y, s=36, c=fill, edgecolors=colours, zorder=3)
    axis.axvline(0, color="black", linewidth=0.8)
    told = [format_effect(row) for row in effects.itertuples()]
    beside = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 8}
    for place, text, n in zip(y, told, effects["n_seeds"], strict=True):
        axis.text(1.02, place, f"{text}  n = {n}", **beside)
    for place, name in zip(y[starts], effects["group"][starts], strict=True):
        axis.text(0.01, place - 1, name, fontweight="bold", **beside)
    axis.set_yticks(y, [textwrap.fill(str(arm), 34) for arm in effects["arm"]])
    axis.set(ylim=(y[-1] + 0.6, -0.6), xlabel=xlabel)
    axis.tick_params(axis="y", length=0)
    rows = (f"{arm} {text}" for arm, text in zip(effects["arm"], told, strict=True))
    return _finish(figure, title, f"Differences with 95 % intervals: {'; '.join(rows)}.")


def draw_map(points: Mapping[str, np.ndarray], groups: Sequence[str], *, title: str) -> Figure:
    """Draw maps side by side: points[name] (N, 2), groups (N,) the colour of each point."""
    figure, axes = new(1, len(points), width=3.2 * len(points), height=3.3, squeeze=False)
    kinds = list(dict.fromkeys(groups))
    look = {"hue": groups, "style": groups, "palette": [COLOURS[i % 8] for i in range(len(kinds))]}
    look |= {"markers": [MARKERS[i % 8] for i in range(len(kinds))], "s": 16, "alpha": 0.7}
    for axis, (name, xy) in zip(axes[0], points.items(), strict=True):
        sns.scatterplot(x=xy[:, 0], y=xy[:, 1], ax=axis, **look)
        axis.set(title=name, xlabel="first main axis", ylabel="second main axis")
        axis.set(xticks=[], yticks=[])
        axis.get_legend().remove()
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    said = f"{len(groups)} embeddings on two axes by {', '.join(kinds)}: {', '.join(points)}."
    return _finish(figure, title, said)


def draw_heat(
    panels: Mapping[str, pd.DataFrame],
    *,
    title: str,
    unit: str,
    fmt: str = ".1f",
    signed: bool = False,
    bold: pd.DataFrame | None = None,
) -> Figure:
    """Draw tables of one form as heat maps on one scale; `signed` centres the colours on 0.

    bold: a table of the same form, true where the number is set in bold.
    """
    table = next(iter(panels.values()))
    top = 1.4 * max(np.nanmax(each.abs().to_numpy(float)) for each in panels.values()) or 1
    width = min(9.0, 1.6 + 0.62 * len(table.columns) * len(panels))
    size = {"width": width, "height": 0.3 * len(table) + 1.5}
    figure, axes = new(1, len(panels), squeeze=False, sharey=True, **size)
    look = {"vmin": -top if signed else 0, "vmax": top, "cmap": "PuOr" if signed else "Blues"}
    look |= {"annot": True, "fmt": fmt, "cbar": False, "annot_kws": {"size": 8}}
    for axis, (name, each) in zip(axes[0], panels.items(), strict=True):
        sns.heatmap(each, ax=axis, **look)
        axis.tick_params(length=0, labelsize=8)
        axis.tick_params(axis="x", rotation=45 if len(table.columns) > 5 else 0)
        axis.tick_params(axis="y", rotation=0)
        axis.set_title(name)
        axis.label_outer()
        if bold is not None:
            for text, strong in zip(axis.texts, bold.to_numpy().flat, strict=True):
                text.set_weight("bold" if strong else "normal")
    figure.supxlabel(unit, fontsize=8)
    return _finish(figure, title, f"Heat maps of {unit}: {', '.join(panels)}.")


def draw_tradeoff(table: pd.DataFrame, named: Iterable[str], *, title: str, xlabel: str) -> Figure:
    """Draw cost against score, a point an arm: columns arm, cost, value, low, high.

    Arms in `named` are labelled and have their interval; the others are small and grey.
    """
    figure, axis = new(height=3.4)
    chosen = table["arm"].isin(list(named))
    rest, shown = table[~chosen], table[chosen].rename(columns={"arm": "label", "cost": "x"})
    axis.plot(rest["cost"], rest["value"], ".", color="#999999", markersize=5)
    axis.plot(shown["x"], shown["value"], "o", color=COLOURS[0], markersize=5)
    axis.vlines(shown["x"], shown["low"], shown["high"], color=COLOURS[0], linewidth=1.3)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom - 1, top + 1)  # a tenth of a point must not fill it
    axis.set(xlim=(0, table["cost"].max() * 1.05), xlabel=xlabel, ylabel="precision@1, %")
    _name_points(axis, shown.assign(colour="black"))
    rows = (f"{row.label}: {row.x:,.4g}, {row.value:.1f}" for row in shown.itertuples())
    return _finish(figure, title, f"{xlabel} against precision@1: {'; '.join(rows)}.")


def draw_curves(
    table: pd.DataFrame,
    *,
    title: str,
    xlabel: str,
    ylabel: str = "precision@1, %",
    log: bool = False,
) -> Figure:
    """Draw a line a label against x: columns label, x, value and optionally low, high.

    Lines are named at their right end. log: x doubles from tick to tick.
    """
    figure, axis = new(height=3.2)
    ends = []
    for i, (_, part) in enumerate(table.groupby("label", sort=False)):
        part, look = part.sort_values("x"), {"color": COLOURS[i % 8], "linewidth": 1.3}
        axis.plot(part["x"], part["value"], marker=MARKERS[i % 8], markersize=5, **look)
        if "low" in part:
            axis.vlines(part["x"], part["low"], part["high"], **look)
        ends.append(part.tail(1).assign(colour=COLOURS[i % 8]))
    _name_points(axis, pd.concat(ends))
    if log:
        ticks = sorted(table["x"].unique())
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x:,.10g}" for x in ticks])
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    rows = (f"{row.label}, {row.x:g}: {row.value:.1f}" for row in table.itertuples())
    return _finish(figure, title, f"{'; '.join(rows)}.")
