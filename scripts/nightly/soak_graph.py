"""Kill the whole graph at random moments, run the same command until it ends, and compare with a graph nobody disturbed.

    python scripts/nightly/soak_graph.py --rounds 10 [--seed 0]

A copy of the tracked files, profile `smoke`: two arms trained, evaluated and probed. A round deletes `runs/`, starts, kills
the process group at a moment drawn over the whole length (and, every second round, the second attempt as well), and runs the command that `make reproduce` runs once more.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from mutate import copy_tracked

from cocoa_lib.store.checkpoint import weights_hash

ROOT = Path(__file__).resolve().parent.parent.parent
ARMS = ("contrastive", "cocoa")
TARGETS = [f"runs/smoke/seed0/evaluate/{arm}.done" for arm in ARMS]


def flags() -> list[str]:
    """Those of `make reproduce`, from the Makefile."""
    line = re.search(
        r"-m snakemake --cores \$\(CORES\) (.*?) \$\(SNAKEFLAGS\)", (ROOT / "Makefile").read_text(encoding="utf-8")
    )
    if line is None:
        raise SystemExit("the Makefile's call of snakemake is not where it was; mend scripts/nightly/soak_graph.py")
    return line[1].split()


def start(folder: Path, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *flags(), "--config", "profile=smoke", "--", *TARGETS]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, stdout=file, stderr=file)  # noqa: S603


def result(folder: Path) -> dict[str, str]:
    """Hash by file: ranks of each arm, weights of every checkpoint."""
    found = {
        str(path.relative_to(folder)): weights_hash(path.parent)
        for path in folder.glob("runs/smoke/seed0/*/*/cocoa.json")
    }
    for arm in ARMS:
        folder_of = folder / f"runs/smoke/seed0/evaluate/{arm}"
        if (folder_of / "run.json").is_file():
            ranks = pd.read_parquet(folder_of / "ranks.parquet").to_csv().encode()
            found[arm] = hashlib.sha256(ranks + (folder_of / "probe.csv").read_bytes()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, counts = random.Random(args.seed), {"kills": 0, "equal": 0, "lost": 0}  # noqa: S311 - moments, not secrets
    with tempfile.TemporaryDirectory() as base:
        folder, log = Path(base) / "graph", Path(base) / "log"
        folder.mkdir()
        copy_tracked(folder)
        begin = time.monotonic()
        if start(folder, log).wait() or len(expected := result(folder)) < 2 + len(TARGETS):
            raise SystemExit(f"the undisturbed graph failed:\n{log.read_text()[-4000:]}")
        length = time.monotonic() - begin
        print(f"undisturbed: {length:.0f} s, {len(expected)} results", flush=True)
        for number in range(args.rounds):
            shutil.rmtree(folder / "runs")
            for _ in range(1 + number % 2):
                child = start(folder, log)
                time.sleep(draw.random() * length)
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    counts["kills"] += 1
                child.wait()
            ok = start(folder, log).wait() == 0 and result(folder) == expected
            counts["equal" if ok else "lost"] += 1
            print(f"round {number}: {'equal' if ok else 'LOST'}, {counts['kills']} kills so far", flush=True)
            if not ok:
                print(log.read_text()[-3000:], file=sys.stderr)
    print(", ".join(f"{name} {n}" for name, n in counts.items()) + f"; seed {args.seed}")
    sys.exit(bool(counts["lost"]))


if __name__ == "__main__":
    main()
