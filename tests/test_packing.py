"""Packed rows: every token once, samples apart, and the loss and gradients of the padded batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from cocoa_lib.attention import LAYOUTS, PAD, A, block_mask, dense_mask
from cocoa_lib.backbone import hidden_states, language_model, set_bidirectional
from cocoa_lib.corruption import stage1_batch, stage2_batch
from cocoa_lib.embedder import EosEmbedding
from cocoa_lib.packing import NO_SAMPLE, ROOM, pack
from cocoa_lib.positions import position_ids
from cocoa_lib.recipes import make_recipe
from cocoa_lib.reconstruction import Reconstruction
from cocoa_lib.show.masks import segments

SHAPE = st.tuples(st.integers(1, 6), st.integers(0, 5), st.booleans(), st.booleans())
SHAPES = st.lists(SHAPE, min_size=1, max_size=9)


def padded(shapes):
    """(tokens in A, in B, padding left?, picture?) a sample -> a batch of distinct tokens."""
    length = max(a + b + 1 for a, b, *_ in shapes)
    sides = ("pad_right", "pad_left")
    rows = [segments(a, b, **{sides[left]: length - a - b - 1}) for a, b, left, _ in shapes]
    segment_ids = torch.cat(rows)
    real = segment_ids != PAD
    ids = torch.arange(1, real.numel() + 1).reshape(real.shape) * real
    images = torch.tensor([int(image) for *_, image in shapes])
    pixels = (segment_ids == A) & (images[:, None] == 1)
    batch = {"input_ids": ids, "segment_ids": segment_ids, "attention_mask": real.long()}
    batch |= {"labels": ids * 2, "mm_token_type_ids": pixels.long()}
    if images.any():
        grids = torch.tensor([[1, 1, a] for a, *_, image in shapes if image])
        batch |= {"pixel_values": ids[pixels][:, None], "image_grid_thw": grids}
        batch |= {"num_images_per_sample": images, "hidden_cells": ids[pixels] % 2 == 0}
    return batch, torch.stack([ids * 3, ids * 5, ids * 7])


@settings(max_examples=200, deadline=None)
@given(shapes=SHAPES, layout=st.sampled_from(sorted(LAYOUTS)))
def test_every_token_once_in_order_and_samples_do_not_see_each_other(shapes, layout):
    batch, positions = padded(shapes)
    packed = pack(batch, positions)
    real = packed["attention_mask"].bool()
    given, ids, before = batch["input_ids"], packed["input_ids"], batch["attention_mask"].bool()
    assert ids.shape[0] <= len(shapes) and ids.shape[1] <= ROOM * given.shape[1]
    assert sorted(ids[real].tolist()) == given[before].tolist()
    assert torch.equal(packed["position_ids"][:, real], ids[real] * torch.tensor([[3], [5], [7]]))
    assert torch.equal(packed["labels"][real], ids[real] * 2)
    for name, nothing in (("labels", -100), ("sample_ids", NO_SAMPLE), ("segment_ids", PAD)):
        assert (packed[name][~real] == nothing).all()
    of_flex = block_mask(layout, packed["segment_ids"], packed["sample_ids"]).mask_mod
    mask = dense_mask(layout, packed["segment_ids"], packed["sample_ids"])
    assert torch.equal(create_mask(of_flex, len(ids), None, *mask.shape[2:], device="cpu"), mask)
    mask = mask[:, 0]
    alone = dense_mask(layout, batch["segment_ids"])[:, 0]
    for sample in range(len(shapes)):
        at = packed["sample_ids"] == sample
        row, inside = int(at.any(1).nonzero()), at[at.any(1)][0]
        keep = before[sample]
        assert torch.equal(ids[at], given[sample][keep])
        assert torch.equal(mask[row][inside][:, inside], alone[sample][keep][:, keep])
        assert not mask[row][inside][:, ~inside].any(), "and nothing outside is seen"
    assert mask.any(-1).all(), "no row of the mask is empty"
    if "pixel_values" not in batch:
        return
    # A picture has a cell for each image token of its sample, marked with that token.
    pixels = packed["pixel_values"][:, 0]
    assert torch.equal(pixels, ids[packed["mm_token_type_ids"] == 1])
    assert torch.equal(packed["hidden_cells"], pixels % 2 == 0)


def mixture(picture, n=9):
    """Texts of different lengths, two thirds with a picture, of different sizes."""
    words = "a large red circle at the top left of one small blue square".split()
    rows = []
    for i in range(n):
        image = picture(32 + 16 * (i % 3), 32, i) if i % 3 else None
        text, target = "What is it?" * (i % 2 or i % 3 == 0), " ".join(words[: 2 + 2 * i % 11])
        rows.append({"text": text, "image": image, "target": target, "draw": i})
    return rows


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage2 with pictures", "mlm"])
def test_loss_and_gradients_are_those_of_the_padded_batch(small, picture, stage, implementation):
    model, inputs = small
    more = {"stage2 with pictures": {"image_weight": 0.5}, "mlm": {"preset": "moca"}}
    first = stage in ("stage1", "mlm")
    recipe = make_recipe("stage1" if first else "stage2", more.get(stage, {}))
    make = stage1_batch if first else stage2_batch
    set_bidirectional(model, recipe.layout == "bidirectional")
    model.set_attn_implementation(implementation)
    torch.manual_seed(0)
    module = Reconstruction(
        model, layout=recipe.layout, objective=recipe.objective, image_weight=recipe.image_weight
    )
    batch, seen = make(mixture(picture), inputs, recipe, 0), {}
    try:
        for packing in (False, True):
            module.packing = packing
            module.zero_grad(set_to_none=True)
            out = module(**batch)
            out["loss"].backward()
            gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            losses = {name: float(value.detach()) for name, value in out.items()}
            seen[packing] = (losses, gradients)
    finally:
        model.set_attn_implementation("sdpa")
        set_bidirectional(model, False)
        module.zero_grad()
    assert seen[True][0] == pytest.approx(seen[False][0], rel=1e-5)
    assert seen[True][1].keys() == seen[False][1].keys()
    for name, gradient in seen[True][1].items():
        torch.testing.assert_close(gradient, seen[False][1][name], rtol=1e-4, atol=1e-6, msg=name)
    packed = pack(batch, position_ids(model, batch))
    assert len(packed["input_ids"]) < len(batch["input_ids"]), "otherwise nothing was packed"


@torch.no_grad()
def test_the_models_own_mode_is_kept_in_packed_rows(small, picture):
    """The plain 2-D mask would let the samples of a row see each other."""
    model, inputs = small
    for bidirectional in (False, True):
        set_bidirectional(model, bidirectional)
        batch = inputs.collate(
            [{"text": row["target"], "image": row["image"]} for row in mixture(picture)]
        )
        packed = pack(batch, position_ids(model, batch))
        alone, together = hidden_states(model, batch), hidden_states(model, packed)
        for sample in range(len(alone)):
            expected = alone[sample][batch["attention_mask"][sample].bool()]
            torch.testing.assert_close(
                together[packed["sample_ids"] == sample], expected, rtol=1e-4, atol=1e-5
            )
    set_bidirectional(model, False)


@pytest.mark.parametrize("pooling", ["eos", "mean"])
def test_packed_rows_give_the_same_embeddings_and_gradients(small, picture, pooling):
    """Stage 3 packs a column; one sample's state is pooled from its own tokens, in the samples' order."""
    model, inputs = small
    set_bidirectional(model, True)
    items = [{"text": row["target"], "image": row["image"]} for row in mixture(picture)]
    found = []
    for packing in (False, True):
        module = EosEmbedding(model, inputs, pooling=pooling, packing=packing)
        features = module(inputs.collate(items))
        weight = language_model(model).layers[0].mlp.up_proj.weight
        states = features["sentence_embedding"]
        pull = torch.arange(states.numel()).view_as(states).cos()
        found.append((states.detach(), *torch.autograd.grad((states * pull).sum(), weight)))
    set_bidirectional(model, False)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
