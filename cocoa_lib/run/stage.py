"""The stages as runs: each opens its parent's folder, trains, and leaves a checkpoint folder for the next.

`run_stage` is the one entry point, from a notebook, from the command line (`python -m cocoa_lib.run`, also under
`accelerate launch` or `torchrun`) or from the graph. Stages "causal", 1 and 2 run on transformers' Trainer, stage 3 on
sentence-transformers' trainer with its GradCache. While a run lasts its state is in `.NAME.work` beside the output
folder; the same command goes on from the newest checkpoint there that matches its hash, and the output folder appears
only when the stage is done.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from ..backbone import open_backbone, set_mask_token
from ..contrastive import CachedInfoNCE, pair_features
from ..corruption import stage1_batch, stage1_item, stage2_batch
from ..data import corpus
from ..embedder import EosEmbedding
from ..inputs import Inputs
from ..kernels import compile_layers
from ..recipes import RECIPES, CausalRecipe, Recipe, Stage3Recipe
from ..reconstruction import Reconstruction
from ..store.checkpoint import (
    META,
    CheckpointError,
    load_inputs,
    read_meta,
    read_note,
    save_checkpoint,
    weights_hash,
)
from ..store.files import locked, write_json
from ..world.backbone import causal_batch, new_backbone
from .adapters import add_adapter
from .plan import Planned, index_plan
from .resume import SAVING, TrainingError, Watch, checkpoints, explained, last_whole_checkpoint
from .sharding import join_processes, shard, unshard
from .trainers import Bar, ContrastiveTrainer, ReconstructionTrainer, averaged, training_arguments

logger = logging.getLogger(__name__)
PARENT_STAGE = {"causal": "init", "stage1": "causal", "stage2": "stage1", "stage3": "stage2"}
KEPT_IMAGES = (
    1 << 29
)  # bytes of processed pictures that a process keeps, all its workers together (ours)


def check_parent(stage: str, parent: str | Path, allow_parent: bool) -> dict[str, Any]:
    """The parent's `cocoa.json`; a folder or hub name without one counts as a causal checkpoint (a real Qwen2-VL).

    Raises CheckpointError when the parent is of another stage than the one before, unless `allow_parent`.
    """
    if not (Path(parent) / META).is_file():
        if Path(parent).is_dir() and not (Path(parent) / "config.json").is_file():
            raise CheckpointError(f"{parent}: no config.json; not a model folder")
        if Path(parent).is_absolute() and not Path(parent).exists():
            raise CheckpointError(f"{parent}: no such folder")
        digest = (
            weights_hash(Path(parent)) if Path(parent).is_dir() else str(parent)
        )  # of the hub: its name
        # No limit of its own: the recipe's `max_length` holds.
        meta = {
            "stage": "causal",
            "eos_token": "<|im_end|>",
            "max_length": sys.maxsize,
            "weights_sha256": digest,
        }
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
    if (
        out.is_dir() and any(out.iterdir()) and not (out / META).is_file()
    ):  # said now, not when it has been trained
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
        logger.warning(
            "max_length %d: the parent was made for %d tokens, which is used",
            recipe.max_length,
            longest,
        )
    inputs = load_inputs(parent, parent_meta | {"max_length": min(recipe.max_length, longest)})
    inputs.limit_images(recipe.image_limit(inputs.max_length))
    inputs.keep_images(KEPT_IMAGES // max(1, recipe.workers))
    model = open_backbone(
        parent,
        bidirectional=recipe.layout != "causal",
        attn_implementation=recipe.attn_implementation,
    )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainer = BUILDERS[stage](model, inputs, recipe, data, work, seed)
    adapter = None
    if (
        recipe.lora_r
    ):  # after the builder: the patch decoder copies a layer without adapter and is trained whole
        adapter, matched = add_adapter(
            model,
            r=recipe.lora_r,
            alpha=recipe.lora_alpha,
            dropout=recipe.lora_dropout,
            dora=recipe.dora,
        )
        run = run | {"lora_modules": matched}
    if recipe.torch_compile:  # before FSDP, after the adapter
        compile_layers(model)
    whole = (
        shard(trainer, model, adapter)
        if trainer.is_fsdp_enabled
        else (trainer.model, model, adapter)
    )
    with explained(trainer, state, work):
        group = (
            torch.distributed.new_group(backend="gloo", timeout=SAVING)
            if state.num_processes > 1
            else None
        )
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
        raise KeyboardInterrupt(
            f"stopped at step {trainer.state.global_step}; the same command goes on from there"
        )
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
            _finish(
                out, model, inputs, recipe, run, parent, trainer.state.log_history, seconds, decoder
            )
        shutil.rmtree(work, ignore_errors=True)  # the same command elsewhere may be removing it too
    with explained(trainer, state, work):
        watch.wait()
    return out


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
        "parent": "/".join(
            Path(parent).parts[-2:]
        ),  # enough to find it; a whole path would name this machine
        "train_seconds": round(seconds, 1),
        "final_loss": None if log.empty else float(log["loss"].tail(5).mean()),
        "run": run,
    }
    extra = {"log.csv": log.to_csv(index=False)}
    if run["stage"] == "stage3":  # so that the folder also opens as a sentence-transformers model
        module = {"idx": 0, "name": "0", "path": "", "type": "cocoa_lib.embedder.EosEmbedding"}
        extra["modules.json"] = json.dumps([module], indent=2)
    save_checkpoint(out, model, inputs, meta, extra, decoder)


def _same_run(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raises CheckpointError where the two differ. A recipe from before an option existed has that option's default."""
    found = found | {
        "recipe": dataclasses.asdict(RECIPES[wanted["stage"]]()) | found.get("recipe", {})
    }
    differing = sorted(name for name in wanted if json.dumps(found.get(name), sort_keys=True, default=str)
                       != json.dumps(wanted[name], sort_keys=True, default=str))  # fmt: skip
    if differing:
        raise CheckpointError(
            f"{where}: holds a run of another configuration (different: {', '.join(differing)}); it is not reused. "
            "Choose another output folder, or delete this one"
        )


def _reconstruction(
    stage: str, model, inputs: Inputs, recipe: Recipe, data: Path, work: Path, seed: int
) -> Trainer:
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
    module = Reconstruction(
        model, learned_fill=learned, **{name: getattr(recipe, name) for name in wanted}
    )
    rows, plan = (
        ConcatDataset(parts),
        index_plan(list(map(len, parts)), recipe.steps * recipe.batch_size, seed=seed),
    )
    chosen = (rows[i] for i in sorted(set(plan.tolist())))
    if stage == "causal":
        corpus.check_images(row["image"] for row in chosen)
    else:
        corpus.check_items(map(stage1_item, chosen) if stage == "stage1" else chosen, data)
    args = training_arguments(TrainingArguments, recipe, work, seed)
    return ReconstructionTrainer(
        model=module, args=args, train_dataset=Planned(rows, plan), data_collator=collate
    )


def _stage3(
    model, inputs: Inputs, recipe: Stage3Recipe, data: Path, work: Path, seed: int
) -> Trainer:
    rows, sizes = corpus.pairs(data, recipe.max_per_subset, hard_negatives=recipe.hard_negatives)
    if len(rows) < recipe.batch_size:
        raise TrainingError(
            f"{data}: {len(rows)} training pairs are fewer than one batch of {recipe.batch_size}; lower batch_size or add pairs"
        )
    plan = index_plan(
        sizes, recipe.steps * recipe.batch_size, seed=seed, block=recipe.same_task_block
    )
    chosen = rows.select(sorted(set(plan.tolist())))
    corpus.check_items((item for column in chosen.column_names for item in chosen[column]), data)
    embedder = SentenceTransformer(
        modules=[EosEmbedding(model, inputs, pooling=recipe.pooling)], device="cpu"
    )  # the trainer moves it
    return ContrastiveTrainer(
        model=embedder,
        args=training_arguments(SentenceTransformerTrainingArguments, recipe, work, seed),
        train_dataset=rows.select(plan),
        loss=CachedInfoNCE(
            embedder, temperature=recipe.temperature, mini_batch_size=recipe.mini_batch_size
        ),
        data_collator=SentenceTransformerDataCollator(partial(pair_features, inputs=inputs)),
    )


BUILDERS = {stage: partial(_reconstruction, stage) for stage in ("causal", "stage1", "stage2")} | {
    "stage3": _stage3
}


def train_backbone(
    data: Path, out: Path, shape: dict[str, int], recipe: CausalRecipe, *, seed: int
) -> Path:
    """The small causal backbone: a tokenizer, a random Qwen2-VL of this shape, next-token prediction on the corpus.

    The tokenizer is learnt from the corpus and from English prose (Python's own reference manual, part of every
    installation), so that a user's texts are not spelt letter by letter.
    """
    from pydoc_data.topics import topics

    rows = [*corpus.captions(data), *corpus.questions(data)]
    texts = (
        [row["text"] for row in rows[::7]]
        + [row["target"] for row in rows[::7]]
        + list(topics.values())
    )
    init = out.parent / f"{out.name}-init"
    asked = {
        "shape": shape,
        "seed": seed,
        "data": corpus.fingerprint(data),
    }  # its tokenizer is learnt from the data
    found = read_meta(init, check=False) if (init / META).is_file() else asked
    if {name: found.get(name) for name in asked} != asked:
        shutil.rmtree(
            init
        )  # left by an earlier call; a run that began from it is refused below, by its parent's hash
    if not (init / META).is_file():
        model, inputs = new_backbone(texts, seed=seed, **shape)
        save_checkpoint(init, model, inputs, {"stage": "init", **asked})
    return run_stage("causal", recipe, parent=init, data=data, out=out, seed=seed)
