"""Recipes: every number of a training stage, once, with its source.

Profiles and arms override them, nothing else does. The defaults are the numbers of the authors'
scripts (`bi_warmup.sh`, `eos_bridged.sh`, `cl_train.sh`), for 8 GPUs, except for `bf16` and the
adapter, which are off, and where a comment says "ours". Where sources disagree about corruption,
`preset` picks one of them whole: `figure`, `script` or `moca`.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from .attention import LAYOUTS
from .reconstruction import TEXT_LOSSES


class RecipeError(ValueError):
    """A recipe or profile with an unknown name or an impossible value."""


def unknown_name(name: str, known: list[str], where: str) -> RecipeError:
    """The error for a name that is not known: what is close, and what is known."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return RecipeError(f"{where}: unknown name {name!r}{hint} Known: {', '.join(known)}")


# Allowed ranges. Outside them training fails late or silently changes meaning.
Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[int, Field(ge=0)]
Length = Annotated[int, Field(ge=8)]
Weight = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0.001)]  # it divides
# Names that other files define, so that a layout or a loss is added there alone.
Layout = Literal[tuple(LAYOUTS)]
Objective = Literal[tuple(TEXT_LOSSES)]
Fill = Literal["noise", "zero", "learned"]
# Those of transformers that need no numbers of their own.
SCHEDULES = (
    "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt"
)
Schedule = Literal[tuple(SCHEDULES.split())]

CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=CONFIG)
class Recipe:
    """What all stages share. `batch_size` is global: all devices together."""

    steps: Count = 3000  # optimiser steps (script: 3000 in stage 1)
    batch_size: Count = 128  # script: 16 x 8 GPUs in stage 1
    learning_rate: Weight = 2e-5  # script
    schedule: Schedule = "linear"  # script
    warmup_steps: CountOrOff = 100  # script
    max_grad_norm: Weight = 1.0  # transformers' default; MoCa clips at 5
    weight_decay: Weight = 0.0  # not set in the scripts
    max_length: Length = 4096  # script
    # Of one picture at most, and half of max_length; larger ones are shrunk (script: 256 to 1280).
    image_tokens: Count = 1280
    layout: Literal["bidirectional", "causal"] = "bidirectional"  # attention of the forward pass
    bf16: bool = False  # script: on; needs a GPU
    attn_implementation: str = "sdpa"
    lora_r: CountOrOff = 0  # 0: train all weights; script: 8, alpha 64, dropout 0.1, DoRA
    lora_alpha: Count = 64
    lora_dropout: Rate = 0.1
    dora: bool = True
    gradient_checkpointing: bool = False
    torch_compile: bool = False  # the layers, the vision tower's too
    workers: CountOrOff = 0  # processes that decode and tokenise ahead; the batches are the same
    save_steps: Count = 500  # at most this many steps of work are lost in a kill
    logging_steps: Count = 10
    report_to: str | list[str] = "none"  # transformers' trackers: "tensorboard", "wandb", ...

    def image_limit(self, max_length: int) -> int:
        """Most tokens of one picture: `image_tokens`, and half of inputs of `max_length`."""
        return max(1, min(self.image_tokens, max_length // 2))


@dataclass(frozen=True, config=CONFIG)
class Stage1Recipe(Recipe):
    """Bidirectional warm-up by joint reconstruction."""

    text_mask_rate: Rate = 0.2  # figure and script; MoCa 0.4
    patch_mask_rate: Rate = 0.3  # script; figure and MoCa 0.5
    image_weight: Weight = 0.5  # script; MoCa 0.1
    text_weight: Weight = 1.0  # 0: patches only, an ablation (ours)
    objective: Objective = "mntp"  # figure: shifted; MoCa: "mlm"
    # "": the tokenizer's own, or an unused one; else of the vocabulary, or added (MoCa: <|mask|>).
    mask_token: str = ""
    patch_fill: Fill = "noise"  # MoCa: one Gaussian vector
    norm_pix_loss: bool = False  # off in MoCa; He et al. offer it
    packing: bool = False  # several samples in a row; the loss is the same (ours)
    decoder_layers: CountOrOff = 1  # MoCa; 0: linear map only


@dataclass(frozen=True, config=CONFIG)
class Stage2Recipe(Recipe):
    """EOS-bridged reconstruction by attention truncation."""

    batch_size: Count = 64  # script: 8 x 8 GPUs, for 2 epochs; the number of steps is ours
    layout: Layout = "eos_bridged"  # figure; "eos_bridged_strict" is ours, the others are controls
    text_mask_rate: Rate = 0.7  # script
    objective: Objective = "mntp"
    mask_token: str = ""  # as in stage 1, whose checkpoint keeps its token
    # "captions": image -> caption; "corpus": these, and image + question -> answer (ours);
    # "pairs": query -> positive text (script); "both": captions and pairs
    sources: Literal["captions", "corpus", "pairs", "both"] = "both"
    # Above 0, B also holds A's picture with hidden cells, to be restored from EOS (ours).
    image_weight: Weight = 0.0
    patch_mask_rate: Rate = 0.7  # of that picture; the rate of the text (ours)
    patch_fill: Fill = "noise"  # as in stage 1
    packing: bool = False  # as in stage 1

    def image_limit(self, max_length: int) -> int:
        """Where B ends with a copy of A's picture, three quarters of the input are for both."""
        limit = super().image_limit(max_length)
        return max(1, min(limit, 3 * max_length // 8)) if self.image_weight > 0 else limit


@dataclass(frozen=True, config=CONFIG)
class Stage3Recipe(Recipe):
    """Contrastive learning on the compressed embedding."""

    steps: Count = 2000  # script
    batch_size: Count = 1024  # script: 128 x 8 GPUs
    warmup_steps: CountOrOff = 200  # script
    temperature: Temperature = 0.02  # script; MoCa 0.03
    mini_batch_size: Count = 8  # GradCache chunk, script
    pooling: Literal["eos", "mean"] = "eos"  # script; MoCa pools the mean when bidirectional
    hard_negatives: bool = False  # script: none; MoCa 2 a query
    max_per_subset: Count = 100_000  # script: rows of each training subset, from the first
    packing: bool = False  # as in stage 1
    same_task_block: CountOrOff = 0  # rows of one subset together in a batch; 0: mixed (script)


RECIPES: dict[str, type[Recipe]] = {
    "stage1": Stage1Recipe,
    "stage2": Stage2Recipe,
    "stage3": Stage3Recipe,
}
# Corruption of stage 1 by source.
PRESETS: dict[str, dict[str, Any]] = {
    "figure": dict(text_mask_rate=0.2, patch_mask_rate=0.5, image_weight=0.5, objective="mntp"),
    "script": dict(text_mask_rate=0.2, patch_mask_rate=0.3, image_weight=0.5, objective="mntp"),
    "moca": dict(text_mask_rate=0.4, patch_mask_rate=0.5, image_weight=0.1, objective="mlm"),
}
_short = reprlib.Repr()  # for a value in an error, however large: YAML's aliases can unfold
_short.maxlevel = 2


def make_recipe(stage: str, values: dict[str, Any] | None = None) -> Recipe:
    """Make a stage's recipe from a dict (a profile's section); stage 1 also takes a `preset`.

    Raises RecipeError for an unknown stage, preset or name, and for a value of the wrong type or
    out of range, saying what is known or allowed.
    """
    if stage not in RECIPES:
        raise unknown_name(stage, list(RECIPES), "stage")
    if values is not None and not isinstance(values, dict):
        raise RecipeError(f"{stage}: expected names and values, got {_short.repr(values)}")
    values = dict(values or {})
    if (preset := values.pop("preset", None)) is not None:
        name = preset if isinstance(preset, str) else _short.repr(preset)
        if stage != "stage1" or name not in PRESETS:
            raise unknown_name(name, list(PRESETS), f"{stage}.preset (stage 1 only)")
        values = PRESETS[name] | values
    known = [field.name for field in fields(RECIPES[stage])]
    for name in values:
        if name not in known:
            raise unknown_name(str(name), known, stage)
    try:
        return RECIPES[stage](**values)
    except ValidationError as error:
        raise _explain(stage, error.errors()[0]) from None


def _explain(stage: str, fault: dict[str, Any]) -> RecipeError:
    """pydantic's first fault of a stage's values, in this project's words."""
    where, value = f"{stage}.{fault['loc'][0]}", fault["input"]
    if fault["type"] == "literal_error" and isinstance(value, str):
        return unknown_name(value, re.findall(r"'([^']+)'", fault["ctx"]["expected"]), where)
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return RecipeError(f"{where}: {message}, got {_short.repr(value)}")
