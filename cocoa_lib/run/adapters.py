"""LoRA and DoRA adapters by peft."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..recipes import Recipe

# The authors' targets (script): language model q,k,v,o,gate,up,down and vision qkv,fc1,fc2. These
# are Qwen2-VL's names; Qwen2.5-VL's vision blocks have gate, up, down, Qwen3-VL's linear_fc1,
# linear_fc2. Patch mergers are left out in all.
LORA_TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv fc1 fc2 linear_fc1 linear_fc2".split()


def add_adapter(model: PreTrainedModel, recipe: Recipe) -> tuple[PeftModel, list[str]]:
    """Add a recipe's LoRA or DoRA on the published targets (script), in place.

    Returns the peft model and the names of the matched modules. peft's `merge_and_unload` folds the
    adapter into the weights. Raises ValueError (by peft) when nothing matches.
    """
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        use_dora=recipe.dora,
        target_modules=LORA_TARGETS,
        exclude_modules=r".*merger.*",
    )
    wrapped = get_peft_model(model, config)
    return wrapped, sorted(wrapped.base_model.targeted_module_names)
