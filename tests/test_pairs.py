"""A user's own pictures and texts: reading, splitting by concept, clear errors before any writing."""

from __future__ import annotations

import itertools
import json
import shutil

import pandas as pd
import pytest
from PIL import Image

from cocoa_lib.data import corpus
from cocoa_lib.data.pairs import build_pairs as build
from cocoa_lib.data.pairs import find_concept, group_concepts
from cocoa_lib.data.tables import fingerprint, load_eval, load_train
from cocoa_lib.evaluate.tasks import choose_tasks
from cocoa_lib.items import InputError

COLOURS = "red green blue yellow purple orange cyan white grey black pink brown".split()


@pytest.fixture
def table(tmp_path):
    """A JSONL with 24 rows: 12 colours, each twice as variants of one concept."""
    (tmp_path / "png").mkdir()
    rows = []
    for i, variant in itertools.product(range(12), ("man", "woman")):
        file, name = f"{COLOURS[i]}-{variant}.png", f"{COLOURS[i]} {variant}: large"
        image = Image.new("RGB", (20 + i, 20 + (variant == "man")), COLOURS[i])
        image.save(tmp_path / "png" / file)
        rows.append({"file": f"png/{file}", "name": name, "group": "cw"[i % 2], "more": [1]})
    return rewrite(tmp_path / "pairs.jsonl", rows), rows


def rewrite(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_layout_is_mmebs_and_unseen_concepts_are_unseen(table, tmp_path):
    path, _ = table
    root = tmp_path / "data"
    manifest = build(path, root, n_eval=3)
    assert manifest["used"] == 24 and manifest["rows"] == 24
    tasks = choose_tasks(["all"], root)
    names = [kind + part for part in ("Seen", "Unseen") for kind in ("TextToImage", "ImageToText")]
    names = names[:2] + ["ClassSeen"] + names[2:] + ["ClassUnseen"]
    assert [task.name for task in tasks] == names
    assert choose_tasks(["ClassSeen", "ClassSeen"], root) == (tasks[2],), "its queries count once"
    unseen = {row["tgt_text"][0] for row in load_eval(root, "ImageToTextUnseen")}
    seen = {row["tgt_text"][0] for row in load_eval(root, "ImageToTextSeen")}
    assert len(seen) == len(unseen) == 2, "a fifth of 12 concepts; both have the same chance"
    training = {row["target"] for row in corpus.captions(root)}
    concepts = {find_concept(text) for text in training}
    assert seen <= training and not {find_concept(text) for text in unseen} & concepts
    pairs, sizes = corpus.pairs(root)
    assert sizes == [len(training)] * 3 and set(pairs.column_names) == {"anchor", "positive"}
    for row in load_eval(root, "TextToImageUnseen"):
        assert len(set(row["tgt_img_path"])) == len(row["tgt_img_path"]) == 2


def test_concepts_join_variants_and_equal_pictures():
    assert find_concept("Waving Hand: dark skin tone") == "waving hand"
    assert find_concept("woman runner") == find_concept("man runner") == "runner"
    assert find_concept("man") == "man", "a text of variant words alone keeps its words"
    names = (("cat", "1"), ("dog", "2"), ("hound", "2"), ("cat: red", "3"))
    groups = group_concepts([{"text": text, "hash": key} for text, key in names])
    assert groups[0] == groups[3] and groups[1] == groups[2] and groups[0] != groups[1]


def test_a_second_call_does_nothing_and_other_settings_are_refused(table, tmp_path):
    path, _ = table
    root = tmp_path / "data"
    first = build(path, root)
    stamp = (root / "manifest.json").stat().st_mtime_ns
    assert build(path, root) == first and (root / "manifest.json").stat().st_mtime_ns == stamp
    for options in ({"n_eval": 2}, {"image_root": tmp_path}):
        with pytest.raises(ValueError, match="(?s)other data .*delete the folder"):
            build(path, root, **options)


def test_csv_reads_the_same_and_pictures_may_lie_elsewhere(table, tmp_path):
    path, rows = table
    other = path.parent / "png" / "pairs.csv"
    pd.DataFrame(rows)[["file", "name"]].to_csv(other, index=False)
    with pytest.raises(InputError, match=r"name the folder of the pictures \(image_root\)"):
        build(other, tmp_path / "data")
    assert build(other, tmp_path / "data", image_root=path.parent)["used"] == 24


def test_bad_rows_stop_before_anything_is_written_and_are_all_named(table, tmp_path):
    path, rows = table
    rows[0]["file"] = rows[2]["file"] = "none.png"
    rows[5]["name"], rows[8]["name"] = "  ", ["a", "b"]
    (path.parent / rows[7]["file"]).write_bytes(b"not a picture")
    rewrite(path, rows)
    said = ["none.png: no such image file", "row 6: 'name' must hold one text, found '  '"]
    said += ["not a readable image", "row 9: 'name' must hold one text, found ['a', 'b']"]
    with pytest.raises(InputError, match="5 of 24 rows") as error:
        build(path, tmp_path / "data")
    assert all(part in str(error.value) for part in said) and not (tmp_path / "data").exists()
    manifest = build(path, tmp_path / "data", on_bad_row="skip")
    assert (manifest["used"], manifest["skipped"]) == (19, 5)
    assert len((tmp_path / "data" / "skipped.txt").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"file": "a.png"}\nnonsense\n', "line 2: not a JSON object"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b'{"a": 1}', "cannot tell image and text columns among a"),
        (b'{"file": "a.png", "name": "a"}', "1 of 1 rows cannot be used"),
        (b"", "no rows"),
        (b"\xff\xfe\xfa", "not a table in UTF-8"),
        (None, "no such file; expected a .jsonl or .csv"),
    ],
)
def test_a_table_that_is_none_is_named(content, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        build(path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_wrong_settings_say_what_is_known(table, tmp_path):
    path, rows = table
    for options, message in (
        ({"text_column": "title"}, "no column 'title'; columns: file, name, group, more"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be 'stop' or 'skip'"),
    ):
        with pytest.raises(InputError, match=message):
            build(path, tmp_path / "data", **options)
    with pytest.raises(InputError, match="4 usable rows"):
        build(rewrite(path, rows[:4]), tmp_path / "data")


def test_a_folder_of_named_folders(tmp_path, picture):
    for i, name in enumerate(("Fruit/Red-Apple", "Fruit/Pear", "Drink/Oat_Milk", "Drink/Tea")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for k in range(4):
            picture(seed=10 * i + k).save(tmp_path / "in" / name / f"{k}.jpg")
    assert build(tmp_path / "in", tmp_path / "data")["used"] == 16
    texts = {row["target"] for row in corpus.captions(tmp_path / "data")}
    assert texts < {"Red Apple", "Pear", "Oat Milk", "Tea"} and len(texts) == 2
    for task in choose_tasks(["all"], tmp_path / "data"):
        assert task.n_candidates == 2, "one candidate would always be right"
    shutil.rmtree(tmp_path / "in" / "Drink" / "Tea")
    with pytest.raises(InputError, match="3 concepts .*at least 2 are held out and 2 trained on"):
        build(tmp_path / "in", tmp_path / "other")


def test_a_class_may_be_0_come_later_and_be_the_only_one(table, tmp_path):
    path, rows = table
    for i, row in enumerate(rows):
        row["group"] = [0, 1, 2, " "][i // 2 % 4]  # both variants of a concept
    del rows[0]["group"]
    build(rewrite(path, [rows[0] | {"name": 0}, *rows[1:]]), tmp_path / "data", n_eval=6)
    parts = [load_eval(tmp_path / "data", f"Class{part}") for part in ("Seen", "Unseen")]
    assert {text for rows in parts for row in rows for text in row["tgt_text"]} == {"0", "1", "2"}
    trained = load_train(tmp_path / "data", "Class")
    assert set(trained["pos_text"]) == {"0", "1", "2"}
    build(rewrite(path, [row | {"group": "one"} for row in rows]), tmp_path / "one")
    assert corpus.subsets(tmp_path / "one") == ["ImageToText", "TextToImage"]
    assert len(choose_tasks(["all"], tmp_path / "one")) == 4


def test_other_settings_are_other_data(table, tmp_path):
    settings = ({}, {"n_eval": 2}, {"max_side": 16}, {"class_column": "file"})
    for i, how in enumerate(settings):
        build(table[0], tmp_path / str(i), **how)
    assert len({fingerprint(tmp_path / str(i)) for i in range(len(settings))}) == len(settings)


def test_the_real_data(shared_data, tmp_path):
    """Photographs in folders, and the first 200 emoji: transparent, names with variants."""
    manifest = build(shared_data / "grocery" / "val", tmp_path / "grocery", max_side=64)
    assert (manifest["used"], manifest["skipped"]) == (296, 0)
    assert {task[0] for task in manifest["tasks"]} >= {"TextToImageUnseen", "ClassSeen"}
    lines = (shared_data / "emoji" / "emoji_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines[:200]), encoding="utf-8")
    root = tmp_path / "emoji"
    manifest = build(path, root, image_root=shared_data / "emoji" / "png" / "72")
    assert manifest["used"] == 200 and manifest["skipped"] == 0
    texts = load_eval(root, "ClassSeen")[0]["tgt_text"]
    assert set(texts) <= {"Smileys & Emotion", "People & Body"}
