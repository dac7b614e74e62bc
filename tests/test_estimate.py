"""The estimate against what is measured: parameters, bytes and FLOPs of small models here, of the real shapes on meta.

A run on the meta device shows shapes, parameter counts, FLOPs, which weights get a gradient, and that names match. It shows no
value, no memory peak, no time, no choice of kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from cocoa_lib.attention import A
from cocoa_lib.backbone import hidden_states, set_bidirectional
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run import estimate
from cocoa_lib.run.adapters import add_adapter
from cocoa_lib.run.estimate import SHAPES, Data, build, count_flops, make_item, saved_bytes
from cocoa_lib.run.profiles import ROOT, load_profile

CONFIGS = ROOT / "data" / "configs"
# Of the public checkpoints, see the README there.
COUNTS = {"2B": 2_208_985_600, "3B": 3_754_622_976, "7B": 8_292_166_656}
SIDE, TEXT = 20, 61  # patches a side (400 patches, 100 tokens), words
FULL, DORA, CHECKPOINTING = {}, {"lora_r": 8}, {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """name -> folder with the config of that real model, narrowed to four layers of each kind."""
    values = {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1000, "layer_types": ["full_attention"] * 4,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip

    def narrow(name):
        config = AutoConfig.from_pretrained(CONFIGS / SHAPES[name])
        text, vision = config.text_config, config.vision_config
        for key, value in values.items():
            setattr(text, key, value)
        text.rope_parameters["mrope_section"] = [8, 12, 12]
        config.image_token_id, config.video_token_id = 990, 991
        config.vision_start_token_id, config.vision_end_token_id = 992, 993
        vision.depth, vision.num_heads = 4, 4
        if name == "2B":
            vision.embed_dim, vision.hidden_size = 128, 256
        else:
            vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 128, 320, 256
            vision.fullatt_block_indexes = [1, 3]
        folder = tmp_path_factory.mktemp(name)
        config.save_pretrained(folder)
        return folder

    return {name: narrow(name) for name in ("2B", "3B")}


def batch_of(model, n=1):
    """n items: a picture of SIDE x SIDE patches between its two marks, TEXT words, EOS; every fifth word masked."""
    cells = SIDE**2 // 4
    ids = torch.full((1, cells + TEXT + 3), 7)
    ids[0, 0], ids[0, 1 : cells + 1], ids[0, cells + 1] = 992, model.config.image_token_id, 993
    labels = torch.full_like(ids, -100)
    labels[0, -TEXT:-1:5] = 7
    ids, labels = ids.repeat(n, 1), labels.repeat(n, 1)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "segment_ids": torch.full_like(ids, A), "labels": labels,
        "mm_token_type_ids": (ids == model.config.image_token_id).long(), "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * n),
        "pixel_values": torch.randn(n * SIDE**2, 3 * 2 * 14 * 14), "hidden_cells": torch.arange(n * cells) % 3 == 0,
        "patch_fill": torch.zeros(3 * 2 * 14 * 14),
    }  # fmt: skip


def trained_module(folder, recipe):
    """As `run_stage` makes it for stage 1, with random weights."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    set_bidirectional(model, True)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    module = Reconstruction(model, layout="bidirectional", image_weight=0.5)
    if recipe.lora_r:
        add_adapter(model, recipe)
    return module.train()


def test_flops_on_meta_are_those_of_a_step_here(small):
    """Stage 1 with image decoder and head: torch's count on meta is its count of a real step, to 2 %.

    Gradient checkpointing repeats the layers' forward pass, but for what nobody saves.
    """
    recipe = make_recipe("stage1", FULL)
    module = trained_module(small["2B"], recipe)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = module(**batch_of(module.model))["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    found = build(small["2B"], "stage1", recipe)
    item = make_item(found, TEXT, SIDE**2 // 4, 12)
    counted = count_flops(found, "stage1", item)
    assert counted == pytest.approx((forward, counter.get_total_flops() - forward), rel=0.02)
    assert not [name for name, p in found.named_parameters() if p.requires_grad and p.grad is None]
    saving = build(small["2B"], "stage1", make_recipe("stage1", CHECKPOINTING))
    again = count_flops(saving, "stage1", item)
    assert again[0] == counted[0] and 0.5 * counted[0] < again[1] - counted[1] < counted[0]


def kept_bytes(module, bf16):
    """Bytes of distinct tensors that autograd keeps, weights and their casts and the pixels aside."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    shapes = {shape for p in module.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape not in shapes and 14 not in tensor.shape:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = batch_of(module.model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden_states(module.model, batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("values", [FULL, DORA], ids=["full", "dora"])
@pytest.mark.parametrize("name", ["2B", "3B"])
def test_activations_are_those_that_autograd_keeps(small, name, values, bf16):
    """Within a tenth; with checkpointing, within a fifth of each layer's input and one whole layer."""
    length, patches = SIDE**2 // 4 + TEXT + 3, SIDE**2
    recipe = make_recipe("stage3", values | {"bf16": bf16})
    measured = kept_bytes(trained_module(small[name], recipe), bf16)
    found = saved_bytes(build(small[name], "stage3", recipe), recipe, length, patches)
    assert found == pytest.approx(measured, rel=0.1)
    recipe = make_recipe("stage3", values | CHECKPOINTING | {"bf16": bf16})
    inputs = kept_bytes(trained_module(small[name], recipe), bf16)
    found = saved_bytes(build(small[name], "stage3", recipe), recipe, length, patches)
    assert found == pytest.approx(inputs + measured / 8, rel=0.2)  # 8 layers, four of each kind


def test_weights_gradients_and_adam_are_the_bytes_that_a_step_holds(small, counted):
    for values in (FULL, DORA):
        recipe = make_recipe("stage1", values)
        module = trained_module(small["2B"], recipe)
        optimiser = torch.optim.AdamW(module.parameters())
        module(**batch_of(module.model))["loss"].backward()
        optimiser.step()
        size = lambda tensors: sum(t.nbytes for t in tensors if t is not None and t.dim())  # noqa: E731
        needs = estimate.estimate(small["2B"], "stage1", recipe, Data())
        assert needs["weights"] == size(module.parameters())
        assert needs["gradients"] == size(p.grad for p in module.parameters())
        states = optimiser.state.values()
        assert needs["optimiser"] == size(t for state in states for t in state.values())


@pytest.fixture
def counted(monkeypatch):
    """Counting passes takes seconds; what is made of the counts does not depend on them."""
    monkeypatch.setattr(estimate, "count_flops", lambda module, stage, batch: (10**9, 2 * 10**9))


def test_what_more_devices_sharding_and_smaller_chunks_change(small, counted):
    def need(stage="stage3", devices=1, sharded=False, **values):
        recipe = make_recipe(stage, {"batch_size": 128, "bf16": True} | values)
        return estimate.estimate(small["2B"], stage, recipe, Data(), devices, sharded=sharded)

    one, eight, shards = need(), need(devices=8), need(devices=8, sharded=True)
    assert one["weights"] == eight["weights"] == 8 * shards["weights"]
    assert eight["hours"] / one["hours"] == pytest.approx(eight["flops"] / one["flops"] / 8)
    assert eight["activations"] == one["activations"], "GradCache: the chunk decides, not the batch"
    whole = need(mini_batch_size=128)  # one device, one chunk: no GradCache
    assert whole["activations"] == 2 * 128 / 8 * one["activations"], "both sides are held at once"
    assert whole["flops"] < one["flops"], "one forward pass more, but for the first chunk"
    assert need("stage1")["logits"] > 0 == one["logits"]
    assert need(gradient_checkpointing=True)["activations"] < one["activations"] / 3
    uses = [one[name] for name in one if name not in ("memory", "flops", "hours")]
    assert one["memory"] == sum(uses)


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_on_meta_have_the_published_parameters_and_the_published_adapter(name):
    source, paper = CONFIGS / SHAPES[name], make_recipe("stage3", load_profile("paper")["stage3"])
    plain = build(source, "stage3", make_recipe("stage3", FULL))
    assert sum(p.numel() for p in plain.parameters()) == COUNTS[name]
    adapted = build(source, "stage3", paper)
    text, vision = adapted.model.config.text_config, adapted.model.config.vision_config
    matched = [part for part in adapted.modules() if hasattr(part, "lora_A")]
    mlp = 1 if name == "2B" else 0  # Qwen2-VL's towers have fc1, fc2; Qwen2.5-VL's gate, up, down
    assert len(matched) == 7 * text.num_hidden_layers + (4 - mlp) * vision.depth
    assert not [n for n, p in adapted.named_parameters() if "merger" in n and p.requires_grad]


def test_the_command_prints_each_stage_and_what_to_change(small, counted, capsys):
    command = ["--model", str(small["3B"]), "--devices", "8", "--device-memory"]
    estimate.main([*command, "0.1"])
    out = capsys.readouterr().out
    words = [line.split()[0] for line in out.splitlines()[2:]]
    assert words == ["stage1", "does", "stage2", "does", "stage3", "does"]
    assert out.count("lower mini_batch_size (stage 3) or batch_size") == 3
    estimate.main([*command, "80"])
    assert "does not fit" not in capsys.readouterr().out
