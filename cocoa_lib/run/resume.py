"""Checkpoints of a run that lasts: whole or not there, found again, removed when old."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from ..contrastive import gathered
from ..store.checkpoint import read_note
from ..store.files import file_hash, write_json

logger = logging.getLogger(__name__)
SPENT = "seconds.json"  # in a Trainer checkpoint: training time so far, of all attempts
COMPLETE = "complete.json"  # written last into a Trainer checkpoint, with the hash of every file
KEPT_CHECKPOINTS = 2  # of a run that lasts: the newest, and one before it should that be damaged
FULL = (
    "No space left",
    "inline_container",
    "PytorchStreamWriter",
)  # what a full disk makes the system and torch say
SAVING = timedelta(
    hours=2
)  # writing and hashing a checkpoint, and the finished folder's merging, at most


class TrainingError(RuntimeError):
    """A run that cannot start or must stop: says at which step, why, and what to do."""


class Watch(TrainerCallback):
    """Marks a checkpoint as whole once all of it is written; turns Ctrl-C, and a scheduler's notice that the time is over
    (SIGTERM), into: save, then stop (Ctrl-C twice: stop now). transformers' own (`enable_jit_checkpoint`) hears SIGTERM alone,
    each process for itself.

    `checkpoint`: what the run goes on from; its training time counts as well. `group`: of all processes, by gloo, on GPUs too:
    while the main one writes, the others wait. NCCL gives up after ten minutes, which tens of gigabytes to a slow disk can take,
    and a longer limit would be that of every step. A death, gloo sees at once.
    """

    interrupted = False

    def __init__(
        self, checkpoint: Path | None = None, group: torch.distributed.ProcessGroup | None = None
    ) -> None:
        self.group, self.previous = group, {}
        path = None if checkpoint is None else checkpoint / SPENT
        self.spent = read_note(path)["seconds"] if path is not None and path.is_file() else 0.0
        self.began = time.monotonic()

    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    def on_save(self, args, state, control, **kwargs) -> None:
        self.wait()  # every process writes its random state
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_json(folder / SPENT, {"seconds": self.seconds()})
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
            write_json(folder / COMPLETE, hashes)
            for old in checkpoints(folder.parent)[KEPT_CHECKPOINTS:]:
                shutil.rmtree(old)
        self.wait()

    def wait(self) -> None:
        """Until every process is here."""
        if self.group is not None:
            torch.distributed.barrier(self.group)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        with suppress(ValueError):  # not the main thread: the caller handles them
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        if (
            self.interrupted and number == signal.SIGINT
        ):  # a launcher hands SIGTERM on to who has it already
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.interrupted = bool(
            gathered(torch.tensor([self.interrupted], device=args.device)).any()
        )
        if self.interrupted and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def checkpoints(work: Path) -> list[Path]:
    """Trainer checkpoints, newest first: by step, since a clock can jump."""
    return sorted(work.glob("checkpoint-*"), key=checkpoint_step, reverse=True)


def last_whole_checkpoint(work: Path) -> Path | None:
    """The newest Trainer checkpoint whose files all match their recorded hashes; damaged ones are named and removed."""
    for folder in checkpoints(work):
        try:
            hashes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
            damaged = [
                name for name, digest in hashes.items() if file_hash(folder / name) != digest
            ]
        except (OSError, ValueError):
            damaged = ["(unfinished)"]
        if not damaged:
            return folder
        logger.warning(
            "%s is not whole (%s): removed, going on from the one before",
            folder,
            ", ".join(damaged),
        )
        shutil.rmtree(folder)
    return None


@contextmanager
def explained(trainer: Trainer, state: PartialState, work: Path) -> Iterator[None]:
    """What torch, safetensors and the system say of another process that is gone, a worker that was killed and a full disk, as a
    TrainingError that says what to do; any other error as it is."""
    try:
        yield
    except TrainingError:
        raise
    except (OSError, EOFError, SafetensorError, RuntimeError) as error:
        said, at = str(error), f"(after step {trainer.state.global_step}"
        # A worker can go half-way through handing over a batch.
        broken = isinstance(error, (ConnectionError, EOFError)) or "ancdata" in said
        if "gloo" in said or isinstance(error, torch.distributed.DistError):
            what = "another process of this run died or cannot be reached "
            what += f"{at}, process {state.process_index} of {state.num_processes}); its own log says why"
        elif said.startswith("DataLoader worker") or (
            broken and trainer.args.dataloader_num_workers > 0
        ):
            # The loader goes, and the other workers with it: their ends torch would raise wherever the caller then is.
            with suppress(RuntimeError):
                clear_frames(error.__traceback__)
            what = f"a worker that reads pictures was killed {at}), as a rule for want of memory or of shared memory; free "
            what += (
                f"some, or start anew in another folder with fewer `workers`. torch says: {error!r}"
            )
        elif "in DataLoader worker" not in said and any(words in said for words in FULL):
            what = f"the disk is full, a checkpoint could not be written below {work} {at}); free some space"
        else:
            raise
        again = "Run the same command: it goes on from the last whole checkpoint, also with another number of processes"
        raise TrainingError(f"{what}. {again}") from error
