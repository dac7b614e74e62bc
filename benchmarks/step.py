"""What each way to a faster step is worth, alone and together, with equal losses.

    python benchmarks/step.py                       # profile laptop -> results/step.json
    python benchmarks/step.py --profile long --steps 8 --only now packing

The step is that of the trainers, whole: batch, forward, backward, optimiser, log. "before" takes it
as it was without any of these; each other side adds one. All sides start from the same weights and
take one step a round on the same batch, the first round not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Record, keep, record, say
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from cocoa_lib import backbone, embedder, kernels, packing, reconstruction
from cocoa_lib.run import Run, stage

STAGES = ("stage1", "stage2", "stage3")
LOSSES = 20  # steps in a row whose losses are compared
OWN_POSITIONS = backbone.position_ids
Change = Callable[[PreTrainedModel], None]


def slow_positions(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """transformers' own, a row and a picture at a time."""
    if "position_ids" in batch or not len(batch.get("image_grid_thw", ())):
        return OWN_POSITIONS(model, batch)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{name: batch[name] for name in names})[0]


@contextlib.contextmanager
def positions_one_by_one() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (backbone, embedder, reconstruction):
            stack.enter_context(mock.patch.object(module, "position_ids", slow_positions))
        yield


def convolve(model: PreTrainedModel) -> None:
    model.model.visual.patch_embed.proj.__class__ = nn.Conv3d


def singly(model: PreTrainedModel) -> None:
    model.model.visual.config._attn_implementation = "sdpa"


def five_operations(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, kernels.FusedNorm):
            module.__class__ = Qwen2VLRMSNorm


@dataclasses.dataclass(frozen=True)
class Way:
    """One side: what is undone of the library (`kept` names what is not), or done on top of it."""

    text: str
    kept: tuple[str, ...] = ()
    change: Change | None = None
    around: Callable[[], Any] = contextlib.nullcontext
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


KEPT = ("packing", "rows", "pictures", "patches", "positions", "norms")
WAYS = {
    "before": Way("Without any of these"),
    "packing": Way("Several samples in a row (`packing`)", ("packing",)),
    "rows": Way("The same, rows of 1.5 times the longest sample", ("packing", "rows")),
    "pictures": Way("Pictures of one size in one call of the vision tower", ("pictures",)),
    "patches": Way("Patch embedding as a matrix product, not a convolution", ("patches",)),
    "positions": Way("Rotary positions of a whole batch at once", ("positions",)),
    "norms": Way("RMS norm in one operation", ("norms",)),
    "now": Way("**All: the library**", KEPT),
    "math": Way(
        "On top: attention as plain products", KEPT, around=lambda: sdpa_kernel(SDPBackend.MATH)
    ),
    "compiled": Way("On top: compiled layers", KEPT, kernels.compile_layers),
    "adamw": Way("On top: AdamW not fused", KEPT, options={"optim": "adamw_torch"}),
}


def open_trainer(run: Run, name: str, steps: int, way: Way) -> Trainer:
    """The stage's own trainer from the backbone, in this way, that saves nothing."""
    packed = "packing" in way.kept
    recipe = dataclasses.replace(run.recipe(name), steps=steps, packing=packed, workers=0)
    parent, out = run.backbone, Path(tempfile.gettempdir()) / "cocoa-step"
    job = stage.Job(name, recipe, parent, stage.check_parent(name, parent, True), run.data, out, 0)
    set_seed(0)
    model, inputs = stage._open_parent(job)
    undone = {"pictures": singly, "patches": convolve, "norms": five_operations}
    for part, undo in undone.items():
        if part not in way.kept:
            undo(model)
    if way.change:
        way.change(model)
    trainer = (stage._contrastive if name == "stage3" else stage._reconstruction)(
        job, model, inputs
    )
    for option, value in way.options.items():
        setattr(trainer.args, option, value)
    return trainer


def take_steps(trainer: Trainer, steps: int, way: Way) -> Iterator[tuple[float, float]]:
    """CPU seconds and loss of each step, as the trainer takes it: batch, forward, backward, AdamW."""
    trainer.create_optimizer_and_scheduler(steps)
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it
    module, batches = trainer.model.train(), iter(trainer.get_train_dataloader())
    slow = contextlib.nullcontext if "positions" in way.kept else positions_one_by_one
    room = packing.ROOM if "rows" in way.kept else 1
    for _ in range(steps):
        with slow(), way.around(), mock.patch.object(packing, "ROOM", room):
            start = time.process_time()
            loss = trainer.training_step(module, next(batches))
            nn.utils.clip_grad_norm_(module.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            trainer.optimizer.zero_grad()
            seconds = time.process_time() - start
        yield seconds, float(loss)


def compare(run: Run, name: str, ways: Sequence[str], steps: int = LOSSES) -> list[Record]:
    """A record for each way: CPU time of a step before over that of the way, round by round, and
    the largest relative gap of a loss. All ways take one step a round, from the same weights."""
    sides = ["before", *(way for way in ways if way != "before")]
    taken = {
        side: take_steps(open_trainer(run, name, steps, WAYS[side]), steps, WAYS[side])
        for side in sides
    }
    rounds = [{side: next(taken[side]) for side in sides} for _ in range(steps)]
    lines = []
    for side in sides[1:]:
        before, own = ([found[way] for found in rounds] for way in ("before", side))
        gap = max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(before, own, strict=True))
        over, under = ([seconds for seconds, _ in found[1:]] for found in (before, own))
        line = record(f"{side}, {name}", WAYS[side].text, over, under)
        middle = round(statistics.median(under), 3)
        lines.append(line | {"gap": float(f"{gap:.1e}"), "seconds_a_step": middle})
    return lines


def few_rows(runs: str | Path, profile: str = "laptop") -> Run:
    """The profile's shapes and recipes on few rows: enough for the steps that are timed."""
    few = {"n_pairs": 1600, "n_queries": 4, "n_corpus": 1600}
    return Run(profile=profile, changes={"benchmark": few}, runs=runs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--stages", nargs="*", default=STAGES)
    parser.add_argument("--only", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=LOSSES)
    parser.add_argument("--runs", type=Path, help="where the data are written and found again")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        run = few_rows(args.runs or folder, args.profile)
        for name in args.stages:
            found = compare(run, name, args.only, args.steps)
            print(*map(say, found), sep="\n", flush=True)
            records += found
            keep("step", records, profile=args.profile)


if __name__ == "__main__":
    main()
