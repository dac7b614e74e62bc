"""Check the two gates before contrastive learning counts.

    python scripts/gates.py PROFILE [--seed 0 1 2] [--out reports/PROFILE/gates.csv]

Reads each seed's stages 1 and 2, which must be trained, and restores 200 held-out texts. Writes a
row a seed and gate; exits with 1 where a gate fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from cocoa_lib.data import corpus
from cocoa_lib.embedder import load_module
from cocoa_lib.evaluate.restore import check_gates
from cocoa_lib.run import Run
from cocoa_lib.show import restored
from cocoa_lib.store.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
N_TEXTS = 200
COLUMNS = ["seed", "gate", "value", "threshold", "passed", "n"]


def check_seed(profile: str, seed: int) -> pd.DataFrame:
    """Check one seed: columns seed, gate, value, threshold, passed, n (texts).

    Raises SystemExit where a stage is not trained.
    """
    run = Run(profile, seed=seed)
    if not run.done("stage2"):
        raise SystemExit(
            f"{run.folder('stage2')}: no checkpoint; train it by "
            f"`python -m cocoa_lib.run stage2 --profile {profile} --seed {seed}`"
        )
    one, two = (load_module(run.stage(stage, show_progress=False)) for stage in run.stages[:2])
    rows = corpus.captions(run.data, "heldout")[:N_TEXTS]
    recipe, folder = run.recipe("stage1"), run.folder("stage1")
    how = restored.stage1_settings(folder, one.model, one.inputs, recipe, seed)
    found = restored.restore_all(one.model, one.inputs, rows, **how)
    how = restored.stage2_settings(run.recipe("stage2"))
    door = restored.measure_door({"after stage 2": two.model}, two.inputs, rows, **how)
    gates = check_gates(found, door, one.inputs.image_processor.merge_size)
    return gates.assign(seed=seed, n=len(rows))[COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="reports/PROFILE/gates.csv unless given")
    args = parser.parse_args()
    table = pd.concat([check_seed(args.profile, seed) for seed in args.seed])
    out = args.out or ROOT / "reports" / args.profile / "gates.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda aside: table.to_csv(aside, index=False))
    print(table.to_string(index=False))
    sys.exit(bool((table["passed"] == "no").any()))


if __name__ == "__main__":
    main()
