"""Rows for training: read as they are asked for, whole and in order; pictures checked beforehand."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pandas as pd
import pytest

from cocoa_lib.data import corpus
from cocoa_lib.data.tables import write_tables
from cocoa_lib.items import InputError

CORPUS = {
    "image_path": ["a/0.png", "a/1.png", None, "a/3.png"],
    "kind": ["caption", "qa", "caption", None],
    "question": ["", "what?", None, ""],
    "answer": ["zero", "one", "two", "three"],
}
PAIRS = {
    "qry": ["q0", "q1", "q2"],
    "qry_image_path": ["a/0.png", "", None],
    "pos_text": ["p0", "p1", ""],
    "pos_image_path": [None, "a/1.png", "a/2.png"],
}


def write(root: Path, name: str, columns: dict) -> Path:
    write_tables(root, {name: pd.DataFrame(columns)})
    return root / f"{name}.parquet"


def test_rows_of_the_corpus(tmp_path):
    write(tmp_path, "corpus/train", CORPUS)
    rows, images = corpus.captions(tmp_path), tmp_path / "images"
    expected = [
        {"text": "", "image": str(images / "a/0.png"), "target": "zero"},
        {"text": "", "image": None, "target": "two"},
    ]
    assert list(rows) == expected == rows[:] == [rows[0], rows[1]] and rows[-1:] == expected[1:]
    with pytest.raises(IndexError):
        rows[2]
    assert [row["text"] for row in corpus.questions(tmp_path)] == ["what?"]
    assert list(pickle.loads(pickle.dumps(rows))) == expected  # for workers that are spawned
    with pytest.raises(FileNotFoundError, match="heldout.parquet"):
        corpus.captions(tmp_path, "heldout")


def test_without_a_corpus_captions_are_the_pairs_of_a_picture_with_a_text(tmp_path):
    """MMEB-train has no captions of its own, and writes images/ before its paths."""
    pairs = PAIRS | {"qry_image_path": ["images/a/0.png", "", None]}
    write(tmp_path, "train/S/original-0", pairs)
    write(tmp_path, "train/T/original-0", pairs | {"qry": ["r0", "r1", "r2"]})
    image = str(tmp_path / "images" / "a/0.png")
    rows = corpus.captions(tmp_path)
    assert rows[:] == [{"text": q, "image": image, "target": "p0"} for q in ("q0", "r0")]
    for name in "ST":
        write(tmp_path, f"train/{name}/original-0", PAIRS | {"qry_image_path": [""] * 3})
    with pytest.raises(InputError, match="no corpus/, and no training pair of a picture"):
        corpus.captions(tmp_path)


def test_rows_of_pairs(tmp_path):
    write(tmp_path, "train/T/original-0", PAIRS)
    assert corpus.pairs(tmp_path)[0].column_names == ["anchor", "positive"]
    with pytest.raises(ValueError, match="(?s)original-.*not a table of these columns.*neg_text"):
        corpus.pairs(tmp_path, hard_negatives=True)
    negatives = {"neg_text": ["n0", "n1", ""], "neg_image_path": ["", "", "a/1.png"]}
    write(tmp_path, "train/T/original-0", PAIRS | negatives)
    images = tmp_path / "images"
    rows, sizes = corpus.pairs(tmp_path, hard_negatives=True)
    assert sizes == [3] and rows.column_names == ["anchor", "positive", "negative"]
    assert rows[0]["anchor"] == {"text": "q0", "image": str(images / "a/0.png")}
    assert rows[2] == {
        "anchor": {"text": "q2", "image": ""},
        "positive": {"text": "", "image": str(images / "a/2.png")},
        "negative": {"text": "", "image": str(images / "a/1.png")},
    }
    texts = corpus.text_pairs(tmp_path)  # only the first has a text and no picture as its answer
    assert list(texts["T"]) == [{"text": "q0", "image": str(images / "a/0.png"), "target": "p0"}]
    assert len(corpus.pairs(tmp_path, 2)[0]) == 2
    with pytest.raises(FileNotFoundError, match="no training subsets"):
        corpus.pairs(tmp_path / "nowhere")


def test_a_column_without_any_value(tmp_path):
    """pandas writes it without a type."""
    write(tmp_path, "corpus/train", CORPUS | {"question": [None] * 4})
    none = {"pos_text": ["a", "b", "c"], "pos_image_path": [None] * 3}
    write(tmp_path, "train/T/original-0", PAIRS | none)
    assert [row["text"] for row in corpus.captions(tmp_path)] == ["", ""]
    assert [row["target"] for row in corpus.text_pairs(tmp_path)["T"]] == ["a", "b", "c"]


def test_another_file_of_the_same_name_and_time(tmp_path):
    """`datasets` would take it for the one it has in its cache."""
    for word in ("one", "two"):
        path = write(tmp_path, "corpus/train", CORPUS | {"answer": [word] * 4})
        texts = {"pos_text": [word] * 3, "pos_image_path": [""] * 3}
        pairs = write(tmp_path, "train/T/original-0", PAIRS | texts)
        for file in (path, pairs):
            os.utime(file, (1e9, 1e9))
        assert {row["target"] for row in corpus.captions(tmp_path)} == {word}
        assert {row["target"] for row in corpus.text_pairs(tmp_path)["T"]} == {word}
        assert {item["text"] for item in corpus.pairs(tmp_path)[0]["positive"]} == {word}


def test_missing_pictures_are_counted(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path, content in zip(paths, (b"x", b""), strict=False):
        Path(path).write_bytes(content)
    corpus.check_images([paths[0], None, ""])
    with pytest.raises(InputError, match=f"3 of the 4 picture files .*{paths[1]}, {paths[2]}"):
        corpus.check_images(paths)
