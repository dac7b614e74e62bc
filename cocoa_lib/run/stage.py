"""The stages as runs: each opens its parent's folder, trains, and leaves a checkpoint folder.

Stages 1 and 2 run on transformers' Trainer, stage 3 on sentence-transformers' trainer
with its GradCache. While a run lasts its state is in `.NAME.work` beside the output folder; the
same call goes on from the newest whole checkpoint there, and the output folder appears only when
the stage is done.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.utils.data import ConcatDataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from ..backbone import open_backbone, set_mask_token
from ..contrastive import CachedInfoNCE, pair_features
from ..corruption import stage1_batch, stage1_item, stage2_batch
from ..data import corpus
from ..data.tables import fingerprint
from ..embedder import EosEmbedding
from ..inputs import Inputs
from ..kernels import compile_layers, flush_denormals, join_processes
from ..recipes import RECIPES, Recipe
from ..reconstruction import Reconstruction
from ..store import checkpoint as store
from ..store.checkpoint import META, CheckpointError
from ..store.files import locked, write_json
from . import resume, trainers
from .adapters import add_adapter
from .plan import Planned, index_plan
from .resume import TrainingError
from .sharding import shard, unshard

logger = logging.getLogger(__name__)
PARENT_STAGE = {"stage1": "causal", "stage2": "stage1", "stage3": "stage2"}
KEPT_IMAGES = 1 << 29  # bytes of pictures that a process keeps, its workers together (ours)
Progress = bool | Callable[[str], None]  # a bar, nothing, or a function that takes lines


@dataclasses.dataclass(frozen=True)
class Job:
    """What `run_stage` is asked for: one stage from one parent on one data folder."""

    stage: str
    recipe: Recipe
    parent: str | Path
    parent_meta: dict[str, Any]
    data: Path
    out: Path
    seed: int

    @property
    def work(self) -> Path:
        return self.out.parent / f".{self.out.name}.work"

    def record(self) -> dict[str, Any]:
        """List what makes two runs the same run; where the log is sent changes no result."""
        return {
            "stage": self.stage,
            "recipe": _describe(self.recipe),
            "seed": self.seed,
            "parent_stage": self.parent_meta.get("stage"),
            "parent_sha256": self.parent_meta["weights_sha256"],
            "data": fingerprint(self.data),
        }


def _describe(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe) | {"report_to": "none"}


def check_parent(stage: str, parent: str | Path, allow_parent: bool) -> dict[str, Any]:
    """Read the parent's `cocoa.json`; a model without one is a causal checkpoint (a real Qwen-VL).

    Raises CheckpointError when the parent is of another stage than the one before, unless
    `allow_parent`.
    """
    folder = Path(parent)
    if (folder / META).is_file():
        meta = store.read_meta(parent)
    else:  # of the hub: known by its name
        digest = store.weights_hash(folder) if folder.is_dir() else str(parent)
        meta = {"stage": "causal", "eos_token": "<|im_end|>", "max_length": sys.maxsize}
        meta["weights_sha256"] = digest
    if meta.get("stage") != PARENT_STAGE[stage] and not allow_parent:
        raise CheckpointError(
            f"{stage} starts from a {PARENT_STAGE[stage]} checkpoint, but {parent} is "
            f"{meta.get('stage')}; allow_parent=True leaves a stage out on purpose"
        )
    return meta


def compare_runs(
    found: dict[str, Any],
    wanted: dict[str, Any],
    where: Path,
    remedy: str = "Delete the folder, or undo the change",
) -> None:
    """Raise CheckpointError where they differ; an option that `found` lacks has its default."""
    defaults = dataclasses.asdict(RECIPES[wanted["stage"]]())
    have = found | defaults | found.get("recipe", {})
    want = wanted | wanted["recipe"]
    if names := [name for name in want if name != "recipe" and have.get(name) != want[name]]:
        parts = [f"{name} {have.get(name)!r:.30}, not {want[name]!r:.30}" for name in names]
        raise CheckpointError(
            f"{where}: holds a run of another configuration ({', '.join(parts)}); it is not "
            f"reused. {remedy}"
        )


def check_recipe(stage: str, recipe: Recipe, folder: Path) -> None:
    """Raise CheckpointError where a shipped folder is of another recipe.

    Parent and data are not compared: those of a shipped checkpoint need not be there.
    """
    found = store.read_meta(folder, check=False).get("run", {})
    remedy = f"Delete {folder.parent}, pass retrain=True, or undo the change"
    compare_runs(found, {"stage": stage, "recipe": _describe(recipe)}, folder, remedy)


def run_stage(
    stage: str,
    recipe: Recipe,
    *,
    parent: str | Path,
    data: Path,
    out: Path,
    seed: int = 0,
    allow_parent: bool = False,
    show_progress: Progress = True,
) -> Path:
    """Run one stage ("stage1", "stage2", "stage3") from `parent` on `data` into `out`.

    Returns `out`. A finished `out` of the same configuration is returned as it is; of another
    one, CheckpointError. KeyboardInterrupt after Ctrl-C or SIGTERM, with the state saved: the
    same call goes on. TrainingError for a loss that is not finite, a batch size that does not
    fit, an output folder that another run is writing or nobody can, a full disk, and another
    process that is gone.
    """
    job = Job(stage, recipe, parent, check_parent(stage, parent, allow_parent), data, out, seed)
    finished, state = out / META, join_processes()
    if not finished.is_file() and out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out}: holds files that are no checkpoint; choose another folder")
    if not finished.is_file():
        with locked(job.work, TrainingError) if state.is_main_process else nullcontext():
            if not finished.is_file():  # else another run has finished it a moment ago
                with flush_denormals():
                    _train(job, state, show_progress)
                return out
    compare_runs(store.read_meta(out).get("run", {}), job.record(), out)
    shutil.rmtree(job.work, ignore_errors=True)  # of a run killed after `out` was whole
    return out


def _train(job: Job, state: PartialState, show_progress: Progress) -> None:
    """Train from the newest whole checkpoint in `job.work`; leave `job.out`."""
    record, note = job.record(), job.work / "run.json"
    if note.is_file():
        compare_runs(store.read_note(note), record, job.work)
    with state.main_process_first():
        if state.is_main_process:
            write_json(note, record)
        checkpoint = resume.find_checkpoint(job.work)
    set_seed(job.seed)
    model, inputs = _open_parent(job)
    trainer = (_contrastive if job.stage == "stage3" else _reconstruction)(job, model, inputs)
    adapter = None
    if job.recipe.lora_r:  # after the builder: the patch decoder copies a layer without adapter
        adapter, record["lora_modules"] = add_adapter(model, job.recipe)
    if job.recipe.torch_compile:  # before FSDP, after the adapter
        compile_layers(model)
    whole = trainer.model, model, adapter
    if trainer.is_fsdp_enabled:
        whole = shard(trainer, model, adapter)
    watch = resume.Watch(checkpoint)
    trainer.remove_callback(PrinterCallback)
    if show_progress:
        lines = callable(show_progress)
        trainer.add_callback(trainers.Lines(show_progress) if lines else trainers.Bar())
    trainer.add_callback(watch)
    with resume.explain_losses(job.work):
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        finally:
            watch.restore()
        if (step := trainer.state.global_step) < job.recipe.steps:
            raise KeyboardInterrupt(f"stopped at step {step}; the same command goes on from there")
        trainer.check_weights()
        if trainer.is_fsdp_enabled:
            unshard(trainer, whole)
        if state.is_main_process:
            _finish(job, record, whole, inputs, trainer.state.log_history, watch.seconds())
            shutil.rmtree(job.work, ignore_errors=True)
        state.wait_for_everyone()


def _open_parent(job: Job) -> tuple[PreTrainedModel, Inputs]:
    """Open the parent's model and inputs, with the recipe's attention and limits."""
    recipe, longest = job.recipe, job.parent_meta["max_length"]
    if recipe.max_length > longest:
        logger.warning("max_length %d: the parent was made for %d", recipe.max_length, longest)
    length = min(recipe.max_length, longest)
    inputs = store.load_inputs(job.parent, job.parent_meta, max_length=length)
    inputs.limit_images(recipe.image_limit(length))
    inputs.keep_images(KEPT_IMAGES // max(1, recipe.workers))
    attention, bidirectional = recipe.attn_implementation, recipe.layout != "causal"
    model = open_backbone(job.parent, bidirectional=bidirectional, attn_implementation=attention)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, inputs


def _finish(
    job: Job,
    record: dict[str, Any],
    whole: tuple,
    inputs: Inputs,
    history: list[dict],
    seconds: float,
) -> None:
    """Write the finished checkpoint: weights, adapter merged, log.csv, and what made them."""
    module, model, adapter = whole
    log = trainers.average_log([row for row in history if "loss" in row], job.recipe.logging_steps)
    meta = {
        "stage": job.stage,
        "layout": job.recipe.layout,
        "pooling": getattr(job.recipe, "pooling", "eos"),
        "prompt": "<|vision_start|><|image_pad|><|vision_end|>{text}" + inputs.eos_token,
        "parent": "/".join(Path(job.parent).parts[-2:]),  # a whole path would name this machine
        "train_seconds": round(seconds, 1),
        "final_loss": float(log["loss"].tail(5).mean()),
        "run": record,
    }
    if (notes := job.data / "README.md").is_file():  # whose pictures these are
        meta["data_notes"] = notes.read_text(encoding="utf-8")[:500]
    extra = {"log.csv": log.to_csv(index=False)}
    if job.stage == "stage3":  # so that the folder also opens as a sentence-transformers model
        entry = {"idx": 0, "name": "0", "path": "", "type": "cocoa_lib.embedder.EosEmbedding"}
        extra["modules.json"] = json.dumps([entry], indent=2)
    model = model if adapter is None else adapter.merge_and_unload()
    store.save_checkpoint(job.out, model, inputs, meta, extra, getattr(module, "decoder", None))


def _reconstruction(job: Job, model: PreTrainedModel, inputs: Inputs) -> Trainer:
    """Build the trainer of stages 1 and 2: a `Reconstruction` of corrupted rows."""
    recipe, data = job.recipe, job.data
    sources = getattr(recipe, "sources", "captions")
    parts = [corpus.captions(data)] if sources != "pairs" else []
    if sources == "corpus" and (data / "corpus").is_dir():
        parts.append(corpus.questions(data))
    if sources in ("pairs", "both"):
        parts += corpus.text_pairs(data).values()
    set_mask_token(model, inputs, recipe.mask_token)
    corrupt = {"stage1": stage1_batch, "stage2": stage2_batch}[job.stage]
    collate = partial(corrupt, inputs=inputs, recipe=recipe, seed=job.seed)
    options = inspect.signature(Reconstruction).parameters
    values = {name: getattr(recipe, name) for name in options if hasattr(recipe, name)}
    learned = recipe.patch_fill == "learned"
    rows = ConcatDataset(parts)
    plan = index_plan(list(map(len, parts)), recipe.steps * recipe.batch_size, seed=job.seed)
    chosen = (rows[i] for i in sorted(set(plan.tolist())))
    corpus.check_items(map(stage1_item, chosen) if job.stage == "stage1" else chosen, data)
    return trainers.ReconstructionTrainer(
        model=Reconstruction(model, learned_fill=learned, **values),
        args=trainers.training_arguments(TrainingArguments, recipe, job.work, job.seed),
        train_dataset=Planned(rows, plan),
        data_collator=collate,
    )


def _contrastive(job: Job, model: PreTrainedModel, inputs: Inputs) -> Trainer:
    """Build the trainer of stage 3: pairs in plan order through `CachedInfoNCE`."""
    recipe, arguments = job.recipe, SentenceTransformerTrainingArguments
    rows, sizes = corpus.pairs(
        job.data, recipe.max_per_subset, hard_negatives=recipe.hard_negatives
    )
    if len(rows) < recipe.batch_size:
        raise TrainingError(
            f"{job.data}: {len(rows)} training pairs are fewer than one batch of "
            f"{recipe.batch_size}; lower batch_size or add pairs"
        )
    n = recipe.steps * recipe.batch_size
    plan = index_plan(sizes, n, seed=job.seed, block=recipe.same_task_block)
    chosen = rows.select(sorted(set(plan.tolist())))
    corpus.check_items((item for side in chosen.column_names for item in chosen[side]), job.data)
    module = EosEmbedding(model, inputs, pooling=recipe.pooling, packing=recipe.packing)
    embedder = SentenceTransformer(modules=[module], device="cpu")  # the trainer moves it
    chunk = {"mini_batch_size": recipe.mini_batch_size}
    collate = partial(pair_features, inputs=inputs, **chunk)
    return trainers.ContrastiveTrainer(
        model=embedder,
        args=trainers.training_arguments(arguments, recipe, job.work, job.seed),
        train_dataset=rows.select(plan),
        loss=CachedInfoNCE(embedder, temperature=recipe.temperature, **chunk),
        data_collator=SentenceTransformerDataCollator(collate),
    )
