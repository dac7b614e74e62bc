"""Stage 3: InfoNCE on the embedding at EOS, with GradCache, copies of the positive left out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, get_rank, get_world_size
from torch import LongTensor, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .inputs import Batch, Inputs
from .packing import _pictures


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    positive: LongTensor,
    *,
    temperature: float,
    exclude: Tensor | None = None,
) -> Tensor:
    """InfoNCE in float32: -log softmax of the positive among all candidates, mean over queries. Scalar.

    queries (Q, H), candidates (N, H), both normalised here; positive (Q,) = column of each query's own candidate;
    exclude (Q, N) bool = candidates that are no negatives (copies of the positive). Source: temperature 0.02 (script).
    """
    scores = (
        F.normalize(queries.float(), dim=-1)
        @ F.normalize(candidates.float(), dim=-1).T
        / temperature
    )
    if exclude is not None:
        own = F.one_hot(positive, len(candidates)).bool()
        scores = scores.masked_fill(exclude & ~own, -torch.inf)
    return F.cross_entropy(scores, positive)


def gathered(tensor: Tensor, with_grad: bool = False) -> Tensor:
    """(n, ...) of every process, concatenated in rank order; the tensor itself where there is one process."""
    return all_gather(tensor, with_grad=with_grad) if get_world_size() > 1 else tensor


class CachedInfoNCE(CachedLossMixin, nn.Module):
    """InfoNCE with sentence-transformers' GradCache, gathered over devices, copies of the positive left out.

    On one process a batch of at most `mini_batch_size` rows is embedded once, with its graph, and nothing is cached. Loss and
    gradients are the same; with two columns to the bit (three are added up in another order). On several processes DDP
    takes only one forward pass a step where columns use other parameters (texts, no vision tower), so GradCache stays.

    Several chunks are cut from each column's rows sorted by length, so that a text of 20 tokens is not computed at the width
    of a picture of 600; the embeddings are put back into the batch's order before anything else sees them. Chunks stay equal
    in rows, not in tokens: processes that share their weights must do the same number of forward passes.

    GradCache embeds each chunk twice. The first, which is the longest, is embedded once: its graph is kept until its own backward
    pass, which comes before any other chunk has a graph, so that there is still one at a time. (Ours; a batch of two chunks is
    embedded one and a half times instead of twice.)

    Columns: query, positive and, optionally, explicit negatives. Each column's features may carry `key` (B,), one
    integer per distinct item: a candidate with the key of a query's positive, or a positive of the same query in
    another row, is no negative. (The library's own loss leaves duplicates to its batch sampler, which starves on
    tasks with a handful of labels.)
    """

    def __init__(
        self, model: nn.Module, *, temperature: float = 0.02, mini_batch_size: int = 8
    ) -> None:
        super().__init__()
        self.model, self.temperature, self.mini_batch_size = model, temperature, mini_batch_size
        self._order: list[LongTensor] | None = (
            None  # rows of each column as they are embedded; None: as they are given
        )

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        sentence_features = list(sentence_features)
        self._keys = [features.get("key") for features in sentence_features]
        self._order = None
        if len(sentence_features[0]["input_ids"]) > self.mini_batch_size:
            self._order = [longest_first(column) for column in sentence_features]
            sentence_features = [
                column | {"order": order}
                for column, order in zip(sentence_features, self._order, strict=True)
            ]
        elif get_world_size() == 1:
            return self.calculate_loss(
                [[self.model(dict(column))["sentence_embedding"]] for column in sentence_features]
            )
        return self.forward_cached(
            [sentence_features[0] | {"first": []}, *sentence_features[1:]], labels
        )

    def embed_minibatch(
        self, sentence_feature: dict[str, Tensor], begin: int, end: int, with_grad: bool, **settings
    ):
        """The library's, of rows `begin` to `end` of the order. Picked here: a sorted column would hold all pixels twice.

        `first` of the column holds the embeddings of its first chunk, with their graph, from the first pass to the second."""
        column = dict(sentence_feature)
        order, first = column.pop("order", None), column.pop("first", None)
        if with_grad and begin == 0 and first:
            return first.pop(), None
        keep = first is not None and begin == 0 and not with_grad
        if order is not None:
            column = take_rows(column, order[begin:end])
            begin, end = 0, end - begin
        # DDP adds up over processes once, after the last chunk
        with (
            self.model.no_sync()
            if keep and isinstance(self.model, DistributedDataParallel)
            else nullcontext()
        ):
            rows, random_state = super().embed_minibatch(
                column, begin, end, with_grad=with_grad or keep, **settings
            )
        if keep:
            first.append(rows)
        return rows, random_state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        embedded = [torch.cat(chunks) for chunks in reps]
        if self._order is not None:
            embedded = [
                rows[order.argsort()] for rows, order in zip(embedded, self._order, strict=True)
            ]
        columns = [gathered(rows, with_grad=True) for rows in embedded]
        local, total = sum(len(chunk) for chunk in reps[0]), len(columns[0])
        mine = torch.arange(local, device=columns[0].device) + get_rank() * local
        exclude = self._duplicates(mine, total)
        loss = info_nce(
            columns[0][mine],
            torch.cat(columns[1:]),
            mine,
            temperature=self.temperature,
            exclude=exclude,
        )
        self.embeddings = columns[0].detach()
        self.chance = _chance(len(columns[0]) * (len(columns) - 1), mine, exclude)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _duplicates(self, mine: LongTensor, total: int) -> Tensor | None:
        """(local queries, all candidates) bool: the candidates that equal the query's positive, or answer its twin."""
        if any(key is None for key in self._keys):
            return None
        query, *candidates = [gathered(key) for key in self._keys]
        same = candidates[0][mine][:, None] == torch.cat(candidates)[None, :]
        same[:, :total] |= query[mine][:, None] == query[None, :]
        return same


def _chance(n_candidates: int, mine: LongTensor, exclude: Tensor | None) -> float:
    """The loss when all embeddings are the same: mean log of the number of candidates, copies of the positive aside."""
    if exclude is None:
        return math.log(n_candidates)
    own = exclude[torch.arange(len(mine), device=mine.device), mine]
    return float((n_candidates - exclude.sum(1) + own).float().log().mean())


def longest_first(batch: Batch) -> LongTensor:
    """(B,): the rows of a padded batch by their number of real tokens; what does not fit into memory then fails at once."""
    return batch["attention_mask"].sum(1).argsort(descending=True, stable=True)


def take_rows(batch: Batch, rows: LongTensor) -> Batch:
    """These rows (n,) of a padded batch (B, L), in this order, with their pictures: (n, L)."""
    pictures = _pictures(batch, rows.tolist())
    return {name: values[rows] for name, values in batch.items() if name not in pictures} | pictures


def pair_features(items: list[dict[str, Any]], inputs: Inputs, **_) -> Batch:
    """One column of (anchor, positive, negative?) items -> its features, and the `key` of each item."""
    return inputs.collate(items) | {"key": torch.tensor([item_key(item) for item in items])}


def item_key(item: dict[str, Any]) -> int:
    """A 63-bit key of an item's text and image path: equal items, equal keys."""
    digest = hashlib.sha256(
        f"{item.get('text') or ''}\0{item.get('image') or ''}".encode()
    ).digest()
    return int.from_bytes(digest[:8], "big") >> 1
