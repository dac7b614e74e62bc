"""What a compiler makes of the models: fused FlexAttention, layers as one program."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from packaging.version import Version

from cocoa_lib.backbone import hidden_states, language_model
from cocoa_lib.kernels import PICTURES, compile_layers
from cocoa_lib.recipes import make_recipe
from cocoa_lib.run.adapters import add_adapter
from cocoa_lib.world.backbone import new_backbone

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@torch.no_grad()
def test_compiled_flex_equals_sdpa(small, picture):
    """The fused kernel as a GPU run uses it, where this machine can compile one; one layout, because compiling is slow."""
    model, inputs = small
    items = [{"text": "a large red circle", "image": picture(64, 48)}, {"text": "a blue 7"}]
    batch = inputs.collate(items, ["a red circle", "a blue 7 at the bottom"])
    real = batch["attention_mask"].bool()
    dense = hidden_states(model, batch, "eos_bridged")
    config = language_model(model).config
    config._attn_implementation = "flex_attention"
    try:
        fused = hidden_states(model, batch, "eos_bridged")
    except Exception as error:
        pytest.skip(f"FlexAttention does not compile here: {type(error).__name__}: {error!s:.200}")
    finally:
        config._attn_implementation = "sdpa"
    assert torch.allclose(fused[real], dense[real], atol=1e-5)


@contextmanager
def graphs_of(model):
    """The graphs that `compile_layers` hands to a backend while this lasts; torch's own settings come back."""
    graphs, dynamo, drawn = [], torch._dynamo.config, torch._inductor.config.fallback_random
    here = dynamo.patch(recompile_limit=dynamo.recompile_limit, optimize_ddp=dynamo.optimize_ddp)
    keep = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    torch._dynamo.reset()
    with here, torch._inductor.config.patch(fallback_random=drawn):
        compile_layers(model.train(), backend=keep)
        yield graphs


@pytest.mark.parametrize("dora", [None, False, True])
def test_layers_are_one_program_but_with_dora_which_is_said(dora, caplog):
    """Under gradient checkpointing, as the real models are trained. torch 2.11 and 2.12 compiled DoRA's layers, too."""
    stopped = bool(dora) and Version(torch.__version__) >= Version("2.13")
    model, inputs = new_backbone(
        ["a large red circle at the top left"] * 8, vocab_size=300, image_pixels=1024, seed=0, hidden_size=64, layers=3, heads=2,
        vision_dim=32, vision_layers=1, patch_size=8,
    )  # fmt: skip
    model.gradient_checkpointing_enable()
    if dora is not None:
        add_adapter(model, make_recipe("stage1", {"lora_r": 4, "lora_alpha": 8, "dora": dora}))
        model.enable_input_require_grads()
    with graphs_of(model) as graphs:
        batch = inputs.collate([{"text": "a large red circle"}, {"text": "a"}])
        hidden_states(model, batch).sum().backward()
    assert len(graphs) == (0 if stopped else 1), "if DoRA compiles, the warning can go"
    assert ("gains little or nothing with DoRA" in caplog.text) == stopped


def test_compiled_pictures_are_one_program(small, picture):
    """However many there are."""
    model, inputs = copy.deepcopy(small[0]), small[1]
    model.model.visual.config._attn_implementation = PICTURES
    with graphs_of(model) as graphs:
        for n in (2, 3, 5):
            images = [picture(64, 48, seed=i) for i in range(n)]
            batch = inputs.collate([{"text": "a", "image": image} for image in images])
            model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    assert len(graphs) == 1
