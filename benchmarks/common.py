"""What the measurements share: two sides run in turn, peak memory of a step, a table and its JSON.

A figure is a ratio of two things run one after the other, round by round, in one process: what else the machine does hits
both. The ratio is taken within each round; median, lowest and highest are those of the rounds.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench import forkserver
from transformers.utils import logging

from cocoa_lib.store.checkpoint import provenance
from cocoa_lib.world.backbone import new_backbone

logging.disable_progress_bar()  # it would stand between the tables

ROOT = Path(__file__).resolve().parent.parent
# glibc's number of the option: blocks from this size on are taken from the system, and given back when freed.
M_MMAP_THRESHOLD = -3
RESULTS = Path(__file__).resolve().parent / "results"
BACKBONE = ROOT / "data" / "backbone"
WORDS = "a large red circle at the top left and one small blue square below it , seven digits in all".split()


def in_turn(sides: dict[str, Callable[[], Any]], n: int = 5, *, warm: bool = False) -> dict[str, list[float]]:
    """Name -> seconds of each of `n` rounds, every side once a round (A B A B ...), after one round that is not counted,
    unless the sides are `warm`: have run once, to be compared."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm, n + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def record(name: str, compared: str, over: Sequence[float], under: Sequence[float], **more: Any) -> dict[str, Any]:
    """One line of a table: the ratio over / under, round by round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, high, middle = min(ratios), max(ratios), statistics.median(ratios)
    return {
        "name": name,
        "compared": compared,
        "ratio": middle,
        "n": len(ratios),
        "lowest": low,
        "highest": high,
        **more,
    }


@contextmanager
def truly_compiled() -> Iterator[None]:
    """What is compiled inside stays so: past dynamo's limit of shapes (8 of a function, in the whole process) Flex would go
    on unfused, with a warning only. Here the count starts anew, and reaching the limit is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def save(name: str, records: list[dict[str, Any]], note: str = "") -> None:
    """Print the records as a table and keep them, with machine and commit, as results/NAME.json."""
    keep(name, records, note)
    show(name, records, note)


def save_parts(
    name: str, parts: dict[str, Callable[[], list[dict[str, Any]]]], note: str, folder: Path | None, device: str
) -> list[dict[str, Any]]:
    """Measure part by part and keep all records so far after each, as FOLDER/NAME.json (no folder: only print them).

    A part that fails stands there, and in the table, as not measured, and why; the others go on. Raises SystemExit at the end
    if any did.
    """
    records: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for part, measure in parts.items():
        try:
            records += measure()
        except Exception as error:  # memory, a compiler, a kernel: each says so in its own type
            failed[part] = f"{type(error).__name__}: {error}"
        gc.collect()  # of the part, and of the traceback that held it
        torch.cuda.empty_cache()
        if folder is not None:
            keep(name, records, note, folder, device, failed)
    show(name, records, note, failed)
    if failed:
        raise SystemExit(f"{name}: not measured: {'; '.join(failed)} (see above why)")
    return records


def keep(
    name: str, records: list[dict[str, Any]], note: str, folder: Path = RESULTS, device: str = "cpu",
    failed: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """FOLDER/NAME.json. A GPU is named where the measurements ran on it, not where the machine merely has one."""
    commit = provenance()["commit"]
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    machine = f"{kind}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    machine += f", {torch.cuda.get_device_name()}" if device != "cpu" else ""
    for line in records:
        line |= {key: float(f"{line[key]:.4g}") for key in ("ratio", "lowest", "highest")}
        line |= {"machine": machine, "commit": commit}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": name, "note": note, "results": records} | ({"not_measured": failed} if failed else {})
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(name: str, records: list[dict[str, Any]], note: str, failed: dict[str, str] | None = None) -> None:
    width = max((len(line["name"]) for line in records), default=0)
    lines = [f"{line['name']:<{width}} {line['ratio']:>9.4g} [{line['lowest']:.4g}, {line['highest']:.4g}] "
             f"n={line['n']}  {line['compared']}" for line in records]  # fmt: skip
    lines += [f"{part}: not measured, {why}" for part, why in (failed or {}).items()]
    sys.stdout.write("\n".join([f"\n{name}", *([note] if note else []), *lines, ""]))
    sys.stdout.flush()


def peaks(
    make: Callable[..., Callable[[], Any]], runs: Sequence[tuple], *, in_use: bool = True, n: int = 5
) -> dict[tuple, list[float]]:
    """Arguments of `make` -> `peak` of `n` fresh processes: in one, a first step would leave what the next does not need anew."""
    return {args: [peak(make, *args, in_use=in_use) for _ in range(n)] for args in runs}


def peak(make: Callable[..., Callable[[], Any]], *args: Any, in_use: bool = True) -> float:
    """Bytes by which resident memory rises at most while `make(*args)()` runs, in a fresh process.

    `make` sets up (model, data) and returns the step; it should run a small step first, so that what is allocated once
    and for all does not count. Linux only: the high-water mark is reset through /proc.

    `in_use`: freed tensors go back to the system at once, so that the mark is what was in use at most; otherwise it
    also holds what glibc, left to itself, keeps of them in pieces.
    """
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(sender, in_use, make, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures {make.__name__}{args} died; see its message above") from None
    finally:
        process.join()


def _peak(sender, in_use: bool, make: Callable[..., Callable[[], Any]], args: tuple) -> None:
    torch.set_num_threads(1)
    if in_use:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4096)
    step = make(*args)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the setup freed goes back, or the step would use it without being seen
    Path("/proc/self/clear_refs").write_text("5")  # high-water mark = what is resident now
    before = _resident()
    step()
    sender.send(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def small_model(
    hidden_size: int = 256, layers: int = 2, image_pixels: int = 4096, max_length: int = 4096, **sizes: int
):
    """A random Qwen2-VL and its inputs."""
    shape = {
        "heads": hidden_size // 32,
        "vision_dim": 96,
        "vision_layers": 2,
        "patch_size": 8,
        "vocab_size": 400,
    } | sizes
    return new_backbone([" ".join(WORDS)] * 4, image_pixels=image_pixels, seed=0, max_length=max_length,
                        hidden_size=hidden_size, layers=layers, **shape)  # fmt: skip
