"""Several GPUs from one notebook: start `accelerate launch`, stream its lines, fail with the worker's message."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import deque
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .profiles import PROFILES
from .resume import TrainingError
from .stage import Progress

if TYPE_CHECKING:
    from .run import Run

MESSAGE = "stopped: "  # before the message of a worker's own error
RAISED = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)): (?!.*ChildFailed)")


def processes(run: Run) -> int:
    """How many processes a step of this run is to be launched on; 1: this one, which a launcher may have started."""
    if torch.distributed.is_torchelastic_launched():
        return 1
    return run.values.get("launch", {}).get("processes", 0) or max(1, torch.cuda.device_count())


def command(run: Run, step: str) -> list[str]:
    """The line that runs a step on `processes(run)` processes, as `subprocess` takes it."""
    config = run.values.get("launch", {}).get("config_file") or "accelerate/ddp_1x8.yaml"
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    line += ["--config_file", str(PROFILES / config), "--num_processes", str(processes(run))]
    line += ["--main_process_port", "0", "-m", "cocoa_lib.run", step]
    return line + run.arguments()


def start(run: Run, step: str, show_progress: Progress = True) -> None:
    """Run a step by `accelerate launch`; each of its lines is shown as it comes, by tqdm.write or the given function.

    Raises TrainingError with the worker's message where it fails. An interrupt is handed on as SIGTERM: the state is saved.
    """
    say = show_progress if callable(show_progress) else tqdm.write if show_progress else len
    lines: deque[str] = deque(maxlen=200)
    with subprocess.Popen(  # noqa: S603
        command(run, step), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as child:  # fmt: skip
        try:
            for line in child.stdout or ():
                lines.append(line.rstrip())
                say(lines[-1])
        except BaseException:
            child.send_signal(signal.SIGTERM)
            raise
    if child.returncode:
        raise TrainingError(f"{step} on {processes(run)} processes: {worker_message(lines)}")


def worker_message(lines: deque[str]) -> str:
    """The error that a worker ended with, of the last lines of a launch."""
    for line in lines:
        if MESSAGE in line:
            return line.split(MESSAGE, 1)[1]
    raised = [line for line in lines if RAISED.match(line)]
    return raised[0] if raised else "\n".join(list(lines)[-20:])
