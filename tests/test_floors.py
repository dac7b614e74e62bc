"""The floors of the built-in benchmark."""

from __future__ import annotations

import numpy as np
import pytest

from cocoa_lib.run import floors
from cocoa_lib.world import build as files
from cocoa_lib.world.tasks import TASKS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floors") / "world"
    files.build(folder, n_pairs=16, n_queries=4, n_corpus=30)
    return folder


def test_the_table_has_every_floor_and_task(root):
    table = floors.make_floor_table(root, part="dev", n_pairs=16, steps=2).T
    assert list(table.columns) == [*(task.name for task in TASKS), "overall"]
    assert list(table.index) == [
        "chance", "truth", "pixels and words", "random weights", "small CNN, 16 pairs",
    ]  # fmt: skip
    assert (table.loc["truth"] == 100).all()
    assert table.loc["chance", "Kinds"] == pytest.approx(100 / 47, abs=0.1)
    assert ((table >= 0) & (table <= 100)).all(axis=None)


def test_the_cnn_learns(root):
    model = floors.train_small_cnn(root, n_pairs=16, steps=30)
    rows, hits = floors.corpus.pairs(root, 2)[0], []
    for one in (floors.SmallCnn(), model):
        scores = one.encode(rows["anchor"]) @ one.encode(rows["positive"]).T
        hits.append((scores.argmax(1) == np.arange(16)).mean())
    assert hits[1] > hits[0]
