"""Checkpoints of a run that lasts: marked when whole, found again, removed when old."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback

from ..contrastive import gather_rows
from ..store.checkpoint import read_note
from ..store.files import sync, write_json

logger = logging.getLogger(__name__)
COMPLETE = "complete.json"  # written last into a Trainer checkpoint; seconds of all attempts
FULL = ("No space left", "inline_container", "PytorchStreamWriter")  # torch's words for a full disk


class TrainingError(RuntimeError):
    """A run that cannot start or must stop: says at which step, why, and what to do."""


class Watch(TrainerCallback):
    """Mark a checkpoint once all of it is written; on Ctrl-C or SIGTERM save, then stop.

    Ctrl-C twice stops at once. `checkpoint`: what the run goes on from, whose time counts as well.
    """

    interrupted = False

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.spent = read_note(checkpoint / COMPLETE)["seconds"] if checkpoint else 0.0
        self.began, self.previous = time.monotonic(), {}

    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    def on_save(self, args, state, control, **kwargs) -> None:
        PartialState().wait_for_everyone()  # each process writes its random state
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            for path in (*folder.rglob("*"), folder):
                sync(path)
            write_json(folder / COMPLETE, {"seconds": self.seconds()})
            for old in list_checkpoints(folder.parent)[1:]:
                shutil.rmtree(old)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        with suppress(ValueError):  # not the main thread: the caller handles them
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        # SIGTERM may come twice, from scheduler and launcher.
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        mine = torch.tensor([self.interrupted], device=args.device)
        self.interrupted = bool(gather_rows(mine).any())
        if self.interrupted and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def list_checkpoints(work: Path) -> list[Path]:
    """List Trainer checkpoints, newest first: by step, since a clock can jump."""
    found = work.glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def find_checkpoint(work: Path) -> Path | None:
    """Find the newest Trainer checkpoint that is marked as whole; remove unfinished ones."""
    for folder in list_checkpoints(work):
        if (folder / COMPLETE).is_file():
            return folder
        logger.warning("%s is unfinished: removed, going on from the one before", folder)
        shutil.rmtree(folder)
    return None


@contextmanager
def explain_losses(work: Path) -> Iterator[None]:
    """Re-raise a lost process and a full disk as TrainingError with a remedy."""
    try:
        yield
    except TrainingError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if "gloo" in str(error) or isinstance(error, torch.distributed.DistError):
            what = "another process of this run died or cannot be reached; its own log says why"
        elif any(words in str(error) for words in FULL):
            what = f"the disk is full, a checkpoint could not be written below {work}"
        else:
            raise
        raise TrainingError(
            f"{what}. The same command goes on from the last whole checkpoint"
        ) from error
