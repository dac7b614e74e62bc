"""Stage 3: InfoNCE written out, GradCache against the full batch, sorted chunks, copies."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cocoa_lib.contrastive import CachedInfoNCE, info_nce, pair_features
from cocoa_lib.embedder import EosEmbedding


def test_info_nce_is_the_softmax_written_out():
    torch.manual_seed(0)
    queries, candidates, positive = torch.randn(4, 8), torch.randn(6, 8), torch.arange(4)
    q, c = F.normalize(queries, dim=-1), F.normalize(candidates, dim=-1)
    by_hand = -((q @ c.T) / 0.02).softmax(-1).diagonal().log().mean()
    loss = info_nce(queries, candidates, positive, temperature=0.02)
    assert torch.allclose(loss, by_hand, rtol=1e-4)
    same = torch.ones(4, 8)
    at_chance = float(info_nce(same, same, positive, temperature=0.02))
    assert math.isclose(at_chance, math.log(4), rel_tol=1e-5)
    half = info_nce(queries.bfloat16(), candidates.bfloat16(), positive, temperature=0.02)
    assert half.dtype == torch.float32


def test_copies_of_the_positive_are_no_negatives():
    q, copies = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    every = torch.ones(2, 2).bool()
    assert info_nce(q, copies, torch.tensor([0, 1]), temperature=0.02, exclude=every) == 0
    assert info_nce(q[:1], copies, torch.tensor([0]), temperature=0.02) > 0.6, "else it costs ln 2"


class Toy(nn.Module):
    """Stands for a SentenceTransformer: features -> embedding, with dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, features):
        return {"sentence_embedding": self.net(features["input_ids"])}


def columns(n=10, n_columns=3, keys=None, ordered=False):
    """Rows of 6 numbers, given in an `order` that is not the batch's where that is asked for."""
    generator = torch.Generator().manual_seed(0)
    made = [{"input_ids": torch.randn(n, 6, generator=generator)} for _ in range(n_columns)]
    for i, column in enumerate(made):
        column["attention_mask"] = torch.ones(n, 6).long()
        if keys is not None:
            column["key"] = keys[i]
        if ordered:
            order = torch.randperm(n, generator=generator)
            column |= {"input_ids": column["input_ids"][order], "order": order}
    return made


@pytest.mark.parametrize("chunk", [1, 3, 5, 10])
@pytest.mark.parametrize("ordered", [False, True])
def test_gradcache_equals_the_full_batch_with_dropout(chunk, ordered):
    """Dropout depends on the chunking, so the full batch takes the very chunks, in one graph."""
    torch.manual_seed(0)
    model, features = Toy().train(), columns(ordered=ordered)
    torch.manual_seed(7)
    loss = CachedInfoNCE(model, temperature=0.1, mini_batch_size=chunk)(features)
    loss.backward()
    cached = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(7)
    whole = []
    for column in features:
        parts = [model({"input_ids": part}) for part in column["input_ids"].split(chunk)]
        rows = torch.cat([part["sentence_embedding"] for part in parts])
        whole.append(rows[column["order"].argsort()] if ordered else rows)
    full = info_nce(whole[0], torch.cat(whole[1:]), torch.arange(10), temperature=0.1)
    full.backward()
    assert torch.allclose(loss, full, rtol=1e-6)
    for ours, theirs in zip(cached, (p.grad for p in model.parameters()), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [4, 10])
def test_keys_reach_the_loss_and_chance_counts_what_is_left(chunk):
    model = Toy().eval()
    keys = [torch.arange(10), torch.zeros(10).long(), torch.arange(100, 110)]
    features = columns(keys=keys)
    objective = CachedInfoNCE(model, temperature=0.1, mini_batch_size=chunk)
    query, *others = [model(column)["sentence_embedding"] for column in features]
    exclude = torch.cat([torch.ones(10, 10).bool(), torch.zeros(10, 10).bool()], dim=1)
    how = {"temperature": 0.1, "exclude": exclude}
    expected = info_nce(query, torch.cat(others), torch.arange(10), **how)
    assert torch.allclose(objective(features), expected)
    assert objective.chance == pytest.approx(math.log(11))  # its own positive, 10 negatives


def test_two_batches_may_wait_for_their_backward_pass():
    torch.manual_seed(1)
    model = Toy().eval()
    objective = CachedInfoNCE(model, temperature=0.1, mini_batch_size=3)
    first, second, expected = columns(), columns(n=7), []
    for features in (first, second):
        objective(features).backward()
        expected.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    (objective(first) + objective(second)).backward()
    for p, a, b in zip(model.parameters(), *expected, strict=True):
        assert torch.allclose(p.grad, a + b, rtol=1e-5, atol=1e-7)


def mixed_items(picture):
    """Three columns of seven items of 2 to 100 tokens: with no picture, one or two, in no order."""
    long = "What color is the square? " * 8
    queries = [
        {"text": "a"},
        {"text": "b", "image": picture(64, 64)},
        {"text": long},
        {"text": "c d"},
        {"text": "e", "image": [picture(32, 48), picture(64, 64, 1)]},
        {"text": "a red circle"},
        {"text": long, "image": picture(64, 64, 2)},
    ]
    positives = [{"text": f"a small blue {i % 5}" * (1 + 9 * (i % 5 == 1))} for i in range(7)]
    negatives = [
        {"text": "", "image": picture(64, 16 + 16 * (i % 3), i)} if i % 2 else {"text": f"x {i}"}
        for i in range(7)
    ]
    return queries, positives, negatives


def outcome(module, embed, features):
    """Loss, gradients by name, and the shapes (rows, tokens) of what the module was given."""
    seen = []
    hook = module.register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0]["input_ids"].shape))
    )
    module.zero_grad()
    loss = embed([dict(column) for column in features])
    loss.backward()
    hook.remove()
    named = module.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    module.zero_grad()
    return loss.detach(), gradients, seen


def full_batch(module, features):
    """The loss without GradCache, of rows in the order given."""
    query, *others = [module(column)["sentence_embedding"] for column in features]
    keys = [column["key"] for column in features]
    exclude = torch.cat([keys[1][:, None] == key[None] for key in keys[1:]], dim=1)
    assert exclude.sum() > 7, "there are copies of a positive"
    positive = torch.arange(7)
    return info_nce(query, torch.cat(others), positive, temperature=0.1, exclude=exclude)


@pytest.fixture(scope="module")
def made(small, picture):
    """(module, chunk -> features) with pooling "eos"."""
    module = EosEmbedding(*small)
    columns = mixed_items(picture)
    return module, lambda chunk: [pair_features(items, small[1], chunk) for items in columns]


@pytest.mark.parametrize("pooling, chunk", [("eos", 1), ("eos", 3), ("mean", 2), ("eos", 6)])
def test_chunks_of_sorted_rows_have_the_loss_and_gradients_of_the_full_batch(made, pooling, chunk):
    module, features = made
    module.pooling = pooling
    objective = CachedInfoNCE(module, temperature=0.1, mini_batch_size=chunk)
    loss, gradients, _ = outcome(module, objective, features(chunk))
    full, expected, _ = outcome(module, partial(full_batch, module), features(7))
    module.pooling = "eos"
    assert torch.allclose(loss, full, rtol=1e-5) and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_sorted_chunks_compute_less_padding_and_are_as_many(made):
    module, features = made
    objective = CachedInfoNCE(module, mini_batch_size=2)
    _, _, given = outcome(module, objective, features(7))
    _, _, chunks = outcome(module, objective, features(2))
    assert [rows for rows, _ in given] == [rows for rows, _ in chunks] == [2, 2, 2, 1] * 3 * 2
    lengths = [column["attention_mask"].sum(1) for column in features(7)]
    by_length = [each.sort(descending=True).values for each in lengths]
    longest = [int(rows[0]) for column in by_length for rows in column.split(2)]
    assert [length for _, length in chunks] == 2 * longest
    real = 2 * sum(int(each.sum()) for each in lengths)
    padding, before = (sum(n * width for n, width in shapes) - real for shapes in (chunks, given))
    assert 0 < padding < before / 4


def test_one_chunk_is_embedded_in_the_order_given_to_the_bit(made):
    module, features = made
    objective = CachedInfoNCE(module, temperature=0.1, mini_batch_size=3)
    outcome(module, objective, features(3))  # what a call sorts, the next one need not
    objective.mini_batch_size = 7
    loss, gradients, seen = outcome(module, objective, features(7))
    full, expected, whole = outcome(module, partial(full_batch, module), features(7))
    assert torch.equal(loss, full) and seen == whole and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], each) for name, each in expected.items())
