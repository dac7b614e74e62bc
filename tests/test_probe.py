"""What EOS holds: probes find what is there and nothing where there is nothing; geometry by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cocoa_lib.data.tables import CORPUS, write_tables
from cocoa_lib.evaluate.probe import alignment, effective_rank, fit_probe, probe, uniformity

COLOURS, PLACES = ("red", "green", "blue"), ("left", "right")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus whose pictures are names alone, with labels for each but the first of a split."""
    root, labels = tmp_path_factory.mktemp("probe"), []
    for split, n in (("train", 400), ("heldout", 200)):
        rng = np.random.default_rng(n)
        paths = [f"corpus/{split}/{i}.png" for i in range(n)]
        labels += [(p, rng.choice(COLOURS), rng.choice(PLACES)) for p in paths]
        paths.insert(0, f"corpus/{split}/close_up.png")
        rows = [(path, "caption", "", f"caption of {path}") for path in paths]
        write_tables(root, {f"corpus/{split}": pd.DataFrame(rows, columns=CORPUS)})
    table = pd.DataFrame(labels, columns=["image_path", "colour", "place"])
    write_tables(root, {"corpus/labels": table})
    return root


class Fake:
    """An embedder that knows the colour of a picture, or nothing."""

    def __init__(self, data: Path, knows: bool) -> None:
        table = pd.read_parquet(data / "corpus" / "labels.parquet")
        paths = [str(data / "images" / path) for path in table["image_path"]]
        self.colour = dict(zip(paths, table["colour"], strict=True)) if knows else {}
        self.rng = np.random.default_rng(0)

    def encode(self, items, batch_size):
        vectors = self.rng.normal(size=(len(items), 24)).astype(np.float32)
        for vector, item in zip(vectors, items, strict=True):
            if item.get("image") in self.colour:
                vector[COLOURS.index(self.colour[item["image"]])] += 12
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_probe_reads_what_is_there_and_only_that(data, tmp_path):
    table = probe(Fake(data, True), data).set_index("measure")
    assert list(table.columns) == ["value", "low", "high", "majority", "n"]
    assert (table["n"] == 200).all(), "a picture without labels is left out"
    assert table.loc["colour", "value"] == 100 and table.loc["place", "value"] < 65
    blind = probe(Fake(data, False), data).set_index("measure")
    for name in ("colour", "place"):
        row = blind.loc[name]
        assert row["low"] <= row["majority"] + 15 and row["value"] < row["majority"] + 25
    assert blind.loc["effective_rank", "value"] > table.loc["effective_rank", "value"]
    assert pd.isna(table.loc["alignment", "low"]), "no interval is claimed for the geometry"
    with pytest.raises(FileNotFoundError, match="labels.parquet"):
        probe(Fake(data, False), tmp_path)


def test_small_features_count_and_majority_comes_from_training():
    rng = np.random.default_rng(0)
    y = rng.choice(["red", "blue", "green"], p=[0.6, 0.2, 0.2], size=600)
    noise = rng.normal(size=(600, 8)) * 1000
    marked = noise.copy()
    marked[:, 2], marked[:, 5] = (y == "red") * 1e-3, (y == "blue") * 1e-3
    found = fit_probe(marked[:400], y[:400], marked[400:], y[400:])
    assert found["value"] > 98 and found["n"] == 200
    assert found["majority"] == pytest.approx(100 * np.mean(y[400:] == "red"))
    nothing = fit_probe(noise[:400], y[:400], noise[400:], y[400:])
    assert nothing["low"] < nothing["majority"] and nothing["value"] < nothing["majority"] + 5
    x = np.array([[0.0], [0], [1], [0], [1], [1]])
    found = fit_probe(x[:3], [0, 0, 1], x[3:], [0, 1, 1])
    assert found["value"] == 100 and found["majority"] == pytest.approx(100 / 3)


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    assert effective_rank(np.tile(rng.normal(size=7), (50, 1))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(np.eye(6)) == pytest.approx(6)
    assert 15.5 < effective_rank(rng.normal(size=(4000, 16))) <= 16
    # Singular values 3 and 1: shares 3/4 and 1/4.
    by_hand = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert effective_rank(np.diag([3.0, 1.0])) == pytest.approx(by_hand)
    common = 5 + rng.normal(size=(4000, 16))
    assert effective_rank(common) < 8, "a large common direction is a collapse"


def test_alignment_and_uniformity_by_hand():
    x = np.array([[2.0, 0], [0, 3]])
    assert alignment(x, 5 * x) == pytest.approx(0) and alignment(x, -x) == pytest.approx(4)
    assert alignment(x, x[::-1]) == pytest.approx(2)
    assert uniformity(x) == pytest.approx(-4)  # one pair, squared distance 2
    three = np.array([[1.0, 0], [0, 1], [-1, 0]])  # squared distances 2, 2, 4
    assert uniformity(three) == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3))
    assert uniformity(np.ones((1500, 3))) == pytest.approx(0)
