"""Copy the finished checkpoints of profile `laptop`, seed 0, into data/checkpoints, in bf16.

    python scripts/ship.py [--runs runs]

Each folder keeps log.csv and the record of its training. Weights that would make all of them larger
than LIMIT are left out. data/MANIFEST.sha256 is written anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from verify import write_manifest

from cocoa_lib.embedder import load_module
from cocoa_lib.evaluate import read_ranks, score_averages
from cocoa_lib.reconstruction import DECODER, load_decoder
from cocoa_lib.run.run import CHECKPOINTS, Run
from cocoa_lib.store import checkpoint, files
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
        raise SystemExit(f"{run.root}: {lost[0]} is not finished, or not evaluated; train it")
    shutil.rmtree(out, ignore_errors=True)
    for name, stage in STAGES.items():
        copy_checkpoint(runs[name].folder(stage), out / name)
        write_card(runs[name], out / name)
        if count_bytes(out) > limit:
            for path in [p for p in (out / name).iterdir() if p.name not in (LOG, checkpoint.META)]:
                path.unlink()
            write_card(runs[name], out / name)
    return {name: count_bytes(out / name) for name in STAGES}


def copy_checkpoint(folder: Path, out: Path) -> None:
    """Save a checkpoint's weights in bf16; keep what is known of its training."""
    module = load_module(folder, dtype=torch.bfloat16)
    there = {path.name: path for path in folder.iterdir()}
    decoder = load_decoder(folder, module.model).bfloat16() if DECODER in there else None
    extra = {name: there[name].read_text("utf-8") for name in (LOG, MODULES) if name in there}
    checkpoint.save_checkpoint(out, module.model, module.inputs, module.meta, extra, decoder)
    words = json.loads((out / TOKENIZER).read_bytes())
    text = json.dumps(words, ensure_ascii=False, separators=(",", ":"))  # a third of its size
    (out / TOKENIZER).write_text(text, encoding="utf-8")
    meta = checkpoint.read_meta(out, check=False)
    meta |= {name: module.meta[name] for name in checkpoint.provenance()}
    meta["files_sha256"][TOKENIZER] = files.file_hash(out / TOKENIZER)
    meta["float32_sha256"] = module.meta["weights_sha256"]
    files.write_json(out / checkpoint.META, meta)


def write_card(run: Run, out: Path) -> None:
    """Write the model card: what it is, the scores of stage 3, whose drawings these are."""
    about = f"Profile {run.profile}, seed {run.seed}: {out.name}, rounded to bfloat16."
    if (out / MODULES).is_file():
        means = score_averages(read_ranks(run.folder("evaluate"))).dropna().round(1)
        table = means.to_string(index=False)
        about += f" Precision@1 in percent, before rounding:\n\n```\n{table}\n```"
        return checkpoint.add_scores(out, f"{about}\n\n{ATTRIBUTION}")
    about += "" if any(out.glob("*.safetensors")) else " The weights are left out for their size."
    (out / checkpoint.CARD).write_text(f"# {out.name}\n\n{about}\n\n{ATTRIBUTION}\n", "utf-8")


def count_bytes(folder: Path) -> int:
    """Count the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, help="where runs lie; default: runs/")
    sizes = ship(Run("laptop", retrain=True, runs=parser.parse_args().runs), CHECKPOINTS)
    write_manifest(CHECKPOINTS.parent)
    print({name: f"{n / 1e6:.2f} MB" for name, n in sizes.items()}, sum(sizes.values()), "bytes")
