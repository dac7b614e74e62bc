"""The layouts: the paper's figure, padding, dense mask against BlockMask, behaviour."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_lib.attention import EOS, LAYOUTS, PAD, A, B, block_mask, dense_mask, make_additive
from cocoa_lib.backbone import hidden_states, open_backbone, set_bidirectional
from cocoa_lib.inputs import Inputs
from cocoa_lib.show.masks import reachability, segments

FIGURE = """
1 1 1 0 0
1 1 1 0 0
1 1 1 1 1
0 0 1 1 1
0 0 1 1 1
"""


def pattern(text: str) -> torch.Tensor:
    rows = [[int(cell) for cell in line.split()] for line in text.strip().splitlines()]
    return torch.tensor(rows).bool()


def test_the_papers_figure():
    assert torch.equal(dense_mask("eos_bridged", segments(2, 2))[0, 0], pattern(FIGURE))


def test_strict_differs_only_where_eos_looks_at_b():
    strict = dense_mask("eos_bridged_strict", segments(2, 2))[0, 0]
    expected = pattern(FIGURE)
    expected[2, 3:] = False
    assert torch.equal(strict, expected)


def test_causal_and_bidirectional():
    assert torch.equal(dense_mask("causal", segments(3, 2))[0, 0], torch.ones(6, 6).tril().bool())
    assert dense_mask("bidirectional", segments(3, 2)).all()


shapes = st.tuples(st.integers(1, 6), st.integers(0, 5), st.booleans())
rows = st.builds(
    lambda a, b, left, right: segments(a, b, pad_left=left, pad_right=right)[0],
    *(st.integers(0, most) for most in (6, 5, 4, 4)),
)


@settings(max_examples=60, deadline=None)
@given(row=rows, layout=st.sampled_from(sorted(LAYOUTS)))
def test_padding_is_seen_by_nobody_and_no_row_is_empty(row, layout):
    mask = dense_mask(layout, row[None])[0, 0]
    assert not mask[:, row == PAD].any()
    assert mask.any(-1).all()
    real = row != PAD  # what real tokens see is as without it
    assert torch.equal(mask[real][:, real], dense_mask(layout, row[real][None])[0, 0])


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(shapes, min_size=1, max_size=4), layout=st.sampled_from(sorted(LAYOUTS)))
def test_flex_mask_is_the_dense_mask(rows, layout):
    """create_mask evaluates at every cell the function that the BlockMask is built from."""
    from torch.nn.attention.flex_attention import create_mask

    length = max(a + b for a, b, _ in rows) + 1
    sides = ("pad_right", "pad_left")
    parts = [segments(a, b, **{sides[left]: length - a - b - 1}) for a, b, left in rows]
    ids = torch.cat(parts)
    block = block_mask(layout, ids)
    made = create_mask(block.mask_mod, len(ids), None, length, length, device="cpu")
    assert torch.equal(made, dense_mask(layout, ids))
    assert block.shape == (len(ids), 1, length, length)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown attention layout 'eos'.*eos_bridged"):
        dense_mask("eos", segments(1, 1))
    with pytest.raises(ValueError, match=r"row\(s\) \[1\].*padding only"):
        dense_mask("causal", torch.tensor([[A, EOS], [PAD, PAD]]))
    with pytest.raises(ValueError, match=r"\(B, L\)"):
        dense_mask("causal", torch.tensor([A, EOS]))


def test_additive_has_no_infinity():
    mask = make_additive(dense_mask("eos_bridged", segments(2, 2, pad_left=2)), torch.bfloat16)
    assert torch.isfinite(mask).all() and (mask.softmax(-1).isnan().sum() == 0)


def test_reachability_a_and_b_meet_only_through_eos():
    ids = segments(2, 2)
    once = reachability(dense_mask("eos_bridged", ids)[0, 0], 1)
    twice = reachability(dense_mask("eos_bridged", ids)[0, 0], 2)
    assert not once[3, 0] and twice[3, 0] and twice[0, 3]
    strict = reachability(dense_mask("eos_bridged_strict", ids)[0, 0], 5)
    assert strict[3, 0] and not strict[0, 3] and not strict[2, 3], "nothing of B reaches EOS or A"


def stage2_batch(inputs: Inputs, picture, seed=0):
    both = {"text": "a large red circle", "image": picture(seed=seed)}
    return inputs.collate([both, {"text": "a small blue 7"}], ["a red circle", "a blue 7"])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def opened(request, small, tmp_path_factory):
    model, inputs = small
    folder = tmp_path_factory.mktemp("backbone")
    model.save_pretrained(folder)
    return open_backbone(folder, bidirectional=True, attn_implementation=request.param), inputs


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [True, False])
def test_last_token_reaches_the_first_one_only_bidirectionally(opened, bidirectional):
    model, inputs = opened
    set_bidirectional(model, bidirectional)
    for n_items in (1, 3):  # one needs no padding mask: there others were silently causal
        texts = ["a red circle", "a red circle and a small blue 7", "a square"][:n_items]
        batch = inputs.collate([{"text": text} for text in texts])
        changed = dict(batch, input_ids=batch["input_ids"].clone())
        changed["input_ids"][0, 3] = 99
        before, after = hidden_states(model, batch)[0, 0], hidden_states(model, changed)[0, 0]
        assert torch.equal(before, after) != bidirectional
    set_bidirectional(model, True)


@torch.no_grad()
def test_layout_none_is_the_models_own_mode(opened, picture):
    model, inputs = opened
    batch = stage2_batch(inputs, picture)
    real = batch["attention_mask"].bool()
    for bidirectional, layout in ((True, "bidirectional"), (False, "causal")):
        set_bidirectional(model, bidirectional)
        own = hidden_states(model, batch)
        set_bidirectional(model, not bidirectional)  # now the layout must come from the 4-D mask
        assert torch.allclose(own[real], hidden_states(model, batch, layout)[real], atol=1e-5)
    set_bidirectional(model, True)


@torch.no_grad()
def test_many_layers_cutting_eos_cuts_b_from_a(opened, picture, monkeypatch):
    """Two layers, strict layout: B depends on A, and not once EOS is a key for itself only."""
    model, inputs = opened
    batch, changed = (stage2_batch(inputs, picture, seed) for seed in (0, 1))
    is_b = batch["segment_ids"] == B

    def b_states(which):
        return hidden_states(model, which, "eos_bridged_strict")[is_b]

    assert not torch.equal(b_states(batch), b_states(changed))
    whole = LAYOUTS["eos_bridged_strict"]
    cut = lambda q, k, i, j: whole(q, k, i, j) & ((k != EOS) | (q == EOS))  # noqa: E731
    monkeypatch.setitem(LAYOUTS, "eos_bridged_strict", cut)
    assert torch.equal(b_states(batch), b_states(changed))


@torch.no_grad()
def test_padding_rows_do_not_make_nan(opened, picture):
    model, inputs = opened
    for side in ("left", "right"):
        inputs.padding_side = side
        batch = stage2_batch(inputs, picture)
        for layout in LAYOUTS:
            assert torch.isfinite(hidden_states(model, batch, layout)).all(), (side, layout)
    inputs.padding_side = "right"
