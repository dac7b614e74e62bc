"""What can be known before anything trains: model, data, device, and folders of other runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from transformers import AutoConfig

from ..data.tables import fingerprint
from ..items import InputError
from ..store.checkpoint import META, CheckpointError, read_meta, read_note
from . import estimate
from .resume import TrainingError
from .sharding import join_processes
from .spec import RunSpec
from .stage import compare_runs, record_recipe


def check_run(run: RunSpec) -> None:
    """Raise the first error that any part of `run` would meet."""
    for stage in run.stages:
        if run.recipe(stage).bf16 and not torch.cuda.is_available():
            raise TrainingError(
                f"{stage} of profile {run.profile} trains in bf16, which needs a GPU, and there "
                f"is none here; take a "
                f"machine with one, or pass changes: {{{stage}: {{bf16: false}}}} for each stage"
            )
    check_model(run.backbone)
    with join_processes().main_process_first():
        data = run.data
    check_data(data)
    facts = {"seed": run.seed, "data": fingerprint(data)}
    for stage in run.stages:
        wanted = facts | {"stage": stage, "recipe": record_recipe(run.recipe(stage))}
        out = run.folder(stage)
        work = out.parent / f".{out.name}.work"
        if (out / META).is_file():
            compare_runs(read_meta(out, check=False).get("run", {}), wanted, out)
        elif (work / "run.json").is_file():
            compare_runs(read_note(work / "run.json"), wanted, work)


def check_model(source: Path | str) -> None:
    """Raise CheckpointError for a folder or hub name that is no Qwen-VL, or lacks a file."""
    if isinstance(source, Path) and not (source / META).is_file() and not source.is_dir():
        return  # a backbone of another shape, not trained yet
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise CheckpointError(f"model {source}: {_explain_missing(source, error)}") from error
    if config.model_type not in estimate.MODELS:
        vision = "" if hasattr(config, "vision_config") else " without a vision tower"
        raise CheckpointError(
            f"model {source} is a {config.model_type}{vision}; CoCoA needs one of "
            f"{', '.join(estimate.MODELS)}, "
            "such as Qwen/Qwen2-VL-2B-Instruct"
        )
    if isinstance(source, Path):
        _check_shards(source)


def _explain_missing(source: Path | str, error: Exception) -> str:
    if isinstance(source, Path):
        said = str(error).splitlines()[0]
        return f"no config.json that transformers can read ({said}); copy the model again"
    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return "gated; accept its terms on the hub, then run `hf auth login`"
    return (
        "no such folder here, and the hub could not be reached or has no such model; check the "
        "name, or download it "
        f"where there is a network (`hf download {source}`) and pass the folder"
    )


def _check_shards(folder: Path) -> None:
    """Raise CheckpointError where a folder lacks weights that it should have."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_note(index).get("weight_map", {}).values()))
        if lost := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"model {folder}: {len(lost)} of {len(names)} shards are missing, e.g. {lost[0]}; "
                f"download the model again"
            )
    elif not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"model {folder}: no .safetensors file; download the model again")


def check_data(data: Path) -> None:
    """Raise InputError for a data folder without training pairs or pictures."""
    if not any(data.glob("train/*/*.parquet")):
        raise InputError(
            f"data {data}: no training pairs; expected train/<Subset>/original-*.parquet"
        )
    images = data / "images"
    if not images.is_dir() or not any(images.iterdir()):
        raise InputError(
            f"data {data}: no pictures in {images}; unpack the image archives there, so that the "
            f"tables' paths lead "
            "to files"
        )


@contextmanager
def explain_memory(run: RunSpec, stage: str) -> Iterator[None]:
    """Re-raise a device's want of memory as TrainingError with the estimate."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        n = join_processes().num_processes
        memory = (
            torch.cuda.get_device_properties(0).total_memory / 1e9
            if torch.cuda.is_available()
            else math.inf
        )
        item = estimate.measure(run.data)
        lines = estimate.report(run.parent(stage), stage, run.recipe(stage), item, memory, n)
        raise TrainingError(
            f"{stage}: not enough memory on the device ({str(error).splitlines()[0]}). The "
            f"estimate:\n" + "\n".join([estimate.HEAD, *lines])
        ) from error
