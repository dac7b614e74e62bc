"""Stages 1 and 2: what is hidden, what is predicted from where, and that nothing else counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cocoa_lib.attention import EOS, LAYOUTS, A, B
from cocoa_lib.backbone import hidden_states, set_bidirectional
from cocoa_lib.corruption import (
    IGNORE,
    hide_cells,
    mask_cells,
    mask_text,
    maskable,
    patch_noise,
    stage1_batch,
    stage2_batch,
)
from cocoa_lib.recipes import PRESETS, make_recipe
from cocoa_lib.reconstruction import (
    PatchDecoder,
    Reconstruction,
    mlm_loss,
    mntp_loss,
    patch_loss,
    patch_targets,
)
from cocoa_lib.world.backbone import causal_batch


def rows(picture, n=4):
    texts = ["a large red circle at the top left", "a small blue 7", "a square", "a green 3"]
    made = ({"text": "", "image": picture(seed=i), "draw": i} for i in range(n))
    return [row | {"target": texts[row["draw"] % 4]} for row in made]


def test_only_plain_text_of_the_segment_is_masked(small, picture):
    _, inputs = small
    items = [{"text": "a red circle", "image": picture()}, {"text": "a"}]
    batch = inputs.collate(items, ["a blue 7", "a small square"])
    special = {*inputs.tokenizer.all_special_ids, inputs.image_pad_id, inputs.eos_id}
    for segment in (A, B):
        allowed = maskable(batch, inputs, segment)
        assert (batch["segment_ids"][allowed] == segment).all()
        assert not special & set(batch["input_ids"][allowed].tolist())
    assert not maskable(batch, inputs, A)[1, 0], "position 0 has no predecessor to predict it"


def test_the_first_token_is_not_hidden_on_either_side(small):
    model, inputs = small
    texts = enumerate(["red", "a large red circle"])
    made = [{"text": "", "image": None, "target": text, "draw": i} for i, text in texts]
    recipe = make_recipe("stage1", {"text_mask_rate": 1.0, "image_weight": 0.0})
    module, losses = Reconstruction(model, layout="bidirectional").eval(), []
    for side in ("right", "left"):
        batch = stage1_batch(made, replace(inputs, padding_side=side), recipe, 0)
        losses.append(float(module(**batch)["text_loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_mask_text_rate_seed_and_order():
    ids = torch.arange(20).repeat(50, 1)
    allowed = torch.ones_like(ids).bool()
    how = {"rate": 0.3, "mask_token_id": 99}
    masked, labels = mask_text(ids, allowed, **how, seed=1, draws=range(50))
    hidden = labels != IGNORE
    assert 0.25 < hidden.float().mean() < 0.35
    assert torch.equal(masked == 99, hidden) and torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(masked, mask_text(ids, allowed, **how, seed=1, draws=range(50))[0])
    assert not torch.equal(masked, mask_text(ids, allowed, **how, seed=2, draws=range(50))[0])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled, _ = mask_text(ids[order], allowed, **how, seed=1, draws=order.tolist())
    assert torch.equal(shuffled, masked[order]), "a sample is the same at any place of the batch"


def test_at_least_one_masked_and_none_where_nothing_is_allowed():
    ids = torch.arange(6).repeat(200, 1)
    allowed = torch.ones_like(ids).bool()
    allowed[0] = False
    _, labels = mask_text(ids, allowed, rate=0.01, mask_token_id=99, seed=0, draws=range(200))
    count = (labels != IGNORE).sum(1)
    assert count[0] == 0 and (count[1:] >= 1).all()


def test_mask_cells_hides_whole_merged_cells(small, picture):
    _, inputs = small
    pixels, grid = inputs.process_images([picture(seed=i) for i in range(30)])
    ones = torch.ones(30, dtype=torch.long)
    hidden = mask_cells(grid, ones, 2, rate=0.5, seed=0, draws=range(30))
    assert len(hidden) == 30 * 16 and 0.4 < hidden.float().mean() < 0.6
    fill = patch_noise(pixels.shape[1], seed=0)
    changed = (hide_cells(pixels, hidden, fill, 2) != pixels).any(1).view(-1, 4)
    assert torch.equal(changed.all(1), hidden) and torch.equal(changed.any(1), hidden)


def test_mntp_predicts_from_the_state_before_and_mlm_from_the_same():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 8), nn.Linear(8, 11, bias=False)
    labels = torch.full((2, 5), IGNORE)
    labels[0, 2], labels[1, 4] = 3, 7
    for loss, shift in ((mntp_loss, 1), (mlm_loss, 0)):
        states = torch.stack([hidden[0, 2 - shift], hidden[1, 4 - shift]])
        expected = F.cross_entropy(head(states), torch.tensor([3, 7]))
        assert torch.allclose(loss(hidden, head, labels), expected)
    with pytest.raises(ValueError, match="nothing is masked"):
        mntp_loss(hidden, head, torch.full((2, 5), IGNORE))


def test_the_head_sees_masked_positions_only_and_the_loss_is_that_of_full_logits():
    torch.manual_seed(0)
    hidden, seen, head = torch.randn(3, 40, 8), [], nn.Linear(8, 50, bias=False)
    head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    labels = torch.where(torch.rand(3, 40) < 0.2, torch.randint(50, (3, 40)), IGNORE)
    labels[:, 0] = IGNORE
    loss = mntp_loss(hidden, head, labels)
    assert seen == [int((labels != IGNORE).sum())]
    logits = head(hidden)[:, :-1].flatten(0, 1)
    full = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE)
    assert torch.allclose(loss, full)


def test_patch_loss_perfect_is_zero_and_visible_cells_do_not_count():
    torch.manual_seed(0)
    pixels = torch.randn(16, 12)
    target = patch_targets(pixels, 2, norm_pix_loss=False)
    hidden = torch.tensor([True, False, True, False])
    elsewhere = target.clone()
    elsewhere[~hidden] += 100
    assert patch_loss(target, target, hidden) == patch_loss(elsewhere, target, hidden) == 0
    assert torch.allclose(patch_loss(target + 1, target, hidden), torch.tensor(1.0))
    normal = patch_targets(pixels, 2, norm_pix_loss=True).view(16, 12)
    assert torch.allclose(normal.mean(1), torch.zeros(16), atol=1e-5)
    assert torch.allclose(normal.var(1), torch.ones(16), atol=1e-3)


@pytest.mark.parametrize("layers", [0, 1])
def test_the_decoder_predicts_every_pixel_of_a_cell_from_all_tokens(small, picture, layers):
    model, inputs = small
    items = [{"text": "a", "image": picture()}, {"text": "b", "image": picture(32, 48)}]
    batch, decoder = inputs.collate(items), PatchDecoder(model, layers)
    hidden = hidden_states(model, batch).detach()
    before = decoder(hidden, model, batch, "bidirectional")
    assert before.shape == (16 + 6, 4 * 3 * 2 * 8 * 8)
    hidden[0, -1] += 1.0  # of the longer row: the last token, behind the picture
    read = not torch.allclose(before, decoder(hidden, model, batch, "bidirectional"))
    assert read == bool(layers)
    kind = type(model.model.language_model.layers[0])
    assert all(type(layer) is kind for layer in decoder.layers)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("fill", ["noise", "zero", "learned"])
def test_stage1_runs_for_every_source_and_fill(small, picture, preset, fill):
    model, inputs = small
    set_bidirectional(model, True)
    recipe = make_recipe("stage1", {"preset": preset, "patch_fill": fill})
    batch = stage1_batch(rows(picture), inputs, recipe, seed=0)
    values = {"objective": recipe.objective, "image_weight": recipe.image_weight}
    learned = {"learned_fill": fill == "learned"}
    module = Reconstruction(model, layout="bidirectional", **values, **learned)
    out = module(**batch)
    assert torch.isfinite(out["loss"]) and out["text_loss"] > 0 and out["image_loss"] > 0
    both = out["text_loss"] + recipe.image_weight * out["image_loss"]
    assert torch.allclose(out["loss"], both)
    out["loss"].backward()
    assert fill != "learned" or module.decoder.fill.grad.abs().sum() > 0
    model.zero_grad()
    set_bidirectional(model, False)


def test_presets_are_the_sources_numbers():
    names = ("text_mask_rate", "patch_mask_rate", "image_weight", "objective")
    assert {name: tuple(map(values.get, names)) for name, values in PRESETS.items()} == {
        "figure": (0.2, 0.5, 0.5, "mntp"),
        "script": (0.2, 0.3, 0.5, "mntp"),
        "moca": (0.4, 0.5, 0.1, "mlm"),
    }


def test_a_text_only_batch_works_in_both_stages(small):
    model, inputs = small
    texts = enumerate([("a red", "a circle"), ("b", "x y")])
    plain = [{"text": a, "image": None, "target": b, "draw": i} for i, (a, b) in texts]
    one = stage1_batch(plain, inputs, make_recipe("stage1"), 0)
    two = stage2_batch(plain, inputs, make_recipe("stage2"), 0)
    for batch, layout in ((one, "bidirectional"), (two, "eos_bridged")):
        out = Reconstruction(model, layout=layout, image_weight=0.5)(**batch)
        assert torch.isfinite(out["loss"]) and out["image_loss"] == 0


def test_shares_make_the_average_over_processes_exact(small, picture, monkeypatch):
    """One sample on one process, three on the other: the averages are the whole batch's."""
    model, inputs = small
    torch.manual_seed(0)
    module = Reconstruction(model, layout="bidirectional", image_weight=0.5).train()
    recipe, found = make_recipe("stage1", {"text_mask_rate": 0.5}), []
    halves = (rows(picture)[:1], rows(picture)[1:])
    parts = [stage1_batch(half, inputs, recipe, 0) for half in halves]
    counts = torch.tensor([[(p["labels"] != IGNORE).sum(), p["hidden_cells"].sum()] for p in parts])
    for batches in ([stage1_batch(rows(picture), inputs, recipe, 0)], parts):
        if len(batches) == 2:
            monkeypatch.setattr("cocoa_lib.reconstruction.gather_rows", lambda own: counts.float())
        module.zero_grad()
        losses = [module(**batch)["loss"] / len(batches) for batch in batches]
        sum(losses).backward()
        gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        found.append((sum(losses).detach(), gradients))
    module.eval().zero_grad()
    (whole, expected), (average, gradients) = found
    assert torch.allclose(average, whole, rtol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_stage2_loss_is_on_masked_b_only_and_its_first_token_comes_from_eos(small, picture):
    model, inputs = small
    recipe = make_recipe("stage2", {"text_mask_rate": 1.0})
    batch = stage2_batch(rows(picture), inputs, recipe, seed=0)
    labelled = batch["labels"] != IGNORE
    assert torch.equal(labelled, batch["segment_ids"] == B)
    first = labelled.int().argmax(1)
    assert (batch["segment_ids"][torch.arange(4), first - 1] == EOS).all()
    loss = Reconstruction(model, layout="eos_bridged")(**batch)["loss"]
    logits = model.lm_head(hidden_states(model, batch, "eos_bridged"))[:, :-1].log_softmax(-1)
    shifted = batch["labels"][:, 1:]
    places = shifted != IGNORE
    expected = -logits[places].gather(1, shifted[places][:, None]).mean()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_stage2_can_also_restore_the_picture_through_eos(small, picture):
    model, inputs = small
    recipe = make_recipe("stage2", {"image_weight": 0.5, "patch_mask_rate": 0.5})
    plain = {"text": "no picture", "image": None, "target": "a red circle <|image_1|>", "draw": 9}
    mixed = [*rows(picture), plain]
    batch = stage2_batch(mixed, inputs, recipe, seed=0)
    of_cell, hidden = batch["segment_ids"][batch["mm_token_type_ids"] == 1], batch["hidden_cells"]
    assert (of_cell[hidden] == B).all() and (of_cell == A).sum() == (of_cell == B).sum()
    assert 0 < hidden.sum() < (of_cell == B).sum(), "some cells of the copy; A's picture is whole"
    assert batch["num_images_per_sample"].tolist() == [2, 2, 2, 2, 0]
    first_b = (batch["segment_ids"] == B).int().argmax(1)
    assert (batch["mm_token_type_ids"][torch.arange(5), first_b] == 0).all(), "B begins with text"
    out = Reconstruction(model, layout="eos_bridged", image_weight=0.5)(**batch)
    assert out["image_loss"] > 0
    assert torch.allclose(out["loss"], out["text_loss"] + 0.5 * out["image_loss"])
    off = stage2_batch(mixed, inputs, make_recipe("stage2"), seed=0)
    assert "hidden_cells" not in off and off["num_images_per_sample"].tolist() == [1, 1, 1, 1, 0]


@torch.no_grad()
def test_the_copy_knows_the_picture_only_through_eos(small, picture, monkeypatch):
    """All of the copy is hidden: it depends on A's picture, and not once EOS is cut off."""
    model, inputs = small
    recipe = make_recipe("stage2", {"image_weight": 1.0, "patch_mask_rate": 1.0})
    module = Reconstruction(model, layout="eos_bridged_strict", image_weight=1.0).eval()

    def pixels(seed: int) -> torch.Tensor:
        row = {"text": "what?", "image": picture(seed=seed), "target": "a red circle", "draw": 0}
        batch = stage2_batch([row], inputs, recipe, 0)
        states = hidden_states(model, module.hide(batch), module.layout)
        return module.decoder(states, model, batch, module.layout)[batch["hidden_cells"]]

    assert not torch.equal(pixels(0), pixels(1))
    whole = LAYOUTS["eos_bridged_strict"]
    cut = lambda q, k, i, j: whole(q, k, i, j) & ((k != EOS) | (q == EOS))  # noqa: E731
    monkeypatch.setitem(LAYOUTS, "eos_bridged_strict", cut)
    assert torch.equal(pixels(0), pixels(1))


def test_next_token_prediction_learns_answers_where_the_text_is_cut_too(small, picture):
    """What is left of a cut answer is learnt, and EOS; a question never."""
    _, inputs = small
    turns = [("What color?", "red red red"), ("And the circle?", "blue")]
    rows = [{"image": picture(), "turns": turns}]
    whole = causal_batch(rows, inputs)
    ids, learnt = whole["input_ids"][0], whole["labels"][0] != IGNORE
    assert inputs.tokenizer.decode(ids[learnt]) == " red red red\n blue" + inputs.eos_token
    for length in range(len(ids) - 1, int(whole["mm_token_type_ids"].sum()) + 4, -1):
        cut = causal_batch(rows, replace(inputs, max_length=length))
        for name in ("input_ids", "labels"):  # what stands before EOS is the same
            assert torch.equal(cut[name][0, : length - 1], whole[name][0, : length - 1])
            assert cut[name][0, length - 1] == inputs.eos_id
