"""The three families by their standard classes: opened, probed, trained, adapted, merged."""

from __future__ import annotations

import ast
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import cocoa_lib
from cocoa_lib import kernels
from cocoa_lib.attention import EOS, LAYOUTS, A, dense_mask
from cocoa_lib.backbone import (
    _text_batch,
    hidden_states,
    language_model,
    open_backbone,
    position_ids,
    probe_attention,
    set_bidirectional,
)
from cocoa_lib.contrastive import CachedInfoNCE, pair_features
from cocoa_lib.corruption import stage1_batch, stage2_batch
from cocoa_lib.embedder import EosEmbedding
from cocoa_lib.kernels import PICTURES, find_picture_fault
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import PatchDecoder, Reconstruction
from cocoa_lib.run.adapters import add_adapter

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # peft asks for it
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
    ),  # torch itself
]

SPACE = {"spatial_merge_size": 2, "temporal_patch_size": 2, "patch_size": 8, "num_heads": 2}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
VISION = {
    "qwen2_vl": {**SPACE, "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {
        **SPACE,
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        **SPACE,
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
}
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
LANGUAGE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
IN_VISION = {
    "qwen2_vl": ("attn.qkv", "mlp.fc1", "mlp.fc2"),
    "qwen2_5_vl": ("attn.qkv", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3_vl": ("attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2"),
}


def random_model(family, tokenizer):
    """A tiny random model with every part of the real one (windows, deepstack, positions)."""
    config, cls = CLASSES[family]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope}
    if family == "qwen3_vl":
        text |= {"head_dim": 32, "rope_parameters": {**rope, "mrope_interleaved": True}}
    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(1)
    return cls(
        config(
            text_config=text,
            vision_config=VISION[family],
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=family == "qwen2_vl",
        )
    )


@pytest.fixture(scope="module", params=sorted(CLASSES))
def family(request, small, tmp_path_factory):
    """(name, folder, inputs): saved in the standard form."""
    _, inputs = small
    folder = tmp_path_factory.mktemp(request.param)
    random_model(request.param, inputs.tokenizer).save_pretrained(folder)
    inputs.save(folder)
    return request.param, folder, inputs


def rows(picture):
    texts = ["a large red circle", "a small blue 7 at the bottom", "a square"]
    return [
        {
            "text": "which",
            "image": picture(64, 48, seed=i) if i < 2 else None,
            "target": text,
            "draw": i,
        }
        for i, text in enumerate(texts)
    ]


def pairs(picture, n=4):
    return [
        {
            "anchor": {
                "text": "What color is the square?" if i % 2 else "",
                "image": picture(64, 48, seed=i),
            },
            "positive": {
                "text": f"a large red circle {i}",
                "image": picture(32, 64, seed=i) if i % 2 else "",
            },
        }
        for i in range(n)
    ]


def test_the_switch_takes_in_every_family_and_backend(family):
    name, folder, _ = family
    for implementation in ("sdpa", "eager"):
        for bidirectional in (True, False):
            model = open_backbone(
                folder, bidirectional=bidirectional, attn_implementation=implementation
            )  # probed
            assert type(model) is CLASSES[name][1], "the standard class, unmodified"
            assert (
                language_model(model).config.is_causal is not bidirectional and not model.training
            )


def test_positions_are_three_dimensional_where_there_is_an_image(family, picture):
    """Text starts after the larger side of an image, not after its number of tokens."""
    _, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    batch = inputs.collate([{"text": "a red circle", "image": picture(64, 48)}])
    time, height, width = position_ids(model, batch)[:, 0]
    cells = batch["mm_token_type_ids"][0] == 1
    assert len(set(time[cells].tolist())) == 1
    assert len(set(height[cells].tolist())) == 3 and len(set(width[cells].tolist())) == 4
    after = int(cells.nonzero().max()) + 1
    assert time[after] == time[cells][0] + 4


@torch.no_grad()
def test_embedding_alone_batched_and_padded_left_is_the_same(family, picture):
    _, folder, inputs = family
    module = EosEmbedding(open_backbone(folder, bidirectional=True), inputs)
    items = [
        {"text": "a red circle", "image": picture(64, 48)},
        {"text": "a"},
        {"image": picture(32, 80)},
    ]
    together = module(inputs.collate(items))["sentence_embedding"]
    assert torch.allclose(together.norm(dim=1), torch.ones(3))
    for i, item in enumerate(items):
        assert torch.allclose(
            module(inputs.collate([item]))["sentence_embedding"][0], together[i], atol=1e-5
        )
    inputs.padding_side = "left"
    try:
        assert torch.allclose(
            module(inputs.collate(items))["sentence_embedding"], together, atol=1e-5
        )
    finally:
        inputs.padding_side = "right"


@torch.no_grad()
def test_a_layout_holds_in_every_family(family, picture):
    """One layer, eos_bridged: block B is the same whatever the image of A (deepstack included)."""
    _, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    language_model(model).layers = language_model(model).layers[:1]
    batch = inputs.collate([{"text": "a", "image": picture(64, 48)}], ["a red circle"])
    other = inputs.collate([{"text": "a", "image": picture(64, 48, seed=1)}], ["a red circle"])
    is_b = batch["segment_ids"] > EOS
    for layout, same in (
        ("eos_bridged", True),
        ("eos_bridged_strict", True),
        ("bidirectional", False),
    ):
        assert (
            torch.equal(
                hidden_states(model, batch, layout)[is_b], hidden_states(model, other, layout)[is_b]
            )
            is same
        )


def one_step(module, loss):
    """Backward and one AdamW step: returns the parameters with a gradient, by name."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    loss.backward()
    moved = {
        name
        for name, p in module.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    optimizer.step()
    return moved


def test_one_step_of_all_three_stages(family, picture):
    name, folder, inputs = family
    model = open_backbone(folder, bidirectional=True).train()
    recipe = make_recipe("stage1", {"preset": "figure"})
    stage1 = Reconstruction(model, layout="bidirectional", image_weight=0.5)
    batch = stage1_batch(rows(picture), inputs, recipe, seed=0)
    before = stage1(**batch)
    assert before["image_loss"] > 0 and before["text_loss"] > 0
    moved = one_step(stage1, before["loss"])
    assert any(n.startswith("decoder.layers.0") for n in moved) and any(
        ".visual.blocks.0" in n for n in moved
    )
    assert any("language_model.layers.0" in n for n in moved)
    if name == "qwen3_vl":
        assert any("deepstack_merger_list" in n for n in moved)
    assert stage1(**batch)["loss"] < before["loss"], (
        "a step along the gradient helps on the same batch"
    )

    stage2 = Reconstruction(model, layout="eos_bridged")
    batch = stage2_batch(rows(picture), inputs, make_recipe("stage2"), seed=0)
    before = stage2(**batch)["loss"]
    model.zero_grad()
    assert any(".visual.blocks.0" in n for n in one_step(stage2, before)), (
        "the caption teaches the eyes through EOS"
    )
    assert stage2(**batch)["loss"] < before

    embedder = SentenceTransformer(modules=[EosEmbedding(model, inputs)])
    embedder.train()
    loss = CachedInfoNCE(embedder, temperature=0.1, mini_batch_size=3)
    batch = SentenceTransformerDataCollator(
        partial(pair_features, inputs=inputs, mini_batch_size=3)
    )(pairs(picture))
    columns = [
        {k.removeprefix(f"{c}_"): v for k, v in batch.items() if k.startswith(c)}
        for c in ("anchor", "positive")
    ]
    before = loss([dict(column) for column in columns])
    model.zero_grad()
    one_step(embedder, before)
    assert torch.isfinite(before) and loss([dict(column) for column in columns]) < before


# --- adapters ------------------------------------------------------------------------------------


def expected_targets(name):
    language = [f"model.language_model.layers.{i}.{part}" for i in range(2) for part in LANGUAGE]
    return sorted(
        language + [f"model.visual.blocks.{i}.{part}" for i in range(2) for part in IN_VISION[name]]
    )


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_match_the_published_targets_and_merge_exactly(family, picture, dora, caplog):
    name, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    batch = inputs.collate(
        [{"text": "a red circle", "image": picture(64, 48)}, {"text": "a blue 7"}]
    )
    with torch.no_grad():
        plain = hidden_states(model, batch)
    with caplog.at_level(logging.INFO, logger="cocoa_lib.run.adapters"):
        wrapped, matched = add_adapter(model, r=4, alpha=8, dora=dora)
    assert matched == expected_targets(name)
    assert f"matched {len(matched)} modules" in caplog.text
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if (
                "lora_B" in n or "magnitude" in n
            ):  # B starts at zero: without this the adapter does nothing
                p.add_(0.2 * torch.randn_like(p))
        model.eval()
        adapted = hidden_states(model, batch)
        assert not torch.allclose(adapted, plain, atol=1e-2)
        merged = wrapped.merge_and_unload()
        assert type(merged) is CLASSES[name][1]
        assert torch.allclose(hidden_states(merged, batch), adapted, atol=1e-5)


def test_published_defaults():
    import inspect

    given = {
        name: p.default
        for name, p in inspect.signature(add_adapter).parameters.items()
        if name != "model"
    }
    assert given == {"r": 8, "alpha": 64, "dropout": 0.1, "dora": True}


# --- what is refused -----------------------------------------------------------------------------


def test_pickled_weights_are_refused(small, tmp_path):
    model, _ = small
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        open_backbone(tmp_path, bidirectional=True)


def test_remote_code_is_never_trusted():
    files = sorted(Path(cocoa_lib.__file__).parent.rglob("*.py"))
    uses = {  # as code passes it; a docstring may speak of the flag
        (file.name, ast.unparse(node.value))
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    }
    assert ("backbone.py", "False") in uses and {value for _, value in uses} == {"False"}


def test_a_broken_switch_is_refused_at_opening(family, monkeypatch):
    _, folder, _ = family
    monkeypatch.setattr(
        "cocoa_lib.backbone.set_bidirectional", lambda model, bidirectional: model
    )  # the switch does nothing
    with pytest.raises(
        RuntimeError, match="the attention switch did not take: bidirectional.*'sdpa'.*causal"
    ):
        open_backbone(folder, bidirectional=True)


def test_probe_leaves_the_mode_and_no_gradient(family):
    _, folder, _ = family
    model = open_backbone(folder, bidirectional=True).train()
    probe_attention(model, True)
    assert model.training and all(p.grad is None for p in model.parameters())


# --- FlexAttention -------------------------------------------------------------------------------


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """torch's own unfused FlexAttention, from the same BlockMask: exact, and needs no compiler."""
    from torch.nn.attention import flex_attention as module
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        integration, "WrappedFlexAttention", lambda training: lambda: module.flex_attention
    )


def flex_batch(inputs, picture):
    items = [{"text": "a large red circle", "image": picture(64, 48)}, {"text": "a blue 7"}]
    return inputs.collate(items, ["a red circle", "a blue 7 at the bottom"])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_sdpa_for_every_layout(family, picture, uncompiled_flex):
    _, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    config = language_model(model).config
    batch = flex_batch(replace(inputs, padding_side="left"), picture)
    real = batch["attention_mask"].bool()
    config._attn_implementation = "flex_attention"
    fused = PatchDecoder(model).eval()  # has a layer of the model, and its implementation
    config._attn_implementation = "sdpa"
    plain = PatchDecoder(model).eval()
    plain.load_state_dict(fused.state_dict())
    for layout in (None, *LAYOUTS):
        dense = hidden_states(model, batch, layout)
        pixels = plain(dense, model, batch, layout or "bidirectional")
        config._attn_implementation = "flex_attention"
        assert torch.allclose(hidden_states(model, batch, layout)[real], dense[real], atol=1e-5), (
            layout
        )
        assert torch.allclose(
            fused(dense, model, batch, layout or "bidirectional"), pixels, atol=1e-5
        ), layout
        config._attn_implementation = "sdpa"
    config._attn_implementation = "flex_attention"
    probe_attention(model, True)
    set_bidirectional(model, False)
    probe_attention(model, False)


def test_flex_falls_back_to_sdpa_with_a_warning(small, tmp_path, monkeypatch, caplog):
    """On a CPU there is no backward pass, elsewhere perhaps no compiler: both end in SDPA."""
    model, _ = small
    model.save_pretrained(tmp_path)

    def broken(*args):
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr("cocoa_lib.backbone.block_mask", broken)
    opened = open_backbone(tmp_path, bidirectional=True, attn_implementation="flex_attention")
    assert language_model(opened).config._attn_implementation == "sdpa"
    assert (
        "flex_attention is not available here (RuntimeError: no C++ compiler); using sdpa"
        in caplog.text
    )
    assert all(p.grad is None for p in opened.parameters())


def test_a_kernel_of_the_accelerator_is_tried_there(small, tmp_path, monkeypatch):
    """Flex and flash-attention have no (whole) kernel on a CPU: they are tried on the device."""
    model, _ = small
    model.save_pretrained(tmp_path)
    moves, move = [], torch.nn.Module.to
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu:0"))
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, device: moves.append(str(device)) or move(self, "cpu")
    )
    monkeypatch.setattr("cocoa_lib.backbone._train_a_little", lambda model: moves.append("tried"))
    monkeypatch.setattr("cocoa_lib.backbone.probe_attention", lambda *args: moves.append("probed"))
    open_backbone(tmp_path, bidirectional=True, attn_implementation="flex_attention")
    assert moves == ["cpu:0", "tried", "probed", "cpu"]
    moves.clear()
    open_backbone(tmp_path, bidirectional=True)
    assert moves == ["probed", "cpu"]


def test_the_vision_tower_takes_all_pictures_at_once_where_it_can(family, monkeypatch, caplog):
    _, folder, _ = family

    def used(**how):
        opened = open_backbone(folder, bidirectional=True, **how)
        return opened.model.visual.config._attn_implementation

    assert (used(), used(attn_implementation="eager")) == (PICTURES, "eager"), "a CPU"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    widths = []
    monkeypatch.setattr("cocoa_lib.kernels.find_picture_fault", lambda width: widths.append(width))
    assert (used(), used(attn_implementation="eager")) == (PICTURES, "eager")
    attention = open_backbone(folder, bidirectional=True).model.visual.blocks[0].attn
    assert widths == [attention.head_dim] * 2 and not caplog.text
    monkeypatch.setattr("cocoa_lib.kernels.find_picture_fault", lambda width: "no kernel")
    assert (
        used() == "sdpa"
        and "one by one, which takes longer and gives the same: no kernel" in caplog.text
    )


def test_a_kernel_for_pictures_is_tried_forth_and_back(monkeypatch):
    """Two calls stand in for it; one that is wrong, forth or back, or missing is found."""
    right, spoil = kernels.picture_attention, {}

    def kernel(module, *qkv, **how):
        out, _ = right(module, *qkv, **how)
        assert out.shape == (1, 300, 2, 80)
        return spoil.get(qkv[0].dtype, lambda out, q: out)(out, qkv[0]), None

    monkeypatch.setattr("cocoa_lib.kernels.picture_attention", kernel)
    assert find_picture_fault(80, "cpu") is None
    for wrong in (
        lambda out, q: out.roll(1, dims=1),
        lambda out, q: out + 0.5 * (q - q.detach()).transpose(1, 2),
        lambda out, q: out * float("nan"),
    ):
        spoil[torch.bfloat16] = wrong
        assert "its numbers are off by" in find_picture_fault(80, "cpu")
    monkeypatch.setattr("cocoa_lib.kernels.picture_attention", lambda *args, **how: 1 / 0)
    assert find_picture_fault(80, "cpu") == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "sizes", [[(64, 48)] * 3, [(64, 48), (32, 64), (96, 32)]], ids=["one size", "different"]
)
def test_pictures_at_once_are_pictures_singly(family, picture, sizes, monkeypatch):
    """Of one size in one call; states and gradients are the same."""
    _, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    visual = model.model.visual
    batch = inputs.collate(
        [{"text": "which", "image": picture(*size, seed=i)} for i, size in enumerate(sizes)]
    )
    calls, found, original = [], [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **how: (
            calls.append(visual.config._attn_implementation) or original(*args, **how)
        ),
    )
    for implementation in ("sdpa", PICTURES):
        visual.config._attn_implementation = implementation
        states = hidden_states(model, batch, "bidirectional")
        model.zero_grad()
        states.square().sum().backward()
        found.append(
            [states.detach(), *(p.grad.clone() for p in visual.parameters() if p.grad is not None)]
        )
    assert len(found[0]) == len(found[1]) > 5
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(one.abs().max()) + 1e-7)
    singly, at_once = calls.count("sdpa"), calls.count(PICTURES)
    assert singly >= 3 * len(visual.blocks) and (at_once < singly) == (len(set(sizes)) == 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pictures", [False, True], ids=["texts", "pictures"])
def test_positions_are_transformers_own(family, picture, side, pictures):
    """Of texts, and of none, one and two pictures of different sizes in a row."""
    _, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    items = [{"text": "a large red circle"}, {"text": "a"}, {"text": "red " * 9}]
    if pictures:
        items[0]["image"] = picture(96, 32)
        two = {"text": "from <|image_1|> to <|image_2|> it", "image": [picture(), picture(32, 64)]}
        items.append(two)
    batch = replace(inputs, padding_side=side).collate(items)
    names = ("input_ids", "mm_token_type_ids", "attention_mask")
    theirs, _ = model.model.get_rope_index(
        **{name: batch[name] for name in names}, image_grid_thw=batch.get("image_grid_thw")
    )
    assert torch.equal(position_ids(model, batch), theirs)


def test_patches_are_multiplied_as_they_are_convolved(family):
    """The patch embedding is a matrix product: values and gradients of transformers' convolution."""
    _, folder, _ = family
    plain, opened = (
        AutoModelForImageTextToText.from_pretrained(folder).model.visual.patch_embed,
        open_backbone(folder, bidirectional=True).model.visual.patch_embed,
    )
    assert type(plain.proj) is torch.nn.Conv3d and type(opened.proj) is kernels.PatchProduct
    assert plain.state_dict().keys() == opened.state_dict().keys()
    patches = torch.randn(12, plain.proj.weight[0].numel())
    found = []
    for embed in (plain, opened):
        out = embed(patches)
        out.square().sum().backward()
        found.append((out.detach(), embed.proj.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_flex_is_kept_where_it_works(small, tmp_path, monkeypatch, uncompiled_flex):
    model, inputs = small
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("cocoa_lib.backbone._train_a_little", lambda model: None)
    with torch._dynamo.config.patch(
        recompile_limit=8
    ):  # monkeypatch would hide the option from other tests afterwards
        opened = open_backbone(tmp_path, bidirectional=True, attn_implementation="flex_attention")
        assert torch._dynamo.config.recompile_limit == 64, "batches of many shapes stay compiled"
    assert language_model(opened).config._attn_implementation == "flex_attention"
    assert opened.config.vision_config._attn_implementation == PICTURES, (
        "the vision tower has its own masks"
    )
    ids = torch.tensor([[5, 6, 7]])
    seen = []
    monkeypatch.setattr(
        opened.model,
        "forward",
        lambda **given: seen.append(given) or SimpleNamespace(last_hidden_state=None),
    )
    with torch.no_grad():
        hidden_states(opened, _text_batch(ids, torch.full_like(ids, A)))
    mask = seen[0]["attention_mask"]
    assert (
        type(mask).__name__ == "BlockMask"
        and dense_mask("bidirectional", torch.full_like(ids, A)).all()
    )
