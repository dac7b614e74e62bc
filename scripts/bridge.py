"""How much comes back through EOS after a stage 2: as notebook 02 measures it, for several runs and seeds.

    python scripts/bridge.py benchmarks/results/bridge.csv runs/laptop runs/long

Of the hidden tokens of 64 held-out captions, the share restored exactly with the caption's own picture and with another one's;
what differs has passed through EOS. A row for each seed whose stage 2 of arm `cocoa` the run has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cocoa_lib.backbone import open_backbone
from cocoa_lib.data import corpus
from cocoa_lib.evaluate.restore import count_right
from cocoa_lib.run.arms import read_arms
from cocoa_lib.store.checkpoint import load_inputs, read_meta

N_PROBE = 64  # notebook 02's n_probe


def restored(folder: Path, data: Path) -> dict[str, float]:
    """Percent of the hidden tokens that come back, with the own and with another picture, and how many tokens were hidden."""
    meta = read_meta(folder)
    model, inputs, recipe = open_backbone(folder, bidirectional=True), load_inputs(folder, meta), meta["run"]["recipe"]
    how = {"text_rate": recipe["text_mask_rate"], "objective": recipe["objective"], "layout": recipe["layout"]}
    rows = corpus.captions(data, "heldout")[:N_PROBE]
    own = [row["image"] for row in rows]
    sides = {"own": own, "other": own[1:] + own[:1]}
    counts = {
        name: count_right(model, inputs, rows, pictures, **how).sum(0) for name, pictures in sides.items()
    }
    return {name: 100 * right / hidden for name, (right, hidden) in counts.items()} | {"n": counts["own"][1]}


def main(out: Path, runs: list[Path]) -> None:
    rows = []
    for run in runs:
        for file in sorted(run.glob(f"seed*/stage2/{read_arms()['cocoa'].key('stage2')}/cocoa.json")):
            steps = read_meta(file.parent)["run"]["recipe"]["steps"]
            found = restored(file.parent, run / "benchmark")
            rows.append(
                {"profile": run.name, "steps": steps, "seed": file.parents[2].name.removeprefix("seed"), **found}
            )
    table = pd.DataFrame(rows)
    table.insert(5, "through_eos", table["own"] - table["other"])
    table.round(3).to_csv(out, index=False)
    print(table.round(1).to_string(index=False))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
