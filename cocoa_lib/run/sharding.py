"""Several processes: FSDP's wrapping, and what keeps ranks in step."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..backbone import language_model
from ..inputs import Batch
from ..reconstruction import Reconstruction
from .resume import TrainingError


def shard(trainer: Trainer, model: PreTrainedModel, adapter: Any) -> tuple | None:
    """Prepare for FSDP (version 2): gathered at a time is a layer of the language model.

    The vision tower is gathered with the rest: a batch of texts does not run its layers, and
    another process would wait for them. Returns (module, model, adapter) that stay whole, in the
    memory of the main process's machine, for the weights of the finished run (`unshard`); None
    elsewhere. Raises TrainingError where the launch file asks for another kind of sharding.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    sharded_saves = "SHARDED_STATE_DICT" in str(plugin.state_dict_type)
    if plugin.fsdp_version != 2 or not sharded_saves or plugin.cpu_ram_efficient_loading:
        raise TrainingError(
            "sharded training needs fsdp_version: 2, fsdp_state_dict_type: SHARDED_STATE_DICT and "
            "fsdp_cpu_ram_efficient_loading: false; take "
            "notebooks/profiles/accelerate/fsdp_1x8.yaml"
        )
    plugin.transformer_cls_names_to_wrap = [type(language_model(model).layers[0]).__name__]
    if (policy := plugin.mixed_precision_policy) is not None:
        # The model in bf16, as accelerate has it; not the losses, nor sums of gradients.
        ours = {"output_dtype": None, "reduce_dtype": torch.float32}
        plugin.mixed_precision_policy = dataclasses.replace(policy, **ours)
    parts = (trainer.model, model, adapter)
    whole = copy.deepcopy(parts) if trainer.is_world_process_zero() else None
    if adapter is not None:
        # Else a text's first layer gets its gradients last, a picture's in its turn: two orders.
        model.enable_input_require_grads()
    keep_in_step(trainer.model, model)
    return whole


def keep_in_step(module: nn.Module, model: PreTrainedModel) -> None:
    """Give every rank the gradients of a part that only another rank runs: zeros, in training.

    Ranks that share weights exchange the gradients of the same ones, or they wait for each other
    for ever. A batch of texts runs no vision tower, one without hidden cells no patch decoder. A
    decoder's layers are gathered when it runs, so every rank runs it where one does.
    """

    def needed_elsewhere(here: bool) -> bool:
        """Tell whether another rank runs this part on its batch and this one does not. All ask."""
        anywhere = torch.tensor(int(here), device=model.device)
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
        return bool(anywhere) and not here

    def add_tower(base: nn.Module, args: tuple, given: dict[str, Any], output: Any) -> Any:
        if base.training and torch.is_grad_enabled() and needed_elsewhere("pixel_values" in given):
            weights = (weight for weight in base.visual.parameters() if weight.requires_grad)
            zero = 0.0 * sum(weight.sum() for weight in weights)
            output.last_hidden_state = output.last_hidden_state + zero
        return output

    model.model.register_forward_hook(add_tower, with_kwargs=True)
    if not isinstance(module, Reconstruction) or module.decoder is None:
        return
    image_loss = module.image_loss

    def add_decoder(hidden: Tensor, batch: Batch) -> Tensor:
        if not (module.training and needed_elsewhere("hidden_cells" in batch)):
            return image_loss(hidden, batch)
        zero = 0.0 * module.decoder(hidden, model, batch, module.layout).sum()
        return zero if module.decoder.fill is None else zero + 0.0 * module.decoder.fill.sum()

    module.image_loss = add_decoder


def unshard(trainer: Trainer, whole: tuple | None) -> None:
    """Collect every process's part of the weights into what `shard` kept whole."""
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if whole is not None:
        whole[0].load_state_dict(weights)
