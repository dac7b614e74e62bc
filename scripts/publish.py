"""Copy what readers need of a finished run into reports/: figures, result tables, notebooks and their pages.

    python scripts/publish.py runs/laptop reports/laptop
    python scripts/publish.py runs/laptop-mypairs reports/laptop-mypairs --tables   # no pictures of other people's data

Checkpoints and embeddings stay in the run. The target is written beside and renamed, so it is whole or not there.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from cocoa_lib import analysis
from cocoa_lib.profiles import read_arms

KEPT = ("results.csv", "per_query.parquet", "provenance.json")


def page(notebook: Path) -> str:
    """An executed notebook as one HTML page; pictures carry their alt text, links to notebooks lead to pages."""
    exporter = HTMLExporter(
        template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True,
        mathjax_url="", require_js_url="", jquery_url="",  # a page loads nothing from elsewhere
    )  # fmt: skip
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace(".ipynb)", ".html)")
        for output in cell.get("outputs", []):  # the lab template ignores the alt text of a PNG: write the tag itself
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt and "image/png" in output.get("data", {}):
                safe = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
                output.data = {
                    "text/html": f'<img alt="{safe}" src="data:image/png;base64,{output.data["image/png"].strip()}">'
                }
    return exporter.from_notebook_node(content)[0]


def summary(run: Path, baseline: str = "contrastive") -> str:
    """The README's table of a run: an arm a row, means over seeds, and the paired difference with its interval."""
    results, per_query = analysis.gather_results(run)
    scores = analysis.arm_scores(results).groupby("arm").mean(numeric_only=True)
    effects = analysis.paired_effects(per_query, baseline).set_index("arm")
    names = [
        name
        for name in ("classification", "vqa", "retrieval", "grounding", "ind", "ood", "overall")
        if scores[name].notna().any()
    ]
    lines = ["| arm | " + " | ".join(names) + " | difference [95 % interval] |", "|---" * (len(names) + 2) + "|"]
    for arm in [name for name in read_arms() if name in scores.index]:
        found = "(baseline)"
        if arm in effects.index:
            row = effects.loc[arm]
            found = f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
        lines.append(f"| {arm} | " + " | ".join(f"{scores.loc[arm, name]:.1f}" for name in names) + f" | {found} |")
    return "\n".join(lines)


def publish(run: Path, target: Path, tables_only: bool = False) -> None:
    aside = target.parent / f".{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if (run / "figures").is_dir() and not tables_only:
        shutil.copytree(run / "figures", aside / "figures")
    for results in sorted(run.glob("results/*/seed*/results.csv")):
        for name in KEPT:
            copy = aside / (results.parent / name).relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(results.parent / name, copy)
    if (run / "costs.csv").is_file():
        shutil.copy(run / "costs.csv", aside)
    for notebook in sorted(run.glob("notebooks/0*.ipynb")):
        if not (tables_only or notebook.name.endswith(".partial.ipynb")):
            (aside / f"{notebook.stem}.html").write_text(page(notebook), encoding="utf-8")
    (aside / "summary.md").write_text(summary(run) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]), "--tables" in sys.argv)
