"""Kill runs at random moments, run the same command again, and compare with a run that nobody disturbed, bit for bit.

    python scripts/nightly/soak.py --minutes 10 [--seed 0] [--folder runs/soak]

Tiny runs of every stage and of the evaluation on a tiny benchmark. A round takes the next fault in turn:

    causal .. stage3  SIGKILL at a moment drawn over the whole length of an undisturbed run
    evaluation        the same for `python -m cocoa_lib.evaluate`
    saving            SIGKILL of a stage while files of a checkpoint, or of the finished folder, are being written
    clock back        SIGKILL, then the checkpoints' times are set a day ahead of the clock
    second run        a second command into the same folder: it must refuse, and the first must not notice

Prints a table of counts and exits with 1 if anything was lost. Each command runs in a process of its own, forked from
a server that has imported the library once: a dozen rounds a minute instead of two.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import torch

from cocoa_lib.data import corpus
from cocoa_lib.evaluate.__main__ import main as evaluate
from cocoa_lib.recipes import make_recipe
from cocoa_lib.run.stage import run_stage
from cocoa_lib.store.checkpoint import save_checkpoint, weights_hash
from cocoa_lib.world.backbone import new_backbone
from cocoa_lib.world.build import build

STAGES = ("stage1", "stage2", "stage3")
PARENT = {"stage1": "causal", "stage2": "stage1", "stage3": "stage2"}
RECIPE = {"steps": 12, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "max_length": 128, "save_steps": 2,
          "logging_steps": 5, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3}  # fmt: skip
FAULTS = (*STAGES, "evaluation", "saving", "clock back", "second run")
COUNTS = ("tried", "killed", "refused", "equal", "lost")


def run_in_child(home: Path, name: str, out: Path, log: Path) -> None:
    """A stage or the evaluation in this process, its output in `log`."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if name == "evaluation":
        words = [home / "stage3", "--root", home / "world", "--out", out, "--batch-size", 4, "--n-queries", 6]
        evaluate(list(map(str, words)))
        return
    values = RECIPE | ({"mini_batch_size": 3, "temperature": 0.1} if name == "stage3" else {})
    run_stage(name, make_recipe(name, values), parent=home / PARENT[name], data=home / "world", out=out)


def prepare(home: Path) -> None:
    """The benchmark and the random model that the stages start from."""
    build(home / "world", seed=0, n_pairs=64, n_queries=8, n_corpus=16)
    rows = [*corpus.captions(home / "world"), *corpus.questions(home / "world")]
    model, inputs = new_backbone(
        [row["text"] + row["target"] for row in rows], vocab_size=400, image_pixels=1024, seed=0, hidden_size=64,
        layers=2, heads=2, vision_dim=32, vision_layers=1, patch_size=8,
    )  # fmt: skip
    save_checkpoint(home / "causal", model, inputs, {"stage": "causal"})


def result(out: Path) -> str:
    """A hash of what a run leaves: weights and log of a stage, tables of an evaluation. "" where it left nothing."""
    if (out / "cocoa.json").is_file():
        recorded = json.loads((out / "cocoa.json").read_text(encoding="utf-8"))["weights_sha256"]
        return f"{weights_hash(out)} {recorded} {hashlib.sha256((out / 'log.csv').read_bytes()).hexdigest()}"
    if (out / "run.json").is_file():
        return hashlib.sha256(pd.read_parquet(out / "ranks.parquet").to_csv().encode()).hexdigest()
    return ""


class Soak:
    """A folder with undisturbed results, and rounds against them."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.random = home, random.Random(seed)  # noqa: S311 - moments, not secrets
        self.counts = {fault: Counter() for fault in FAULTS}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["cocoa_lib.run", "cocoa_lib.evaluate", "cocoa_lib.embedder"])
        self.log = home / "soak.log"
        self.seconds: dict[str, float] = {}
        prepare(home)
        first = self.context.Process(target=int)  # so that the server imports the library now, not in a measured run
        first.start()
        first.join()
        for name in (*STAGES, "evaluation"):
            start = time.monotonic()
            child = self.start(name, home / name)
            child.join()
            self.seconds[name] = time.monotonic() - start
            if child.exitcode or not result(home / name):
                raise SystemExit(f"the undisturbed {name} failed: see {self.log}")

    def start(self, name: str, out: Path):
        child = self.context.Process(target=run_in_child, args=(self.home, name, out, self.log))
        child.start()
        return child

    def kill(self, child) -> bool:
        """SIGKILL; whether it came before the process had ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        return child.exitcode == -signal.SIGKILL

    def wait_for_write(self, child, work: Path, out: Path) -> None:
        """Until a checkpoint without its last file is there (a random one of the run), or the finished folder's."""
        skip = self.random.randrange(1, RECIPE["steps"] // RECIPE["save_steps"] + 1)
        step = skip * RECIPE["save_steps"]
        partial, folder = out.parent / f".{out.name}.partial", work / f"checkpoint-{step}"
        last = step == RECIPE["steps"]
        while child.is_alive() and not (partial if last else folder).exists():
            time.sleep(0.0005)
        time.sleep(self.random.random() * 0.05)

    def round(self, fault: str, number: int) -> bool:
        """One fault, then the same command again; True if the result is the undisturbed one."""
        count = self.counts[fault]
        name = fault if fault in self.seconds else self.random.choice(STAGES)
        out = self.home / f"round{number}" / name
        out.parent.mkdir()
        work = out.parent / f".{out.name}.work"
        count["tried"] += 1
        child = self.start(name, out)
        if fault == "second run":
            ok = self.second_run(child, name, out, work, count)
        else:
            if fault == "saving":
                self.wait_for_write(child, work, out)
            elif fault == "clock back":
                while child.is_alive() and not self.newest(work):
                    time.sleep(0.001)
                time.sleep(self.random.random() * self.seconds[name] / 2)
            else:
                time.sleep(self.random.random() * self.seconds[name])
            count["killed"] += self.kill(child)
            if fault == "clock back":
                self.ahead(work)
            again = self.start(name, out)
            again.join()
            ok = again.exitcode == 0
        ok = ok and result(out) == result(self.home / name) and not work.exists()
        count["equal" if ok else "lost"] += 1
        if ok:
            shutil.rmtree(out.parent)
        return ok

    def second_run(self, child, name: str, out: Path, work: Path, count: Counter) -> bool:
        while child.is_alive() and not (work / "run.json").exists():
            time.sleep(0.001)
        size = self.log.stat().st_size
        second = self.start(name, out)
        second.join()
        count["refused"] += second.exitcode != 0
        said = self.log.read_bytes()[size:]
        child.join()
        return child.exitcode == 0 and (second.exitcode == 0 or b"is at work in this folder" in said)

    def newest(self, work: Path) -> Path | None:
        whole = [path.parent for path in work.glob("checkpoint-*/complete.json")]
        return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)

    def ahead(self, work: Path) -> None:
        """As if the clock had been a day ahead until now: what is written next looks older than what is there."""
        tomorrow = time.time() + 86400
        for folder in work.glob("checkpoint-*"):
            os.utime(folder, (tomorrow, tomorrow))

    def table(self) -> str:
        total = sum(self.counts.values(), Counter())
        lines = [f"{'fault':14s}" + "".join(f"{name:>8s}" for name in COUNTS)]
        for fault, count in [*self.counts.items(), ("all", total)]:
            lines.append(f"{fault:14s}" + "".join(f"{count[name]:8d}" for name in COUNTS))
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept afterwards (default: a temporary folder)")
    args = parser.parse_args()
    if args.folder is not None and args.folder.exists():
        raise SystemExit(f"{args.folder}: exists already; the soak wants a folder of its own")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() if args.folder is None else contextlib.nullcontext(args.folder) as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        run, number, end = Soak(Path(folder), args.seed), 0, time.monotonic() + args.minutes * 60
        while time.monotonic() < end:
            fault = FAULTS[number % len(FAULTS)]
            if not run.round(fault, number):  # what was lost stays in its folder, to be looked at
                print(f"LOST: {fault}, see {Path(folder) / f'round{number}'} and {run.log}", file=sys.stderr)
            number += 1
        print(run.table())
        print(f"{(time.monotonic() - start) / 60:.1f} minutes, seed {args.seed}")
        if lost := sum(count["lost"] for count in run.counts.values()):
            print((Path(folder) / "soak.log").read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
            raise SystemExit(f"{lost} rounds did not end as the undisturbed run does")


if __name__ == "__main__":
    main()
