"""Are the committed results as committed, do tables follow from ranks, does a smoke run repeat?

    python scripts/verify.py                 # check; exits with 1 and a list of what is wrong
    python scripts/verify.py --write         # after new results: write tables, manifests, smoke run
    python scripts/verify.py --without-run   # hashes and tables alone: seconds

MANIFEST.sha256 in reports/ and in data/ is in sha256sum's format: `sha256sum -c MANIFEST.sha256`.
A table in README.md or docs/ between `<!-- reports/laptop: arm arm -->` and `<!-- end -->` is written
from that report's ranks: the named arms in their order, or all. Between `<!-- reports/floors.csv -->`
and `<!-- end -->` stands that file.

reports/smoke_arm.json holds a smoke run of each kind of CPU. One with AVX-512 gives that of one
without, to the bit, under `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`: PyTorch's kernels and
oneDNN's are chosen apart (tried on AMD EPYC).
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cocoa_lib.data.tables import fingerprint
from cocoa_lib.evaluate import read_ranks
from cocoa_lib.evaluate.results import summarise
from cocoa_lib.run import Run
from cocoa_lib.store.checkpoint import provenance, read_meta
from cocoa_lib.store.files import file_hash, write_json

ROOT = Path(__file__).resolve().parent.parent
MANIFEST, SMOKE = "MANIFEST.sha256", "smoke_arm.json"
ARM = "contrastive"  # one stage and the evaluation, from the committed backbone
TABLE = re.compile(r"<!-- (reports/[\w.-]+)(?:: ([\w ]+))? -->\n(.*?)<!-- end -->", re.DOTALL)


def list_files(folder: Path) -> dict[str, str]:
    """List relative path -> sha256 of all files below, but the manifest and hidden ones."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): file_hash(path)
        for name, path in paths.items()
        if name.as_posix() != MANIFEST and not any(part.startswith(".") for part in name.parts)
    }


def write_manifest(folder: Path) -> None:
    """Write the folder's MANIFEST.sha256."""
    lines = [f"{digest}  {name}\n" for name, digest in list_files(folder).items()]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8", newline="\n")


def check_manifest(folder: Path) -> list[str]:
    """List what differs from the folder's manifest: altered, missing and unlisted files."""
    path = folder / MANIFEST
    if not path.is_file():
        return [f"{path}: no such file; `python scripts/verify.py --write` makes it"]
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
    if any(len(line) != 2 for line in lines):
        return [f"{path}: not lines of hash and name; restore it from git"]
    wanted, found, wrong = {name: digest for digest, name in lines}, list_files(folder), []
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            wrong.append(f"{folder / name}: missing")
        elif name not in wanted:
            wrong.append(f"{folder / name}: not in the manifest")
        elif wanted[name] != found[name]:
            wrong.append(f"{folder / name}: altered")
    return wrong


def fill_tables(text: str, root: Path) -> str:
    """Write the tables of a page anew, each from the ranks of its report or from a CSV file."""

    def read_rows(path: Path) -> list[str]:
        if path.suffix != ".csv":
            return summarise(read_ranks(path)).splitlines()
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [f"| {' | '.join(cells)} |" for cells in csv.reader(lines)]
        return [rows[0], "| --- " * len(rows[0].split(" | ")) + "|", *rows[1:]]

    def fill(match: re.Match[str]) -> str:
        head, rule, *rows = read_rows(root / match[1])
        by_name = {row.split(" ")[1]: row for row in rows}
        chosen = [by_name[name] for name in match[2].split()] if match[2] else rows
        start = match[0].split("\n", 1)[0]
        return "\n".join([start, head, rule, *chosen, "<!-- end -->"])

    return TABLE.sub(fill, text)


def check_tables(root: Path, write: bool = False) -> list[str]:
    """Check each report's summary.md, the tables of pages and the figures' companions."""
    wrong = []
    for ranks in sorted(root.glob("reports/*/ranks.parquet")):
        summary, text = ranks.parent / "summary.md", summarise(read_ranks(ranks.parent))
        if write:
            summary.write_text(text, encoding="utf-8")
        elif not summary.is_file() or summary.read_text(encoding="utf-8") != text:
            wrong.append(f"{summary}: not what the ranks beside it give; run with --write")
        for picture in sorted(ranks.parent.glob("figures/*.png")):
            for suffix in (".svg", ".txt"):
                if not picture.with_suffix(suffix).is_file():
                    wrong.append(f"{picture}: no {suffix} beside it")
    for page in sorted([*root.glob("*.md"), *root.glob("docs/*.md")]):
        text = page.read_text(encoding="utf-8")
        if (filled := fill_tables(text, root)) != text:
            if write:
                page.write_text(filled, encoding="utf-8")
            else:
                wrong.append(f"{page}: a table does not follow from its ranks; run with --write")
    return wrong


def run_smoke(folder: Path) -> dict[str, Any]:
    """Run one arm of the smoke profile, on one thread: more add up in another order."""
    torch.set_num_threads(1)
    run = Run(profile="smoke", arm=ARM, runs=folder)
    ranks, out = run.evaluate(show_progress=False), run.folder("stage3")
    made = provenance()
    return {
        "arm": ARM,
        "data": fingerprint(run.data),
        "loss": pd.read_csv(out / "log.csv")["loss"].tolist(),
        "hits": int((ranks["rank"] == 1).sum()),
        "queries": len(ranks),
        "weights_sha256": read_meta(out)["weights_sha256"],
        "where": {name: made[name] for name in ("versions", "python", "machine")},
    }


def compare_runs(found: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """List differences: on a record's machine and versions every bit counts, elsewhere the loss.

    Elsewhere the loss may differ by 1 % from the first record's: sums are made in another order.
    """
    wanted = next((one for one in records if one["where"] == found["where"]), records[0])
    wrong = [
        f"smoke run: {name} is {found[name]}, was {wanted[name]}"
        for name in ("arm", "data", "queries")
        if found[name] != wanted[name]
    ]
    loss, old = found["loss"], wanted["loss"]
    if len(loss) != len(old) or not np.allclose(loss, old, rtol=1e-2):
        wrong.append(f"smoke run: losses {loss}, were {old}")
    same_place = found["where"] == wanted["where"]
    if same_place and found["weights_sha256"] != wanted["weights_sha256"]:
        wrong.append("smoke run: same machine and versions, but other weights than recorded")
    return wrong


def verify(root: Path, run: bool = True) -> list[str]:
    """List all that is wrong."""
    wrong = [line for name in ("reports", "data") for line in check_manifest(root / name)]
    wrong += check_tables(root)
    record = root / "reports" / SMOKE
    if run and not record.is_file():
        wrong.append(f"{record}: no such file; `python scripts/verify.py --write` makes it")
    elif run:
        with tempfile.TemporaryDirectory() as folder:
            found = run_smoke(Path(folder))
        wrong += compare_runs(found, json.loads(record.read_text(encoding="utf-8")))
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Verify the committed results.")
    parser.add_argument("--write", action="store_true", help="write tables and manifests anew")
    parser.add_argument("--without-run", action="store_true", help="no smoke run")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(argv)
    if not args.write:
        wrong = verify(args.root, run=not args.without_run)
        print("\n".join(wrong) or "reports/, data/ and tables are as committed")
        return int(bool(wrong))
    check_tables(args.root, write=True)
    if not args.without_run:
        record = args.root / "reports" / SMOKE
        records = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
        with tempfile.TemporaryDirectory() as folder:
            found = run_smoke(Path(folder))
        machine = found["where"]["machine"]
        others = [one for one in records if one["where"]["machine"] != machine]
        write_json(record, [*others, found])
    for name in ("reports", "data"):
        write_manifest(args.root / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
