"""Figures in one style: the title is the message, intervals are drawn, colours stay apart in grey.

Each `draw_` function takes tables or arrays and returns a matplotlib Figure; its `alt` attribute says
in words what it shows. `show` puts a figure and its caption into a notebook, `save` writes files.
"""

from __future__ import annotations

import io
import itertools
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
from matplotlib.colors import ListedColormap
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
    "axes.titlesize": 10,
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


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Move label positions upwards until neighbours are `gap` apart; keeps their order."""
    moved, last = dict.fromkeys(range(len(places)), 0.0), -np.inf
    for i in np.argsort(places, kind="stable"):
        last = moved[int(i)] = max(places[i], last + gap)
    return list(moved.values())


def _errors(table: pd.DataFrame) -> np.ndarray | None:
    """Lengths (2, n) of the error bars of columns value, low, high; None where there are none."""
    if not {"low", "high"} <= set(table) or table["low"].isna().all():
        return None
    below, above = table["value"] - table["low"], table["high"] - table["value"]
    return np.nan_to_num(np.stack([below, above]).clip(min=0))


def _dots(
    axis: Axes, x: Any, y: Any, errors: Mapping[str, Any], i: int, line: str = "", label=""
) -> None:
    """Draw the points of series `i` in its colour and marker; errors: xerr or yerr."""
    look = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "markersize": 5, "capsize": 2}
    axis.errorbar(x, y, **errors, **look, linestyle=line, linewidth=1.3, label=label)


def _label(
    axis: Axes, text: str, at: tuple, xycoords: Any = "data", dx: int = 0, **look: Any
) -> None:
    """Write text at a place, `dx` points to the right of it."""
    look = {"va": "center", "fontsize": 8, "annotation_clip": False} | look
    axis.annotate(text, at, xycoords=xycoords, xytext=(dx, 0), textcoords="offset points", **look)


def name_runs(names: Sequence[str]) -> tuple[list[float], list[str]]:
    """Ticks and labels of tokens: three or more of one name in a row share one label.

    With more than 24 labels, only shared ones and EOS are named.
    """
    runs: list[tuple[str, list[int]]] = []
    for name, each in itertools.groupby(range(len(names)), key=lambda i: names[i]):
        places = list(each)
        runs += [(name, places)] if len(places) > 2 else [(name, [i]) for i in places]
    if len(runs) > 24:
        runs = [(name, each) for name, each in runs if len(each) > 2 or name == "EOS"]
    labels = [f"{name} x {len(each)}" if len(each) > 1 else name for name, each in runs]
    return [float(np.mean(each)) for _, each in runs], labels


def draw_masks(
    panels: Mapping[str, np.ndarray], names: Sequence[str], *, title: str = "", columns: int = 4
) -> Figure:
    """Draw grids (L, L) of 0 never, 1 looks at, 2 knows through others; rows look at columns.

    names: L token labels. Long sequences get wide panels, and one label for a run of equal names.
    """
    columns = min(columns if len(names) <= 16 else 2, len(panels))
    rows, side = -(-len(panels) // columns), min(2.2 if len(names) <= 16 else 3.0, 6.2 / columns)
    figure, axes = new(rows, columns, height=(side + 0.35) * rows + 0.6, squeeze=False)
    ticks, labels = name_runs(names)
    for axis, (name, panel) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=("", [])):
        axis.set_axis_off() if not len(panel) else _draw_grid(axis, name, panel, ticks, labels)
    words = {"looks at it": COLOURS[0], "knows it through others": COLOURS[1], "never": LIGHT}
    if not any((np.asarray(panel) == 2).any() for panel in panels.values()):
        words.pop("knows it through others")
    swatches = [Patch(facecolor=c, edgecolor="#777777", label=text) for text, c in words.items()]
    figure.legend(handles=swatches, loc="outside lower center", ncols=3, fontsize=8)
    figure.supylabel("query: looks", fontsize=8)
    shares = (f"{name}: {np.mean(np.asarray(p) > 0):.0%} of pairs" for name, p in panels.items())
    return _finish(figure, title, f"Masks, rows look at columns. {'; '.join(shares)}.")


def _draw_grid(
    axis: Axes, name: str, panel: np.ndarray, ticks: Sequence[float], labels: Sequence[str]
) -> None:
    colours = ListedColormap([LIGHT, COLOURS[0], COLOURS[1]])
    axis.imshow(panel, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
    if len(panel) <= 16:  # lines between cells
        axis.set_xticks(np.arange(0.5, len(panel) - 1), minor=True)
        axis.set_yticks(np.arange(0.5, len(panel) - 1), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.8)
    size = 7 if len(labels) <= 16 else 5
    axis.set_xticks(ticks, labels, rotation=90, fontsize=size)
    axis.set_yticks(ticks, labels, fontsize=size)
    axis.tick_params(which="both", length=0, pad=1)
    axis.set_title(name, fontsize=9)


def draw_training(
    logs: Mapping[str, pd.DataFrame],
    columns: Sequence[str],
    *,
    title: str,
    smooth: int = 5,
    chance: float | None = None,
) -> Figure:
    """Draw losses against steps: raw values faint, their centred mean over `smooth` entries solid.

    logs: label -> table with `step` and the columns. chance: the loss of a collapsed model.
    """
    figure, axes = new(1, len(columns), width=3.4 * len(columns), height=2.7, squeeze=False)
    ends = []
    for axis, column in zip(axes[0], columns, strict=True):
        for (label, log), colour in zip(logs.items(), itertools.cycle(COLOURS), strict=False):
            axis.plot(log["step"], log[column], color=colour, alpha=0.3, linewidth=1)
            running = log[column].rolling(smooth, center=True).mean()  # whole windows only
            axis.plot(log["step"], running, color=colour, linewidth=1.8, label=label)
            ends.append(f"{label}: {column} ends at {log[column].iloc[-1]:.2f}")
        if chance is not None:
            axis.axhline(chance, color="grey", linestyle=":", linewidth=1, label="collapsed model")
        axis.set_xlabel("optimiser step")
        axis.set_ylabel("squared error" if column == "image_loss" else "cross-entropy, nats")
        axis.set_title(column.replace("_", " "), fontsize=9)
        axis.legend(fontsize=8)
    return _finish(figure, title, f"Training curves. {'; '.join(ends)}.")


def draw_pictures(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 6, title: str
) -> Figure:
    """Draw pictures in a grid, each with its text below."""
    texts = [textwrap.shorten(text, 90, placeholder=" ...") for text in captions]
    texts, size = [textwrap.fill(text, 20) for text in texts], 1.3
    below = 0.12 * max(text.count("\n") + 1 for text in texts)
    rows = -(-len(images) // columns)
    height = (size + below + 0.05) * rows + 0.25
    figure, axes = new(rows, columns, width=size * columns, height=height, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], anchor="N", frame_on=False)
    for axis, image, text in zip(axes.flat, images, texts, strict=False):
        axis.imshow(image, interpolation="nearest")
        _label(axis, text, (0.5, -0.04), "axes fraction", ha="center", va="top", fontsize=7)
    return _finish(figure, title, f"{len(images)} pictures. {'; '.join(captions[:3])}")


def draw_scores(table: pd.DataFrame, *, title: str, xlabel: str = "precision@1, %") -> Figure:
    """Draw a row of dots a task: columns task, label, value and optionally low, high."""
    order, labels = (list(dict.fromkeys(table[name])) for name in ("task", "label"))
    figure, axis = new(height=max(0.24, 0.1 * len(labels)) * len(order) + 1.0)
    for i, label in enumerate(labels):
        part = table[table["label"] == label].set_index("task").reindex(order)
        y = np.arange(len(order)) + (i - (len(labels) - 1) / 2) * 0.6 / len(labels)
        _dots(axis, part["value"], y, {"xerr": _errors(part)}, i, label=label)
    axis.set_yticks(range(len(order)), order)
    axis.set(ylim=(len(order) - 0.5, -0.5), xlim=(-2, 102), xlabel=xlabel)
    axis.grid(axis="y", color="#eeeeee")
    n_columns = min(4, len(labels), max(1, 80 // max(map(len, labels))))
    figure.legend(loc="outside lower center", fontsize=8, ncols=n_columns)
    means = table.groupby("label", sort=False)["value"].mean()
    told = "; ".join(f"{label} {value:.1f}" for label, value in means.items())
    return _finish(figure, title, f"Means over {len(order)} rows: {told}.")


def draw_forest(effects: pd.DataFrame, *, title: str, xlabel: str) -> Figure:
    """Draw differences with 95 % intervals: columns arm, difference, low, high, n_seeds, group.

    Rows of one `group` (optional) stand together below its name. Filled blue: the interval excludes 0.
    """
    group = effects.get("group", pd.Series("", index=effects.index))
    starts = (group.ne("") & group.ne(group.shift())).to_numpy()
    y = np.arange(len(effects)) + np.cumsum(starts)
    figure, axis = new(height=0.28 * (y[-1] + 1) + 0.9)
    for place, row in zip(y, effects.itertuples(), strict=True):
        clear = is_significant(row)
        colour, fill = (COLOURS[0], COLOURS[0]) if clear else ("grey", "white")
        axis.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
        axis.plot(row.difference, place, "o", color=colour, markerfacecolor=fill, markersize=6)
        text = f"{format_effect(row)}  n = {row.n_seeds}"
        _label(axis, text, (1.02, place), ("axes fraction", "data"))
    for place, name in zip(y[starts], group[starts], strict=True):
        _label(axis, name, (0, place - 1), ("axes fraction", "data"), 4, fontweight="bold")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(y, [textwrap.fill(str(arm), 34) for arm in effects["arm"]])
    axis.set(ylim=(y[-1] + 0.6, -0.6), xlabel=xlabel)
    axis.tick_params(axis="y", length=0)
    rows = (f"{row.arm} {format_effect(row)}" for row in effects.itertuples())
    return _finish(figure, title, f"Differences with 95 % intervals: {'; '.join(rows)}.")


def draw_map(points: Mapping[str, np.ndarray], groups: Sequence[str], *, title: str) -> Figure:
    """Draw maps side by side: points[name] (N, 2), groups (N,) the colour of each point."""
    figure, axes = new(1, len(points), width=3.2 * len(points), height=3.3, squeeze=False)
    for axis, (name, xy) in zip(axes[0], points.items(), strict=True):
        for i, group in enumerate(dict.fromkeys(groups)):
            chosen = np.array(groups) == group
            look = {"color": COLOURS[i % 8], "markersize": 3, "alpha": 0.7}
            axis.plot(*xy[chosen].T, MARKERS[i % 8], **look, label=group)
        axis.set_title(name, fontsize=9)
        axis.set(xticks=[], yticks=[], xlabel="first main axis", ylabel="second main axis")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8)
    kinds = ", ".join(dict.fromkeys(groups))
    return _finish(
        figure, title, f"{len(groups)} embeddings on two axes by {kinds}: {', '.join(points)}."
    )


def draw_heat(
    panels: Mapping[str, pd.DataFrame],
    *,
    title: str,
    unit: str,
    fmt: str = ".1f",
    signed: bool = False,
    bold: pd.DataFrame | None = None,
) -> Figure:
    """Draw tables as heat maps on one scale; `signed` centres the colours on 0.

    bold: a table of the same form, true where the number of the first panel is set in bold.
    """
    top = 1.4 * max(np.nanmax(table.abs().to_numpy(float)) for table in panels.values()) or 1
    n_rows, n_columns = max(map(len, panels.values())), max(len(t.columns) for t in panels.values())
    width = min(9.0, 1.6 + 0.62 * n_columns * len(panels))
    figure, axes = new(1, len(panels), width=width, height=0.3 * n_rows + 1.5, squeeze=False)
    look = {"vmin": -top if signed else 0, "vmax": top, "cmap": "PuOr" if signed else "Blues"}
    look |= {"annot": True, "fmt": fmt, "cbar": False, "annot_kws": {"size": 8}}
    for axis, (name, table) in zip(axes[0], panels.items(), strict=True):
        first = axis is axes[0][0]
        sns.heatmap(table, ax=axis, **look)
        axis.tick_params(length=0, labelsize=8)
        long = n_columns > 5 and max(len(str(name)) for name in table.columns) > 4
        axis.tick_params(axis="x", rotation=45 if long else 0)
        axis.tick_params(axis="y", rotation=0, labelleft=first)
        axis.set_title(name, fontsize=9)
        axis.set(xlabel=table.columns.name or "", ylabel=(table.index.name or "") * first)
    if bold is not None:
        for text, strong in zip(axes[0][0].texts, bold.to_numpy().flat, strict=True):
            text.set_weight("bold" if strong else "normal")
    figure.supxlabel(unit, fontsize=8)
    return _finish(figure, title, f"Heat maps of {unit}: {', '.join(panels)}.")


def draw_tradeoff(table: pd.DataFrame, named: Iterable[str], *, title: str, xlabel: str) -> Figure:
    """Draw cost against score, a point an arm: columns arm, cost, value, low, high.

    Arms in `named` are labelled and have their interval; the others are small and grey.
    """
    figure, axis = new(height=3.4)
    chosen = table["arm"].isin(list(named))
    rest, table = table[~chosen], table[chosen].sort_values("value")
    axis.plot(rest["cost"], rest["value"], ".", color="#999999", markersize=5)
    _dots(axis, table["cost"], table["value"], {"yerr": _errors(table)}, 0)
    middle, half = np.mean(axis.get_ylim()), np.ptp(axis.get_ylim()) / 2
    axis.set_ylim(middle - max(2.5, half), middle + max(2.5, half))  # a tenth must not fill it
    places = _spread(table["value"].tolist(), np.ptp(axis.get_ylim()) / 16)
    dearest = max(table["cost"].max(), rest["cost"].max() if len(rest) else 0)
    for row, place in zip(table.itertuples(), places, strict=True):
        dx, ha = (-8, "right") if row.cost > 0.7 * dearest else (8, "left")
        _label(axis, row.arm, (row.cost, place), dx=dx, ha=ha)
    axis.set(xlim=(0, dearest * 1.05), xlabel=xlabel, ylabel="precision@1, %")
    rows = (f"{row.arm}: {row.cost:,.4g}, {row.value:.1f}" for row in table.itertuples())
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
    lines = dict(list(table.groupby("label", sort=False)))
    for i, (_, part) in enumerate(lines.items()):
        part = part.sort_values("x")
        _dots(axis, part["x"], part["value"], {"yerr": _errors(part)}, i, "-")
    ends = [part.sort_values("x").iloc[-1] for part in lines.values()]
    places = _spread([end["value"] for end in ends], np.ptp(axis.get_ylim()) / 14)
    for i, (label, end, place) in enumerate(zip(lines, ends, places, strict=True)):
        _label(axis, label, (end["x"], place), dx=8, color=COLOURS[i % 8])
    ticks = sorted(table["x"].unique())
    if log:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{x:,.10g}" for x in ticks])
    axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    rows = (f"{row.label}, {row.x:g}: {row.value:.1f}" for row in table.itertuples())
    return _finish(figure, title, f"{'; '.join(rows)}.")
