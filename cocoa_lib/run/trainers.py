"""Both libraries' trainers, with rows in plan order and the loss watched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_model, save_model
from sentence_transformers import SentenceTransformerTrainer
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ..contrastive import gather_rows
from ..recipes import Recipe
from .resume import COMPLETE, TrainingError, list_checkpoints

logger = logging.getLogger(__name__)
COLLAPSED_STEPS = 10  # so many in a row at the loss of identical embeddings are a collapse


class PlainTrainer:
    """Mixed into both trainers: checkpoints without pickled arguments, the loss watched."""

    def _save_checkpoint(self, model, trial) -> None:
        self.check_weights()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.accelerator.unwrap_model(self.model), str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:  # sentence-transformers' own knows no shards
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)
        else:
            load_model(model or self.model, f"{resume_from_checkpoint}/model.safetensors")

    def check_loss(self, loss: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {float(loss.detach())}", self.state.global_step + 1)
        return loss

    def check_weights(self) -> None:
        """Raise TrainingError before weights that are not finite are saved."""
        for name, values in self.accelerator.unwrap_model(self.model).named_parameters():
            values = values.full_tensor() if isinstance(values, DTensor) else values
            if not torch.isfinite(values).all():
                raise self.diverged(f"the weights {name} are not finite", self.state.global_step)

    def diverged(self, what: str, step: int) -> TrainingError:
        """Make the error that names the step, its rows in the plan, and the last checkpoint."""
        work = Path(self.args.output_dir)
        size = self.args.per_device_train_batch_size * self.args.world_size
        whole = [path for path in list_checkpoints(work) if (path / COMPLETE).is_file()]
        return TrainingError(
            f"{what} at step {step}. Lower learning_rate, raise warmup_steps, or lower "
            f"max_grad_norm; then delete {work}. The batch: places {(step - 1) * size} to "
            f"{step * size - 1} of the plan; last good checkpoint: {whole[0] if whole else 'none'}"
        )


class ReconstructionTrainer(PlainTrainer, Trainer):
    """transformers' Trainer on a `Reconstruction`; logs the losses of text and image too.

    With several processes they are averaged over them, like the sum.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # our losses are means already
        self.parts: dict[str, torch.Tensor] = {}

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.parts = {name: outputs[name] for name in ("text_loss", "image_loss")}
        return self.check_loss(outputs["loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, part in self.parts.items():
                logs[name] = float(gather_rows(part[None]).mean())
        super().log(logs, start_time)


class ContrastiveTrainer(PlainTrainer, SentenceTransformerTrainer):
    """sentence-transformers' trainer on (anchor, positive, negative?) items; reports a collapse."""

    steps_at_chance = 0

    def get_batch_sampler(self, dataset, batch_size: int, drop_last: bool, **kwargs):
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    def add_model_card_callback(self, default_args_dict) -> None:
        """Add none: `cocoa.json` records the run."""

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        loss = self.check_loss(super().compute_loss(model, inputs))
        if self.state.global_step >= self.args.warmup_steps:
            self.watch_collapse(float(loss.detach()))
        return loss

    def watch_collapse(self, loss: float) -> None:
        """Warn, once, when the loss stays within 1 % of that of identical embeddings."""
        at_chance = self.loss.chance > 0 and abs(loss - self.loss.chance) <= 0.01 * self.loss.chance
        self.steps_at_chance = self.steps_at_chance + 1 if at_chance else 0
        if self.steps_at_chance == COLLAPSED_STEPS:
            logger.warning(
                f"collapsed: for {COLLAPSED_STEPS} steps, up to step {self.state.global_step + 1}, "
                f"the loss {loss:.3f} is that of identical embeddings. Start again with a longer "
                "warm-up (warmup_steps), a lower max_grad_norm or learning_rate, or a larger "
                "batch_size"
            )


class Lines(TrainerCallback):
    """Hand on a line a step, with the loss."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs and state.is_world_process_zero:
            self.say(f"step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}")


class Bar(ProgressCallback):
    """transformers' bar, of one line, with the loss."""

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def training_arguments(cls: type[TrainingArguments], recipe: Recipe, work: Path, seed: int):
    """Turn a recipe into the trainers' arguments; `batch_size` is divided over the processes.

    Raises TrainingError where it does not divide, and for bf16 without a GPU.
    """
    if recipe.bf16 and not torch.cuda.is_available():
        raise TrainingError(
            "bf16 needs a GPU, and there is none here; set bf16: false, stage by stage"
        )
    args = cls(
        output_dir=str(work),
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=min(recipe.warmup_steps, max(1, recipe.steps // 2)),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        save_steps=recipe.save_steps,  # `Watch` removes old ones, once the new one is whole
        logging_steps=1,  # log.csv averages over recipe.logging_steps, resumed or not
        disable_tqdm=True,  # `Bar` stands for theirs
        report_to=recipe.report_to,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # a batch, or GradCache's last chunk, may have no image
    )
    args.mixed_precision = "bf16" if recipe.bf16 else "no"  # the recipe's, not the launcher's
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would cut pictures apart and multiply the batch
    share, rest = divmod(recipe.batch_size, args.world_size)
    if rest:
        raise TrainingError(
            f"batch_size {recipe.batch_size} does not divide over {args.world_size} processes"
        )
    args.per_device_train_batch_size = share
    return args


def average_log(rows: list[dict[str, float]], every: int) -> pd.DataFrame:
    """Average one row a step into one for each `every`: mean losses, the last of all else.

    Columns in a fixed order: a resumed run has its first rows from a file that sorts them by name.
    """
    log = pd.DataFrame(rows)
    first = [name for name in ("step", "loss", "text_loss", "image_loss") if name in log]
    columns = [*first, *sorted(set(log) - set(first))]
    how = {name: "mean" if name.endswith("loss") else "last" for name in columns}
    return log.groupby((log["step"] - 1) // every).agg(how)
