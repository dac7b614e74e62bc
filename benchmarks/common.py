"""What the measurements share: two sides run in turn, the peak memory of a step, records.

A figure is a ratio of two things run one after the other, round by round, in one process: what else
the machine does hits both. Seconds are CPU seconds of this process, so that a busy machine counts
less. The ratio is taken within each round; median, lowest and highest are those of the rounds.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cocoa_lib.store.checkpoint import provenance
from cocoa_lib.world.backbone import new_backbone

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BACKBONE = ROOT / "data" / "backbone"
WORDS = "a large red circle at the top left and one small blue square below it , seven".split()
M_MMAP_THRESHOLD = -3  # glibc's number: blocks from this size on go back to the system when freed
Record = dict[str, Any]


def in_turn(
    sides: dict[str, Callable[[], Any]],
    n: int = 5,
    *,
    warm: bool = False,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Name -> seconds of each of `n` rounds, every side once a round, after one that is not
    counted unless the sides are `warm`: have run once, to be compared."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm, n + 1):
        for name, side in sides.items():
            start = clock()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def record(name: str, text: str, over: Sequence[float], under: Sequence[float]) -> Record:
    """One row: the ratio over / under, round by round; `text` is what the page says of it."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    found = {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }
    rounded = {key: float(f"{value:.4g}") for key, value in found.items()}
    return {"name": name, "text": text, **rounded, "n": len(ratios)}


def keep(name: str, records: list[Record], folder: Path = RESULTS, **more: Any) -> None:
    """Write FOLDER/NAME.json: the records, the machine and the commit."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    machine = (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}{gpu}"
    )
    content = {"machine": machine, "commit": provenance()["commit"], **more, "results": records}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def say(line: Record) -> str:
    """A record as one line of a terminal."""
    spread = f"{line['ratio']:.3g} [{line['lowest']:.3g}, {line['highest']:.3g}]"
    return f"{line['name']}: {spread} (n {line['n']}) {line['text']}"


def peaks(make: Callable[..., Callable[[], Any]], *args: Any, n: int = 3) -> list[float]:
    """Bytes by which resident memory rises at most while `make(*args)()` runs; `n` new processes.

    `make` sets up model and data and runs a small step, so that what is allocated once does not
    count. Linux only: the high-water mark is reset through /proc. Freed tensors go back to the
    system at once, so that the mark is what was in use.
    """
    context, found = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["rows"])  # the libraries are imported once
    for _ in range(n):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_peak, args=(sender, make, args))
        process.start()
        sender.close()
        found.append(receiver.recv())  # EOFError where the process died; it has said why
        process.join()
    return found


def _peak(sender: Any, make: Callable[..., Callable[[], Any]], args: tuple) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4096)
    step = make(*args)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the set-up freed would be used again without being seen
    Path("/proc/self/clear_refs").write_text("5")  # high-water mark = what is resident now
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step()
    status = Path("/proc/self/status").read_text()
    highest = int(status.split("VmHWM:")[1].split()[0]) * 1024
    sender.send(float(highest - before))


def small_model(hidden_size: int = 256, layers: int = 2, **sizes: int) -> tuple:
    """A random Qwen2-VL and its inputs."""
    shape = {
        "heads": hidden_size // 32,
        "vision_dim": 96,
        "vision_layers": 2,
        "patch_size": 8,
        "vocab_size": 400,
        "image_pixels": 4096,
        "max_length": 4096,
    }
    texts = [" ".join(WORDS)] * 4
    return new_backbone(texts, seed=0, hidden_size=hidden_size, layers=layers, **shape | sizes)
