"""Rows for training: read as they are asked for, whole and in order, in little memory however many there are."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
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
    assert len(rows) == 2 and list(rows) == expected == rows[:] == [rows[0], rows[1]] and rows[-1:] == expected[1:]
    with pytest.raises(IndexError):
        rows[2]
    assert [row["text"] for row in corpus.questions(tmp_path)] == ["what?"]
    assert list(pickle.loads(pickle.dumps(rows))) == expected  # for workers that are spawned


def test_rows_of_pairs(tmp_path):
    write(tmp_path, "train/T/original-0", PAIRS)
    assert corpus.pairs(tmp_path)[0].column_names == ["anchor", "positive"]
    with pytest.raises(ValueError, match="original-0.parquet: no column neg_text"):
        corpus.pairs(tmp_path, hard_negatives=True)
    write(tmp_path, "train/T/original-0", PAIRS | {"neg_text": ["n0", "", "n2"], "neg_image_path": [""] * 3})
    assert corpus.pairs(tmp_path)[0].column_names == ["anchor", "positive"]
    with pytest.raises(ValueError, match="original-0.parquet, row 1, column neg_text/neg_image_path: neither text nor"):
        corpus.pairs(tmp_path, hard_negatives=True)
    write(tmp_path, "train/T/original-0", PAIRS | {"neg_text": ["n0", "n1", ""], "neg_image_path": ["", "", "a/1.png"]})
    images = tmp_path / "images"
    rows, sizes = corpus.pairs(tmp_path, hard_negatives=True)
    assert sizes == [3] and rows.column_names == ["anchor", "positive", "negative"]
    assert rows[:]["anchor"] == [
        {"text": "q0", "image": str(images / "a/0.png")}, {"text": "q1", "image": ""}, {"text": "q2", "image": ""},
    ]  # fmt: skip
    assert rows[2] == {
        "anchor": {"text": "q2", "image": ""},
        "positive": {"text": "", "image": str(images / "a/2.png")},
        "negative": {"text": "", "image": str(images / "a/1.png")},
    }
    texts = corpus.text_pairs(tmp_path)  # only the first has a text and no picture as its answer
    assert list(texts["T"]) == [{"text": "q0", "image": str(images / "a/0.png"), "target": "p0"}]
    assert list(pickle.loads(pickle.dumps(texts))["T"]) == list(texts["T"])
    assert len(corpus.pairs(tmp_path, 2)[0]) == 2


def test_a_column_without_any_value(tmp_path):
    """pandas writes it without a type."""
    write(tmp_path, "corpus/train", CORPUS | {"question": [None] * 4})
    write(tmp_path, "train/T/original-0", PAIRS | {"pos_text": ["a", "b", "c"], "pos_image_path": [None] * 3})
    assert [row["text"] for row in corpus.captions(tmp_path)] == ["", ""]
    assert [row["target"] for row in corpus.text_pairs(tmp_path)["T"]] == ["a", "b", "c"]


def test_another_file_of_the_same_name_and_time(tmp_path):
    """`datasets` would take it for the one it has in its cache."""
    for word in ("one", "two"):
        path = write(tmp_path, "corpus/train", CORPUS | {"answer": [word] * 4})
        pairs = write(tmp_path, "train/T/original-0", PAIRS | {"pos_text": [word] * 3, "pos_image_path": [""] * 3})
        for file in (path, pairs):
            os.utime(file, (1e9, 1e9))
        assert {row["target"] for row in corpus.captions(tmp_path)} == {word}
        assert {row["target"] for row in corpus.text_pairs(tmp_path)["T"]} == {word}
        assert {item["text"] for item in corpus.pairs(tmp_path)[0]["positive"]} == {word}


def test_the_data_of_a_run_are_known_by_content(tmp_path):
    """Of a folder without a manifest: names and sizes alone would take a mended word for the same data."""
    file = write(tmp_path, "corpus/train", {"question": ["one"]})
    first = corpus.fingerprint(tmp_path)
    size = file.stat().st_size
    write(tmp_path, "corpus/train", {"question": ["two"]})
    assert file.stat().st_size == size and corpus.fingerprint(tmp_path) != first
    write(tmp_path, "corpus/train", {"question": ["one"]})
    assert corpus.fingerprint(tmp_path) == first


def test_a_path_that_leaves_is_named_with_its_row(tmp_path):
    path = write(tmp_path, "corpus/train", CORPUS | {"image_path": ["a/0.png", "a/1.png", None, "../3.png"]})
    with pytest.raises(InputError, match=rf"{path.name}, row 3, column image_path: .*'\.\./3\.png'"):
        corpus.captions(tmp_path)
    write(tmp_path, "train/T/original-0", PAIRS | {"pos_image_path": [None, "/etc/passwd", ""], "pos_text": ["a"] * 3})
    for read in (corpus.pairs, corpus.text_pairs):
        with pytest.raises(InputError, match=r"T, row 1, column pos_image_path: .*'/etc/passwd'"):
            read(tmp_path)


def test_a_row_beyond_the_first_block_keeps_its_number(tmp_path):
    n = 5000  # `mmeb.blocks` holds 4096
    write(
        tmp_path,
        "corpus/train",
        {"image_path": [""] * (n - 1) + ["../a.png"], "kind": "qa", "question": "", "answer": ""},
    )
    with pytest.raises(InputError, match="row 4999, column image_path"):
        corpus.questions(tmp_path)
    texts = ["q"] * 4500 + [""] + ["q"] * 499
    write(tmp_path, "train/T/original-0", {"qry": texts, "qry_image_path": "", "pos_text": "p", "pos_image_path": ""})
    with pytest.raises(ValueError, match="row 4500, column qry/qry_image_path: neither text nor image"):
        corpus.pairs(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
def test_many_rows_need_little_memory(tmp_path):
    """60 MB of text a column, of which each reader may hold 20 at most; pages of a mapped file do not count as held."""
    n, text = 40_000, "word " * 300
    texts = [f"{i} {text}" for i in range(n)]
    write(tmp_path, "corpus/train", {"image_path": "", "kind": "caption", "question": "", "answer": texts})
    write(tmp_path, "train/T/original-0", {"qry": texts, "qry_image_path": "", "pos_text": texts, "pos_image_path": ""})
    code = """if True:
        import sys
        from pathlib import Path
        from cocoa_lib import corpus
        def held():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
        for name in ("captions", "text_pairs", "pairs"):
            before = held()
            rows = getattr(corpus, name)(Path(sys.argv[1]))
            print(name, held() - before)"""
    for _ in range(2):  # the first time `datasets` makes the files that are mapped
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    grown = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
    assert set(grown) == {"captions", "text_pairs", "pairs"} and max(grown.values()) < 20, grown


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_training_would_stop_at_are_named_before_it(tmp_path, monkeypatch):
    paths = [str(tmp_path / name) for name in ("bomb.png", "fine.png", "floats.tiff", "huge.png", "words.png")]
    Image.new("1", (10_000, 10_000)).save(paths[0], compress_level=1)
    Image.new("RGB", (64, 64)).save(paths[1])
    Image.new("F", (8, 8)).save(paths[2])
    Image.new("1", (20_000, 10_000)).save(paths[3], compress_level=1)  # PIL itself refuses to open it
    Path(paths[4]).write_text("no picture")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a picture was decoded"))
    corpus.check_images([paths[1], None, ""])
    with pytest.raises(InputError) as failure:
        corpus.check_images(paths)
    first, *lines = str(failure.value).splitlines()
    assert first.startswith("4 of the 5 picture files") and "shrink them, or leave their rows out" in first
    assert len(lines) == 3
    assert lines[0] == f"  {paths[0]}: 10000 x 10000 pixels is over the limit of 64,000,000; shrink it"
    assert lines[1].startswith(f"  {paths[2]}: floating-point") and lines[2].startswith(f"  {paths[3]}: not a readable")
    monkeypatch.undo()
    for path in (paths[0], *paths[2:]):
        with pytest.raises(InputError):
            items.load_image(path)  # what training would have said, at its step
