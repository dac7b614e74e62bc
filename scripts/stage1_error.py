"""How far a run's stages 1 restore the hidden cells of held-out pictures: as notebook 02 measures it, for several checkpoints.

    python scripts/stage1_error.py runs/long benchmarks/results/stage1_error.csv cocoa stage1_longer

Mean squared error on the hidden cells of 64 held-out scenes, in units of normalised pixels, by the decoder and by the average
patch of these scenes; a row for each arm and seed whose stage 1 the run has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cocoa_lib.backbone import open_backbone
from cocoa_lib.corruption import patch_noise
from cocoa_lib.data import corpus
from cocoa_lib.evaluate.restore import cell_errors, reconstruct
from cocoa_lib.reconstruction import load_decoder
from cocoa_lib.run.arms import read_arms
from cocoa_lib.store.checkpoint import load_inputs, read_meta

N_PROBE = 64  # notebook 02's n_probe


def measure(folder: Path, data: Path) -> dict[str, float]:
    """The errors of one checkpoint of stage 1, whose recipe hid cells by noise, of its own seed."""
    run, model = read_meta(folder)["run"], open_backbone(folder, bidirectional=True)
    recipe, inputs, decoder = run["recipe"], load_inputs(folder, read_meta(folder)), load_decoder(folder, model)
    size = 3 * inputs.image_processor.temporal_patch_size * inputs.image_processor.patch_size**2
    how = {"decoder": decoder, "fill": patch_noise(size, seed=run["seed"]), "objective": recipe["objective"]}
    how |= {"text_rate": recipe["text_mask_rate"], "patch_rate": recipe["patch_mask_rate"]}
    rows = corpus.captions(data, "heldout")[:N_PROBE]
    restored = [reconstruct(model, inputs, row, draw=i, **how) for i, row in enumerate(rows)]
    return dict(
        zip(("decoder", "average"), cell_errors(restored, inputs.image_processor.merge_size), strict=True)
    )


def main(run: Path, out: Path, names: list[str]) -> None:
    rows = []
    for name in names:
        for folder in sorted(run.glob(f"seed*/stage1/{read_arms()[name].key('stage1')}/cocoa.json")):
            errors = measure(folder.parent, run / "benchmark")
            rows.append({"arm": name, "seed": folder.parents[2].name.removeprefix("seed"), **errors, "n": N_PROBE})
    table = pd.DataFrame(rows)
    table.round(5).to_csv(out, index=False)
    print(table.round(3).to_string(index=False))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
