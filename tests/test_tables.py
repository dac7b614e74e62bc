"""MMEB's files: columns and rows are read as they are, bad ones are named, no path leaves."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from mmeb_files import ONE, SMALL, edit, make_rows, write_task

from cocoa_lib.data import corpus
from cocoa_lib.data.pairs import build_pairs
from cocoa_lib.data.tables import (
    EVAL,
    fingerprint,
    list_items,
    load_eval,
    load_train,
    read_finished,
    resolve_below,
    resolve_image,
    write_tables,
)  # fmt: skip
from cocoa_lib.evaluate.tasks import choose_tasks


def test_rows_are_read_as_they_are_and_from_several_files(tmp_path):
    for task in SMALL[:3]:
        write_task(tmp_path / "data [old]", task.name, make_rows(task, 9))
        rows = load_eval(tmp_path / "data [old]", task.name, n_candidates=task.n_candidates)
        assert rows[:] == pd.DataFrame(make_rows(task, 9)).to_dict("list")
        assert rows.column_names == EVAL
    rows = make_rows(ONE, 6)
    write_task(tmp_path, "DocVQA", rows[:2], "test-00000-of-00002.parquet")
    for part in (rows[2:4], rows[4:]):  # the second time the same file name holds other rows
        write_task(tmp_path, "DocVQA", part, "test-00001-of-00002.parquet")
        wanted = [row["qry_text"] for row in (*rows[:2], *part)]
        assert load_eval(tmp_path, "DocVQA")["qry_text"][:] == wanted


def test_a_task_that_is_not_there_is_named(tmp_path):
    write_task(tmp_path, "GQA", make_rows(ONE, 3))
    with pytest.raises(FileNotFoundError, match="DocVQA.*test-.*no such file"):
        load_eval(tmp_path, "DocVQA")
    assert [task.name for task in choose_tasks(["all"], tmp_path)] == ["GQA"]
    for names, root, message in ((["GQQ"], "", "unknown.*GQQ"), (["all"], "none", "no task's")):
        with pytest.raises(ValueError, match=message):
            choose_tasks(names, tmp_path / root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{**row, "tgt_text": "a"} for row in rows], "Couldn't cast array"),
        (lambda rows: pd.DataFrame(rows).drop(columns="tgt_img_path"), "No match for .*tgt_img"),
        (lambda rows: edit(rows, 3, tgt_text=["a", "b"]), "row 3: 2 texts and 3 pictures"),
        (lambda rows: edit(rows, 0, tgt_text=None, tgt_img_path=None), "row 0: 0 .*expected 3"),
        (lambda rows: edit(rows, 4, tgt_text=["a"], tgt_img_path=[""]), "row 4: 1 .*expected 3"),
        (lambda rows: pd.DataFrame(rows)[:0], "not a table"),
        (None, "not a table"),
    ],
)
def test_a_bad_table_names_its_file_and_row(change, message, tmp_path):
    rows = make_rows(ONE, 5)
    path = write_task(tmp_path, "DocVQA", change(rows) if change else rows)
    if change is None:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path.parent))}.*{message}"):
        load_eval(tmp_path, "DocVQA", n_candidates=3)


def test_training_rows_of_the_original_split(tmp_path):
    row = {"qry": "<|image_1|> what?", "qry_image_path": "a.png", "pos_text": "a cat"}
    row["pos_image_path"] = ""
    write_task(tmp_path, "ChartQA", [row] * 5, "original-0.parquet", "train")
    write_task(tmp_path, "ChartQA", [{**row, "qry": "x"}], "diverse_instruction-0.parquet", "train")
    rows = load_train(tmp_path, "ChartQA", n=3)
    assert len(rows) == 3 and rows[0] == row and len(load_train(tmp_path, "ChartQA", n=99)) == 5


def test_candidates_are_the_same_by_text_and_path_and_keep_their_order(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    texts, paths = ["one", "two", "one", "one"], ["a.png", "a.png", "b.png", "a.png"]
    row = {"qry_text": "q", "qry_img_path": "b.png", "tgt_text": texts, "tgt_img_path": paths}
    write_task(tmp_path, "WebQA", [row, {**row, "tgt_text": texts[::-1]}])
    found = list_items(load_eval(tmp_path, "WebQA"), np.arange(2), "WebQA", tmp_path)
    named = [(item["text"], item["image"].name) for item in found.items[2:]]
    assert named == [("one", "a.png"), ("two", "a.png"), ("one", "b.png"), ("two", "b.png")]
    assert [own.tolist() for own in found.candidates] == [[0, 1, 2], [0, 3]]
    assert found.items[0] == {"text": "q", "image": tmp_path / "b.png"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tgt_img_path": ["x.png", "y.png", ""]}, r"2 pictures .*x.png \(D, row 3, tgt"),
        ({"qry_img_path": "../x.png"}, "D, row 3, qry_img_path: path '../x.png'"),
    ],
)
def test_missing_pictures_are_counted_and_a_bad_path_names_its_row(fields, message, tmp_path):
    write_task(tmp_path, "DocVQA", edit(make_rows(ONE, 5), 3, **fields))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        list_items(load_eval(tmp_path, "DocVQA"), np.arange(5), "D", tmp_path)


def test_image_paths_stay_in_the_folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    for path in (tmp_path / "private" / "secret.png", root / "sub" / "a.png"):
        path.write_bytes(b"y")
    (root / "out.png").symlink_to(tmp_path / "private" / "secret.png")
    (root / "folder").symlink_to(tmp_path / "private")
    (root / "in.png").symlink_to(root / "sub" / "a.png")
    assert resolve_below(root, "sub/a.png").is_file() and resolve_below(root, "in.png").is_file()
    assert resolve_image(root, "images/sub/a.png") == root / "sub" / "a.png", "as MMEB-train writes"
    leaving = ["../private/secret.png", "sub/../../x.png", str(tmp_path / "x.png"), "C:/a.png"]
    leaving += ["..\\x.png", "\\\\host\\x.png", "a\0.png", "out.png", "folder/secret.png"]
    for rel in (*leaving, "images/../../private/secret.png"):
        with pytest.raises(ValueError, match="path"):
            resolve_image(root, rel)


@pytest.mark.parametrize("rel", ["../../private.png", "/etc/passwd", "link.png"])
def test_no_reader_of_rows_follows_a_path_that_leaves_the_folder(tmp_path, rel):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to("/etc/passwd")
    captions = {"image_path": [rel], "kind": "caption", "question": "", "answer": "a"}
    pairs = {"qry": "q", "qry_image_path": [rel], "pos_text": "p", "pos_image_path": ""}
    for name, columns in (("corpus/train", captions), ("train/T/original-0", pairs)):
        write_tables(tmp_path, {name: pd.DataFrame(columns)})
    table, out = tmp_path / "images" / "pairs.csv", tmp_path / "out"
    table.write_text(f"image,text\n{rel},b\n", encoding="utf-8")
    for read in (
        lambda: corpus.captions(tmp_path)[:],
        lambda: corpus.pairs(tmp_path),
        lambda: corpus.text_pairs(tmp_path)["T"][0],
        lambda: build_pairs(table, out),
    ):
        with pytest.raises(ValueError, match="path " + re.escape(repr(rel))):
            read()
    assert not out.exists()


def test_data_are_known_by_content_and_a_folder_of_other_data_is_refused(tmp_path):
    path = write_task(tmp_path, "T", [{"qry": "one"}], "original-0.parquet", "train")
    first, size = fingerprint(tmp_path), path.stat().st_size
    write_task(tmp_path, "T", [{"qry": "two"}], "original-0.parquet", "train")
    assert path.stat().st_size == size and fingerprint(tmp_path) != first
    wanted, note = {"generator": "world", "settings": {"seed": 1}}, tmp_path / "manifest.json"
    with pytest.raises(ValueError, match="unfinished build"):
        read_finished(tmp_path, wanted)
    note.write_text('{"generator": "world", "settings": {"seed": 0}}')
    with pytest.raises(ValueError, match=r"other data \(seed 0, not 1\)"):
        read_finished(tmp_path, wanted)
    assert read_finished(tmp_path / "nowhere", wanted) is None
    with pytest.raises(ValueError, match="content_hash"):
        fingerprint(tmp_path)
