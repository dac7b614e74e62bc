"""Several processes: FSDP's wrapping, and what keeps ranks in step."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, Trainer

from ..backbone import language_model
from .resume import TrainingError


def join_processes() -> PartialState:
    """This process among those of `torchrun` or `accelerate launch`: alone where there are none.

    On a machine without an accelerator accelerate must be told so, or each process would take itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


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
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, output_dtype=None, reduce_dtype=torch.float32
        )
    whole = (
        copy.deepcopy((trainer.model, model, adapter)) if trainer.is_world_process_zero() else None
    )
    if adapter is not None:
        # Else a text's first layer gets its gradients after all others, a picture's in its turn: two orders of exchange.
        model.enable_input_require_grads()
    return whole


def unshard(trainer: Trainer, whole: tuple | None) -> None:
    """Every process gives its part of the weights; the main one puts them into what `shard` kept whole."""
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if whole is not None:
        whole[0].load_state_dict(weights)
