"""Several GPUs from one notebook: `accelerate launch`, its lines, its worker's error."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import deque

import torch
from tqdm.auto import tqdm

from .profiles import PROFILES
from .resume import TrainingError
from .spec import RunSpec
from .stage import Progress

MESSAGE = "stopped: "  # before the message of a worker's own error
RAISED = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)): (?!.*ChildFailed)")


def processes(run: RunSpec) -> int:
    """Count the processes that a step of this run is to be launched on.

    1: this one, which a launcher may have started.
    """
    if torch.distributed.is_torchelastic_launched():
        return 1
    return run.values.get("launch", {}).get("processes", 0) or max(1, torch.cuda.device_count())


def command(run: RunSpec, step: str) -> list[str]:
    """Build the line that runs a step on `processes(run)` processes."""
    config = run.values.get("launch", {}).get("config_file") or "accelerate/ddp_1x8.yaml"
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    line += ["--config_file", str(PROFILES / config), "--num_processes", str(processes(run))]
    line += ["--main_process_port", "0", "-m", "cocoa_lib.run", step]
    return line + run.arguments()


def start(run: RunSpec, step: str, show_progress: Progress = True) -> None:
    """Run a step by `accelerate launch`; show each of its lines as it comes.

    Raises TrainingError with the worker's message where it fails. An interrupt is handed on as
    SIGTERM: the state is saved.
    """
    say = show_progress if callable(show_progress) else tqdm.write if show_progress else len
    lines: deque[str] = deque(maxlen=200)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    line = command(run, step)
    with subprocess.Popen(line, text=True, errors="replace", **pipes) as child:  # noqa: S603
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
    """Find the error that a worker ended with among the last lines of a launch."""
    for line in lines:
        if MESSAGE in line:
            return line.split(MESSAGE, 1)[1]
    raised = [line for line in lines if RAISED.match(line)]
    return raised[0] if raised else "\n".join(list(lines)[-20:])
