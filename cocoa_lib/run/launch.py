"""Several GPUs from one notebook: `accelerate launch`, its lines, its worker's error."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .profiles import PROFILES
from .resume import TrainingError
from .stage import Progress

MESSAGE = "stopped: "  # before the message of a worker's own error


def count_processes(settings: dict[str, Any]) -> int:
    """Count the processes that a step is to be launched on; settings: a profile's `launch`.

    1: this one, which a launcher may have started.
    """
    if torch.distributed.is_torchelastic_launched():
        return 1
    return settings.get("processes", 0) or max(1, torch.cuda.device_count())


def command(settings: dict[str, Any], step: str, arguments: Sequence[str]) -> list[str]:
    """Build the line that runs a step, with a run's arguments, on several processes."""
    config = settings.get("config_file") or "accelerate/ddp_1x8.yaml"
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    line += ["--config_file", str(PROFILES / config), "--main_process_port", "0"]
    line += ["--num_processes", str(count_processes(settings)), "-m", "cocoa_lib.run", step]
    return [*line, *arguments]


def launch(line: Sequence[str], show_progress: Progress = True) -> None:
    """Run a line that `command` built; show each line that it prints as it comes.

    Raises TrainingError with the worker's message, or the last lines, where it fails. An interrupt
    is handed on as SIGTERM: the state is saved.
    """
    say = show_progress if callable(show_progress) else tqdm.write if show_progress else len
    lines: deque[str] = deque(maxlen=100)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(line, text=True, errors="replace", **pipes) as child:  # noqa: S603
        try:
            for words in child.stdout:
                lines.append(words.rstrip())
                say(lines[-1])
        except BaseException:
            child.send_signal(signal.SIGTERM)
            raise
    if child.returncode:
        own = [line.split(MESSAGE, 1)[1] for line in lines if MESSAGE in line] or ["\n".join(lines)]
        raise TrainingError(f"on several processes: {own[0]}")
