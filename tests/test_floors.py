"""The floors of the built-in benchmark."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

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


def test_the_cnn_has_four_hundred_thousand_weights_and_tells_pictures_from_words(tmp_path):
    model = floors.SmallCnn()
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(4e5, rel=0.1)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    items = [{"text": "a snake"}, {"text": "a snake", "image": path}, {"text": "", "image": path}]
    vectors = model.encode(items)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_the_cnn_learns(root):
    model = floors.train_small_cnn(root, n_pairs=16, steps=30)
    rows, hits = floors.corpus.pairs(root, 2)[0], []
    for one in (floors.SmallCnn(), model):
        scores = one.encode(rows["anchor"]) @ one.encode(rows["positive"]).T
        hits.append((scores.argmax(1) == np.arange(16)).mean())
    assert hits[1] > hits[0]
