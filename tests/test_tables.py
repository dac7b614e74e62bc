"""MMEB's files: columns and rows are read as they are, bad ones are named, no path leaves."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from mmeb_files import ONE, SMALL, drop, edit, make_rows, write_task

from cocoa_lib.data.tables import (
    EVAL,
    fingerprint,
    list_items,
    load_eval,
    load_train,
    read_finished,
    resolve_below,
    resolve_image,
    row_items,
)
from cocoa_lib.evaluate.tasks import choose_tasks


def test_rows_are_read_as_they_are_under_eval_too_and_from_several_files(tmp_path):
    for task in SMALL[:3]:
        write_task(tmp_path / "data [old]" / "eval", task.name, make_rows(task, 9))
        rows = load_eval(tmp_path / "data [old]", task.name, n_candidates=task.n_candidates)
        assert rows[:] == pd.DataFrame(make_rows(task, 9)).to_dict("list")
        assert rows.column_names == EVAL
    rows = make_rows(ONE, 6)
    write_task(tmp_path, "DocVQA", rows[:2], "test-00000-of-00002.parquet")
    for part in (rows[2:4], rows[4:]):  # the second time the same file name holds other rows
        write_task(tmp_path, "DocVQA", part, "test-00001-of-00002.parquet")
        wanted = [row["qry_text"] for row in (*rows[:2], *part)]
        assert load_eval(tmp_path, "DocVQA")["qry_text"][:] == wanted


def test_a_task_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_task(tmp_path, "GQA", make_rows(ONE, 3))
    with pytest.raises(FileNotFoundError, match="DocVQA.*test-.*folders in .*: GQA"):
        load_eval(tmp_path, "DocVQA")
    assert [task.name for task in choose_tasks(["all"], tmp_path)] == ["GQA"]
    with pytest.raises(ValueError, match="unknown.*GQQ"):
        choose_tasks(["GQQ"], tmp_path)
    with pytest.raises(ValueError, match="no task's folder"):
        choose_tasks(["all"], tmp_path / "nowhere")


BAD_ROWS = {
    "no column": (drop("tgt_img_path"), "no column tgt_img_path; found qry_text"),
    "a number for a text": (
        lambda rows: [{**row, "qry_text": 3} for row in rows],
        "column qry_text must hold strings",
    ),
    "a text for a list": (
        lambda rows: [{**row, "tgt_text": "a"} for row in rows],
        "column tgt_text must hold lists",
    ),
    "empty query": (edit(2, qry_text="  "), "row 2, qry_text/qry_img_path: neither text nor image"),
    "empty candidate": (edit(1, tgt_text=["a", "", "c"]), "row 1, tgt_text: .* neither text nor"),
    "unequal lists": (edit(3, tgt_text=["a", "b"]), "row 3, tgt_text/tgt_img_path: .* 2 and 3"),
    "null list": (edit(0, tgt_text=None, tgt_img_path=None), "row 0, tgt_text: 0 .*expected 3"),
    "too few": (edit(4, tgt_text=["a"], tgt_img_path=[""]), "row 4, tgt_text: 1 .*expected 3"),
    "no rows": (lambda rows: pd.DataFrame(rows)[:0], "empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_name_file_row_and_column(case, tmp_path):
    change, message = BAD_ROWS[case]
    path = write_task(tmp_path, "DocVQA", change(make_rows(ONE, 5)))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
        load_eval(tmp_path, "DocVQA", n_candidates=3)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    path = write_task(tmp_path, "DocVQA", make_rows(ONE, 5))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*not readable as parquet"):
        load_eval(tmp_path, "DocVQA")


def test_training_rows_of_the_original_split(tmp_path):
    row = {"qry": "<|image_1|> what?", "qry_image_path": "a.png", "pos_text": "a cat"}
    row["pos_image_path"] = ""
    first, other = "original-00000-of-00001.parquet", "diverse_instruction-00000-of-00001.parquet"
    write_task(tmp_path / "train", "ChartQA", [row] * 5, first)
    write_task(tmp_path / "train", "ChartQA", [{**row, "qry": "x"}], other)
    rows = load_train(tmp_path, "ChartQA", n=3)
    assert len(rows) == 3 and rows[0] == row
    assert len(load_train(tmp_path / "train", "ChartQA", n=99)) == 5
    with pytest.raises(ValueError, match="no column neg_text"):
        load_train(tmp_path, "ChartQA", negatives=True)
    n = 4200  # more than are checked at a time
    rows = [row] * n + [{**row, "pos_text": None}]
    path = write_task(tmp_path / "train", "GQA", rows, "original-0.parquet")
    with pytest.raises(ValueError, match=re.escape(f"{path}, row {n}, pos_text/pos_image_path")):
        load_train(tmp_path, "GQA")


def test_candidates_are_the_same_by_text_and_path_and_keep_their_order(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    texts, paths = ["one", "two", "one", "one"], ["a.png", "a.png", "b.png", "a.png"]
    row = {"qry_text": "q", "qry_img_path": "b.png", "tgt_text": texts, "tgt_img_path": paths}
    write_task(tmp_path, "WebQA", [row, {**row, "tgt_text": texts[::-1]}])
    found = list_items(load_eval(tmp_path, "WebQA"), np.arange(2), "WebQA", tmp_path)
    assert [(item["text"], item["image"].name) for item in found.items[2:]] == [
        ("one", "a.png"),
        ("two", "a.png"),
        ("one", "b.png"),
        ("two", "b.png"),
    ]
    assert [own.tolist() for own in found.candidates] == [[0, 1, 2], [0, 3]]
    query, candidates = row_items(row, tmp_path)
    assert query == {"text": "q", "image": str(tmp_path / "b.png")} and len(candidates) == 4


def test_missing_pictures_are_counted_and_a_path_that_leaves_names_its_row(tmp_path):
    rows = load_eval(
        write_task(
            tmp_path, "DocVQA", edit(3, tgt_img_path=["x.png", "y.png", ""])(make_rows(ONE, 5))
        ).parent.parent,
        "DocVQA",
    )
    with pytest.raises(
        FileNotFoundError, match=r"2 pictures are not in .*first 'x.png' \(D, row 3"
    ):
        list_items(rows, np.arange(5), "D", tmp_path)
    write_task(tmp_path, "DocVQA", edit(3, qry_img_path="../x.png")(make_rows(ONE, 5)))
    with pytest.raises(ValueError, match="D, row 3, qry_img_path: path '../x.png'"):
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


def test_data_are_known_by_content_and_a_folder_of_other_data_is_refused(tmp_path):
    path = write_task(tmp_path / "train", "T", [{"qry": "one"}], "original-0.parquet")
    first, size = fingerprint(tmp_path), path.stat().st_size
    write_task(tmp_path / "train", "T", [{"qry": "two"}], "original-0.parquet")
    assert path.stat().st_size == size and fingerprint(tmp_path) != first
    wanted = {"generator": "world", "settings": {"seed": 1, "n": 2}}
    with pytest.raises(ValueError, match="unfinished build"):
        read_finished(tmp_path, wanted)
    (tmp_path / "manifest.json").write_text(
        '{"generator": "world", "settings": {"seed": 0, "n": 2}}'
    )
    with pytest.raises(ValueError, match=r"other data \(seed 0, not 1\)"):
        read_finished(tmp_path, wanted)
    assert read_finished(tmp_path / "nowhere", wanted) is None
    with pytest.raises(ValueError, match="content_hash"):
        fingerprint(tmp_path)
