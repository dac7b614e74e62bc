"""The order of rows in a run, fixed before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Planned(torch.utils.data.Dataset):
    """Rows in plan order: item k is row plan[k], and `draw` = k seeds its corruption."""

    def __init__(self, rows, plan: np.ndarray) -> None:
        self.rows, self.plan = rows, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {**self.rows[int(self.plan[k])], "draw": k}


def index_plan(sizes: Sequence[int], n: int, *, seed: int, block: int = 0) -> np.ndarray:
    """Choose the rows of a run once: (n,) indices into the concatenated subsets.

    Each subset is shuffled and gone through again when used up. Subsets take turns in proportion
    to their size, row by row (block = 0), or in blocks of `block` rows of one subset, so that
    negatives are of the same task. No row of a subset comes a second time before all have come
    once. For the same sizes and seed a shorter plan is the beginning of a longer one.
    """
    step, shares, starts = max(1, block), np.divide(sizes, sum(sizes)), np.cumsum([0, *sizes])
    rng = np.random.default_rng([seed, 2])
    turns = rng.choice(len(sizes), size=math.ceil(n / step), p=shares).repeat(step)[:n]
    plan = np.empty(n, dtype=np.int64)
    for subset, size in enumerate(sizes):
        places = np.flatnonzero(turns == subset)
        rng = np.random.default_rng([seed, 2, subset])
        for first in range(0, len(places), size):
            some = places[first : first + size]
            plan[some] = starts[subset] + rng.permutation(size)[: len(some)]
    return plan
