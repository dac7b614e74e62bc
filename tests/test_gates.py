"""The gates before contrastive learning: what is counted, when a gate holds, what is committed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cocoa_lib.corruption import IGNORE
from cocoa_lib.evaluate import restore
from cocoa_lib.evaluate.restore import check_gates, count_right
from cocoa_lib.inputs import Inputs
from cocoa_lib.show import restored

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = sorted(ROOT.glob("reports/*/gates.csv"))


@pytest.fixture(scope="module")
def inputs():
    return Inputs.load(ROOT / "data" / "backbone")


def restore_all_but(wrong: str, inputs: Inputs):
    """A `reconstruct` that hides a whole text and restores it, but for the tokens of `wrong`."""

    def reconstruct(model, inputs, row, **how):
        ids, missed = inputs.text_ids(row["target"]), set(inputs.text_ids(wrong))
        guesses = [-1 if token in missed else token for token in ids]
        return {"labels": torch.tensor([[IGNORE, *ids, IGNORE]])}, guesses, {}

    return reconstruct


def count(texts: list[str], wrong: str, inputs, monkeypatch) -> list[list[int]]:
    monkeypatch.setattr(restore, "reconstruct", restore_all_but(wrong, inputs))
    rows = [{"text": "", "image": None, "target": text} for text in texts]
    return count_right(None, inputs, rows, [None] * len(rows)).tolist()


def test_content_words_alone_are_counted(inputs, monkeypatch):
    texts = ["There is a large cap at the top left, some small caps.", "two billed caps", "a, the"]
    assert [inputs.tokenizer.decode([i]) for i in inputs.text_ids(texts[1])][-1] == "s", "a piece"
    found = count(texts, " large", inputs, monkeypatch)
    sizes = [len(inputs.text_ids(text)) for text in texts]
    # large cap top left small cap s; two billed cap s; nothing
    assert found == [[6, 7, sizes[0]], [4, 4, sizes[1]], [0, 0, sizes[2]]]
    assert count(texts, " the, a", inputs, monkeypatch)[0] == [7, 7, sizes[0]]


@pytest.mark.filterwarnings("error")
def test_rows_without_a_content_word_weigh_nothing(inputs, monkeypatch):
    def measure(texts):
        rows = [{"text": "", "image": None, "target": text} for text in texts]
        return restored.measure_door({"after stage 2": None}, inputs, rows)

    monkeypatch.setattr(restore, "reconstruct", restore_all_but(" small", inputs))
    texts = ["a, the", " small cap", " small", " cap"]
    door, without = measure(texts), measure(texts[1:])
    assert door["value"].tolist() == without["value"].tolist() == [50.0] * 3
    assert (door["content"] == 4).all() and (door["hidden"] > 4).all()
    assert ((door["low"] >= 0) & (door["low"] < 50) & (door["high"] > 50)).all()
    assert measure(texts[:1])[["value", "low", "high"]].isna().all(axis=None)


def make_findings(error: float):
    """Two pictures of one cell each, 0 and 2, so that an average patch is 1 off; both hidden."""
    return [
        (
            {"hidden_cells": torch.tensor([True])},
            [],
            {
                "original": torch.full((1, 3), value),
                "hidden cells predicted": torch.full((1, 3), value + error**0.5),
            },
        )
        for value in (0.0, 2.0)
    ]


def make_door(right: float, wrong: float) -> pd.DataFrame:
    rows = [
        ("after stage 1", "right picture", 90.0),
        ("after stage 1", "wrong picture", 10.0),
        ("after stage 2", "right picture", right),
        ("after stage 2", "wrong picture", wrong),
    ]
    return pd.DataFrame(rows, columns=["task", "label", "value"])


@pytest.mark.parametrize(
    ("error", "right", "passed"),
    [
        (0.99, 60.0, ["yes", "yes"]),
        (1.0, 59.9, ["no", "no"]),
        (4.0, 60.0, ["no", "yes"]),
        (0.5, 40.0, ["yes", "no"]),
    ],
)
def test_a_gate_holds_from_its_threshold_on(error, right, passed):
    gates = check_gates(make_findings(error), make_door(right, 50.0), merge_size=1)
    assert gates["passed"].tolist() == passed
    assert gates["value"].tolist() == pytest.approx([error, right - 50])
    assert gates["threshold"].tolist() == pytest.approx([1, 10])
    said = restored.summarise_gates(gates)
    for i, word in enumerate(passed):
        verb = {"yes": "holds", "no": "**fails**"}[word]
        assert f"Gate {i + 1} {verb}: " in said


def test_gates_that_measure_nothing_are_not_applicable():
    text_only = [({"labels": torch.tensor([[1]])}, [1], {})]
    gates = check_gates(text_only, make_door(np.nan, np.nan), merge_size=1)
    assert gates["passed"].tolist() == ["not applicable"] * 2
    assert restored.summarise_gates(gates) == "Gate 1 does not apply. Gate 2 does not apply."


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
@pytest.mark.skipif(not COMMITTED, reason="no gates.csv is committed below reports/")
def test_committed_gates_hold(path):
    table = pd.read_csv(path)
    assert (table.groupby("seed").size() == 2).all() and len(table) > 0
    assert (table["passed"] == "yes").all(), table.to_string(index=False)
    cells = table["gate"].str.contains("cells")
    assert (table["value"] < table["threshold"])[cells].all()
    assert (table["value"] >= table["threshold"])[~cells].all()
