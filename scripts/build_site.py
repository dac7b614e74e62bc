#!/usr/bin/env python
"""Build the pages: the notebooks of a run (or notebooks/ itself), docs/*.md and a front page.

    python scripts/build_site.py runs/laptop/notebooks reports/laptop --out reports/site

The first argument is a folder of executed notebooks, the second the report whose finding the front
page states. Sphinx does the rest (docs/conf.py). The site is written aside and then put in place.
"""

from __future__ import annotations

import argparse
import base64
import re
import shutil
import sys
import tempfile
from html import escape
from pathlib import Path

import nbformat
from sphinx.cmd.build import build_main

from cocoa_lib.evaluate import read_ranks, read_runs, score_arms
from cocoa_lib.show import arms, figures

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "contrastive"
MAX_BYTES = 12_000_000


def read_card(path: Path) -> dict[str, str]:
    """Read what the front page says of a notebook: title, first sentence in bold, first figure."""
    cells = nbformat.read(path, as_version=4).cells
    text = cells[0].source
    pictures = [
        output.data["image/png"]
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    sentence = re.search(r"\*\*(.+?)\*\*", text, re.DOTALL)
    return {
        "file": f"notebooks/{path.stem}.html",
        "title": text.splitlines()[0].lstrip("# "),
        "sentence": sentence[1] if sentence else "",
        "picture": pictures[len(pictures) > 1] if pictures else "",
    }


def write_cards(notebooks: list[Path], static: Path) -> str:
    """Write the six cards as HTML, and their pictures as files."""
    cards = []
    for path in notebooks:
        card = read_card(path)
        name = f"card_{path.stem[:2]}.png"
        if card["picture"]:
            (static / name).write_bytes(base64.b64decode(card["picture"]))
        image = f'<img src="_static/{name}" alt="">' * bool(card["picture"])
        cards.append(
            f'<a href="{card["file"]}">{image}<b>{escape(card["title"])}</b>'
            f"<span>{escape(card['sentence'])}</span></a>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def write_finding(report: Path, static: Path) -> str:
    """State the finding of a report in Markdown, and draw its figure: the planned comparison."""
    ranks, runs = read_ranks(report), read_runs(report)
    scores, found = score_arms(ranks), set(ranks["arm"])
    main = "cocoa" if "cocoa" in found else next(arm for arm in sorted(found) if arm != BASELINE)
    effects = arms.compare_groups(ranks, main, BASELINE)
    title = arms.say_effect(effects, main, BASELINE)
    curve = arms.learning_curve(scores, runs)
    curve = curve[curve["label"].isin([main, BASELINE])] if len(curve) else curve
    said = arms.say_curve(ranks, curve, main, BASELINE) if len(curve) else ""
    if said:
        title = f"{said}, against contrastive learning alone"
        figure = figures.draw_curves(curve, title=title, xlabel="contrastive steps", log=True)
    else:
        xlabel = f"{main} - {BASELINE}, points of precision@1"
        figure = figures.draw_forest(effects, title=title, xlabel=xlabel)
    figures.save(figure, static / "finding")
    means, seeds = scores.groupby("arm")["overall"].mean(), int(effects["n_seeds"].iloc[0])
    levels = f"CoCoA scores {means[main]:.1f} %, contrastive learning alone {means[BASELINE]:.1f} %"
    if said:
        wide = curve.pivot_table(index="x", columns="label", values="value").dropna()
        levels = "; ".join(
            f"after {x:,} contrastive steps CoCoA scores {row[main]:.1f} %, contrastive learning "
            f"alone {row[BASELINE]:.1f} %"
            for x, row in wide.iterrows()
        )
    return (
        f"**{title[0].upper()}{title[1:]}.** In report `{report.name}`, {levels} (precision@1, "
        f"{ranks['task'].nunique()} tasks, {seeds} seed{'s' * (seeds > 1)}).\n\n"
        f'<img src="_static/finding.png" alt="{escape(figure.alt)}" width="640">'
    )


def write_footer(report: Path) -> str:
    """One line for the foot of each page: licences, and which commit made the numbers."""
    commits = sorted(set(read_runs(report)["commit"].astype(str)))
    return (
        "the authors, Apache-2.0. Drawings: OpenMoji, CC BY-SA 4.0; names: Unicode CLDR. "
        f"Numbers of report {report.name}: commit {', '.join(commits)}"
    )


def adapt_page(page: Path, static: Path) -> None:
    """Make a page of docs stand alone: copy the repository's pictures, drop links out of the site."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"!\[[^\]]*\]\((\.\./[^)]+)\)", text)):
        if (file := ROOT / "docs" / name).is_file():
            copy = "-".join(file.resolve().relative_to(ROOT).parts)
            shutil.copyfile(file, static / copy)
            text = text.replace(name, f"_static/{copy}")
    text = re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", text)
    page.write_text(text, encoding="utf-8")


def write_source(notebooks: list[Path], report: Path, source: Path) -> None:
    """Write the folder that Sphinx reads."""
    shutil.copytree(ROOT / "docs", source)
    (source / "notebooks").mkdir()
    for path in notebooks:
        content = nbformat.read(path, as_version=4)
        content.metadata.pop("widgets", None)
        nbformat.write(content, source / "notebooks" / path.name)
    pages = [f"notebooks/{path.stem}" for path in notebooks]
    docs = sorted(path.stem for path in source.glob("*.md"))
    static = source / "_static"
    for name in docs:
        adapt_page(source / f"{name}.md", static)
    svg = (source / "pipeline.svg").read_text(encoding="utf-8")
    parts = {
        "finding": write_finding(report, static),
        "cards": write_cards(notebooks, static),
        "pipeline": f'<div class="pipeline">{svg}</div>',
        "notebooks": "\n".join(pages),
        "docs": "\n".join(docs),
    }
    template = (ROOT / "scripts" / "front_page.md").read_text(encoding="utf-8")
    for name, text in parts.items():
        template = template.replace("{{" + name + "}}", text)
    (source / "index.md").write_text(template, encoding="utf-8")


def build_site(notebooks: list[Path], report: Path, out: Path) -> None:
    """Build the site into `out`. Raises SystemExit where Sphinx fails or the site is over 12 MB."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "source", Path(folder) / "site"
        write_source(notebooks, report, source)
        foot = ["-D", f"copyright={write_footer(report)}"]
        if build_main(["-q", *foot, "-d", f"{folder}/doctrees", str(source), str(built)]):
            raise SystemExit("sphinx-build failed")
        size = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise SystemExit(f"the site has {size / 1e6:.1f} MB, over {MAX_BYTES / 1e6:.0f}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(built, out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", type=Path, help="a folder of executed notebooks")
    parser.add_argument("report", type=Path, help="the report whose finding the front page states")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "site")
    options = parser.parse_args(arguments)
    notebooks = sorted(options.notebooks.glob("0*.ipynb"))
    if not notebooks:
        sys.exit(f"{options.notebooks}: no executed notebooks; run `make reproduce` first")
    build_site(notebooks, options.report, options.out)


if __name__ == "__main__":
    main()
