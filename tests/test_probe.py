"""What EOS holds: labels come from the scenes, probes find what is there and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cocoa_lib.evaluate import probe
from cocoa_lib.world.build import build, read_scenes
from cocoa_lib.world.scenes import POSITIONS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "world"
    build(folder, seed=0, n_pairs=8, n_queries=4, n_corpus=400)
    return folder


class Fake:
    """An embedder that knows the scene of a picture, or that knows nothing."""

    def __init__(self, data, knows: str | None) -> None:
        self.scenes, self.images, self.knows = read_scenes(data), data / "images", knows
        self.rng = np.random.default_rng(0)

    def encode(self, items, batch_size):
        vectors = self.rng.normal(size=(len(items), 24)).astype(np.float32)
        if self.knows and "image" in items[0]:
            for vector, item in zip(vectors, items, strict=True):
                label = probe.content(self.scenes[item["image"].removeprefix(f"{self.images}/")])[self.knows]
                vector[POSITIONS.index(label)] += 12
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_content_is_of_the_first_object_in_reading_order():
    last = {"kind": "7", "color": "red", "size": "small", "position": "bottom"}
    first = {"kind": "star", "color": "cyan", "size": "large", "position": "top right"}
    assert probe.content([last, first]) == {
        "count": "2", "kind": "star", "color": "cyan", "size": "large", "position": "top right",
    }  # fmt: skip


def test_a_probe_reads_what_is_there_and_only_that(data):
    table = probe.probe(Fake(data, "position"), data).set_index("measure")
    assert table.loc["position", "value"] == 100
    blind = probe.probe(Fake(data, None), data).set_index("measure")
    for name in probe.CONTENT:
        row = blind.loc[name]
        assert row["low"] <= row["majority"] + 15 and row["value"] < row["majority"] + 25, (name, row["value"])
    assert blind.loc["effective_rank", "value"] > table.loc["effective_rank", "value"]
    assert pd.isna(table.loc["alignment", "low"]), "no interval is claimed for the geometry"


def test_labels_need_scenes(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="scenes"):
        probe.probe(Fake(data, None), tmp_path)
