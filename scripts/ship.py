"""Copy the finished checkpoints of profile `laptop`, seed 0, into data/checkpoints, in bf16.

    python scripts/ship.py [--runs runs]

Each folder keeps log.csv and the record of its training. Weights that would make all of them larger
than LIMIT are left out. data/MANIFEST.sha256 is written anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from verify import write_manifest

from cocoa_lib.embedder import load_module
from cocoa_lib.evaluate import read_ranks, score_averages
from cocoa_lib.reconstruction import DECODER, load_decoder
from cocoa_lib.run import Run
from cocoa_lib.run.run import CHECKPOINTS
from cocoa_lib.store import checkpoint as store
from cocoa_lib.store.files import file_hash, write_json
from cocoa_lib.world.pictures import ATTRIBUTION

LIMIT = 16 << 20  # bytes of all of them
STAGES = {"contrastive": "stage3", "cocoa": "stage3", "stage2": "stage2", "stage1": "stage1"}
LOG, MODULES, TOKENIZER = "log.csv", "modules.json", "tokenizer.json"


def ship(run: Run, out: Path, limit: int = LIMIT) -> dict[str, int]:
    """Copy the checkpoints of a `Run` of arm cocoa, and of contrastive; return bytes of each.

    What is used most comes first. Exits where one is not finished or not evaluated.
    """
    runs = dict.fromkeys(STAGES, run) | {"contrastive": run.other(arm="contrastive")}
    if lost := [n for n in STAGES for do in (STAGES[n], "evaluate") if not runs[n].done(do)]:
        sys.exit(f"{run.root}: {lost[0]} is not finished or not evaluated; run `make reproduce`")
    shutil.rmtree(out, ignore_errors=True)
    sizes: dict[str, int] = {}
    for name, stage in STAGES.items():
        copy_checkpoint(runs[name].folder(stage), out / name)
        if count_bytes(out / name) + sum(sizes.values()) > limit:
            for path in set((out / name).iterdir()) - {out / name / LOG, out / name / store.META}:
                path.unlink()
        write_card(runs[name], out / name)
        sizes[name] = count_bytes(out / name)
    return sizes


def copy_checkpoint(folder: Path, out: Path) -> None:
    """Save a checkpoint's weights in bf16; keep what is known of its training."""
    module = load_module(folder, dtype=torch.bfloat16)
    has_decoder = (folder / DECODER).is_file()
    decoder = load_decoder(folder, module.model).bfloat16() if has_decoder else None
    kept = [folder / name for name in (LOG, MODULES) if (folder / name).is_file()]
    extra = {path.name: path.read_text(encoding="utf-8") for path in kept}
    store.save_checkpoint(out, module.model, module.inputs, module.meta, extra, decoder)
    words = json.loads((out / TOKENIZER).read_text(encoding="utf-8"))
    text = json.dumps(words, ensure_ascii=False, separators=(",", ":"))  # a third of its size
    (out / TOKENIZER).write_text(text, encoding="utf-8")
    made = {name: module.meta[name] for name in store.provenance()}
    meta = store.read_meta(out, check=False) | made
    meta["files_sha256"][TOKENIZER] = file_hash(out / TOKENIZER)
    write_json(out / store.META, meta | {"float32_sha256": module.meta["weights_sha256"]})


def write_card(run: Run, out: Path) -> None:
    """Write the model card: what it is, the scores of stage 3, whose drawings these are."""
    about = f"Profile {run.profile}, seed {run.seed}: {out.name}, rounded to bfloat16."
    if (out / MODULES).is_file():
        table = score_averages(read_ranks(run.folder("evaluate"))).dropna().round(1)
        about += " Before rounding, precision@1 in percent on the built-in benchmark:"
        text = f"{about}\n\n```\n{table.to_string(index=False)}\n```\n\n{ATTRIBUTION}"
        return store.add_scores(out, text)
    about += "" if any(out.glob("*.safetensors")) else " The weights are left out for their size."
    text = f"# CoCoA, {out.name}\n\n{about}\n\n{ATTRIBUTION}\n"
    (out / store.CARD).write_text(text, encoding="utf-8")


def count_bytes(folder: Path) -> int:
    """Count the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ship the checkpoints of profile laptop.")
    parser.add_argument("--runs", type=Path, help="where runs lie; default: runs/")
    sizes = ship(Run("laptop", retrain=True, runs=parser.parse_args().runs), CHECKPOINTS)
    write_manifest(CHECKPOINTS.parent)
    print(*(f"{name} {n / 1e6:.2f} MB" for name, n in sizes.items()), sep="\n")
    print(f"together {sum(sizes.values()) / 1e6:.2f} MB")
