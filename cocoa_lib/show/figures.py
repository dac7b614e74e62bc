"""Every figure, one style: colour-blind safe, readable at column width and in grey, intervals drawn, n on the figure.

Each function takes a table or tensors and returns a matplotlib Figure whose `alt` attribute says in words what it shows;
`save` writes PNG and SVG with the same bytes for the same data. Nothing is computed here that is not drawn.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ..evaluate import effects as analysis
from ..items import PLACEHOLDER, load_image

# Okabe and Ito's palette, ordered so that neighbours differ in lightness too; grey for their yellow, faint on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777", "#000000")
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


def new(rows: int = 1, columns: int = 1, *, width: float = 6.5, height: float = 3.0, **kwargs):
    """A figure in the project's style: (figure, axes)."""
    with mpl.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width, height), **kwargs)


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write NAME.png and NAME.svg, without a date, and the alt text as NAME.txt; returns the PNG's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    (folder / f"{name}.txt").write_text(getattr(figure, "alt", "") + "\n", encoding="utf-8")
    return folder / f"{name}.png"


def show(figure: Figure, name: str = "", folder: str | Path = ""):
    """The figure as a PNG display object with its alt text, for a notebook; saved as well where a folder is given,
    which starts at the repository's root as all paths of a notebook's parameters do."""
    from IPython.display import Image as Shown

    from ..run.profiles import path

    if (
        folder
    ):  # the saved file itself: drawn a second time, a figure can be laid out a hair differently
        data = save(figure, path(folder), name).read_bytes()
    else:
        png = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(png, metadata={"Software": None})
        data = png.getvalue()
    return Shown(data=data, alt=getattr(figure, "alt", ""))


def _done(figure: Figure, alt: str) -> Figure:
    figure.alt = " ".join(alt.split())  # of titles in two lines, too
    plt.close(figure)  # shown by the notebook as a value, not a second time by pyplot
    return figure


def span(counts: Iterable[int]) -> str:
    """Counts for a title: "500" where all are equal, else "3 to 5"."""
    counts = [int(count) for count in counts]
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def masks(patterns: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Attention layouts side by side. patterns: title -> (L, L) bool, rows attend to columns; names: L token labels."""
    figure, axes = new(1, len(patterns), width=2.4 * len(patterns), height=3.0, squeeze=False)
    show_names = len(names) <= 32
    for axis, (title, pattern) in zip(axes[0], patterns.items(), strict=True):
        axis.imshow(
            pattern,
            cmap=ListedColormap(["#f2f2f2", COLOURS[0]]),
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axis.set_title(title)
        axis.set_xlabel("key: looked at")
        if show_names:
            size = 8 if len(names) <= 12 else 4.5
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
            axis.set_yticks(range(len(names)), names, fontsize=size)
        axis.tick_params(length=0)
    axes[0][0].set_ylabel("query: looks")
    shares = ", ".join(
        f"{title}: {np.mean(pattern):.0%} of cells" for title, pattern in patterns.items()
    )
    return _done(
        figure,
        f"Attention masks as grids of query rows and key columns; dark cells may attend ({shares}).",
    )


def training_curves(
    logs: Mapping[str, pd.DataFrame],
    columns: Sequence[str],
    *,
    smooth: int = 5,
    chance: float | None = None,
) -> Figure:
    """Loss against step. logs: label -> table with `step` and the columns; raw values faint, centred mean of `smooth` solid.

    chance: the loss of a collapsed model, as a level line.
    """
    figure, axes = new(1, len(columns), width=3.5 * len(columns), height=2.7, squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for (label, log), colour in zip(logs.items(), COLOURS * 3, strict=False):
            if column not in log:
                continue
            axis.plot(log["step"], log[column], color=colour, alpha=0.25, linewidth=1)
            running = (
                log[column].rolling(smooth, center=True).mean()
            )  # whole windows: half of one is another mean
            axis.plot(log["step"], running, color=colour, linewidth=1.8)
            end = running.dropna().iloc[-1] if len(log) >= smooth else log[column].iloc[-1]
            axis.annotate(label, (log["step"].iloc[-1], end), xytext=(4, 0), textcoords="offset points", color=colour,
                          va="bottom" if "\n" in label else "center", fontsize=8)  # fmt: skip
        if chance is not None:
            axis.axhline(chance, color="grey", linestyle=":", linewidth=1)
            above = chance < np.mean(
                axis.get_ylim()
            )  # below a line at the bottom the word would stand on the axis
            axis.annotate("collapsed", (1, chance), xycoords=("axes fraction", "data"), xytext=(0, 3 if above else -3),
                          ha="right", va="bottom" if above else "top", textcoords="offset points", color="grey",
                          fontsize=8)  # fmt: skip
        axis.set_xlabel("optimiser step")
        axis.set_ylabel("mean squared error" if column == "image_loss" else "cross-entropy, nats")
        axis.set_title(f"{column.replace('_', ' ')} (solid: mean of {smooth} log entries)")
        axis.set_xlim(right=axis.get_xlim()[1] * 1.12)
    ends = "; ".join(
        f"{label}, {column} ends at {log[column].iloc[-1]:.2f}"
        for label, log in logs.items()
        for column in columns
        if column in log
    )
    return _done(figure, f"Training curves of {', '.join(columns)} against step. {ends}.")


def pictures(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 6, size: float = 1.5
) -> Figure:
    """Pictures in a grid, each with its text below."""
    rows = max(1, -(-len(images) // columns))  # of none, an empty figure
    texts = [textwrap.fill(caption, 24) for caption in captions]
    below = 0.13 * max(
        (text.count("\n") + 1 for text in texts), default=0
    )  # inches for the longest text
    figure, axes = new(
        rows, columns, width=size * columns, height=(size + below) * rows, squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
        axis.set_anchor("N")  # the room for the text is below
    for axis, image, text in zip(axes.flat, images, texts, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.text(0.5, -0.04, text, fontsize=7, ha="center", va="top", transform=axis.transAxes)
    alt = (
        f"{len(images)} pictures, each with its text below; the first: {captions[0]!r}."
        if captions
        else "Pictures."
    )
    return _done(figure, alt)


def queries_and_targets(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Figure:
    """Pairs of items {text, image: path}, of which one has a picture: that picture, and below it "query → target" in words."""

    def words(item: Mapping[str, Any]) -> str:
        text = PLACEHOLDER.sub("", item["text"] or "").strip()
        return ", ".join(["this picture"] * bool(item["image"]) + [text] * bool(text))

    images = [load_image(query["image"] or target["image"]) for query, target in pairs]
    return pictures(images, [f"{words(query)} \u2192 {words(target)}" for query, target in pairs])


def reconstructions(originals: Sequence, hidden: Sequence, restored: Sequence) -> Figure:
    """Rows original / masked / reconstructed, one column a sample."""
    n = len(originals)
    figure, axes = new(3, n, width=1.15 * n + 0.8, height=3.6, squeeze=False)
    titles = ("original", "seen by the model", "reconstructed")
    for row, (title, images) in enumerate(zip(titles, (originals, hidden, restored), strict=True)):
        for column, image in enumerate(images):
            axes[row][column].imshow(image, interpolation="nearest")
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
        axes[row][0].set_ylabel(title, fontsize=8)
    return _done(
        figure,
        f"{n} held-out scenes: original, with hidden cells, and with the hidden cells predicted.",
    )


def restored_text(
    samples: Sequence[Sequence[tuple[str, str | None]]], *, width: int = 88
) -> Figure:
    """Texts with hidden words as they were restored: samples of (text, what stood there or None if it was not hidden).

    In brackets, a tick for a right word; for a wrong one a cross and what stood there. `width`: characters a line.
    """
    lines: list[list[tuple[str, str]]] = []
    for sample in samples:
        lines.append([])
        for text, truth in sample:
            # A line break would be drawn as one, over the next lines.
            text, meant = (part and part.replace("\n", "\u21b5") for part in (text, truth))
            bare = text.strip() or text
            marked = (
                text
                if truth is None
                else f" [{bare}\u2713]"
                if text == meant
                else f" [{bare}\u2717 {meant.strip()}]"
            )
            if sum(len(part) for part, _ in lines[-1]) + len(marked) > width:
                lines.append([])
            colour = "black" if truth is None else COLOURS[2] if text == meant else COLOURS[5]
            lines[-1].append((marked if lines[-1] else marked.lstrip(), colour))
        lines.append([])
    figure, axis = new(width=6.5, height=0.19 * len(lines) + 0.1)
    axis.axis("off")
    axis.set(xlim=(0, width), ylim=(len(lines), 0))
    for row, line in enumerate(lines):
        at = 0
        for text, colour in line:
            axis.text(at, row, text, family="monospace", fontsize=7.5, color=colour, va="top")
            at += len(text)
    hidden = [(text, truth) for sample in samples for text, truth in sample if truth is not None]
    right = sum(text == truth for text, truth in hidden)
    return _done(
        figure,
        f"{len(samples)} texts with hidden words restored: {right} of {len(hidden)} are right.",
    )


def task_scores(
    table: pd.DataFrame, *, order: Sequence[str], title: str, xlabel: str = "precision@1, %"
) -> Figure:
    """Scores by task with intervals: columns task, label, value, low, high (low and high may be missing)."""
    labels = list(dict.fromkeys(table["label"]))
    figure, axis = new(width=6.5, height=max(0.36, 0.11 * len(labels)) * len(order) + 1.0)
    markers = "osD^vPX*"
    for i, label in enumerate(labels):
        part = table[table["label"] == label].set_index("task").reindex(order)
        y = np.arange(len(order)) + (i - (len(labels) - 1) / 2) * 0.7 / max(1, len(labels))
        errors = None
        if {"low", "high"} <= set(part.columns) and part["low"].notna().any():
            errors = np.nan_to_num(
                np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(min=0)
            )
        axis.errorbar(part["value"], y, xerr=errors, fmt=markers[i % 8], color=COLOURS[i % 8], markersize=4.5,
                      linewidth=1.2, label=label)  # fmt: skip
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(len(order) - 0.5, -0.5)  # the first task on top, no marker cut
    axis.set_xlim(-2, 102)
    axis.set_xlabel(xlabel)
    axis.set_title(title)
    axis.grid(axis="y", color="#eeeeee")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    means = "; ".join(
        f"{label} {table[table['label'] == label]['value'].mean():.1f}" for label in labels
    )
    return _done(figure, f"{title}. Unweighted means over the {len(order)} rows: {means}.")


def forest(effects: pd.DataFrame, *, baseline: str, unit: str = "points of precision@1") -> Figure:
    """Paired differences to a baseline with 95 % intervals: columns arm, difference, low, high, p_holm, n_seeds, n_queries."""
    figure, axis = new(width=6.5, height=0.42 * len(effects) + 1.35)
    y = np.arange(len(effects))
    for i, row in enumerate(effects.itertuples()):
        clear = row.n_seeds > 1 and (row.low > 0 or row.high < 0)  # one seed says nothing of others
        colour = COLOURS[0] if clear else "grey"
        axis.plot([row.low, row.high], [i, i], color=colour, linewidth=2)
        axis.plot(row.difference, i, "o" if clear else "D", color=colour, markersize=6,
                  markerfacecolor=colour if analysis.certain(row._asdict()) else "white")  # fmt: skip
        text = f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"
        text += f"  {row.n_seeds} seeds" * (effects["n_seeds"].nunique() > 1)
        axis.annotate(text, (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(y, [textwrap.fill(arm, 34) for arm in effects["arm"]])
    axis.invert_yaxis()
    axis.set_ylim(len(effects) - 0.4, -0.6)
    axis.locator_params(axis="x", nbins=7)
    axis.set_xlabel(f"difference to '{baseline}', {unit} (right: better); bar: 95 % interval")
    seeds = span(effects["n_seeds"])
    queries = int(effects["n_queries"].iloc[0])
    axis.set_title(
        f"n = {seeds} seeds x {queries} queries\ncircle: excludes 0 (filled: once corrected, too)\ndiamond: contains 0"
    )
    listing = "; ".join(
        f"{row.arm} {row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"
        for row in effects.itertuples()
    )
    return _done(figure, f"Paired differences to {baseline} with 95 % intervals: {listing}.")


def meta_task_bars(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Scores by meta-task, a panel a title, one above the other: columns label, meta_task, value and optionally low, high."""
    panels = {
        title: table.dropna(subset="value") for title, table in panels.items()
    }  # a meta-task without tasks
    figure, axes = new(len(panels), width=6.5, height=2.7 * len(panels), squeeze=False)
    for axis, (title, table) in zip(axes[:, 0], panels.items(), strict=True):
        _bars(axis, table)
        axis.set_title(title)
    listing = (
        f"{title}. "
        + "; ".join(f"{row.label}, {row.meta_task}: {row.value:.1f}" for row in table.itertuples())
        for title, table in panels.items()
    )
    return _done(figure, ". ".join(listing))


def _bars(axis, table: pd.DataFrame) -> None:
    """One group of bars a meta-task, a bar a label, named beside them where there are several."""
    labels, groups = list(dict.fromkeys(table["label"])), list(dict.fromkeys(table["meta_task"]))
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        part = table[table["label"] == label].set_index("meta_task").reindex(groups)
        x = np.arange(len(groups)) + (i - (len(labels) - 1) / 2) * width
        hatch = ("", "//", "..", "xx")[i % 4]  # told apart in grey
        axis.bar(
            x,
            part["value"],
            width * 0.92,
            color=COLOURS[i % 8],
            label=label,
            edgecolor="white",
            hatch=hatch,
        )
        tops = part["value"]
        if "low" in part and part["low"].notna().any():
            errors = np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(
                min=0
            )
            axis.errorbar(x, part["value"], yerr=errors, fmt="none", color="black", linewidth=1)
            tops = part["high"].fillna(part["value"])
        for position, value, top in zip(x, part["value"], tops, strict=True):
            if not np.isnan(value):
                axis.annotate(f"{value:.1f}", (position, top), xytext=(0, 2), textcoords="offset points", ha="center",
                              va="bottom", fontsize=7, rotation=90 if len(labels) > 2 else 0)  # fmt: skip
    highest = table[[name for name in ("value", "high") if name in table]].max(axis=None)
    axis.set_ylim(0, 1.25 * highest)
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylabel("precision@1, %")
    if len(labels) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def embedding_map(points: Mapping[str, np.ndarray], groups: Sequence[str]) -> Figure:
    """Two-dimensional maps side by side: points[title] (N, 2), groups (N,) a group a point."""
    figure, axes = new(1, len(points), width=3.2 * len(points), height=3.0, squeeze=False)
    names = list(dict.fromkeys(groups))
    for axis, (title, xy) in zip(axes[0], points.items(), strict=True):
        for name, colour, marker in zip(
            names, itertools.cycle(COLOURS), itertools.cycle("osD^vPX*p"), strict=False
        ):
            chosen = np.array([group == name for group in groups])
            axis.plot(*xy[chosen].T, marker, color=colour, markersize=3, alpha=0.7, label=name)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("first main axis")
    axes[0][0].set_ylabel("second main axis")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return _done(
        figure,
        f"Maps of {len(groups)} embeddings in two dimensions, coloured by {', '.join(names)}: {'; '.join(points)}.",
    )


def _runs(names: Sequence[str]) -> tuple[list[float], list[str]]:
    """Ticks and labels of tokens: three or more of one name in a row, as a picture's, share one in their middle."""
    runs = [
        (name, list(each))
        for name, each in itertools.groupby(range(len(names)), key=lambda i: names[i])
    ]
    runs = [
        part
        for name, each in runs
        for part in ([(name, each)] if len(each) > 2 else [(name, [i]) for i in each])
    ]
    labels = [f"{name} x {len(each)}" if len(each) > 1 else name for name, each in runs]
    return [float(np.mean(each)) for _, each in runs], labels


def token_masks(
    patterns: Mapping[str, np.ndarray], names: Sequence[str], segments: Sequence[str]
) -> Figure:
    """Layouts over the tokens of one sample, two a row: patterns[title] (L, L) bool, a name and a segment a token."""
    rows = -(-len(patterns) // 2)
    figure, axes = new(rows, 2, width=7.4, height=3.9 * rows, squeeze=False)
    starts = [i for i in range(len(segments)) if i == 0 or segments[i] != segments[i - 1]]
    ticks, labels = _runs(names)
    for axis, (title, pattern) in zip(axes.flat, patterns.items(), strict=False):
        axis.imshow(
            pattern,
            cmap=ListedColormap(["#f2f2f2", COLOURS[0]]),
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axis.set_title(f"{title}: {np.mean(pattern):.0%} of pairs", fontsize=10, loc="left")
        axis.set_xticks(ticks, labels, rotation=90, fontsize=6.5)
        axis.set_yticks(ticks, labels, fontsize=6.5)
        axis.tick_params(length=0, pad=1)
        for start, end in zip(
            starts, [*starts[1:], len(segments)], strict=True
        ):  # where a segment begins and ends
            axis.axhline(start - 0.5, color="white", linewidth=1.5)
            axis.axvline(start - 0.5, color="white", linewidth=1.5)
            if end - start > 2:
                x, y = (
                    start + (end - start) / 4,
                    start + (end - start) * 0.7,
                )  # below the diagonal: dark in all layouts
                axis.text(
                    x,
                    y,
                    segments[start],
                    color="white",
                    ha="center",
                    va="center",
                    fontweight="bold",
                )
    for axis in list(axes.flat)[len(patterns) :]:
        axis.axis("off")
    figure.supxlabel("key: looked at", fontsize=8)
    figure.supylabel("query: looks", fontsize=8)
    counts = ", ".join(f"{list(segments).count(s)} of {s}" for s in dict.fromkeys(segments))
    shares = ", ".join(f"{title} {np.mean(pattern):.0%}" for title, pattern in patterns.items())
    return _done(
        figure,
        f"Masks over one sample's tokens ({counts}); rows look at columns; share of pairs: {shares}.",
    )


def reach_grid(
    depths: Mapping[str, np.ndarray], layers: Sequence[int], names: Sequence[str]
) -> Figure:
    """Who can know whom after so many layers: depths[layout] (L, L) int, layers until known, 0 never; one row a layout."""
    figure, axes = new(
        len(depths),
        len(layers),
        width=2.3 * len(layers),
        height=2.25 * len(depths) + 0.3,
        squeeze=False,
    )
    colours = ListedColormap(["#f2f2f2", COLOURS[0], COLOURS[1]])
    for line, (layout, depth) in zip(axes, depths.items(), strict=True):
        for axis, n in zip(line, layers, strict=True):
            known = np.where((depth == 0) | (depth > n), 0, np.where(depth == 1, 1, 2))
            axis.imshow(known, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
            axis.set_xticks(np.arange(0.5, len(names) - 1), minor=True)
            axis.set_yticks(np.arange(0.5, len(names) - 1), minor=True)
            axis.grid(which="minor", color="white", linewidth=0.8)
            axis.tick_params(which="minor", length=0)
            axis.set_title(f"after {n} layer{'s' * (n != 1)}", fontsize=9, loc="left")
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
            axis.set_yticks(range(len(names)), names, fontsize=6.5)
            axis.tick_params(length=0, pad=1)
        line[0].set_ylabel(layout, fontsize=9, fontweight="bold")
    words = {
        "looks at it": COLOURS[0],
        "can know it through another token": COLOURS[1],
        "cannot know it": "#f2f2f2",
    }
    swatches = [
        Patch(facecolor=colour, edgecolor="#777777", label=text) for text, colour in words.items()
    ]
    figure.legend(
        handles=swatches, loc="outside lower center", ncols=3 if len(layers) > 2 else 1, fontsize=8
    )
    ends = "; ".join(
        f"{layout}: {np.mean((depth > 0) & (depth <= layers[-1])):.0%}"
        for layout, depth in depths.items()
    )
    return _done(figure, f"Which token's state can depend on which token, after {', '.join(map(str, layers))} layers. "
                 f"Share of pairs known at the end: {ends}.")  # fmt: skip


def effects(panels: Mapping[str, pd.DataFrame], *, unit: str) -> Figure:
    """Tables of effects, layouts (rows) by segments (columns), one panel a title; an exact zero is left light."""
    n_rows = max(len(table) for table in panels.values())
    figure, axes = new(
        1, len(panels), width=1.7 * len(panels) + 1.2, height=0.38 * n_rows + 1.1, squeeze=False
    )
    top = max(float(table.to_numpy().max()) for table in panels.values())
    for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
        values = table.to_numpy()
        axis.imshow(
            np.where(values > 0, 0.35 + 0.65 * values / top, 0),
            cmap="Blues",
            vmin=0,
            vmax=1.2,
            aspect="auto",
        )
        for (i, j), value in np.ndenumerate(values):
            text, colour = (
                (f"{value:.2g}", "white" if value > 0.6 * top else "black")
                if value > 0
                else ("0", "black")
            )
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(table.columns)), table.columns, fontsize=8)
        axis.set_yticks(
            range(len(table)), table.index if axis is axes[0][0] else [""] * len(table), fontsize=8
        )
        axis.tick_params(length=0)
    figure.supxlabel(unit, fontsize=8)
    zeros = "; ".join(
        f"{title}: " + (", ".join(f"{row} {column}" for row in table.index for column in table.columns
                                  if table.loc[row, column] == 0) or "none")
        for title, table in panels.items()
    )  # fmt: skip
    return _done(figure, f"{unit}. No effect at all (exactly 0) at {zeros}.")


def cost(table: pd.DataFrame, *, block: int) -> Figure:
    """Share of L x L pairs against L: columns layout, ratio, length, cells, blocks (shares of 1)."""
    ratios = list(dict.fromkeys(table["ratio"]))
    figure, axes = new(
        1, len(ratios), width=3.4 * len(ratios), height=2.9, sharey=True, squeeze=False
    )
    each = zip(COLOURS, "osD^", ("-", "--", "-.", ":"), strict=False)
    looks = dict(
        zip(dict.fromkeys(table["layout"]), each, strict=False)
    )  # of a layout; one line may lie on another
    for axis, ratio in zip(axes[0], ratios, strict=True):
        part = table[table["ratio"] == ratio]
        above = 0.0
        groups = sorted(
            part.groupby("layout", sort=False), key=lambda group: group[1]["blocks"].iloc[-1]
        )
        for layout, rows in groups:
            colour, marker, line = looks[layout]
            axis.plot(
                rows["length"], 100 * rows["cells"], color=colour, linewidth=1.4, linestyle=line
            )
            axis.plot(
                rows["length"],
                100 * rows["blocks"],
                marker,
                color=colour,
                markersize=4,
                linestyle=":",
            )
            share = 100 * rows["blocks"].iloc[-1]
            above = max(share, above + 8)  # labels keep their distance
            axis.annotate(f" {layout} {share:.0f} %", (rows["length"].iloc[-1] * 1.1, above), va="center", color=colour,
                          fontsize=7.5, annotation_clip=False)  # fmt: skip
        axis.set_title(f"A : B = {ratio}", fontsize=10, loc="left")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(dict.fromkeys(part["length"])), list(dict.fromkeys(part["length"])))
        axis.set_xlabel("sequence length L, tokens")
    axes[0][0].set_ylabel("% of the L x L pairs")
    axes[0][0].set_ylim(0, 112)
    figure.supxlabel(
        f"without marks: pairs that the mask allows\ndotted, with marks: in {block} x {block} blocks that FlexAttention computes",
        fontsize=8,
    )
    last = table[table["length"] == table["length"].max()]
    return _done(figure, "Share of all pairs that FlexAttention computes, at the greatest length: " + "; ".join(
        f"{row.layout}, A:B {row.ratio}: {row.blocks:.0%}" for row in last.itertuples()) + ".")  # fmt: skip


def similarity(cosine: np.ndarray) -> Figure:
    """Cosine similarities (n, n) as a heat map, pictures in rows and texts in columns; the right pairs are the diagonal."""
    figure, axis = new(width=3.6, height=3.0)
    shown = axis.imshow(cosine, cmap="cividis", interpolation="nearest")
    figure.colorbar(shown, ax=axis, label="cosine")
    axis.set_xlabel("text")
    axis.set_ylabel("picture")
    hits = int((cosine.argmax(1) == np.arange(len(cosine))).sum())
    axis.set_title(f"{hits} of {len(cosine)} are nearest to their own text")
    return _done(
        figure,
        f"Heat map of cosine similarity of {len(cosine)} pictures and texts; {hits} rows peak on the diagonal.",
    )


def effect_table(
    table: pd.DataFrame, *, baseline: str, unit: str = "points of precision@1"
) -> Figure:
    """Paired differences by group: columns arm, group, difference, low, high; bold where the interval excludes 0.

    With p_holm, corrected for all cells, and n_seeds, a star where `analysis.certain`.
    """
    import seaborn as sns  # here: a first picture need not wait for it

    wide = {
        name: table.pivot(index="arm", columns="group", values=name)
        for name in ("difference", "low", "high")
    }
    arms, groups = list(dict.fromkeys(table["arm"])), list(dict.fromkeys(table["group"]))
    value, low, high = (
        wide[name].loc[arms, groups].to_numpy() for name in ("difference", "low", "high")
    )
    drawn, clear, stands = (
        ~np.isnan(value),
        (low > 0) | (high < 0),
        np.zeros_like(value, dtype=bool),
    )
    if "p_holm" in table:
        certain = table.assign(certain=[analysis.certain(row) for row in table.to_dict("records")])
        stands = (
            certain.pivot(index="arm", columns="group", values="certain")
            .loc[arms, groups]
            .to_numpy()
            == True
        )  # noqa: E712
    limit = 1.6 * max(1.0, float(np.nanmax(np.abs(value))))  # pale, for black numbers
    figure, axis = new(width=6.5, height=0.38 * len(arms) + 1.1)
    sns.heatmap(value, vmin=-limit, vmax=limit, cmap="PuOr", cbar=False, annot=True, fmt="+.1f", ax=axis,
                annot_kws={"size": 8, "color": "black"}, xticklabels=[textwrap.fill(group, 18) for group in groups],
                yticklabels=[textwrap.fill(arm, 34) for arm in arms])  # fmt: skip
    for text, bold, star in zip(axis.texts, clear[drawn], stands[drawn], strict=True):
        text.set_weight("bold" if bold else "normal")
        text.set_text(text.get_text() + "*" * bool(star))
    axis.tick_params(length=0, rotation=0)
    seeds = f"; n = {span(table['n_seeds'])} seeds" if "n_seeds" in table else ""
    axis.set_title(f"difference to '{baseline}', {unit}")
    star = (
        f"\n*: corrected for all cells, too ({stands.sum()} of {drawn.sum()})"
        if "p_holm" in table
        else ""
    )
    axis.set_xlabel(f"bold: the 95 % interval excludes 0, uncorrected{star}{seeds}")
    listing = "; ".join(
        f"{row.arm}, {row.group}: {row.difference:+.1f}" for row in table.itertuples()
    )
    return _done(figure, f"Paired differences to {baseline} by group: {listing}.")


def cost_score(table: pd.DataFrame, *, named: Sequence[str], title: str, xlabel: str) -> Figure:
    """Cost against score, a point an arm: columns arm, cost, value, low, high (low and high may be nan).

    The arms in `named` have their names and intervals, the others are small and grey: many cost the same.
    """
    figure, axis = new(width=6.5, height=3.4)
    chosen, dearest = table["arm"].isin(named), table["cost"].max()
    rest, table = table[~chosen], table[chosen].sort_values("value")
    axis.plot(
        rest["cost"], rest["value"], ".", color="#999999", markersize=5, label="the other arms"
    )
    errors = np.nan_to_num(
        np.stack([table["value"] - table["low"], table["high"] - table["value"]]).clip(min=0)
    )
    same = table.groupby("cost")[
        "cost"
    ]  # intervals at one cost would look like one: they stand a little apart
    x = table["cost"] + (same.cumcount() - (same.transform("size") - 1) / 2) * dearest / 120
    axis.plot(x, table["value"], "o", color=COLOURS[0], markersize=5)
    axis.errorbar(x, table["value"], yerr=errors, fmt="none", color=COLOURS[0], linewidth=1)
    middle, half = np.mean(axis.get_ylim()), np.ptp(axis.get_ylim()) / 2
    axis.set_ylim(
        middle - max(2.5, half), middle + max(2.5, half)
    )  # a tenth of a point must not fill the figure
    axis.set_xlim(0, dearest * 1.04)
    placed: list[tuple[float, float]] = []
    for row in (
        table.itertuples()
    ):  # names beside their points, moved apart upwards; of the dearest on the left
        place, gap = row.value, np.ptp(axis.get_ylim()) / 14
        for x, y in placed:
            place = y + gap if abs(x - row.cost) < dearest / 3 and abs(y - place) < gap else place
        placed.append((row.cost, place))
        left = row.cost > 0.7 * dearest
        axis.annotate(row.arm, (row.cost, place), xytext=(-8 if left else 8, -4), textcoords="offset points", fontsize=8,
                      va="center", ha="right" if left else "left")  # fmt: skip
    if len(rest):
        axis.legend(loc="best", fontsize=8)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("precision@1, %")
    axis.set_title(title)
    listing = "; ".join(
        f"{row.arm}: {row.cost:,.4g}, {row.value:.1f} %"
        for row in pd.concat([table, rest]).itertuples()
    )
    return _done(figure, f"{title}, {xlabel}. {listing}.")


def curves(
    table: pd.DataFrame, *, xlabel: str, title: str, log: bool = False,
    reference: tuple[str, Mapping[str, float]] | None = None,
) -> Figure:  # fmt: skip
    """A score against what was varied: columns label, x, value, low, high; a line a label, named at its right end.

    reference: name, and value, low, high of a level line with its band. `log`: x doubles from tick to tick.
    """
    figure, axis = new(width=6.5, height=3.0)
    first, last, ends = table["x"].min(), table["x"].max(), []
    for i, (label, part) in enumerate(table.groupby("label", sort=False)):
        part = part.sort_values("x")
        aside = (
            i - (table["label"].nunique() - 1) / 2
        ) / 80  # of the figure's width, so that no bar lies in another
        x = part["x"] * (last / first) ** aside if log else part["x"] + aside * (last - first)
        errors = np.nan_to_num(
            np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(min=0)
        )
        axis.errorbar(x, part["value"], yerr=errors, color=COLOURS[i % 8], marker="os^D"[i % 4], capsize=2,
                      linestyle=("-", "--", ":", "-.")[i % 4], markersize=5, linewidth=1.5)  # fmt: skip
        ends.append((part["x"].iloc[-1], part["value"].iloc[-1], x.iloc[-1], label))
    place = {x: -np.inf for x, *_ in ends}
    for last_x, value, x, label in sorted(
        ends
    ):  # names of lines that end at the same x are moved apart
        place[last_x] = max(value, place[last_x] + np.ptp(axis.get_ylim()) / 14)
        axis.annotate(
            label,
            (x, place[last_x]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    if log:
        axis.set_xscale("log", base=2)
    axis.set_xticks(
        sorted(table["x"].unique()), [f"{x:,.10g}" for x in sorted(table["x"].unique())]
    )
    axis.minorticks_off()
    if reference is not None:
        name, level = reference
        axis.axhline(level["value"], color="grey", linewidth=1)
        if np.isfinite(level["low"]):
            axis.axhspan(level["low"], level["high"], color="#eeeeee", zorder=0)
        title += f"\ngrey line and band: {name}, {level['value']:.1f}"
    axis.margins(x=0.05)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("precision@1, %")
    axis.set_title(title)
    listing = "; ".join(
        f"{row.label}, {row.x:g}: {row.value:.1f}"
        for row in table.sort_values(["label", "x"]).itertuples()
    )
    return _done(figure, f"{title}. {listing}.".replace("\n", ". "))


mpl.rcParams.update(STYLE)  # one style for the session, so that titles set later follow it too
