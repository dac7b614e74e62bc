"""Stage 3: InfoNCE on the embedding at EOS, with GradCache and without copies of the positive."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, get_rank, get_world_size
from torch import BoolTensor, LongTensor, Tensor, nn

from .inputs import Batch, Inputs
from .packing import sort_longest_first


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    positive: LongTensor,
    *,
    temperature: float,
    exclude: BoolTensor | None = None,
) -> Tensor:
    """InfoNCE: -log softmax of the positive among all candidates, mean over queries. Scalar,
    float32.

    queries (Q, H), candidates (N, H), both normalised here; positive (Q,) = column of each query's
    own candidate; exclude (Q, N) = candidates that are no negatives. Source: temperature 0.02
    (script).
    """
    queries, candidates = (
        F.normalize(queries.float(), dim=-1),
        F.normalize(candidates.float(), dim=-1),
    )
    scores = queries @ candidates.T / temperature  # (Q, N)
    if exclude is not None:
        own = F.one_hot(positive, len(candidates)).bool()
        scores = scores.masked_fill(exclude & ~own, -torch.inf)
    return F.cross_entropy(scores, positive)


def gather_rows(tensor: Tensor, with_grad: bool = False) -> Tensor:
    """(n, ...) of every process, in rank order; the tensor itself where there is one process."""
    return all_gather(tensor, with_grad=with_grad) if get_world_size() > 1 else tensor


class CachedInfoNCE(CachedLossMixin, nn.Module):
    """InfoNCE over all devices with sentence-transformers' GradCache.

    Columns: query, positive and, optionally, explicit negatives, as `pair_features` makes them.
    Each may carry `key` (B,), one integer per distinct item. A candidate with the key of a query's
    positive, or a positive of the same query in another row, is no negative. (The library's own
    loss leaves duplicates to its batch sampler, which starves on tasks with a handful of labels.)

    On one process a batch of at most `mini_batch_size` rows is embedded once, with its graph; loss
    and gradients are the same. On several, DDP takes one forward pass a step where columns use
    other parameters (texts, no vision tower), so GradCache stays. `chance` is the loss of a
    collapsed model.
    """

    def __init__(
        self, model: nn.Module, *, temperature: float = 0.02, mini_batch_size: int = 8
    ) -> None:
        super().__init__()
        self.model, self.temperature, self.mini_batch_size = model, temperature, mini_batch_size

    def forward(self, sentence_features: Iterable[Batch], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        self.keys = [column.get("key") for column in columns]  # (B,) each
        self.orders = [column.get("order") for column in columns]  # (B,) each
        if len(columns[0]["input_ids"]) <= self.mini_batch_size and get_world_size() == 1:
            embedded = [self.model(dict(column))["sentence_embedding"] for column in columns]
            return self.calculate_loss([[rows] for rows in embedded])
        return self.forward_cached(columns, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of all columns, each a list of chunks (b, H); GradCache calls it."""
        embedded = [torch.cat(chunks) for chunks in reps]  # (B, H) each
        for i, order in enumerate(self.orders):
            if order is not None:  # back into the order of the batch
                embedded[i] = embedded[i][order.argsort()]
        n = len(embedded[0])
        queries, *others = [gather_rows(rows, with_grad=True) for rows in embedded]
        mine = torch.arange(n, device=queries.device) + get_rank() * n  # this process's queries
        exclude = self.find_copies(mine, len(queries))
        candidates = torch.cat(others)  # (N, H), the positives first
        loss = info_nce(
            queries[mine], candidates, mine, temperature=self.temperature, exclude=exclude
        )
        self.chance = chance_loss(len(candidates), mine, exclude)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def find_copies(self, mine: LongTensor, total: int) -> BoolTensor | None:
        """(Q, N): the candidates that equal the query's positive, or are a positive of its twin."""
        if any(key is None for key in self.keys):
            return None
        query, *candidates = [gather_rows(key) for key in self.keys]
        same = candidates[0][mine][:, None] == torch.cat(candidates)[None, :]
        same[:, :total] |= query[mine][:, None] == query[None, :]
        return same


def chance_loss(n_candidates: int, mine: LongTensor, exclude: BoolTensor | None) -> float:
    """The loss when all embeddings are the same: mean log of the candidates that are left."""
    if exclude is None:
        return math.log(n_candidates)
    own = exclude[torch.arange(len(mine), device=mine.device), mine]
    return float((n_candidates - exclude.sum(1) + own).float().log().mean())


def pair_features(items: list[dict[str, Any]], inputs: Inputs, mini_batch_size: int, **_) -> Batch:
    """One column of (anchor, positive, negative?) items -> its features, with a `key` an item.

    A column that GradCache cuts into several chunks has its longest rows first, and their `order`
    (B,): a text of 20 tokens is then not computed at the width of a picture of 600. Chunks stay
    equal in rows, not in tokens: processes that share weights must do the same number of forward
    passes.
    """
    batch = inputs.collate(items)
    if len(items) > mini_batch_size:
        batch, order = sort_longest_first(batch)
        batch["order"] = order
    return batch | {"key": torch.tensor([make_key(item) for item in items])}


def make_key(item: dict[str, Any]) -> int:
    """A 63-bit hash of an item's text and image path: equal items, equal hashes."""
    content = f"{item.get('text') or ''}\0{item.get('image') or ''}"
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1
