"""The estimate against what is measured: parameters, bytes and FLOPs of small models here, of the real shapes on meta.

A run on the meta device shows shapes, parameter counts, FLOPs, which weights get a gradient, and that names match. It shows no
value, no memory peak, no time, no choice of kernels.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLConfig

from cocoa_lib.attention import EOS, PAD, A, B
from cocoa_lib.backbone import hidden_states, language_model, set_bidirectional
from cocoa_lib.contrastive import CachedInfoNCE
from cocoa_lib.embedder import EosEmbedding
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.run import estimate
from cocoa_lib.run.__main__ import main
from cocoa_lib.run.adapters import add_adapter
from cocoa_lib.run.estimate import SHAPES, Data, build, item_cost
from cocoa_lib.run.profiles import ROOT, load_profile

sys.path[:0] = [str(ROOT / "benchmarks")]
aten = torch.ops.aten
CONFIGS = ROOT / "data" / "configs"
COUNTS = {
    "2B": 2_208_985_600,
    "3B": 3_754_622_976,
    "7B": 8_292_166_656,
}  # of the public checkpoints, see the README there
SIDE, TEXT = 20, 61  # patches a side (400 patches, 100 tokens), words


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """name -> folder with the config of that real model, narrowed to four layers of each kind."""

    def narrow(name):
        config = AutoConfig.from_pretrained(CONFIGS / SHAPES[name])
        text, vision = config.text_config, config.vision_config
        for key, value in {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
                           "num_key_value_heads": 2, "vocab_size": 1000, "layer_types": ["full_attention"] * 4,
                           "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}.items():  # fmt: skip
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

    def qwen3(text, vision):
        """Of the same widths; its vision tower hands states of two layers to the language model besides."""
        values = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                             "num_key_value_heads", "vocab_size")}  # fmt: skip
        tower = {"depth": 4, "num_heads": 4, "hidden_size": 128, "intermediate_size": 320, "out_hidden_size": 256,
                 "patch_size": vision["patch_size"], "deepstack_visual_indexes": [1, 2]}  # fmt: skip
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        marks = {name: 990 + i for i, name in enumerate(names)}
        config = Qwen3VLConfig(
            text_config=values | {"head_dim": 64}, vision_config=tower, tie_word_embeddings=True, **marks
        )
        folder = tmp_path_factory.mktemp("qwen3")
        config.save_pretrained(folder)
        return folder

    folders = {name: narrow(name) for name in ("2B", "3B")}
    parts = json.loads((folders["3B"] / "config.json").read_text())
    return folders | {"Qwen3": qwen3(parts["text_config"], parts["vision_config"])}


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
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    set_bidirectional(model, True)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    module = Reconstruction(model, layout="bidirectional", image_weight=0.5)
    if recipe.lora_r:
        add_adapter(model)
    return module.train()


def expected(folder, recipe):
    module = build(folder, "stage1", recipe)
    return item_cost(module, recipe, TEXT, (SIDE * 14) ** 2, masked=12)


def test_the_table_in_the_docs_is_the_estimate():
    text, profile = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"), load_profile("paper")
    for name, label in (("2B", "Qwen2-VL-2B"), ("3B", "Qwen2.5-VL-3B"), ("7B", "Qwen2.5-VL-7B")):
        cells = []
        for stage in ("stage1", "stage2", "stage3"):
            found = estimate.estimate(
                CONFIGS / SHAPES[name], stage, make_recipe(stage, profile[stage]), Data(), devices=8
            )
            memory, hours = found["memory"] / 1e9, found["hours"]
            cells.append(f"{memory:.0f} / {hours:.{0 if hours > 9.9 else 1}f}")
        assert f"| {label} | {' | '.join(cells)} |" in text


def test_the_hours_of_encoding_in_the_docs_are_the_estimate():
    text, recipe = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), make_recipe("stage3", {"bf16": True})
    sizes = {"text only": 0, "picture of 448 x 448": 448**2, "larger picture, shrunk to 1280 tokens": 1280 * 28**2}
    modules = [build(CONFIGS / folder, "stage3", recipe) for folder in SHAPES.values()]
    for label, pixels in sizes.items():
        cells = []
        for module in modules:
            flops = item_cost(module, recipe, 64, pixels, 0.0).forward
            hours, digits = 1e9 * flops / (989e12 * 0.25 * 3600), 1 if pixels > 448**2 else 2
            cells.append(f"{flops / 1e12:.{digits}f}, {round(hours, -2 if pixels else 0):,.0f} h")
        assert f"| {label} | {' | '.join(cells)} |" in text, cells


@pytest.fixture(scope="module")
def on_a_gpu():
    """Of each step that was measured at 2B's shape: memory, estimated over measured, and the share of the peak that the
    estimate's FLOPs were done at, by way. A picture of 448 x 448 and words up to 1,024 tokens a row."""
    kept = [
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        for name in ("gpu_earlier", "gpu")
    ]
    memory, shares = {}, {}
    for line in (line for content in kept for line in content["results"] if "tokens_per_second" in line):
        what, way, rows = re.match(r"(.*), (.*), (\d+) rows of 1024$", line["name"]).groups()
        if way in ("Flex", "pictures singly"):
            continue
        stage = what.split()[0]
        values = {
            "bf16": True,
            "batch_size": int(rows),
            "max_length": 1024,
            "gradient_checkpointing": "checkpointing" in way,
        }
        if stage == "stage3":
            values["mini_batch_size"] = {("GradCache", "48"): 12}.get(
                (way, rows), int(rows) // (1 + (way == "GradCache"))
            )
        if "adapter" in what:
            values |= {
                name: value
                for name, value in load_profile("paper")["stage1"].items()
                if name.startswith(("lora", "dora"))
            }
        item = Data(382 if stage == "stage2" else 765, 448**2, 448**2, 1.0)
        found = estimate.estimate(CONFIGS / SHAPES["2B"], stage, make_recipe(stage, values), item)
        seconds = int(rows) * 1024 * (1 + (stage == "stage3")) / line["tokens_per_second"]
        kind = "adapter" if "adapter" in what else way
        shares.setdefault(kind, []).append(found["flops"] / seconds / 989e12)
        if way != "compiled layers":
            memory.setdefault(kind, []).append(found["memory"] / 1e9 / line["peak_memory_gb"])
    return memory, shares


def test_the_estimate_is_above_what_a_gpu_took(on_a_gpu):
    memory, _ = on_a_gpu
    text = " ".join((ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split())
    kept = [ratio - 1 for kind in ("plain", "GradCache") for ratio in memory[kind]]
    other = [ratio - 1 for kind in ("gradient checkpointing", "adapter") for ratio in memory[kind]]
    assert 0 < min(kept)
    said = f"by {100 * min(kept):.0f} to {100 * max(kept):.0f} % with all weights trained and all states kept, "
    said += f"by {100 * min(other):.0f} to {100 * max(other):.0f} % under gradient checkpointing or with the adapter"
    assert said in text, said


def test_the_utilisation_taken_is_what_a_gpu_reached(on_a_gpu):
    """By whole batches, rounded; the larger shares are those of compiled layers, which are off by default."""
    _, shares = on_a_gpu
    assert max(shares["plain"]) < 0.32 and np.mean(shares["plain"][-3:]) == pytest.approx(
        estimate.UTILISATION, abs=0.01
    )
    assert shares["adapter"] == pytest.approx([estimate.ADAPTED] * 2, abs=0.01)
    *chunks, _ = sorted(shares["GradCache"])
    text = " ".join((ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split())
    assert (
        f"GradCache in chunks of three or four rows {100 * chunks[0]:.0f} to {100 * chunks[1]:.0f} %" in text
        and len(chunks) == 2
    )
    recipe = make_recipe("stage1", {})
    assert estimate.usual_utilisation(recipe) == estimate.UTILISATION
    assert estimate.usual_utilisation(make_recipe("stage1", {"lora_r": 8})) == estimate.ADAPTED


def test_the_docs_say_which_chunks_of_gradcache_fit():
    text, values = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"), load_profile("paper")["stage3"]
    recipe = make_recipe("stage3", values | {"mini_batch_size": 16})
    two, three, seven = (
        estimate.estimate(CONFIGS / folder, "stage3", recipe, Data(), devices=8)["memory"] / 1e9
        for folder in SHAPES.values()
    )
    assert f"fits at 2B ({two:.0f} GB) and 3B ({three:.0f}), at 7B ({seven:.0f}) without sharding it does not" in text
    assert three < 72 < seven, "a tenth of 80 GB is left free"


FULL, DORA, CHECKPOINTING = {}, {"lora_r": 8}, {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    "values", [FULL, DORA, CHECKPOINTING, DORA | CHECKPOINTING], ids=["full", "dora", "ckpt", "both"]
)
@pytest.mark.parametrize("name", ["2B", "3B", "Qwen3"])
def test_flops_are_those_that_torch_counts(small, name, values):
    """Stage 1 with image decoder and head, to 2 %; DoRA to 5 %: each pass puts an identity matrix through its adapters, which
    is much beside one short item and little beside a batch."""
    recipe = make_recipe("stage1", values)
    module, cost = trained_module(small[name], recipe), expected(small[name], recipe)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # torch counts no other kernel of a CPU
        loss = module(**batch_of(module.model))["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    assert cost.forward == pytest.approx(forward, rel=0.05 if recipe.lora_r else 0.02)
    backward = cost.backward + (cost.repeated if recipe.gradient_checkpointing else 0)
    assert backward == pytest.approx(counter.get_total_flops() - forward, rel=0.05 if recipe.lora_r else 0.02)


def saved_bytes(module, bf16):
    """Bytes of distinct tensors kept for the backward pass, weights and their casts and the pixels aside."""
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
    """Within a tenth of what autograd keeps; with checkpointing, within a fifth of each layer's input and one whole layer."""
    recipe = make_recipe("stage3", values | {"bf16": bf16})
    cost = item_cost(build(small[name], "stage3", recipe), recipe, TEXT, (SIDE * 14) ** 2, masked=0)
    measured = saved_bytes(trained_module(small[name], recipe), bf16)
    assert cost.saved == pytest.approx(measured, rel=0.1)
    recipe = make_recipe("stage3", values | CHECKPOINTING | {"bf16": bf16})
    inputs = saved_bytes(trained_module(small[name], recipe), bf16)
    assert cost.checkpointed == pytest.approx(inputs + measured / 8, rel=0.2)  # 8 layers, four of each kind


def test_weights_gradients_and_adam_are_the_bytes_that_a_step_holds(small):
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
        assert needs["optimiser"] == size(t for state in optimiser.state.values() for t in state.values())


def two_steps(folder, recipe, n):
    """In the second Adam's state is there beside the activations."""
    module = trained_module(folder, recipe)
    optimiser = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            loss = module(**batch_of(module.model, n))["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def prepared(folder, values, n):
    """A step for `peak`, which includes the model; what is allocated once and for all is there after the smaller one."""
    recipe = make_recipe("stage1", values)
    two_steps(folder, recipe, 1)
    return lambda: two_steps(folder, recipe, n)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    "values", [FULL, DORA, CHECKPOINTING, {"bf16": True}], ids=["full", "dora", "ckpt", "bf16"]
)  # fmt: skip
def test_the_memory_is_the_measured_peak_of_a_small_step(small, values):
    """Stage 1, 8 million parameters, 4 items: within 15 %. On a CPU: what a GPU's allocator leaves in gaps is not in it."""
    from common import peak

    values = values | {"batch_size": 4, "text_mask_rate": 12 / TEXT}
    area = (SIDE * 14) ** 2
    needs = estimate.estimate(
        small["2B"], "stage1", make_recipe("stage1", values), Data(text=TEXT, pixels=area, largest=area)
    )
    assert needs["memory"] == pytest.approx(peak(prepared, small["2B"], values, 4), rel=0.15)


def test_what_more_devices_sharding_and_smaller_chunks_change(small):
    def need(stage="stage3", devices=1, sharded=False, **values):
        recipe = make_recipe(stage, {"batch_size": 128, "bf16": True} | values)
        return estimate.estimate(small["2B"], stage, recipe, Data(), devices, sharded=sharded)

    one, eight, shards = need(), need(devices=8), need(devices=8, sharded=True)
    assert one["weights"] == eight["weights"] == 8 * shards["weights"]
    module = estimate.build(small["2B"], "stage3", make_recipe("stage3", {}))
    layers = [sum(p.numel() for p in layer.parameters()) for layer in language_model(module.model).layers]
    whole = sum(p.numel() for p in module.parameters()) - sum(layers) + 2 * layers[0]
    assert shards["copies"] == pytest.approx(2 * 2 * whole), (
        "weights and gradients in bf16 of what is gathered at a time"
    )
    assert eight["hours"] / one["hours"] == pytest.approx(eight["flops"] / one["flops"] / 8)
    assert eight["activations"] == one["activations"], "GradCache: the chunk decides, not the batch"
    assert need(mini_batch_size=4)["activations"] == one["activations"] / 2
    whole_batch = need(mini_batch_size=128)  # one device, one chunk: no GradCache
    assert whole_batch["activations"] == 2 * 128 / 8 * one["activations"], "the graphs of both sides are held at once"
    kept = {
        8 / 256: one,
        8 / 32: eight,
        127 / 256: need(mini_batch_size=127),
    }  # share of the items that are embedded once
    forward = [(needs["flops"] - whole_batch["flops"]) / (1 - share) for share, needs in kept.items()]
    assert min(forward) > 0 and forward == pytest.approx([forward[0]] * 3), (
        "one forward pass more, but for the first chunk"
    )
    assert need(devices=8, mini_batch_size=128)["activations"] == 2 * eight["activations"], "not with DDP"
    stage1 = need("stage1"), need("stage1", devices=8)
    assert stage1[0]["activations"] == 8 * stage1[1]["activations"] and stage1[0]["logits"] > 0 == one["logits"]
    assert need(gradient_checkpointing=True)["activations"] < one["activations"] / 3
    assert need(gradient_checkpointing=True)["hours"] > 1.1 * one["hours"]
    assert one["memory"] == sum(one[name] for name in one if name not in ("memory", "flops", "hours"))


def test_items_are_measured(tmp_path):
    build(tmp_path / "world", seed=0, n_pairs=64, n_queries=8, n_corpus=8)
    data = estimate.measure(tmp_path / "world")
    assert 0.8 * 64**2 < data.pixels <= data.largest == 64**2 and 0.3 < data.share < 0.8 and 2 < data.text < 40


# --- the real shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_on_meta_have_the_published_parameters_and_the_published_adapter(name):
    recipe = make_recipe("stage3", load_profile("paper")["stage3"])
    plain = build(CONFIGS / SHAPES[name], "stage3", make_recipe("stage3", FULL))
    assert sum(p.numel() for p in plain.parameters()) == COUNTS[name]
    assert {p.device.type for p in plain.parameters()} == {"meta"}
    adapted = build(CONFIGS / SHAPES[name], "stage3", recipe)
    text, vision = adapted.model.config.text_config, adapted.model.config.vision_config
    matched = [part for part in adapted.modules() if hasattr(part, "lora_A")]
    mlp = 1 if name == "2B" else 0  # Qwen2-VL's towers have fc1, fc2; Qwen2.5-VL's gate, up, down
    assert len(matched) == 7 * text.num_hidden_layers + (4 - mlp) * vision.depth
    assert not [n for n, p in adapted.named_parameters() if "merger" in n and p.requires_grad]


class Weightless(TorchDispatchMode):
    """Weights, pixels and all that is computed from them are on meta; ids, masks and grids keep their values, on the CPU, as what
    follows from them does (rotary positions, windows, the places of pictures and of masked words): the code runs as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if func is aten._to_copy.default and not args[0].is_meta:
            kwargs.pop("device", None)
        elif any(value.is_meta for value in tensors) and func.overloadpacket not in (aten.index, aten.index_put_):
            args, kwargs = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def real_rows(model, stage, side=224, n=1):
    """n items of a stage: a picture of side x side pixels, or none (0), 12 words, EOS and B where the stage has them; B's, or all
    words, masked."""
    cells, picture = (side // 28) ** 2, int(side > 0)
    pieces = [(992, A), *[(model.config.image_token_id, A)] * cells, (993, A)] * picture + [(7, A)] * 12
    pieces += [(8, EOS)] * (stage != "stage1") + [(7, B)] * 12 * (stage == "stage2")
    ids, segments = (torch.tensor(values).repeat(n, 1) for values in zip(*pieces, strict=True))
    batch = {"input_ids": ids, "segment_ids": segments, "attention_mask": torch.ones_like(ids),
             "mm_token_type_ids": (ids == model.config.image_token_id).long()}  # fmt: skip
    if stage != "stage3":
        batch["labels"] = torch.where((ids == 7) & (segments == (A if stage == "stage1" else B)), ids, -100)
    if picture:
        grid, patches = torch.tensor([[1, side // 14, side // 14]] * n), n * (side // 14) ** 2
        batch |= {"image_grid_thw": grid, "pixel_values": torch.empty(patches, 1176, device="meta")}
        batch["num_images_per_sample"] = torch.ones(n, dtype=torch.long)
    if stage == "stage1":
        batch |= {"hidden_cells": torch.arange(n * cells) % 3 == 0, "patch_fill": torch.zeros(1176)}
    return batch


def with_texts(batch, texts):
    """A picture's item, and below it texts padded to its length."""
    room = batch["input_ids"].shape[1] - texts["input_ids"].shape[1]
    fill = {"labels": -100, "segment_ids": PAD}
    long = {name: torch.nn.functional.pad(rows, (0, room), value=fill.get(name, 0)) for name, rows in texts.items()}
    images = torch.cat([batch["num_images_per_sample"], torch.zeros(len(texts["input_ids"]), dtype=torch.long)])
    return (
        batch
        | {name: torch.cat([batch[name], rows]) for name, rows in long.items()}
        | {"num_images_per_sample": images}
    )


def real_step(stage, module, columns):
    """Forward and backward of a batch, in stage 3 of its two columns -> FLOPs of both."""
    with Weightless(), FlopCounterMode(display=False) as counter:
        if stage == "stage3":
            embedder = SentenceTransformer(modules=[EosEmbedding(module.model, None)], device="meta").train()
            loss = CachedInfoNCE(embedder)(columns)
        else:
            loss = module(**columns[0])["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    assert loss.is_meta and loss.shape == ()
    return forward, counter.get_total_flops() - forward


def real_module(name, stage, **changes):
    recipe = make_recipe(stage, load_profile("paper")[stage] | changes)
    module = build(CONFIGS / SHAPES[name], stage, recipe).train()
    set_bidirectional(module.model, True)
    module.packing = getattr(recipe, "packing", False)
    if recipe.gradient_checkpointing:
        module.model.gradient_checkpointing_enable()
    return module, recipe


def without_gradient(module):
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return [name for name, p in trained.items() if p.grad is None or p.grad.shape != p.shape]


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_on_meta_at_the_real_shape(name, stage):
    """All weights trained, checkpointed as in the paper's profile: every weight gets a gradient, and FLOPs are the estimate's, in
    stage 2 with a picture large enough for the tower's attention to count."""
    module, recipe = real_module(name, stage, lora_r=0, **({} if stage == "stage3" else {"packing": False}))
    side = 448 if stage == "stage2" and name != "7B" else 224  # whose tower is 3B's
    columns = [
        real_rows(module.model, stage, side),
        real_rows(module.model, stage, 0),
    ]  # a text alone: stage 3's other side
    forward, backward = real_step(stage, module, columns)
    head = ["model.lm_head.weight"] if stage == "stage3" and name == "7B" else []  # the others' is the embedding table
    assert without_gradient(module) == head
    words = 24 if stage == "stage2" else 12 - (stage == "stage1")  # `item_cost` counts an EOS, which stage 1 has not
    costs = [item_cost(module, recipe, words, side**2, masked=12 * (stage != "stage3"))]
    costs += [item_cost(module, recipe, words - 2, 0, masked=0)] * (
        stage == "stage3"
    )  # a text has no marks of a picture
    assert sum(cost.forward for cost in costs) == pytest.approx(forward, rel=0.02)
    assert sum(cost.backward + cost.repeated for cost in costs) == pytest.approx(backward, rel=0.02)


def test_the_paper_s_stage_2_on_meta():
    """2B with DoRA, a picture and two texts, which share a row: adapters alone, all of them, get a gradient."""
    module, _ = real_module("2B", "stage2")
    rows, seen = with_texts(real_rows(module.model, "stage2"), real_rows(module.model, "stage2", 0, n=2)), []
    language_model(module.model).norm.register_forward_hook(lambda part, args, out: seen.append(len(out)))
    real_step("stage2", module, [rows])
    assert len(rows["input_ids"]) == 3 and seen == [2]
    assert not without_gradient(module)
    assert all("lora_" in name for name, p in module.named_parameters() if p.grad is not None)


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_each_stage_and_what_to_change(small, capsys):
    command = ["--model", str(small["3B"]), "--devices", "8", "--device-memory"]
    estimate.main([*command, "0.1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines if line.startswith("stage")] == ["stage1", "stage2", "stage3"]
    advice = [line.strip() for line in lines if line.startswith("    ")]
    assert any(line.startswith("mini_batch_size: 1: ") for line in advice)
    assert any(line.startswith("32 devices, or a smaller batch_size or pictures: ") for line in advice)
    assert not any(line.startswith(("lora_r", "gradient_checkpointing")) for line in advice), "the profile has both"
    estimate.main([*command, "80"])
    assert "does not fit" not in capsys.readouterr().out


def test_without_adapter_and_checkpointing_both_are_proposed(small):
    recipe = make_recipe("stage1", {"batch_size": 8})
    before = estimate.estimate(small["2B"], "stage1", recipe, Data(), 8)["memory"]
    found = {words: estimate.estimate(small["2B"], "stage1", changed, Data(), **{"devices": 8} | more)["memory"]
             for words, changed, more in estimate.remedies("stage1", recipe, 8)}  # fmt: skip
    assert (
        found["gradient_checkpointing: true"] < before
        and found["FSDP (notebooks/profiles/accelerate/fsdp_1x8.yaml)"] < before
    )


@pytest.fixture
def start(small, tmp_path, monkeypatch, capsys):
    """A training command on a GPU that is not there, of `memory` bytes -> what it printed; its training prints a word."""
    build(tmp_path / "data", seed=0, n_pairs=16, n_queries=4, n_corpus=4)
    monkeypatch.setattr("cocoa_lib.run.__main__.run_stage", lambda *args, **kwargs: "TRAINED")

    def run(*more, parent=small["2B"], data=tmp_path / "data", gpu=True, memory=1e12, main_process=True):
        device = torch.device("cuda" if gpu else "cpu")
        state = SimpleNamespace(is_main_process=main_process, num_processes=2, device=device)
        monkeypatch.setattr("cocoa_lib.run.__main__.join_processes", lambda: state)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
        words = ["stage1", "--parent", parent, "--data", data, "--out", tmp_path / "out", *more]
        main([str(word) for word in words])
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == "TRAINED", "an estimate stops no training, and comes before it"
        return lines

    return run


def test_training_says_beforehand_what_it_needs_and_what_to_change(start, small, tmp_path):
    recipe, item = make_recipe("stage1", {"batch_size": 8}), estimate.measure(tmp_path / "data")
    found = start("--recipe", '{"batch_size": 8}', memory=1e8)
    assert found[1:] == [estimate.HEAD, *estimate.report(small["2B"], "stage1", recipe, item, 0.1, 2)]
    assert "one of 2 device(s), hours at 30% of 989 TFLOP/s" in found[0] and str(item) in found[0]
    assert "does not fit into 0.1 GB" in found[3]
    assert any(line.startswith("    gradient_checkpointing: true: ") for line in found[4:])
    assert len(start("--recipe", '{"batch_size": 8}')) == 3, "no advice where it fits"


def test_the_estimate_of_a_launch_with_fsdp_is_sharded(start, monkeypatch):
    monkeypatch.setattr(estimate, "report", lambda *args, sharded: [f"{sharded=}"])
    assert start()[-1] == "sharded=False"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert start()[-1] == "sharded=True"


def test_the_estimate_is_printed_where_it_is_of_use(start, tmp_path):
    assert start("--profile", "paper", gpu=False), "the real models, also where the command is only tried"
    assert start("--profile", "smoke", gpu=False) == [], "the small model on a CPU"
    assert start(main_process=False) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cocoa.json").write_text("{}")
    assert start() == [], "nothing will be trained"


def test_why_there_is_no_estimate_is_said_in_a_line(start, tmp_path, monkeypatch):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for values, why in (
        ({"parent": tmp_path / "bert"}, "is a bert, the formula knows qwen2_vl"),
        ({"parent": tmp_path / "absent"}, "absent"),
        ({"data": tmp_path / "bert"}, "no training subsets"),
    ):
        (line,) = start(**values)
        assert line.startswith("no estimate of memory and time: ") and why in line
    monkeypatch.setattr(estimate, "item_cost", lambda *args: None + 1)
    with pytest.raises(TypeError):
        start()  # a mistake in our own code is no reason to be quiet
