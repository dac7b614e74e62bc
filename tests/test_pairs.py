"""A user's own pictures and texts: reading, splitting by concept, clear errors before anything is written."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image

from cocoa_lib.data import corpus
from cocoa_lib.data.pairs import build_pairs, check_rows, concept, find_image_root, group_concepts
from cocoa_lib.data.tables import load_eval
from cocoa_lib.evaluate.tasks import choose_tasks
from cocoa_lib.items import InputError
from cocoa_lib.run.profiles import NOTEBOOKS, run_notebook
from cocoa_lib.run.profiles import path as profiles_path

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "white", "grey", "black", "pink", "brown"]


@pytest.fixture
def table(tmp_path):
    """A JSONL with 24 rows: 12 colours, each twice as variants of one concept."""
    (tmp_path / "png").mkdir()
    rows = []
    for i, colour in enumerate(COLOURS):
        for variant in ("man", "woman"):
            name = f"{colour}-{variant}.png"
            Image.new("RGB", (20 + i, 20), colour).resize((20 + i, 20 + (variant == "man"))).save(
                tmp_path / "png" / name
            )
            rows.append(
                {"file": name, "name": f"{colour} {variant}: large", "group": "warm" if i % 2 else "cold", "more": [1]}
            )
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path, rows


def rewrite(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def test_lists_are_refused_a_number_is_a_text_and_a_class_may_come_later(table, tmp_path):
    path, rows = table
    rewrite(path, [rows[0] | {"name": ["a", "b"]}, *rows[1:]])
    with pytest.raises(InputError, match="row 1: 'name' holds a list, not a text; write a row for each entry"):
        build_pairs(path, tmp_path / "data", progress=False)
    rows = [rows[0] | {"name": 0}, *rows[1:]]
    del rows[0]["group"]
    rewrite(path, rows)
    made = build_pairs(path, tmp_path / "data", n_eval=3, progress=False)
    assert made["used"] == 24 and made["columns"][2] == "group"


def test_concepts_join_variants_and_equal_pictures():
    assert concept("Waving Hand: dark skin tone") == "waving hand"
    assert concept("woman runner") == concept("man runner") == "runner"
    assert concept("man") == "man", "a text of variant words alone keeps its words"
    rows = [{"_text": t, "_hash": h} for t, h in (("cat", "1"), ("dog", "2"), ("hound", "2"), ("cat: red", "3"))]
    groups = group_concepts(rows)
    assert groups[0] == groups[3] and groups[1] == groups[2] and groups[0] != groups[1]


def test_layout_is_mmebs_and_unseen_concepts_are_unseen(table, tmp_path):
    path, rows = table
    root = tmp_path / "data"
    manifest = build_pairs(path, root, n_eval=3, progress=False)
    assert manifest["used"] == 24 and manifest["image_root"] == "png", "the image folder is found below the table"
    tasks = choose_tasks(["all"], str(root))
    assert choose_tasks(["ClassSeen", "ClassSeen"], str(root)) == (tasks[2],), "its queries count once"
    assert [task.name for task in tasks] == [
        "TextToImageSeen", "ImageToTextSeen", "ClassSeen", "TextToImageUnseen", "ImageToTextUnseen", "ClassUnseen",
    ]  # fmt: skip
    unseen = {row["tgt_text"][0] for row in load_eval(str(root), "ImageToTextUnseen")}
    seen = {row["tgt_text"][0] for row in load_eval(str(root), "ImageToTextSeen")}
    assert len(seen) == len(unseen) == 2, "a fifth of 12 concepts; both have the same chance"
    training = {row["target"] for row in corpus.captions(root)}
    assert seen <= training and not {concept(t) for t in unseen} & {concept(t) for t in training}
    pairs, sizes = corpus.pairs(root)
    assert sizes == [len(training)] * 3 and set(pairs.column_names) == {"anchor", "positive"}
    for row in load_eval(str(root), "TextToImageUnseen"):
        assert len(set(row["tgt_img_path"])) == len(row["tgt_img_path"]) == 2


def test_a_second_call_does_nothing_and_other_settings_are_refused(table, tmp_path):
    path, _ = table
    root = tmp_path / "data"
    first = build_pairs(path, root, progress=False)
    stamp = (root / "manifest.json").stat().st_mtime_ns
    assert build_pairs(path, root, progress=False) == first and (root / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"other data \(seed 0, not 1\); delete the folder"):
        build_pairs(path, root, seed=1, progress=False)
    (root / "manifest.json").unlink()
    with pytest.raises(ValueError, match="unfinished build"):
        build_pairs(path, root, progress=False)


def test_csv_reads_the_same(table, tmp_path):
    path, rows = table
    other = path.with_suffix(".csv")
    with other.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "name"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert build_pairs(other, tmp_path / "data", progress=False)["used"] == 24


def test_bad_rows_stop_before_anything_is_written_and_are_all_named(table, tmp_path):
    path, rows = table
    rows[2]["file"] = "none.png"
    rows[5]["name"] = "  "
    (path.parent / "png" / rows[7]["file"]).write_bytes(b"not a picture")
    rewrite(path, rows)
    root = tmp_path / "data"
    with pytest.raises(InputError) as error:
        build_pairs(path, root, progress=False)
    message = str(error.value)
    assert "3 of 24 rows" in message and not root.exists()
    for part in ("row 3", "none.png: no such image file", "row 6: empty 'name'", "row 8", "not a readable image"):
        assert part in message
    manifest = build_pairs(path, root, on_bad_row="skip", progress=False)
    assert (manifest["used"], manifest["skipped"]) == (21, 3)
    assert len((root / "skipped.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": "title"}, r"no column 'title' for the text; columns: file, name, group, more"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be 'stop' or 'skip'"),
    ],
)
def test_wrong_settings_say_what_is_known(table, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        build_pairs(table[0], tmp_path / "data", progress=False, **change)


def test_a_folder_of_named_folders(tmp_path, picture):
    for kind, name in (("Fruit", "Red-Apple"), ("Fruit", "Pear"), ("Drink", "Oat_Milk"), ("Drink", "Tea")):
        (tmp_path / "in" / kind / name).mkdir(parents=True)
        for i in range(4):
            picture(seed=len(name) * 10 + i).save(tmp_path / "in" / kind / name / f"{i}.jpg")
    manifest = build_pairs(tmp_path / "in", tmp_path / "data", progress=False)
    assert manifest["used"] == 16
    texts = set(pd.read_parquet(tmp_path / "data" / "corpus" / "train.parquet")["answer"])
    assert texts < {"Red Apple", "Pear", "Oat Milk", "Tea"} and len(texts) == 2
    for task in choose_tasks(["all"], str(tmp_path / "data")):
        assert task.n_candidates == 2, "one candidate would always be right"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in named folders"):
        build_pairs(tmp_path / "empty", tmp_path / "other", progress=False)


def test_too_few_concepts_are_said_before_anything_is_written(tmp_path, picture):
    for name in ("Apple", "Pear", "Tea"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(9):
            picture(seed=len(name) * 10 + i).save(tmp_path / "in" / name / f"{i}.jpg")
    with pytest.raises(InputError, match="3 concepts .*at least 2 are held out and 2 trained on"):
        build_pairs(tmp_path / "in", tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())


def test_a_class_may_be_0_and_blanks_are_none(table, tmp_path):
    path, rows = table
    for i, row in enumerate(rows):
        row["group"] = [0, 1, 2, " "][i // 2 % 4]  # both variants of a concept
    rewrite(path, rows)
    build_pairs(path, tmp_path / "data", n_eval=6, progress=False)
    shown = [row for part in ("Seen", "Unseen") for row in load_eval(str(tmp_path / "data"), f"Class{part}")]
    assert {text for row in shown for text in row["tgt_text"]} == {"0", "1", "2"}
    assert {row["tgt_text"][0] for row in shown} == {"0", "1", "2"}
    trained = pd.read_parquet(next((tmp_path / "data" / "train" / "Class").glob("*.parquet")))
    assert set(trained["pos_text"]) == {"0", "1", "2"}


def test_a_class_that_few_rows_have(table, tmp_path):
    path, rows = table
    for i, row in enumerate(rows):
        row["group"] = {0: "warm", 1: "cold"}.get(i, "")
    rewrite(path, rows)
    build_pairs(path, tmp_path / "data", n_eval=2, progress=False)
    assert len(choose_tasks(["all"], str(tmp_path / "data"))) < 6, "a part without such a row has no such task"


def test_the_folder_of_pictures_is_found_by_whole_names(table, tmp_path):
    path, rows = table
    (path.parent / "png" / "1red-man.png").write_bytes((path.parent / "png" / "red-man.png").read_bytes())
    assert rows[0]["file"] == "red-man.png" and find_image_root(path, "red-man.png") == path.parent / "png"
    assert find_image_root(path, "./red-man.png") == path.parent / "png"


def test_another_folder_of_pictures_is_another_setting(table, tmp_path):
    path, _ = table
    shutil.copytree(path.parent / "png", tmp_path / "other")
    build_pairs(path, tmp_path / "data", image_root=path.parent / "png", progress=False)
    for other in (tmp_path / "other", None):
        with pytest.raises(ValueError, match=rf"other data \(image_root .*png, not {other}\)"):
            build_pairs(path, tmp_path / "data", image_root=other, progress=False)


def test_the_notebook_takes_a_relative_image_root_from_the_projects_root(monkeypatch):
    """As `make reproduce IMAGE_ROOT=my/pictures` hands it over; the kernel runs in notebooks/."""
    cells = json.loads((NOTEBOOKS / "00_data_and_backbone.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(cell["source"]) for cell in cells if "build_pairs" in "".join(cell["source"])]
    monkeypatch.chdir(NOTEBOOKS)
    names = {
        "pairs": {"path": "my/a.csv", "image_root": "my/pictures", "text_column": "t"},
        "data": "d",
        "path": profiles_path,
    }
    names["user_pairs"] = SimpleNamespace(build_pairs=lambda **given: given)
    exec("\n".join(line for line in source.splitlines()[:2]), names)  # what it hands over, not what it shows of it
    made = names["made"]
    assert made == {"root": "d", "path": Path("../my/a.csv"), "image_root": Path("../my/pictures"), "text_column": "t"}


def test_pictures_are_not_all_held_at_once(table):
    path, rows = table
    good, bad = check_rows(rows, "file", "name", path.parent / "png", False)
    assert not bad and not any(isinstance(value, Image.Image) for row in good for value in row.values())


def test_the_notebooks_run_on_few_pairs_of_ones_own(table, tmp_path):
    """No scenes to probe, meta-tasks without tasks, fewer queries than the pictures of the built-in benchmark show."""
    path, _ = table
    build_pairs(path, tmp_path / "data", progress=False)
    folders = {name: str(tmp_path / "run" / name) for name in ("stage1", "stage2", "stage3")}
    common = {"data": str(tmp_path / "data"), "figures_folder": str(tmp_path / "figures")}
    results = tmp_path / "run" / "results"
    outs = {f"{stage}_out": folder for stage, folder in folders.items()}
    for name, values in (
        (
            "02_reconstruction_pretraining",
            common | {k: v for k, v in outs.items() if k != "stage3_out"} | {"n_probe": 4},
        ),
        ("03_contrastive_training", common | outs),
        ("04_mmeb_evaluation", common | {"model": folders["stage3"], "results": str(results / "cocoa" / "seed0")}),
        ("05_ablations", {"run": str(tmp_path / "run"), "n_boot": 100, "beside": ""}),
    ):
        if name == "04_mmeb_evaluation":  # another model's results lie there
            (results / "cocoa" / "seed0").mkdir(parents=True)
            (results / "cocoa" / "seed0" / "provenance.json").write_text('{"fingerprint": "another"}', encoding="utf-8")
            (results / "cocoa" / "seed0" / "results.csv").write_text("stale", encoding="utf-8")
        if name == "05_ablations":
            assert "stale" not in (results / "cocoa" / "seed0" / "results.csv").read_text(encoding="utf-8")
            shutil.copytree(results / "cocoa", results / "contrastive")
        run_notebook(NOTEBOOKS / f"{name}.ipynb", tmp_path / f"{name}.ipynb", "smoke", values, progress=False)
    assert "nan" not in (tmp_path / "figures" / "meta_tasks.txt").read_text()
    assert not (tmp_path / "figures" / "probe_stages.png").exists()


def test_the_grocery_photos_of_the_real_data(shared_data, tmp_path):
    manifest = build_pairs(shared_data / "grocery" / "val", tmp_path / "data", max_side=64, progress=False)
    assert (manifest["used"], manifest["skipped"]) == (296, 0)
    assert {task[0] for task in manifest["tasks"]} >= {"TextToImageUnseen", "ClassSeen"}


def test_wrong_files(table, tmp_path):
    path, rows = table
    with pytest.raises(InputError, match="no such file; PAIRS takes"):
        build_pairs(tmp_path / "none.jsonl", tmp_path / "data", progress=False)
    path.write_text('{"file": "a.png"}\nnonsense\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 2: not a JSON object"):
        build_pairs(path, tmp_path / "data", progress=False)
    rewrite(path, [{"a": 1}])
    with pytest.raises(InputError, match="cannot tell image and text columns among a"):
        build_pairs(path, tmp_path / "data", progress=False)
    rewrite(path, rows[:4])
    with pytest.raises(InputError, match="4 usable rows; at least 10"):
        build_pairs(path, tmp_path / "data", progress=False)


def test_the_emoji_of_the_real_data(shared_data, tmp_path):
    """The first 200 real rows: transparent pictures, names with variants."""
    lines = (shared_data / "emoji" / "emoji_pairs.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    root = tmp_path / "data"
    manifest = build_pairs(path, root, image_root=shared_data / "emoji" / "png" / "72", progress=False)
    assert manifest["used"] == 200 and manifest["skipped"] == 0
    table = pd.read_parquet(root / "eval" / "ClassSeen" / "test-00000-of-00001.parquet")
    assert set(table["tgt_text"].iloc[0]) <= {"Smileys & Emotion", "People & Body"}
