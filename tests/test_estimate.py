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

from cocoa_lib.backbone import hidden_states, set_bidirectional
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run import estimate
from cocoa_lib.run.adapters import add_adapter
from cocoa_lib.run.estimate import HALF, SHAPES, Data, build, count_step, make_item
from cocoa_lib.run.profiles import ROOT, load_profile

CONFIGS = ROOT / "data" / "configs"
# Of the public checkpoints, see the README there.
COUNTS = {"2B": 2_208_985_600, "3B": 3_754_622_976, "7B": 8_292_166_656}
SIDE, TEXT = 20, 61  # patches a side (400 patches, 100 tokens), words
CELLS = SIDE**2 // 4
FULL, DORA, CHECKPOINTING = {}, {"lora_r": 8}, {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """name -> folder with the config of that real model, narrowed to four layers of each kind."""
    folders = {}
    for name in ("2B", "3B"):
        config = AutoConfig.from_pretrained(CONFIGS / SHAPES[name])
        text, vision = config.text_config, config.vision_config
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 1024, 4
        text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 4, 2, 1000
        text.layer_types = ["full_attention"] * 4
        text.bos_token_id = text.eos_token_id = text.pad_token_id = 0
        text.rope_parameters["mrope_section"] = [8, 12, 12]
        config.image_token_id, config.video_token_id = 990, 991
        config.vision_start_token_id, config.vision_end_token_id = 992, 993
        vision.depth, vision.num_heads = 4, 4
        if name == "2B":
            vision.embed_dim, vision.hidden_size = 128, 256
        else:
            vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 128, 320, 256
            vision.fullatt_block_indexes = [1, 3]
        folders[name] = tmp_path_factory.mktemp(name)
        config.save_pretrained(folders[name])
    return folders


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


def batch_of(module, n=1):
    """n items with weight: a picture of SIDE x SIDE patches, TEXT words of which 12 are masked."""
    item = make_item(module, TEXT, CELLS, 12)
    pixels = torch.randn(item.pop("pixel_values").shape)
    fill = {"patch_fill": item.pop("patch_fill")}
    many = {name: torch.cat([part] * n) for name, part in item.items()}
    return many | fill | {"pixel_values": torch.cat([pixels] * n)}


def test_flops_on_meta_are_those_of_a_step_here(small):
    """Stage 1 with image decoder and head: torch's count on meta is its count of a real step, to 2 %.

    Gradient checkpointing repeats the layers' forward pass, but for what nobody saves.
    """
    recipe = make_recipe("stage1", FULL)
    module = trained_module(small["2B"], recipe)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = module(**batch_of(module))["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    found = build(small["2B"], "stage1", recipe)
    item = make_item(found, TEXT, CELLS, 12)
    *counted, _ = count_step(found, "stage1", item)
    assert counted == pytest.approx([forward, counter.get_total_flops() - forward], rel=0.02)
    assert not [name for name, p in found.named_parameters() if p.requires_grad and p.grad is None]
    saving = build(small["2B"], "stage1", make_recipe("stage1", CHECKPOINTING))
    again = count_step(saving, "stage1", item)
    assert again[0] == counted[0] and 0.5 * counted[0] < again[1] - counted[1] < counted[0]


def kept_bytes(module, bf16):
    """Bytes of distinct tensors that autograd keeps, weights and their casts and the pixels aside."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    shapes = {shape for p in module.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape not in shapes:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = batch_of(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden_states(module.model, batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("bf16, share", [(False, 1.0), (True, HALF)], ids=["float32", "bf16"])
@pytest.mark.parametrize("values", [FULL, DORA], ids=["full", "dora"])
@pytest.mark.parametrize("name", ["2B", "3B"])
def test_activations_are_those_that_autograd_keeps(small, name, values, bf16, share):
    """Within an eighth; HALF is one number for all kinds."""
    recipe = make_recipe("stage3", values)
    measured = kept_bytes(trained_module(small[name], recipe), bf16)
    module = build(small[name], "stage3", recipe)
    *_, found = count_step(module, "stage3", make_item(module, TEXT, CELLS, 0))
    assert share * found == pytest.approx(measured, rel=0.125), found / measured


@pytest.fixture
def counted(monkeypatch):
    """Counting passes takes seconds; what is made of the counts does not depend on them."""
    counts = (10**9, 2 * 10**9, 10**6)
    monkeypatch.setattr(estimate, "count_step", lambda module, stage, batch: counts)


def test_weights_gradients_and_adam_are_the_bytes_that_a_step_holds(small, counted):
    for values in (FULL, DORA):
        recipe = make_recipe("stage1", values)
        module = trained_module(small["2B"], recipe)
        optimiser = torch.optim.AdamW(module.parameters())
        module(**batch_of(module))["loss"].backward()
        optimiser.step()
        size = lambda tensors: sum(t.nbytes for t in tensors if t is not None and t.dim())  # noqa: E731
        needs = estimate.estimate(small["2B"], "stage1", recipe, Data())
        states = (t for state in optimiser.state.values() for t in state.values())
        assert needs["weights"] == size(module.parameters())
        assert needs["gradients"] == size(p.grad for p in module.parameters())
        assert needs["optimiser"] == size(states)


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
    assert one["memory"] == sum(one[name] for name in estimate.USES[:-1])


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_on_meta_have_the_published_parameters_and_the_published_adapter(name):
    plain = build(CONFIGS / SHAPES[name], "stage3", make_recipe("stage3", FULL))
    assert sum(p.numel() for p in plain.parameters()) == COUNTS[name]
    recipe = make_recipe("stage3", load_profile("paper")["stage3"])
    adapted = build(CONFIGS / SHAPES[name], "stage3", recipe)
    text, vision = adapted.model.config.text_config, adapted.model.config.vision_config
    matched = [part for part in adapted.modules() if hasattr(part, "lora_A")]
    mlp = 1 if name == "2B" else 0  # Qwen2-VL's towers have fc1, fc2; Qwen2.5-VL's gate, up, down
    assert len(matched) == 7 * text.num_hidden_layers + (4 - mlp) * vision.depth
    assert not [n for n, p in adapted.named_parameters() if "merger" in n and p.requires_grad]


def test_the_command_prints_each_stage_and_what_to_change(small, counted, capsys):
    command = ["--model", str(small["3B"]), "--devices", "8", "--device-memory"]
    for memory, lines in (
        ("0.1", ["stage1", "does", "stage2", "does", "stage3", "does"]),
        ("80", []),
    ):
        estimate.main([*command, memory])
        out = capsys.readouterr().out
        found = [line.split()[0] for line in out.splitlines()[1:]]
        assert found == (lines or ["stage1", "stage2", "stage3"])
