"""Corruption and losses: what is hidden, what is predicted from where, and that nothing else counts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cocoa_lib.attention import EOS, LAYOUTS, A, B
from cocoa_lib.backbone import hidden_states, set_bidirectional
from cocoa_lib.contrastive import CachedInfoNCE, info_nce
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
from cocoa_lib.embedder import EosEmbedding
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
    texts = ["a large red circle at the top left", "a small blue 7", "a square", "a green 3 at the bottom"]
    return [{"text": "", "image": picture(seed=i), "target": texts[i % 4], "draw": i} for i in range(n)]


def test_only_plain_text_of_the_segment_is_masked(small, picture):
    _, inputs = small
    batch = inputs.collate(
        [{"text": "a red circle", "image": picture()}, {"text": "a"}], ["a blue 7", "a small square"]
    )
    special = {*inputs.tokenizer.all_special_ids, inputs.image_pad_id, inputs.eos_id}
    for segment in (A, B):
        allowed = maskable(batch, inputs, segment)
        assert (batch["segment_ids"][allowed] == segment).all()
        assert not special & set(batch["input_ids"][allowed].tolist())
    assert not maskable(batch, inputs, A)[1, 0], "position 0 has no predecessor to be predicted from"


def test_mask_text_rate_seed_and_order():
    ids = torch.arange(20).repeat(50, 1)
    allowed = torch.ones_like(ids).bool()
    masked, labels = mask_text(ids, allowed, rate=0.3, mask_token_id=99, seed=1, draws=range(50))
    hidden = labels != IGNORE
    assert 0.25 < hidden.float().mean() < 0.35
    assert torch.equal(masked == 99, hidden) and torch.equal(labels[hidden], ids[hidden])
    again, _ = mask_text(ids, allowed, rate=0.3, mask_token_id=99, seed=1, draws=range(50))
    assert torch.equal(masked, again)
    other, _ = mask_text(ids, allowed, rate=0.3, mask_token_id=99, seed=2, draws=range(50))
    assert not torch.equal(masked, other)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled, _ = mask_text(ids[order], allowed, rate=0.3, mask_token_id=99, seed=1, draws=order.tolist())
    assert torch.equal(shuffled, masked[order]), "a sample's corruption must not depend on its place in the batch"


def test_at_least_one_masked_and_none_where_nothing_is_allowed():
    ids = torch.arange(6).repeat(200, 1)
    allowed = torch.ones_like(ids).bool()
    allowed[0] = False
    _, labels = mask_text(ids, allowed, rate=0.01, mask_token_id=99, seed=0, draws=range(200))
    count = (labels != IGNORE).sum(1)
    assert count[0] == 0 and (count[1:] >= 1).all()
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got 1.5"):
        mask_text(ids, allowed, rate=1.5, mask_token_id=99, seed=0, draws=range(200))


def test_mask_cells_hides_whole_merged_cells(small, picture):
    _, inputs = small
    pixels, grid = inputs.process_images([picture(seed=i) for i in range(30)])
    hidden = mask_cells(grid, torch.ones(30, dtype=torch.long), 2, rate=0.5, seed=0, draws=range(30))
    assert len(hidden) == 30 * 16 and 0.4 < hidden.float().mean() < 0.6
    fill = patch_noise(pixels.shape[1], seed=0)
    changed = (hide_cells(pixels, hidden, fill, 2) != pixels).any(1).view(-1, 4)
    assert torch.equal(changed.all(1), hidden) and torch.equal(changed.any(1), hidden)


def test_mntp_predicts_from_the_state_before_and_mlm_from_the_same(small):
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 8), nn.Linear(8, 11, bias=False)
    labels = torch.full((2, 5), IGNORE)
    labels[0, 2], labels[1, 4] = 3, 7
    logits = head(hidden)
    expected = F.cross_entropy(torch.stack([logits[0, 1], logits[1, 3]]), torch.tensor([3, 7]))
    assert torch.allclose(mntp_loss(hidden, head, labels), expected)
    expected = F.cross_entropy(torch.stack([logits[0, 2], logits[1, 4]]), torch.tensor([3, 7]))
    assert torch.allclose(mlm_loss(hidden, head, labels), expected)
    with pytest.raises(ValueError, match="nothing is masked"):
        mntp_loss(hidden, head, torch.full((2, 5), IGNORE))


def test_the_head_sees_masked_positions_only_and_the_loss_is_that_of_full_logits(small):
    torch.manual_seed(0)
    hidden = torch.randn(3, 40, 8)
    seen = []

    class Head(nn.Linear):
        def forward(self, states):
            seen.append(len(states))
            return super().forward(states)

    head = Head(8, 50, bias=False)
    labels = torch.where(torch.rand(3, 40) < 0.2, torch.randint(50, (3, 40)), IGNORE)
    labels[:, 0] = IGNORE
    loss = mntp_loss(hidden, head, labels)
    assert seen == [int((labels != IGNORE).sum())]
    full = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    assert torch.allclose(loss, full)


def test_patch_loss_perfect_is_zero_and_visible_cells_do_not_count():
    torch.manual_seed(0)
    pixels = torch.randn(16, 12)
    target = patch_targets(pixels, 2, normalise=False)
    hidden = torch.tensor([True, False, True, False])
    assert patch_loss(target.clone(), target, hidden) == 0
    wrong_elsewhere = target.clone()
    wrong_elsewhere[~hidden] += 100
    assert patch_loss(wrong_elsewhere, target, hidden) == 0
    assert torch.allclose(patch_loss(target + 1, target, hidden), torch.tensor(1.0))
    normal = patch_targets(pixels, 2, normalise=True).view(16, 12)
    assert torch.allclose(normal.mean(1), torch.zeros(16), atol=1e-5)
    assert torch.allclose(normal.var(1), torch.ones(16), atol=1e-3)


@pytest.mark.parametrize("layers", [0, 1])
def test_decoder_predicts_every_pixel_of_a_cell(small, picture, layers):
    model, inputs = small
    batch = inputs.collate([{"text": "a", "image": picture()}, {"text": "b", "image": picture(32, 48)}])
    decoder = PatchDecoder(model, layers)
    out = decoder(hidden_states(model, batch), model, batch, "bidirectional")
    assert out.shape == (16 + 6, 4 * 3 * 2 * 8 * 8)


def test_decoder_is_bidirectional_and_of_the_backbones_kind(small, picture):
    model, inputs = small
    batch = inputs.collate([{"text": "a red circle", "image": picture()}])
    decoder = PatchDecoder(model, 1)
    assert type(decoder.layers[0]) is type(model.model.language_model.layers[0])
    hidden = torch.randn(1, batch["input_ids"].shape[1], 64)
    before = decoder(hidden, model, batch, "bidirectional")
    hidden[0, -1] += 1.0
    assert not torch.allclose(before, decoder(hidden, model, batch, "bidirectional")), "the last token must be read"


def test_either_half_of_stage_1_can_be_left_out(small, picture):
    model, inputs = small
    recipe = make_recipe("stage1", {"preset": "figure"})
    batch = stage1_batch(rows(picture), inputs, recipe, 0)
    for weights in ({"text_weight": 0.0, "image_weight": 0.5}, {"text_weight": 1.0, "image_weight": 0.0}):
        out = Reconstruction(model, layout="bidirectional", **weights)(**batch)
        expected = weights["text_weight"] * out["text_loss"] + weights["image_weight"] * out["image_loss"]
        assert float(out["loss"].detach()) == pytest.approx(float(expected)) and float(out["loss"].detach()) > 0


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("fill", ["noise", "zero", "learned"])
def test_stage1_runs_for_every_source_and_fill(small, picture, preset, fill):
    model, inputs = small
    set_bidirectional(model, True)
    recipe = make_recipe("stage1", {"preset": preset, "patch_fill": fill})
    batch = stage1_batch(rows(picture), inputs, recipe, seed=0)
    module = Reconstruction(model, layout="bidirectional", objective=recipe.objective, image_weight=recipe.image_weight,
                            learned_fill=fill == "learned")  # fmt: skip
    out = module(**batch)
    assert torch.isfinite(out["loss"]) and out["text_loss"] > 0 and out["image_loss"] > 0
    assert torch.allclose(out["loss"], out["text_loss"] + recipe.image_weight * out["image_loss"])
    out["loss"].backward()
    if fill == "learned":
        assert module.decoder.fill.grad.abs().sum() > 0
    model.zero_grad()
    set_bidirectional(model, False)


def test_presets_are_the_sources_numbers():
    assert PRESETS["figure"] == {
        "text_mask_rate": 0.2,
        "patch_mask_rate": 0.5,
        "image_weight": 0.5,
        "objective": "mntp",
    }
    assert PRESETS["script"] == {
        "text_mask_rate": 0.2,
        "patch_mask_rate": 0.3,
        "image_weight": 0.5,
        "objective": "mntp",
    }
    assert PRESETS["moca"] == {"text_mask_rate": 0.4, "patch_mask_rate": 0.5, "image_weight": 0.1, "objective": "mlm"}


def test_a_text_only_batch_works_in_both_stages(small, picture):
    model, inputs = small
    plain = [
        {"text": "a red", "image": None, "target": "a circle", "draw": 0},
        {"text": "b", "image": None, "target": "x y", "draw": 1},
    ]
    for batch, layout in (
        (stage1_batch(plain, inputs, make_recipe("stage1"), 0), "bidirectional"),
        (stage2_batch(plain, inputs, make_recipe("stage2"), 0), "eos_bridged"),
    ):
        out = Reconstruction(model, layout=layout, image_weight=0.5)(**batch)
        assert torch.isfinite(out["loss"]) and out["image_loss"] == 0


def test_stage2_loss_is_on_masked_b_only_and_its_first_token_comes_from_eos(small, picture):
    model, inputs = small
    recipe = make_recipe("stage2", {"text_mask_rate": 1.0})
    batch = stage2_batch(rows(picture), inputs, recipe, seed=0)
    labelled = batch["labels"] != IGNORE
    assert torch.equal(labelled, batch["segment_ids"] == B)
    first = labelled.int().argmax(1)
    assert (batch["segment_ids"][torch.arange(4), first - 1] == EOS).all()
    module = Reconstruction(model, layout="eos_bridged")
    loss = module(**batch)["loss"]
    hidden = hidden_states(model, batch, "eos_bridged")
    logits = model.lm_head(hidden)[:, :-1].log_softmax(-1)
    shifted = batch["labels"][:, 1:]
    places = shifted != IGNORE
    expected = -logits[places].gather(1, shifted[places][:, None]).mean()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_stage2_can_also_restore_the_picture_through_eos(small, picture):
    model, inputs = small
    recipe = make_recipe("stage2", {"image_weight": 0.5, "patch_mask_rate": 0.5})
    mixed = [*rows(picture), {"text": "no picture", "image": None, "target": "a red circle <|image_1|>", "draw": 9}]
    batch = stage2_batch(mixed, inputs, recipe, seed=0)
    cell_segment, hidden = batch["segment_ids"][batch["mm_token_type_ids"] == 1], batch["hidden_cells"]
    assert (cell_segment[hidden] == B).all() and (cell_segment == A).sum() == (cell_segment == B).sum()
    assert 0 < hidden.sum() < (cell_segment == B).sum(), "some cells of the copy are hidden; A's picture is whole"
    assert batch["num_images_per_sample"].tolist() == [2, 2, 2, 2, 0]
    first_b = (batch["segment_ids"] == B).int().argmax(1)
    assert (batch["mm_token_type_ids"][torch.arange(5), first_b] == 0).all(), "B begins with its text: EOS predicts it"
    out = Reconstruction(model, layout="eos_bridged", image_weight=0.5)(**batch)
    assert out["image_loss"] > 0 and torch.allclose(out["loss"], out["text_loss"] + 0.5 * out["image_loss"])
    off = stage2_batch(mixed, inputs, make_recipe("stage2"), seed=0)
    assert "hidden_cells" not in off and off["num_images_per_sample"].tolist() == [1, 1, 1, 1, 0], "off by default"


@torch.no_grad()
def test_the_copy_knows_the_picture_only_through_eos(small, picture, monkeypatch):
    """Two pictures in A, all cells of the copy hidden: its predicted pixels differ, and, once EOS is cut off, do not."""
    model, inputs = small
    recipe = make_recipe("stage2", {"image_weight": 1.0, "patch_mask_rate": 1.0})
    module = Reconstruction(model, layout="eos_bridged_strict", image_weight=1.0).eval()

    def pixels(seed: int) -> torch.Tensor:
        row = {"text": "what?", "image": picture(seed=seed), "target": "a red circle", "draw": 0}
        batch = stage2_batch([row], inputs, recipe, 0)
        visible = hide_cells(batch["pixel_values"], batch["hidden_cells"], batch["patch_fill"], 2)
        states = hidden_states(model, batch | {"pixel_values": visible}, module.layout)
        return module.decoder(states, model, batch, module.layout)[batch["hidden_cells"]]

    assert not torch.equal(pixels(0), pixels(1))
    whole = LAYOUTS["eos_bridged_strict"]
    monkeypatch.setitem(LAYOUTS, "eos_bridged_strict", lambda q, k, i, j: whole(q, k, i, j) & ((k != EOS) | (q == EOS)))
    assert torch.equal(pixels(0), pixels(1))


# --- contrastive -------------------------------------------------------------------------------------------------


def test_info_nce_is_the_softmax_written_out():
    torch.manual_seed(0)
    queries, candidates = torch.randn(4, 8), torch.randn(6, 8)
    positive = torch.tensor([0, 1, 2, 3])
    q, c = F.normalize(queries, dim=-1), F.normalize(candidates, dim=-1)
    by_hand = torch.stack([-torch.log(((q[i] @ c.T) / 0.02).softmax(-1)[i]) for i in range(4)]).mean()
    assert torch.allclose(info_nce(queries, candidates, positive, temperature=0.02), by_hand, rtol=1e-4)
    same = torch.ones(4, 8)
    assert math.isclose(float(info_nce(same, same, positive, temperature=0.02)), math.log(4), rel_tol=1e-5)
    half = info_nce(queries.bfloat16(), candidates.bfloat16(), positive, temperature=0.02)
    assert half.dtype == torch.float32


def test_copies_of_the_positive_are_no_negatives():
    q = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=-1)
    copies = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    exclude = torch.ones(2, 2).bool()
    assert info_nce(q, copies, torch.tensor([0, 1]), temperature=0.02, exclude=exclude) == 0
    assert info_nce(q[:1], copies, torch.tensor([0]), temperature=0.02) > 0.6, "counted as a negative it costs ln 2"


class Toy(nn.Module):
    """Stands for a SentenceTransformer: features -> embedding, with dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, features):
        return {"sentence_embedding": self.net(features["input_ids"])}


def columns(n=10, n_columns=3, keys=None):
    """Rows of 1 to 9 tokens, which the toy does not read."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 10, (n_columns, n, 1), generator=generator)
    return [
        {"input_ids": torch.randn(n, 6, generator=generator), "attention_mask": (torch.arange(9) < lengths[i]).long()}
        | ({} if keys is None else {"key": keys[i]})
        for i in range(n_columns)
    ]  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 5, 10])
def test_gradcache_equals_the_full_batch_with_dropout(chunk):
    """Dropout masks depend on the chunking, so the full-batch run uses the very masks: chunks, of rows sorted by length,
    embedded in one graph; one chunk is not sorted."""
    torch.manual_seed(0)
    model = Toy().train()
    features = columns()
    torch.manual_seed(7)
    loss = CachedInfoNCE(model, temperature=0.1, mini_batch_size=chunk)(features)
    loss.backward()
    cached = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(7)
    whole = []
    for column in features:
        order = (
            column["attention_mask"].sum(1).argsort(descending=True, stable=True) if chunk < 10 else torch.arange(10)
        )
        parts = column["input_ids"][order].split(chunk)
        embedded = torch.cat([model({"input_ids": part})["sentence_embedding"] for part in parts])
        whole.append(embedded[order.argsort()])
    full = info_nce(whole[0], torch.cat(whole[1:]), torch.arange(10), temperature=0.1)
    full.backward()
    assert torch.allclose(loss, full, rtol=1e-6)
    for ours, theirs in zip(cached, (p.grad for p in model.parameters()), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_batch_of_one_chunk_is_embedded_once_and_pairs_have_gradcaches_gradients_to_the_bit():
    torch.manual_seed(0)
    model, rows = Toy().train(), []
    model.register_forward_hook(lambda module, args, out: rows.append(len(out["sentence_embedding"])))
    found = {}
    for name in ("forward", "forward_cached"):
        objective, features = CachedInfoNCE(model, temperature=0.1, mini_batch_size=10), columns(n_columns=2)
        objective._keys = [None] * 2
        torch.manual_seed(7)
        loss = getattr(objective, name)(features)
        loss.backward()
        found[name] = (loss.detach(), *(p.grad.clone() for p in model.parameters()), rows.copy())
        model.zero_grad()
        rows.clear()
    plain, cached = found["forward"], found["forward_cached"]
    assert (plain[-1], cached[-1]) == ([10] * 2, [10] * 4)  # the library's own passes keep no chunk
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain[:-1], cached[:-1], strict=True))


@pytest.mark.parametrize("chunk", [4, 10])
def test_keys_reach_the_loss(chunk):
    model = Toy().eval()
    keys = [torch.arange(10), torch.zeros(10).long(), torch.arange(100, 110)]
    features = columns(keys=keys)
    loss = CachedInfoNCE(model, temperature=0.1, mini_batch_size=chunk)(features)
    embedded = [model(f)["sentence_embedding"] for f in features]
    exclude = torch.cat([torch.ones(10, 10).bool(), torch.zeros(10, 10).bool()], dim=1)
    expected = info_nce(embedded[0], torch.cat(embedded[1:]), torch.arange(10), temperature=0.1, exclude=exclude)
    assert torch.allclose(loss, expected)


def mixed_columns(inputs, picture):
    """Three columns of seven items, 2 to some 100 tokens: with no picture, one or two, of several sizes, in no order."""
    long = "What color is the square? " * 8
    queries = [{"text": "a"}, {"text": "b", "image": picture(64, 64)}, {"text": long}, {"text": "c d"},
               {"text": "e", "image": [picture(32, 48), picture(64, 64, 1)]}, {"text": "a red circle"},
               {"text": long, "image": picture(64, 64, 2)}]  # fmt: skip
    positives = [{"text": f"a small blue {i}" * (1 + 9 * (i % 3 == 1))} for i in range(7)]
    negatives = [{"text": "", "image": picture(64, 16 + 16 * (i % 3), i)} if i % 2 else {"text": "x"} for i in range(7)]
    keys = torch.arange(7), torch.tensor([7, 8, 7, 9, 8, 10, 11]), torch.arange(12, 19)  # two pairs of equal positives
    made = [inputs.collate(items) for items in (queries, positives, negatives)]
    return [column | {"key": key} for column, key in zip(made, keys, strict=True)]


def outcome(module, embed, features):
    """Loss, gradients by name, and the shapes of what the module was given."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0]["input_ids"].shape)))
    module.zero_grad()
    loss = embed([dict(column) for column in features])
    loss.backward()
    hook.remove()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return loss.detach(), gradients, seen


def full_batch(module, keys, features):
    query, *others = [module(column)["sentence_embedding"] for column in features]
    exclude = torch.cat([keys[1][:, None] == key[None] for key in keys[1:]], dim=1)
    return info_nce(query, torch.cat(others), torch.arange(7), temperature=0.1, exclude=exclude)


@pytest.mark.parametrize("pooling", ["eos", "mean"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_chunks_of_sorted_rows_have_the_loss_and_gradients_of_the_full_batch(small, picture, pooling, chunk):
    model, inputs = small
    module, features = EosEmbedding(model, inputs, pooling), mixed_columns(inputs, picture)
    keys = [column["key"] for column in features]
    loss, gradients, _ = outcome(module, CachedInfoNCE(module, temperature=0.1, mini_batch_size=chunk), features)
    full, expected, _ = outcome(module, partial(full_batch, module, keys), features)
    assert torch.allclose(loss, full, rtol=1e-5) and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_chunks_of_sorted_rows_compute_less_padding_and_as_many_chunks(small, picture):
    model, inputs = small
    module, features = EosEmbedding(model, inputs), mixed_columns(inputs, picture)
    objective = CachedInfoNCE(module, mini_batch_size=2)
    _, _, chunks = outcome(module, objective, features)
    objective._order = None
    _, _, given = outcome(module, objective.forward_cached, features)
    assert [rows for rows, _ in given] == [2, 2, 2, 1] * 3 * 2  # columns, passes
    assert [rows for rows, _ in chunks] == [rows for rows, _ in given[:12] + given[13:]], (
        "the first is not computed again"
    )
    chunks.insert(12, chunks[0])
    by_length = [column["attention_mask"].sum(1).sort(descending=True).values for column in features]
    assert [length for _, length in chunks] == 2 * [int(rows[0]) for column in by_length for rows in column.split(2)]
    real = 2 * sum(int(lengths.sum()) for lengths in by_length)
    padding, before = (sum(n * length for n, length in shapes) - real for shapes in (chunks, given))
    assert 0 < padding < before / 4


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_the_first_chunk_is_kept_and_there_is_one_graph_at_a_time(chunk):
    """Its graph lives from the first pass to its own backward pass; evaluation, without gradients, keeps none."""
    model, alive, most = Toy().train(), [], []

    def count(module, args, out):
        rows = out["sentence_embedding"]
        if rows.requires_grad:
            alive.append(1)
            rows.register_hook(lambda gradient: alive.pop() and None)
        most.append(len(alive))

    model.register_forward_hook(count)
    objective = CachedInfoNCE(model, temperature=0.1, mini_batch_size=chunk)
    objective(columns()).backward()
    chunks = 3 * math.ceil(10 / chunk)
    assert len(most) == 2 * chunks - 1 and set(most) == {1} and not alive
    most.clear()
    with torch.no_grad():
        objective(columns())
    assert most == [0] * chunks


def test_two_batches_may_wait_for_their_backward_pass():
    model = Toy().eval()
    objective, first, second = CachedInfoNCE(model, temperature=0.1, mini_batch_size=3), columns(), columns(n=7)
    expected = []
    for features in (first, second):
        objective(features).backward()
        expected.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    (objective(first) + objective(second)).backward()
    for p, a, b in zip(model.parameters(), *expected, strict=True):
        assert torch.allclose(p.grad, a + b, rtol=1e-5, atol=1e-7)


def test_one_chunk_is_embedded_in_the_order_given_to_the_bit(small, picture):
    model, inputs = small
    module, features = EosEmbedding(model, inputs), mixed_columns(inputs, picture)
    keys = [column["key"] for column in features]
    objective = CachedInfoNCE(module, temperature=0.1, mini_batch_size=3)
    outcome(module, objective, features)  # what a call sorts, the next one need not
    objective.mini_batch_size = 7
    loss, gradients, seen = outcome(module, objective, features)
    full, expected, whole = outcome(module, partial(full_batch, module, keys), features)
    assert torch.equal(loss, full) and seen == whole and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_same_draw_same_noise():
    assert torch.equal(patch_noise(8, seed=3), patch_noise(8, seed=3))
    assert not torch.equal(patch_noise(8, seed=3), patch_noise(8, seed=4))
    assert np.isclose(patch_noise(10_000, seed=0).std(), 1.0, atol=0.05)


def test_next_token_prediction_learns_answers_where_the_text_is_cut_too(small, picture):
    """Cut text loses its end; what is left of an answer is learnt, EOS as well, a question or a picture never."""
    _, inputs = small
    rows = [{"image": picture(), "turns": [("What color?", "red red red"), ("And the circle?", "blue")]}]
    whole = causal_batch(rows, inputs)
    learnt = whole["labels"][0] != IGNORE
    ids = whole["input_ids"][0]
    assert inputs.tokenizer.decode(ids[learnt]) == " red red red\n blue" + inputs.eos_token
    for length in range(len(ids) - 1, int(whole["mm_token_type_ids"].sum()) + 4, -1):
        cut = causal_batch(rows, replace(inputs, max_length=length))
        n = length - 1  # what stands before EOS is the same
        assert torch.equal(cut["input_ids"][0, :n], ids[:n]) and cut["input_ids"][0, n] == inputs.eos_id
        assert torch.equal(cut["labels"][0, :n], whole["labels"][0, :n]) and cut["labels"][0, n] == inputs.eos_id
