"""Rows for training: read as they are asked for, whole and in order; pictures checked beforehand."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image, ImageFile

from cocoa_lib import items
from cocoa_lib.data import corpus
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
    path = root / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path, index=False)
    return path


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
    assert len(rows) == 2 and rows[-1]["text"] == "r0"
    write(tmp_path, "train/S/original-0", PAIRS | {"qry_image_path": [""] * 3})
    (tmp_path / "train/T/original-0.parquet").unlink()
    (tmp_path / "train/T").rmdir()
    with pytest.raises(InputError, match="no corpus/, and no training pair of a picture"):
        corpus.captions(tmp_path)


def test_rows_of_pairs(tmp_path):
    write(tmp_path, "train/T/original-0", PAIRS)
    assert corpus.pairs(tmp_path)[0].column_names == ["anchor", "positive"]
    with pytest.raises(ValueError, match="original-0.parquet: no column neg_text"):
        corpus.pairs(tmp_path, hard_negatives=True)
    negatives = {"neg_text": ["n0", "n1", ""], "neg_image_path": ["", "", "a/1.png"]}
    write(tmp_path, "train/T/original-0", PAIRS | negatives | {"neg_text": ["n0", "", ""]})
    with pytest.raises(ValueError, match="row 1, neg_text/neg_image_path: neither text nor"):
        corpus.pairs(tmp_path, hard_negatives=True)
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


@pytest.mark.parametrize("rel", ["../../private.png", "/etc/passwd", "link.png"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, rel):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to("/etc/passwd")
    write(tmp_path, "corpus/train", CORPUS | {"image_path": [rel] * 4})
    write(tmp_path, "train/T/original-0", PAIRS | {"qry_image_path": [rel] * 3})
    for read in (
        lambda: corpus.captions(tmp_path)[:],
        lambda: corpus.pairs(tmp_path),
        lambda: corpus.text_pairs(tmp_path)["T"][0],
    ):
        with pytest.raises(ValueError, match=re.escape(repr(rel))):
            read()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_training_would_stop_at_are_named_before_it(tmp_path, monkeypatch):
    names = ("bomb.png", "fine.png", "floats.tiff", "huge.png", "words.png")
    paths = [str(tmp_path / name) for name in names]
    Image.new("1", (10_000, 10_000)).save(paths[0], compress_level=1)
    Image.new("RGB", (64, 64)).save(paths[1])
    Image.new("F", (8, 8)).save(paths[2])
    Image.new("1", (20_000, 10_000)).save(paths[3], compress_level=1)  # PIL refuses to open it
    Path(paths[4]).write_text("no picture")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    corpus.check_images([paths[1], None, ""])
    with pytest.raises(InputError) as failure:
        corpus.check_images(paths)
    first, *lines = str(failure.value).splitlines()
    assert first.startswith("4 of the 5 picture files") and "leave their rows out" in first
    assert lines[0] == (
        f"  {paths[0]}: 10000 x 10000 pixels is over the limit of 64,000,000; shrink it"
    )
    assert lines[1].startswith(f"  {paths[2]}: floating-point") and len(lines) == 3
    monkeypatch.undo()
    for path in (paths[0], *paths[2:]):
        with pytest.raises(InputError):
            items.load_image(path)  # what training would have said, at its step


def test_missing_pictures_are_counted_and_good_ones_are_read_once(tmp_path, monkeypatch):
    images = tmp_path / "images"
    paths = [str(images / f"{i}.png") for i in range(4)]
    with pytest.raises(InputError, match="no folder images/, but rows name 4 pictures"):
        corpus.check_images(paths, tmp_path)
    images.mkdir()
    for path in paths[:2]:
        Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(InputError, match=f"2 of the 4 picture files .*{paths[2]}, {paths[3]}"):
        corpus.check_images(paths, tmp_path)
    asked: list[str] = []
    read = items.image_size
    monkeypatch.setattr(corpus, "image_size", lambda path: asked.append(path) or read(path))
    for _ in range(2):
        corpus.check_images(paths[:2], tmp_path)
    assert asked == paths[:2]
    Path(paths[0]).write_text("no picture")  # another size and time
    with pytest.raises(InputError, match="not a readable image"):
        corpus.check_images(paths[:2], tmp_path)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": "", "image": ""}, "neither text nor picture"),
        ({"text": "<|image_1|>", "image": "", "target": "<|image_1|>"}, "neither|no text"),
        ({"text": "q", "image": "", "target": ""}, "no text to restore"),
        ({"text": "<|image_1|><|image_2|>", "image": "a.png"}, "marks 2 image"),
    ],
)
def test_items_that_no_step_could_read_are_named(item, message, tmp_path):
    with pytest.raises(InputError, match=message):
        corpus.check_items([item], tmp_path)
