"""The stages as runs: each opens its parent's folder, trains, and leaves a checkpoint folder for the next.

`run_stage` is the one entry point, from a notebook, from the command line (`python -m cocoa_lib.train`, also under
`accelerate launch` or `torchrun`) or from the graph. Stages "causal", 1 and 2 run on transformers' Trainer, stage 3 on
sentence-transformers' trainer with its GradCache. While a run lasts its state is in `.NAME.work` beside the output
folder; the same command goes on from the newest checkpoint there that matches its hash, and the output folder appears
only when the stage is done.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, ConcatDataset, SequentialSampler
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from . import corpus
from .backbone import add_adapter, compile_layers, language_model, new_backbone, open_backbone, set_mask_token
from .batches import Planned, causal_batch, index_plan, pair_features, stage1_batch, stage1_item, stage2_batch
from .checkpoint import (
    META,
    CheckpointError,
    load_inputs,
    read_meta,
    read_note,
    save_checkpoint,
    weights_hash,
)
from .embedder import EosEmbedding
from .files import file_hash, write_json
from .inputs import Inputs
from .lock import locked
from .objectives import CachedInfoNCE, Reconstruction, gathered
from .recipes import RECIPES, CausalRecipe, Recipe, Stage3Recipe, make_recipe

logger = logging.getLogger(__name__)
PARENT_STAGE = {"causal": "init", "stage1": "causal", "stage2": "stage1", "stage3": "stage2"}
SPENT = "seconds.json"  # in a Trainer checkpoint: training time so far, of all attempts
COMPLETE = "complete.json"  # written last into a Trainer checkpoint, with the hash of every file
KEPT_CHECKPOINTS = 2  # of a run that lasts: the newest, and one before it should that be damaged
KEPT_IMAGES = 1 << 29  # bytes of processed pictures that a process keeps, all its workers together (ours)
FULL = ("No space left", "inline_container", "PytorchStreamWriter")  # what a full disk makes the system and torch say
SAVING = timedelta(hours=2)  # writing and hashing a checkpoint, and the finished folder's merging, at most
COLLAPSED_STEPS = 10  # so many steps in a row at the loss of identical embeddings are reported as a collapse


class TrainingError(RuntimeError):
    """A run that cannot start or must stop: says at which step, why, and what to do."""


# --- trainers ----------------------------------------------------------------------------------------------------


class PlainTrainer:
    """Mixed into both trainers: rows in plan order, checkpoints of weights only (no pickled arguments), the loss
    watched."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def get_batch_sampler(self, dataset, batch_size: int, drop_last: bool, **kwargs):
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    def _save_checkpoint(self, model, trial) -> None:
        self.check_weights()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.accelerator.unwrap_model(self.model), str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        sharded = (folder / f"{FSDP_MODEL_NAME}_0").is_dir()
        if sharded != self.is_fsdp_enabled:
            raise TrainingError(
                f"{folder} was written by a run that was {'' if sharded else 'not '}sharded (FSDP); go on with a launch file "
                f"of the same kind, or delete {folder.parent}"
            )
        if sharded:
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)  # sentence-transformers' knows no shards
        else:
            load_model(model or self.model, str(folder / "model.safetensors"))

    def checked(self, loss: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {float(loss.detach())}", self.state.global_step + 1)
        return loss

    def check_weights(self) -> None:
        """Before anything is saved: a gradient that is not finite spoils the weights one step before the loss shows it."""
        model = self.accelerator.unwrap_model(self.model)
        whole = lambda values: values.full_tensor() if isinstance(values, DTensor) else values  # noqa: E731
        if bad := [name for name, values in model.named_parameters() if not torch.isfinite(whole(values)).all()]:
            raise self.diverged(f"{len(bad)} weights, the first is {bad[0]}, are not finite", self.state.global_step)

    def diverged(self, what: str, step: int) -> TrainingError:
        """The error that names the step, its rows in the plan (`index_plan`), and what is left to go back to."""
        size, work = self.args.per_device_train_batch_size * self.args.world_size, Path(self.args.output_dir)
        last = max((path.parent for path in work.glob(f"checkpoint-*/{COMPLETE}")), key=checkpoint_step, default="none")
        return TrainingError(
            f"{what} at step {step}. Lower learning_rate, raise warmup_steps, or lower max_grad_norm; then run into "
            f"another folder, or delete {work}. The batch: places {(step - 1) * size} to {step * size - 1} of the plan; "
            f"last good checkpoint: {last}"
        )


class ReconstructionTrainer(PlainTrainer, Trainer):
    """transformers' Trainer on a `Reconstruction`; logs the text and image parts of the loss beside the sum.

    With several processes the parts are averaged over them, like the loss.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # our losses are means already
        self.parts: dict[str, torch.Tensor] = {}

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.parts = {name: outputs[name] for name in ("text_loss", "image_loss")}
        return self.checked(outputs["loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: float(gathered(value[None]).mean()) for name, value in self.parts.items()}
        super().log(logs, start_time)


class ContrastiveTrainer(PlainTrainer, SentenceTransformerTrainer):
    """sentence-transformers' trainer on (anchor, positive, negative?) items; reports a collapse."""

    steps_at_chance = 0

    def add_model_card_callback(self, default_args_dict) -> None:
        """None: `cocoa.json` records the run, and the callback would embed widget examples before training."""

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        loss = self.checked(super().compute_loss(model, inputs))
        if self.state.global_step >= self.args.warmup_steps:
            self.watch_collapse(float(loss.detach()))
        return loss

    def watch_collapse(self, loss: float) -> None:
        """Warn, once, when the loss has stayed within 1 % of what identical embeddings give (ln of the candidates)."""
        at_chance = self.loss.chance > 0 and abs(loss - self.loss.chance) <= 0.01 * self.loss.chance
        self.steps_at_chance = self.steps_at_chance + 1 if at_chance else 0
        if self.steps_at_chance == COLLAPSED_STEPS:
            from .analysis import effective_rank

            rank = effective_rank(self.loss.embeddings.float().cpu().numpy())
            logger.warning(
                "collapsed: for %d steps, up to step %d, the loss %.3f has been that of identical embeddings (ln of "
                "the number of candidates, %.3f); the effective rank of this batch's embeddings is %.2f. Start again "
                "with a longer warm-up (warmup_steps), a lower max_grad_norm or learning_rate, or a larger batch_size",
                COLLAPSED_STEPS, self.state.global_step + 1, loss, self.loss.chance, rank,
            )  # fmt: skip


class Bar(TrainerCallback):
    """A progress bar with the loss: one line, where the trainers' own callbacks print or build a table."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        off = not state.is_local_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=off, leave=False)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


class Watch(TrainerCallback):
    """Marks a checkpoint as whole once all of it is written; turns Ctrl-C, and a scheduler's notice that the time is over
    (SIGTERM), into: save, then stop (Ctrl-C twice: stop now). transformers' own (`enable_jit_checkpoint`) hears SIGTERM alone,
    each process for itself.

    `checkpoint`: what the run goes on from; its training time counts as well. `group`: of all processes, by gloo, on GPUs too:
    while the main one writes, the others wait. NCCL gives up after ten minutes, which tens of gigabytes to a slow disk can take,
    and a longer limit would be that of every step. A death, gloo sees at once.
    """

    interrupted = False

    def __init__(self, checkpoint: Path | None = None, group: torch.distributed.ProcessGroup | None = None) -> None:
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
        if self.interrupted and number == signal.SIGINT:  # a launcher hands SIGTERM on to who has it already
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.interrupted = bool(gathered(torch.tensor([self.interrupted], device=args.device)).any())
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
            damaged = [name for name, digest in hashes.items() if file_hash(folder / name) != digest]
        except (OSError, ValueError):
            damaged = ["(unfinished)"]
        if not damaged:
            return folder
        logger.warning("%s is not whole (%s): removed, going on from the one before", folder, ", ".join(damaged))
        shutil.rmtree(folder)
    return None


# --- runs --------------------------------------------------------------------------------------------------------


def join_processes() -> PartialState:
    """This process among those of `torchrun` or `accelerate launch`: alone where there are none.

    On a machine without an accelerator accelerate must be told so, or each process would take itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def training_arguments(cls: type[TrainingArguments], recipe: Recipe, work: Path, seed: int):
    """A recipe as the trainers' arguments; `batch_size` is divided over the processes, each with one GPU at most."""
    args = cls(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=min(recipe.warmup_steps, max(1, recipe.steps // 2)),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        save_steps=recipe.save_steps,
        save_total_limit=None,  # `Watch` removes old ones: the trainer goes by file times, and a clock can jump
        logging_steps=1,  # log.csv averages over recipe.logging_steps: so a resumed run logs what a whole one does
        disable_tqdm=True,  # `Bar` stands for theirs
        report_to=[],
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # a batch, or GradCache's last chunk, may have no image; stage 3 uses no head
    )
    args.mixed_precision = "bf16" if recipe.bf16 else "no"  # the recipe's, which is recorded, and not the launcher's
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would cut pictures apart and multiply the batch
    share, rest = divmod(recipe.batch_size, args.world_size)
    if rest:
        raise TrainingError(f"batch_size {recipe.batch_size} does not divide over {args.world_size} processes")
    args.per_device_train_batch_size = share
    return args


def shard(trainer: Trainer, model: PreTrainedModel, adapter: Any) -> tuple | None:
    """Prepare for FSDP (version 2): gathered at a time is a layer of the language model, and with the rest the vision tower,
    since a batch of texts does not run the tower's layers, and another process would wait for them.

    Returns (module, model, adapter) that stay whole, in the memory of the main process's machine, for the weights of the
    finished run (`unshard`); None elsewhere. Raises TrainingError where the launch file asks for another kind of sharding.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    sharded_saves = "SHARDED_STATE_DICT" in str(plugin.state_dict_type)
    if plugin.fsdp_version != 2 or not sharded_saves or plugin.cpu_ram_efficient_loading:
        raise TrainingError(
            "sharded training needs fsdp_version: 2, fsdp_state_dict_type: SHARDED_STATE_DICT and "
            "fsdp_cpu_ram_efficient_loading: false; take notebooks/profiles/accelerate/fsdp_1x8.yaml"
        )
    plugin.transformer_cls_names_to_wrap = [type(language_model(model).layers[0]).__name__]
    if (policy := getattr(plugin, "mixed_precision_policy", None)) is not None:
        # The model in bf16, as accelerate has it; but what it hands to the losses, and sums of gradients, are not rounded to it.
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32)
    whole = copy.deepcopy((trainer.model, model, adapter)) if trainer.is_world_process_zero() else None
    if adapter is not None:
        # Else a text's first layer gets its gradients after all others, a picture's in its turn: two orders of exchange.
        model.enable_input_require_grads()
    return whole


def unshard(trainer: Trainer, whole: tuple | None) -> None:
    """Every process gives its part of the weights; the main one puts them into what `shard` kept whole."""
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if whole is not None:
        whole[0].load_state_dict(weights)


def check_parent(stage: str, parent: str | Path, allow_parent: bool) -> dict[str, Any]:
    """The parent's `cocoa.json`; a folder or hub name without one counts as a causal checkpoint (a real Qwen2-VL).

    Raises CheckpointError when the parent is of another stage than the one before, unless `allow_parent`.
    """
    if not (Path(parent) / META).is_file():
        if Path(parent).is_dir() and not (Path(parent) / "config.json").is_file():
            raise CheckpointError(f"{parent}: no config.json; not a model folder")
        if Path(parent).is_absolute() and not Path(parent).exists():
            raise CheckpointError(f"{parent}: no such folder")
        digest = weights_hash(Path(parent)) if Path(parent).is_dir() else str(parent)  # of the hub: its name
        # No limit of its own: the recipe's `max_length` holds.
        meta = {"stage": "causal", "eos_token": "<|im_end|>", "max_length": sys.maxsize, "weights_sha256": digest}
    else:
        meta = read_meta(parent)
    if meta.get("stage") != PARENT_STAGE[stage] and not allow_parent:
        raise CheckpointError(
            f"{stage} starts from a {PARENT_STAGE[stage]} checkpoint, but {parent} is {meta.get('stage')}; pass "
            "allow_parent=True (--allow-parent) if an ablation leaves a stage out on purpose"
        )
    return meta


def run_stage(
    stage: str,
    recipe: Recipe,
    *,
    parent: str | Path,
    data: str | Path,
    out: str | Path,
    seed: int = 0,
    allow_parent: bool = False,
    show_progress: bool = True,
) -> Path:
    """Run one stage ("causal", "stage1", "stage2", "stage3") from `parent` on the benchmark folder `data` into `out`.

    Returns `out`. A finished `out` of the same configuration is returned as it is; of another one, CheckpointError.
    KeyboardInterrupt after Ctrl-C or SIGTERM, with the state saved: the same call goes on. TrainingError for a loss that is not
    finite, a batch size that does not fit, an output folder that another run is writing or nobody can, a full disk, and another
    process or a worker that is gone.
    """
    out, data = Path(out), Path(data)
    parent_meta = check_parent(stage, parent, allow_parent)
    run = {
        "stage": stage,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "parent_stage": parent_meta.get("stage"),
        "parent_sha256": parent_meta["weights_sha256"],
        "data": corpus.fingerprint(data),
    }
    work = out.parent / f".{out.name}.work"
    if out.is_dir() and any(out.iterdir()) and not (out / META).is_file():  # said now, not when it has been trained
        raise CheckpointError(
            f"{out}: holds files that are no checkpoint; remove them, or choose another output folder"
        )
    state = join_processes()
    if not (out / META).is_file():
        # Launched as several, they are one run.
        with locked(work, TrainingError) if state.is_main_process else nullcontext():
            if not (out / META).is_file():  # else another process has finished it a moment ago
                return _run(run, recipe, parent, parent_meta, data, out, work, state, show_progress)
    _same_run(read_meta(out).get("run", {}), run, out)
    shutil.rmtree(work, ignore_errors=True)  # of a run killed after `out` was whole
    return out


def _run(
    run: dict[str, Any], recipe: Recipe, parent: str | Path, parent_meta: dict[str, Any], data: Path, out: Path, work: Path,
    state: PartialState, show_progress: bool,
) -> Path:  # fmt: skip
    """`run_stage` once `work` is ours: go on from the newest whole checkpoint, train, leave `out`, remove `work`."""
    stage, seed = run["stage"], run["seed"]
    if (work / "run.json").is_file():
        _same_run(read_note(work / "run.json"), run, work)
    with state.main_process_first():
        if state.is_main_process:
            write_json(work / "run.json", run)
            checkpoint = last_whole_checkpoint(work)
        else:  # of those that are left: all of it need not be read and hashed again
            checkpoint = next(iter(checkpoints(work)), None)

    set_seed(seed)
    if recipe.max_length > (longest := parent_meta["max_length"]):
        logger.warning("max_length %d: the parent was made for %d tokens, which is used", recipe.max_length, longest)
    inputs = load_inputs(parent, parent_meta | {"max_length": min(recipe.max_length, longest)})
    inputs.limit_images(recipe.image_limit(inputs.max_length))
    inputs.keep_images(KEPT_IMAGES // max(1, recipe.workers))
    model = open_backbone(
        parent, bidirectional=recipe.layout != "causal", attn_implementation=recipe.attn_implementation
    )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainer = BUILDERS[stage](model, inputs, recipe, data, work, seed)
    adapter = None
    if recipe.lora_r:  # after the builder: the patch decoder copies a layer without adapter and is trained whole
        adapter, matched = add_adapter(
            model, r=recipe.lora_r, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout, dora=recipe.dora
        )
        run = run | {"lora_modules": matched}
    if recipe.torch_compile:  # before FSDP, after the adapter
        compile_layers(model)
    whole = shard(trainer, model, adapter) if trainer.is_fsdp_enabled else (trainer.model, model, adapter)
    with explained(trainer, state, work):
        group = torch.distributed.new_group(backend="gloo", timeout=SAVING) if state.num_processes > 1 else None
    watch = Watch(checkpoint, group)
    trainer.remove_callback(PrinterCallback)
    if show_progress:
        trainer.add_callback(Bar())
    trainer.add_callback(watch)
    try:
        with explained(trainer, state, work):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        watch.restore()
    if trainer.state.global_step < recipe.steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; the same command goes on from there")
    trainer.check_weights()
    seconds = watch.seconds()
    if trainer.is_fsdp_enabled:
        unshard(trainer, whole)
    if trainer.is_world_process_zero():
        module, model, adapter = whole
        if adapter is not None:
            model = adapter.merge_and_unload()
        decoder = getattr(module, "decoder", None)
        with explained(trainer, state, work):
            _finish(out, model, inputs, recipe, run, parent, trainer.state.log_history, seconds, decoder)
        shutil.rmtree(work, ignore_errors=True)  # the same command elsewhere may be removing it too
    with explained(trainer, state, work):
        watch.wait()
    return out


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
        elif said.startswith("DataLoader worker") or (broken and trainer.args.dataloader_num_workers > 0):
            # The loader goes, and the other workers with it: their ends torch would raise wherever the caller then is.
            with suppress(RuntimeError):
                clear_frames(error.__traceback__)
            what = f"a worker that reads pictures was killed {at}), as a rule for want of memory or of shared memory; free "
            what += f"some, or start anew in another folder with fewer `workers`. torch says: {error!r}"
        elif "in DataLoader worker" not in said and any(words in said for words in FULL):
            what = f"the disk is full, a checkpoint could not be written below {work} {at}); free some space"
        else:
            raise
        again = "Run the same command: it goes on from the last whole checkpoint, also with another number of processes"
        raise TrainingError(f"{what}. {again}") from error


def _finish(
    out: Path,
    model,
    inputs: Inputs,
    recipe: Recipe,
    run: dict,
    parent: str | Path,
    history: list[dict],
    seconds: float,
    decoder=None,
) -> None:
    log = averaged([row for row in history if "loss" in row], recipe.logging_steps)
    meta = {
        "stage": run["stage"],
        "layout": recipe.layout,
        "pooling": getattr(recipe, "pooling", "eos"),
        "prompt": "<|vision_start|><|image_pad|><|vision_end|>{text}" + inputs.eos_token,
        "parent": "/".join(Path(parent).parts[-2:]),  # enough to find it; a whole path would name this machine
        "train_seconds": round(seconds, 1),
        "final_loss": None if log.empty else float(log["loss"].tail(5).mean()),
        "run": run,
    }
    extra = {"log.csv": log.to_csv(index=False)}
    if run["stage"] == "stage3":  # so that the folder also opens as a sentence-transformers model
        module = {"idx": 0, "name": "0", "path": "", "type": "cocoa_lib.embedder.EosEmbedding"}
        extra["modules.json"] = json.dumps([module], indent=2)
    save_checkpoint(out, model, inputs, meta, extra, decoder)


def averaged(rows: list[dict[str, float]], every: int) -> pd.DataFrame:
    """One row a step -> one row for each `every` steps: mean losses, the last value of everything else.

    Columns in a fixed order, since a resumed run has its first rows from a file that sorts them by name.
    """
    log = pd.DataFrame(rows)
    if log.empty:
        return log
    columns = [name for name in ("step", "loss", "text_loss", "image_loss") if name in log]
    columns += sorted(set(log) - set(columns))
    how = {name: "mean" if name.endswith("loss") else "last" for name in columns}
    return log.groupby((log["step"] - 1) // every).agg(how)


def _same_run(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raises CheckpointError where the two differ. A recipe from before an option existed has that option's default."""
    found = found | {"recipe": dataclasses.asdict(RECIPES[wanted["stage"]]()) | found.get("recipe", {})}
    differing = sorted(name for name in wanted if json.dumps(found.get(name), sort_keys=True, default=str)
                       != json.dumps(wanted[name], sort_keys=True, default=str))  # fmt: skip
    if differing:
        raise CheckpointError(
            f"{where}: holds a run of another configuration (different: {', '.join(differing)}); it is not reused. "
            "Choose another output folder, or delete this one"
        )


def _reconstruction(stage: str, model, inputs: Inputs, recipe: Recipe, data: Path, work: Path, seed: int) -> Trainer:
    """Stages "causal", 1 and 2: what they read, how it is corrupted, and a `Reconstruction` with the recipe's values."""
    parts: list[Sequence] = []
    if stage == "causal":
        parts, collate = [corpus.conversations(data)], partial(causal_batch, inputs=inputs)
    else:
        sources = getattr(recipe, "sources", "captions")
        if sources in ("captions", "both"):
            parts.append(corpus.captions(data))
        if sources in ("pairs", "both"):
            parts += corpus.text_pairs(data).values()
        set_mask_token(model, inputs, recipe.mask_token)
        batch = {"stage1": stage1_batch, "stage2": stage2_batch}[stage]
        collate = partial(batch, inputs=inputs, recipe=recipe, seed=seed)
    learned = getattr(recipe, "patch_fill", "") == "learned"
    wanted = dataclasses.asdict(recipe).keys() & inspect.signature(Reconstruction).parameters.keys()
    module = Reconstruction(model, learned_fill=learned, **{name: getattr(recipe, name) for name in wanted})
    rows, plan = ConcatDataset(parts), index_plan(list(map(len, parts)), recipe.steps * recipe.batch_size, seed=seed)
    chosen = (rows[i] for i in sorted(set(plan.tolist())))
    if stage == "causal":
        corpus.check_images(row["image"] for row in chosen)
    else:
        corpus.check_items(map(stage1_item, chosen) if stage == "stage1" else chosen, data)
    args = training_arguments(TrainingArguments, recipe, work, seed)
    return ReconstructionTrainer(model=module, args=args, train_dataset=Planned(rows, plan), data_collator=collate)


def _stage3(model, inputs: Inputs, recipe: Stage3Recipe, data: Path, work: Path, seed: int) -> Trainer:
    rows, sizes = corpus.pairs(data, recipe.max_per_subset, hard_negatives=recipe.hard_negatives)
    if len(rows) < recipe.batch_size:
        raise TrainingError(
            f"{data}: {len(rows)} training pairs are fewer than one batch of {recipe.batch_size}; lower batch_size or add pairs"
        )
    plan = index_plan(sizes, recipe.steps * recipe.batch_size, seed=seed, block=recipe.same_task_block)
    chosen = rows.select(sorted(set(plan.tolist())))
    corpus.check_items((item for column in chosen.column_names for item in chosen[column]), data)
    embedder = SentenceTransformer(
        modules=[EosEmbedding(model, inputs, pooling=recipe.pooling)], device="cpu"
    )  # the trainer moves it
    return ContrastiveTrainer(
        model=embedder,
        args=training_arguments(SentenceTransformerTrainingArguments, recipe, work, seed),
        train_dataset=rows.select(plan),
        loss=CachedInfoNCE(embedder, temperature=recipe.temperature, mini_batch_size=recipe.mini_batch_size),
        data_collator=SentenceTransformerDataCollator(partial(pair_features, inputs=inputs)),
    )


def train_backbone(data: Path, out: Path, shape: dict[str, int], recipe: CausalRecipe, *, seed: int) -> Path:
    """The small causal backbone: a tokenizer, a random Qwen2-VL of this shape, next-token prediction on the corpus.

    The tokenizer is learnt from the corpus and from English prose (Python's own reference manual, part of every
    installation), so that a user's texts are not spelt letter by letter.
    """
    from pydoc_data.topics import topics

    rows = [*corpus.captions(data), *corpus.questions(data)]
    texts = [row["text"] for row in rows[::7]] + [row["target"] for row in rows[::7]] + list(topics.values())
    init = out.parent / f"{out.name}-init"
    asked = {"shape": shape, "seed": seed, "data": corpus.fingerprint(data)}  # its tokenizer is learnt from the data
    found = read_meta(init, check=False) if (init / META).is_file() else asked
    if {name: found.get(name) for name in asked} != asked:
        shutil.rmtree(init)  # left by an earlier call; a run that began from it is refused below, by its parent's hash
    if not (init / META).is_file():
        model, inputs = new_backbone(texts, seed=seed, **shape)
        save_checkpoint(init, model, inputs, {"stage": "init", **asked})
    return run_stage("causal", recipe, parent=init, data=data, out=out, seed=seed)


BUILDERS = {stage: partial(_reconstruction, stage) for stage in ("causal", "stage1", "stage2")} | {"stage3": _stage3}


def print_estimate(stage: str, recipe: Recipe, source: str | Path, data: Path) -> None:
    """What the stage will need here, on the main process: `estimate.report`, or in a line why there is none."""
    from . import estimate

    state = join_processes()
    if not state.is_main_process:
        return
    n, sharded, memory = state.num_processes, parse_flag_from_env("ACCELERATE_USE_FSDP"), math.inf
    if state.device.type == "cuda":
        memory = torch.cuda.get_device_properties(state.device).total_memory / 1e9
    try:
        item = estimate.measure(data)
        lines = estimate.report(source, stage, recipe, item, memory, n, sharded=sharded)
    except (OSError, ValueError) as error:  # no config.json, no pairs, an unreadable picture, another family of models
        lines = [f"no estimate of memory and time: {str(error).splitlines()[0]}"]
    else:
        speed = f"{estimate.usual_utilisation(recipe):.0%} of {estimate.PEAK / 1e12:.0f} TFLOP/s"
        lines = [f"estimated for one of {n} device(s), hours at {speed}; an item: {item}", estimate.HEAD, *lines]
    print(*lines, sep="\n", flush=True)  # noqa: T201


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cocoa_lib.train", description="Run one stage of CoCoA.")
    parser.add_argument("stage", choices=sorted(BUILDERS))
    parser.add_argument("--parent", required=True, help="checkpoint folder or hub name to start from")
    parser.add_argument("--data", required=True, help="folder of the benchmark or of MMEB-train")
    parser.add_argument("--out", required=True)
    parser.add_argument("--profile", help="take the recipe of notebooks/profiles/NAME.yaml")
    parser.add_argument("--recipe", default="{}", help="recipe values as JSON, e.g. '{\"steps\": 200}'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-parent", action="store_true", help="accept a parent of another stage (ablations)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    from .profiles import load_profile

    values = load_profile(args.profile).get(args.stage, {}) if args.profile else {}
    recipe = make_recipe(args.stage, values | json.loads(args.recipe))
    # Where memory and hours can run out: on a GPU, or with the profile of the real models; the small model needs no warning.
    if (torch.cuda.is_available() or args.profile == "paper") and not (Path(args.out) / META).is_file():
        print_estimate(args.stage, recipe, args.parent, Path(args.data))
    folder = run_stage(
        args.stage,
        recipe,
        parent=args.parent,
        data=args.data,
        out=args.out,
        seed=args.seed,
        allow_parent=args.allow_parent,
    )
    print(folder)  # noqa: T201


if __name__ == "__main__":
    main()
