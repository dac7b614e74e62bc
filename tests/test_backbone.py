"""The three families by their standard classes: opened, probed, trained, adapted, merged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_runs import pair_columns
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from cocoa_lib import kernels
from cocoa_lib.attention import EOS, LAYOUTS
from cocoa_lib.backbone import (
    hidden_states,
    language_model,
    open_backbone,
    position_ids,
    probe_attention,
    set_bidirectional,
)
from cocoa_lib.contrastive import CachedInfoNCE
from cocoa_lib.corruption import stage1_batch, stage2_batch
from cocoa_lib.embedder import EosEmbedding
from cocoa_lib.kernels import PICTURES, find_picture_fault
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import PatchDecoder, Reconstruction
from cocoa_lib.run.adapters import add_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]  # in peft, in torch

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
SPACE = {"spatial_merge_size": 2, "temporal_patch_size": 2, "patch_size": 8, "num_heads": 2}
TOWER = SPACE | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "depth": 2}
VISION = {
    "qwen2_vl": {**SPACE, "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": TOWER | {"window_size": 32, "fullatt_block_indexes": [1]},
    "qwen3_vl": TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
}
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
PARTS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
IN_LANGUAGE = f"{PARTS} mlp.gate_proj mlp.up_proj mlp.down_proj"
IN_VISION = {
    "qwen2_vl": "attn.qkv mlp.fc1 mlp.fc2",
    "qwen2_5_vl": "attn.qkv mlp.gate_proj mlp.up_proj mlp.down_proj",
    "qwen3_vl": "attn.qkv mlp.linear_fc1 mlp.linear_fc2",
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
    marks = {"image": "image_pad", "video": "video_pad"}
    marks |= {name: name for name in ("vision_start", "vision_end")}
    tokens = {f"{name}_token_id": token(f"<|{mark}|>") for name, mark in marks.items()}
    parts = {"text_config": text, "vision_config": VISION[family], **tokens}
    return cls(config(**parts, tie_word_embeddings=family == "qwen2_vl"))


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
    images = [picture(64, 48, seed=0), picture(64, 48, seed=1), None]
    made = enumerate(zip(texts, images, strict=True))
    return [{"text": "which", "image": x, "target": text, "draw": i} for i, (text, x) in made]


def pairs(picture, n=4):
    queries = [{"text": "What?" * (i % 2), "image": picture(64, 48, seed=i)} for i in range(n)]
    seen = [picture(32, 64, i) if i % 2 else "" for i in range(n)]
    found = [{"text": f"a circle {i}", "image": image} for i, image in enumerate(seen)]
    return [{"anchor": a, "positive": b} for a, b in zip(queries, found, strict=True)]


def test_the_switch_takes_in_every_family_and_backend(family):
    name, folder, _ = family
    for implementation in ("sdpa", "eager"):
        for bidirectional in (True, False):
            how = {"bidirectional": bidirectional, "attn_implementation": implementation}
            model = open_backbone(folder, **how)  # probed
            assert type(model) is CLASSES[name][1], "the standard class, unmodified"
            assert language_model(model).config.is_causal is not bidirectional
            assert not model.training


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
    both = {"text": "a red circle", "image": picture(64, 48)}
    items = [both, {"text": "a"}, {"image": picture(32, 80)}]

    def embed(some):
        return module(inputs.collate(some))["sentence_embedding"]

    together = embed(items)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))
    for i, item in enumerate(items):
        assert torch.allclose(embed([item])[0], together[i], atol=1e-5)
    inputs.padding_side = "left"
    try:
        assert torch.allclose(embed(items), together, atol=1e-5)
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
    for layout in ("eos_bridged", "eos_bridged_strict", "bidirectional"):
        one, two = (hidden_states(model, which, layout)[is_b] for which in (batch, other))
        assert torch.equal(one, two) == (layout != "bidirectional"), layout


def test_one_step_of_all_three_stages(family, picture):
    name, folder, inputs = family
    model = open_backbone(folder, bidirectional=True).train()

    def step(module, loss):
        """Backward and an AdamW step; what has a gradient. It helps on the same batch."""
        model.zero_grad()
        before = loss()
        before.backward()
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        torch.optim.AdamW(module.parameters(), lr=1e-3).step()
        assert loss() < before
        return " ".join(n for n, gradient in gradients.items() if gradient.abs().sum() > 0)

    stage1 = Reconstruction(model, layout="bidirectional", image_weight=0.5)
    recipe = make_recipe("stage1", {"preset": "figure"})
    batch = stage1_batch(rows(picture), inputs, recipe, seed=0)
    moved = step(stage1, lambda: stage1(**batch)["loss"])
    for part in ("decoder.layers.0", ".visual.blocks.0", "language_model.layers.0"):
        assert part in moved
    assert name != "qwen3_vl" or "deepstack_merger_list" in moved

    stage2 = Reconstruction(model, layout="eos_bridged")
    masked = stage2_batch(rows(picture), inputs, make_recipe("stage2"), seed=0)
    moved = step(stage2, lambda: stage2(**masked)["loss"])
    assert ".visual.blocks.0" in moved, "the caption teaches the eyes through EOS"

    embedder = SentenceTransformer(modules=[EosEmbedding(model, inputs)]).train()
    objective = CachedInfoNCE(embedder, temperature=0.1, mini_batch_size=3)
    columns = pair_columns(pairs(picture), inputs, 3)
    step(embedder, lambda: objective([dict(column) for column in columns]))


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_match_the_published_targets_and_merge_exactly(family, picture, dora):
    name, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    items = [{"text": "a red circle", "image": picture(64, 48)}, {"text": "a blue 7"}]
    batch = inputs.collate(items)
    with torch.no_grad():
        plain = hidden_states(model, batch)
    recipe = make_recipe("stage1", {"lora_r": 4, "lora_alpha": 8, "dora": dora})
    wrapped, matched = add_adapter(model, recipe)
    places = {"language_model.layers": IN_LANGUAGE, "visual.blocks": IN_VISION[name]}
    assert matched == sorted(
        f"model.{place}.{i}.{part}"
        for place, parts in places.items()
        for part in parts.split()
        for i in (0, 1)
    )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n or "magnitude" in n:  # B starts at zero: the adapter would do nothing
                p.add_(0.2 * torch.randn_like(p))
        model.eval()
        adapted = hidden_states(model, batch)
        assert not torch.allclose(adapted, plain, atol=1e-2)
        merged = wrapped.merge_and_unload()
        assert type(merged) is CLASSES[name][1]
        assert torch.allclose(hidden_states(merged, batch), adapted, atol=1e-5)


def test_pickled_weights_are_refused(small, tmp_path):
    model, _ = small
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        open_backbone(tmp_path, bidirectional=True)


def test_a_broken_switch_is_refused_at_opening(family, monkeypatch):
    _, folder, _ = family
    nothing = lambda model, bidirectional: model  # noqa: E731
    monkeypatch.setattr("cocoa_lib.backbone.set_bidirectional", nothing)
    said = "the attention switch did not take: bidirectional.*'sdpa'.*causal"
    with pytest.raises(RuntimeError, match=said):
        open_backbone(folder, bidirectional=True)


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """torch's own unfused FlexAttention, from the same BlockMask: exact, and needs no compiler."""
    from torch.nn.attention import flex_attention as module
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    plain = lambda training: lambda: module.flex_attention  # noqa: E731
    monkeypatch.setattr(integration, "WrappedFlexAttention", plain)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_sdpa_for_every_layout(family, picture, uncompiled_flex):
    _, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    config = language_model(model).config
    items = [{"text": "a large red circle", "image": picture(64, 48)}, {"text": "a blue 7"}]
    padded = replace(inputs, padding_side="left")
    batch = padded.collate(items, ["a red circle", "a blue 7 at the bottom"])
    real = batch["attention_mask"].bool()
    config._attn_implementation = "flex_attention"
    fused = PatchDecoder(model).eval()  # has a layer of the model, and its implementation
    config._attn_implementation = "sdpa"
    plain = PatchDecoder(model).eval()
    plain.load_state_dict(fused.state_dict())
    for layout in (None, *LAYOUTS):
        dense = hidden_states(model, batch, layout)
        how = (dense, model, batch, layout or "bidirectional")
        pixels = plain(*how)
        config._attn_implementation = "flex_attention"
        states = hidden_states(model, batch, layout)
        assert torch.allclose(states[real], dense[real], atol=1e-5), layout
        assert torch.allclose(fused(*how), pixels, atol=1e-5), layout
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
    said = "flex_attention is not available here (RuntimeError: no C++ compiler); using sdpa"
    assert said in caplog.text
    assert all(p.grad is None for p in opened.parameters())


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


@pytest.mark.parametrize("sizes", [[(64, 48)] * 3, [(64, 48), (32, 64), (96, 32)]], ids=(1, 3))
def test_pictures_at_once_are_pictures_singly(family, picture, sizes, monkeypatch):
    """Of one size in one call; states and gradients are the same."""
    _, folder, inputs = family
    model = open_backbone(folder, bidirectional=True)
    visual = model.model.visual
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    batch = inputs.collate([{"text": "which", "image": image} for image in images])
    calls, found, original = [], [], torch.nn.functional.scaled_dot_product_attention

    def attend(*args, **how):
        calls.append(visual.config._attn_implementation)
        return original(*args, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for implementation in ("sdpa", PICTURES):
        visual.config._attn_implementation = implementation
        states = hidden_states(model, batch, "bidirectional")
        model.zero_grad()
        states.square().sum().backward()
        gradients = [p.grad.clone() for p in visual.parameters() if p.grad is not None]
        found.append([states.detach(), *gradients])
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
    plain = AutoModelForImageTextToText.from_pretrained(folder).model.visual.patch_embed
    opened = open_backbone(folder, bidirectional=True).model.visual.patch_embed
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


def test_denormals_are_flushed_and_only_while_asked():
    tiny = torch.tensor([1e-39])
    with kernels.flush_denormals():
        assert (tiny * 1.0 == 0).all()
    assert (tiny * 1.0 > 0).all()
