"""Recipes: every number of a training stage, once, with its source. Profiles override them, nothing else does.

The defaults are the numbers of the authors' scripts (`bi_warmup.sh`, `eos_bridged.sh`, `cl_train.sh`), for 8 GPUs, but for
`bf16` and the adapter, which are off, and where a comment says "ours". Where sources disagree about corruption, `preset`
picks one of them whole: `figure`, `script` or `moca`.
"""

from __future__ import annotations

import difflib
import math
import reprlib
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


class RecipeError(ValueError):
    """A recipe or profile with an unknown name or an impossible value."""


_COUNTS = "steps batch_size mini_batch_size image_tokens save_steps logging_steps max_per_subset lora_alpha".split()
_MAY_BE_ZERO = (
    "learning_rate warmup_steps max_grad_norm weight_decay lora_r workers image_weight text_weight decoder_layers "
    "same_task_block"
).split()
# Least and most of every number: others fail late and in other words, or train as something else without a word.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_COUNTS, (1, math.inf)),
    **dict.fromkeys(_MAY_BE_ZERO, (0, math.inf)),
    **dict.fromkeys(("text_mask_rate", "patch_mask_rate", "lora_dropout"), (0, 1)),
    "max_length": (8, math.inf),
    "temperature": (0.001, math.inf),  # it divides
}


@dataclass(frozen=True)
class Recipe:
    """What all stages share. `batch_size` is global: all devices together."""

    steps: int = 3000  # optimiser steps (script: 3000 in stage 1)
    batch_size: int = 128  # script: 16 x 8 GPUs in stage 1
    learning_rate: float = 2e-5  # script
    # script; those of transformers that need no numbers of their own
    schedule: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                      "inverse_sqrt"] = "linear"  # fmt: skip
    warmup_steps: int = 100  # script
    max_grad_norm: float = 1.0  # transformers' default; MoCa clips at 5
    weight_decay: float = 0.0  # not set in the scripts
    max_length: int = 4096  # script
    image_tokens: int = 1280  # of one picture at most, and half of max_length; larger ones are shrunk (script: 256 to 1280)
    layout: Literal["bidirectional", "causal"] = (
        "bidirectional"  # attention layout of the forward pass
    )
    bf16: bool = False  # script: on; needs a GPU
    attn_implementation: str = "sdpa"
    lora_r: int = 0  # 0: train all weights; script: 8, alpha 64, dropout 0.1, DoRA
    lora_alpha: int = 64
    lora_dropout: float = 0.1
    dora: bool = True
    gradient_checkpointing: bool = False
    torch_compile: bool = (
        False  # language model's layers, on a GPU also the vision tower's; compiling takes a while
    )
    workers: int = (
        0  # processes that decode and tokenise ahead of the device; the batches are the same
    )
    save_steps: int = 500  # at most this many steps of work are lost in a kill
    logging_steps: int = 10

    def image_limit(self, max_length: int) -> int:
        """Most tokens of one picture in inputs of `max_length`: `image_tokens`, and half of the input."""
        return max(1, min(self.image_tokens, max_length // 2))

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise unknown_name(
                    str(value), list(get_args(hint)), f"{type(self).__name__}.{name}"
                )
            low, high = RANGES.get(name, (None, None))
            if low is not None and not low <= value <= high:
                allowed = f"at least {low}" if high == math.inf else f"in {low}..{high}"
                raise RecipeError(f"{type(self).__name__}.{name} must be {allowed}, got {value}")


@dataclass(frozen=True)
class CausalRecipe(Recipe):
    """Next-token prediction of captions and answers: only for the small backbone of this project."""

    layout: Literal["causal"] = "causal"


@dataclass(frozen=True)
class Stage1Recipe(Recipe):
    """Bidirectional warm-up by joint reconstruction."""

    text_mask_rate: float = 0.2  # figure and script; MoCa 0.4
    patch_mask_rate: float = 0.3  # script; figure and MoCa 0.5
    image_weight: float = 0.5  # script; MoCa 0.1
    text_weight: float = 1.0  # 0: patches only, an ablation (ours)
    objective: Literal["mntp", "mlm"] = "mntp"  # figure: shifted; MoCa: "mlm"
    mask_token: str = ""  # "": the tokenizer's own, or an unused one; else one of the vocabulary, or added (MoCa: <|mask|>)
    patch_fill: Literal["noise", "zero", "learned"] = "noise"  # MoCa: one Gaussian vector
    normalise_patches: bool = False  # off in MoCa; He et al.'s norm_pix_loss
    packing: bool = (
        False  # several samples in a row instead of padding; the loss is the same (ours)
    )
    decoder_layers: int = 1  # MoCa; 0: linear map only


@dataclass(frozen=True)
class Stage2Recipe(Recipe):
    """EOS-bridged reconstruction by attention truncation."""

    batch_size: int = 64  # script: 8 x 8 GPUs, for 2 epochs; the number of steps is ours
    # figure; "eos_bridged_strict" is ours, the other two are controls
    layout: Literal["eos_bridged", "eos_bridged_strict", "bidirectional", "causal"] = "eos_bridged"
    text_mask_rate: float = 0.7  # script
    objective: Literal["mntp", "mlm"] = "mntp"
    mask_token: str = ""  # as in stage 1, whose checkpoint keeps its token
    sources: Literal["captions", "pairs", "both"] = (
        "both"  # "captions": image -> caption; "pairs": query -> positive text (script); "both"
    )
    image_weight: float = (
        0.0  # above 0: B also holds A's picture with hidden cells, to be restored from EOS (ours)
    )
    patch_mask_rate: float = 0.7  # of that picture; the rate of the text (ours)
    patch_fill: Literal["noise", "zero", "learned"] = "noise"  # as in stage 1
    packing: bool = False  # as in stage 1

    def image_limit(self, max_length: int) -> int:
        """Where B ends with a copy of A's picture, three quarters of the input are for both."""
        limit = super().image_limit(max_length)
        return max(1, min(limit, 3 * max_length // 8)) if self.image_weight > 0 else limit


@dataclass(frozen=True)
class Stage3Recipe(Recipe):
    """Contrastive learning on the compressed embedding."""

    steps: int = 2000  # script
    batch_size: int = 1024  # script: 128 x 8 GPUs
    warmup_steps: int = 200  # script
    temperature: float = 0.02  # script; MoCa 0.03
    mini_batch_size: int = 8  # GradCache chunk, script
    pooling: Literal["eos", "mean"] = "eos"  # script; MoCa pools the mean when bidirectional
    hard_negatives: bool = False  # script: none; MoCa 2 a query
    max_per_subset: int = 100_000  # script: rows taken from each training subset, from the first
    same_task_block: int = (
        0  # rows of one subset that stand together in a batch; 0: fully mixed (script)
    )


RECIPES: dict[str, type[Recipe]] = {
    "causal": CausalRecipe,
    "stage1": Stage1Recipe,
    "stage2": Stage2Recipe,
    "stage3": Stage3Recipe,
}
# Corruption of stage 1 by source, so that nobody has to guess where a number is from.
PRESETS: dict[str, dict[str, Any]] = {
    "figure": {
        "text_mask_rate": 0.2,
        "patch_mask_rate": 0.5,
        "image_weight": 0.5,
        "objective": "mntp",
    },
    "script": {
        "text_mask_rate": 0.2,
        "patch_mask_rate": 0.3,
        "image_weight": 0.5,
        "objective": "mntp",
    },
    "moca": {
        "text_mask_rate": 0.4,
        "patch_mask_rate": 0.5,
        "image_weight": 0.1,
        "objective": "mlm",
    },
}


def unknown_name(name: str, known: list[str], where: str) -> RecipeError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return RecipeError(f"{where}: unknown name {name!r}{hint} Known: {', '.join(known)}")


_short = reprlib.Repr()  # for a value in an error, however large: YAML's aliases can unfold
_short.maxlevel = 2


def make_recipe(stage: str, values: dict[str, Any] | None = None) -> Recipe:
    """A stage's recipe from a dict (a profile's section); `preset` may stand among the values of stage 1.

    Raises RecipeError for an unknown stage, preset, name, or a value of the wrong type, saying what is known.
    """
    if stage not in RECIPES:
        raise unknown_name(stage, list(RECIPES), "stage")
    if values is not None and not isinstance(values, dict):
        raise RecipeError(f"{stage}: expected names and values, got {_short.repr(values)}")
    values = dict(values or {})
    preset = values.pop("preset", None)
    if preset is not None:
        if stage != "stage1" or not isinstance(preset, str) or preset not in PRESETS:
            raise unknown_name(
                _short.repr(preset).strip("'"), list(PRESETS), f"{stage}.preset (stage 1 only)"
            )
        values = {**PRESETS[preset], **values}
    cls = RECIPES[stage]
    types = {field.name: type(field.default) for field in fields(cls)}
    for name, value in values.items():
        if name not in types:
            raise unknown_name(str(name), list(types), stage)
        wanted = types[name]
        if wanted is float and type(value) in (int, float):
            if (
                not abs(value) <= sys.float_info.max
            ):  # of a whole number, too, which `float` would not take
                raise RecipeError(
                    f"{stage}.{name}: expected a finite number, got {_short.repr(value)}"
                )
            values[name] = float(value)
        elif type(value) is not wanted:
            raise RecipeError(
                f"{stage}.{name}: expected {wanted.__name__}, got {_short.repr(value)}"
            )
    return cls(**values)
