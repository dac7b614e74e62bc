"""Are the committed results the ones that were committed, do figures match their tables, does a smoke run repeat?

    python scripts/verify.py                 # check; exits with 1 and a list of what is wrong
    python scripts/verify.py --write         # after new results: write the manifests and this machine's smoke run anew
    python scripts/verify.py --without-run   # hashes, tables and figures alone: seconds

reports/smoke_arm.json holds a smoke run of each kind of CPU. One with AVX-512 gives that of one without, to the bit, under
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`: PyTorch's kernels and oneDNN's are chosen apart (tried on AMD EPYC).

MANIFEST.sha256 in reports/ and in data/ is in the format of sha256sum: `cd reports && sha256sum -c MANIFEST.sha256`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cocoa_lib.embedder import CocoaEmbedder
from cocoa_lib.evaluate import effects as analysis
from cocoa_lib.evaluate.score import evaluate
from cocoa_lib.evaluate.tasks import choose_tasks
from cocoa_lib.recipes import make_recipe
from cocoa_lib.run.arms import read_arms
from cocoa_lib.run.profiles import load_profile
from cocoa_lib.run.stage import run_stage
from cocoa_lib.show import figures
from cocoa_lib.store.checkpoint import provenance, read_meta
from cocoa_lib.store.files import file_hash, write_json
from cocoa_lib.world.build import build

ROOT = Path(__file__).resolve().parent.parent
MANIFEST, SMOKE = "MANIFEST.sha256", "smoke_arm.json"
ARM = "contrastive"  # one stage and the evaluation, from the committed backbone


def listing(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of all files below, but the manifest, in order. Hidden ones are work in progress."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hidden = [name for name in paths if any(part.startswith(".") for part in Path(name).parts)]
    return {name: file_hash(path) for name, path in paths.items() if name != MANIFEST and name not in hidden}


def write_manifest(folder: Path) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in listing(folder).items()]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8", newline="\n")


def check_manifest(folder: Path) -> list[str]:
    """What differs from the folder's manifest: altered, missing and unlisted files."""
    path = folder / MANIFEST
    if not path.is_file():
        return [f"{path}: no such file; `python scripts/verify.py --write` makes it"]
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
    if any(len(line) != 2 for line in lines):
        return [f"{path}: not lines of hash and name; restore it from git"]
    wanted, found = {name: digest for digest, name in lines}, listing(folder)
    return [
        f"{folder / name}: "
        + ("missing" if name not in found else "not in the manifest" if name not in wanted else "altered")
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]


def check_report(report: Path) -> list[str]:
    """A report's summary, and its figures of the ablation, against its result tables; every figure with its words."""
    from publish import summary

    wrong = []
    results = analysis.gather_results(report)
    per_query = analysis.gather_ranks(report, results)
    if (report / "summary.md").read_text(encoding="utf-8").strip() != summary(report):
        wrong.append(f"{report / 'summary.md'}: not what the tables below results/ give; run scripts/publish.py again")
    drawn = report / "figures"
    for picture in sorted(drawn.glob("*.png")):
        wrong += [
            f"{picture}: no {suffix} beside it"
            for suffix in (".svg", ".txt")
            if not picture.with_suffix(suffix).is_file()
        ]
    if (drawn / "forest.txt").is_file():  # its words hold the numbers it draws
        shown = [name for name, arm in read_arms().items() if arm.kind == "arm"]  # in the notebook's order
        effects = analysis.paired_effects(per_query[per_query["arm"].isin(shown)], "contrastive").set_index("arm")
        order = [name for name in shown if name in effects.index]
        figure = figures.forest(effects.loc[order].reset_index(), baseline="contrastive")
        if figure.alt != (drawn / "forest.txt").read_text(encoding="utf-8").strip():
            wrong.append(f"{drawn / 'forest.png'}: its numbers are not those of the tables below {report / 'results'}")
    return wrong


def smoke_run(folder: Path) -> dict[str, Any]:
    """One arm of the smoke profile: what it gives, and on what. On one thread, since more add up in another order."""
    torch.set_num_threads(1)
    profile, arm = load_profile("smoke"), read_arms()[ARM]
    build(folder / "data", **profile["benchmark"])
    out = run_stage(
        "stage3", make_recipe("stage3", profile["stage3"] | arm.stage3), parent=ROOT / "data" / "backbone",
        data=folder / "data", out=folder / "out", allow_parent=True, show_progress=False,
    )  # fmt: skip
    embedder, tasks = CocoaEmbedder.load(out), choose_tasks(["all"], str(folder / "data"))
    _, per_query = evaluate(embedder, str(folder / "data"), tasks=tasks, show_progress=False)
    made = provenance()
    return {
        "arm": ARM,
        "data": json.loads((folder / "data" / "manifest.json").read_text(encoding="utf-8"))["content_hash"],
        "loss": pd.read_csv(out / "log.csv")["loss"].tolist(),
        "hits": int((per_query["rank"] == 1).sum()),
        "queries": len(per_query),
        "weights_sha256": read_meta(out)["weights_sha256"],
        "where": {
            "versions": made["versions"],
            "python": made["python"],
            "machine": made["machine"],
        },
    }


def compare_runs(found: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """On a record's machine and versions every bit counts; elsewhere the loss to 1 % of the first (sums in another order)."""
    wanted = next((record for record in records if record["where"] == found["where"]), records[0])
    wrong = [f"smoke run: {name} is {found[name]}, was {wanted[name]}" for name in ("arm", "data", "queries")
             if found[name] != wanted[name]]  # fmt: skip
    if len(found["loss"]) != len(wanted["loss"]) or not np.allclose(found["loss"], wanted["loss"], rtol=1e-2):
        wrong.append(f"smoke run: losses {found['loss']}, were {wanted['loss']}")
    if found["where"] == wanted["where"] and found["weights_sha256"] != wanted["weights_sha256"]:
        wrong.append("smoke run: same machine and versions, but other weights than recorded")
    return wrong


def verify(root: Path, run: bool = True) -> list[str]:
    wrong = [complaint for name in ("reports", "data") for complaint in check_manifest(root / name)]
    for results in sorted((root / "reports").glob("*/results")):
        try:
            wrong += check_report(results.parent)
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    record = root / "reports" / SMOKE
    if run and not record.is_file():
        wrong.append(f"{record}: no such file; `python scripts/verify.py --write` makes it")
    elif run:
        with tempfile.TemporaryDirectory() as folder:
            wrong += compare_runs(smoke_run(Path(folder)), json.loads(record.read_text(encoding="utf-8")))
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write manifests and record instead of checking")
    parser.add_argument("--without-run", action="store_true", help="leave the smoke run out")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(argv)
    if args.write:
        if not args.without_run:
            record = args.root / "reports" / SMOKE
            records = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
            with tempfile.TemporaryDirectory() as folder:
                found = smoke_run(Path(folder))
            others = [other for other in records if other["where"]["machine"] != found["where"]["machine"]]
            write_json(record, [*others, found])
        for name in ("reports", "data"):
            write_manifest(args.root / name)
        return 0
    wrong = verify(args.root, run=not args.without_run)
    print(
        "\n".join(wrong)
        or "reports/ and data/ are as committed" + ("" if args.without_run else ", and the smoke run repeats")
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
