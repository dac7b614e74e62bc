"""The generated benchmark: the same for any number of workers, nothing unseen is seen, one right candidate a row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.utils.parallel
from PIL import Image

from cocoa_lib.evaluate.floor import pixel_bow_embed
from cocoa_lib.world.build import GENERATOR_VERSION, _eval_rows, _make, build, read_scenes
from cocoa_lib.world.scenes import (
    CANVAS,
    HELD_OUT,
    PLACEHOLDER,
    SHAPES,
    SIDES,
    _center,
    _shape_mask,
    caption,
    crop,
    render,
    sample_scene,
)
from cocoa_lib.world.scenes import answer as scenes_answer
from cocoa_lib.world.tasks import LABELS, MAKERS, SUBSETS, TASKS, oracle

SIZES = {"n_pairs": 64, "n_queries": 12, "n_corpus": 40}
TRAIN_COLUMNS = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
EVAL_COLUMNS = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "data"
    build(folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def scenes(root):
    return read_scenes(root)


def eval_rows(root: Path, name: str) -> list[dict]:
    return pd.read_parquet(root / "eval" / name / "test-00000-of-00001.parquet").to_dict("records")


def train_rows(root: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(root / "train" / name / "original-00000-of-00001.parquet")


def combos(scene) -> set[tuple[str, str]]:
    return {(obj["color"], obj["kind"]) for obj in scene}


def obj(kind="circle", color="red", size="large", position="center", **more):
    return {"kind": kind, "color": color, "size": size, "position": position, "offset": [0, 0], **more}


# ---- building -------------------------------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_and_another_seed_does_not(root, tmp_path):
    manifest = build(root, **SIZES)
    two = build(tmp_path / "two", **SIZES)
    other = build(tmp_path / "other", **SIZES, seed=1)
    assert two == manifest
    assert other["content_hash"] != manifest["content_hash"]
    assert (tmp_path / "two" / "scenes.jsonl").read_bytes() == (root / "scenes.jsonl").read_bytes()


def test_several_processes_make_the_same(root, tmp_path, monkeypatch):
    asked = []

    def parallel(original=sklearn.utils.parallel.Parallel, **options):
        asked.append(options["n_jobs"])
        return original(**options | {"n_jobs": 2, "batch_size": 7})

    monkeypatch.setattr("cocoa_lib.world.build.FEW", 0)
    monkeypatch.setattr("sklearn.utils.parallel.Parallel", parallel)
    build(tmp_path / "two", **SIZES)
    assert asked == [-1]
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (root, tmp_path / "two")]
    assert names[0] == names[1]
    assert (tmp_path / "two/manifest.json").read_bytes() == (root / "manifest.json").read_bytes()


def test_smaller_builds_are_prefixes_of_larger_ones(root, tmp_path):
    build(tmp_path / "larger", **{**SIZES, "n_pairs": 128, "n_corpus": 60})
    for name in SUBSETS:
        small, large = train_rows(root, name), train_rows(tmp_path / "larger", name)
        assert (len(small), len(large)) == (8, 16)
        pd.testing.assert_frame_equal(small, large.iloc[:8])
        for path in small["qry_image_path"]:
            if path:
                images = [np.asarray(Image.open(folder / "images" / path)) for folder in (root, tmp_path / "larger")]
                np.testing.assert_array_equal(*images)
    small, large = (pd.read_parquet(f / "corpus" / "train.parquet") for f in (root, tmp_path / "larger"))
    pd.testing.assert_frame_equal(small, large.iloc[: len(small)])


def test_a_second_call_does_no_work(root, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr("cocoa_lib.world.build._make", lambda *job: pytest.fail("made again"))
    assert build(root, **SIZES) == json.loads((root / "manifest.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_refuses_another_configuration_and_says_what_differs(root):
    with pytest.raises(ValueError, match=r"n_pairs 64, not 128.*delete the folder"):
        build(root, **{**SIZES, "n_pairs": 128})


def test_refuses_data_of_another_version(root, monkeypatch):
    monkeypatch.setattr("cocoa_lib.world.build.GENERATOR_VERSION", GENERATOR_VERSION + 1)
    with pytest.raises(ValueError, match="generator_version"):
        build(root, **SIZES)


@pytest.mark.parametrize("content", ["[]", "{", '{"settings": 3}', "{}"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        build(tmp_path, **SIZES)


def test_refuses_an_unfinished_build(tmp_path, monkeypatch):
    make, made = _make, []

    def stop(*job):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(job)
        return make(*job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cocoa_lib.world.build._make", stop)
        build(tmp_path / "data", **SIZES)
    assert not (tmp_path / "data" / "manifest.json").exists()
    with pytest.raises(ValueError, match="no manifest.*delete it"):
        build(tmp_path / "data", **SIZES)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"n_pairs": 12}, "n_pairs must be a multiple of 8"),
        ({"n_pairs": 0}, r"n_pairs must be in 8\.\."),
        ({"n_queries": 1}, "n_queries must be in 2"),
        ({"n_corpus": 0}, "n_corpus must be in 1"),
        ({"seed": -1}, "seed must be in 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path, argument, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "data", **{**SIZES, **argument})
    assert not (tmp_path / "data").exists()


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_tasks_are_three_a_meta_task_and_eight_in_distribution():
    assert len(TASKS) == 12 and len(SUBSETS) == 8
    for meta_task in ("classification", "vqa", "retrieval", "grounding"):
        assert sum(task.meta_task == meta_task for task in TASKS) == 3


def test_columns_sizes_and_files(root, scenes):
    files = {path.relative_to(root / "images").as_posix() for path in (root / "images").rglob("*.png")}
    assert set(scenes) == files and json.loads((root / "manifest.json").read_text())["n_images"] == len(files)
    used = set()
    for name in SUBSETS:
        table = train_rows(root, name)
        assert list(table.columns) == TRAIN_COLUMNS and len(table) == 8
        used |= set(table[[c for c in TRAIN_COLUMNS if "image" in c]].to_numpy().ravel())
        assert ((table["pos_text"] != table["neg_text"]) | (table["pos_image_path"] != table["neg_image_path"])).all()
    for task in TASKS:
        rows = eval_rows(root, task.name)
        assert len(rows) == 12 and list(rows[0]) == EVAL_COLUMNS
        for row in rows:
            assert len(row["tgt_text"]) == len(row["tgt_img_path"]) <= task.n_candidates
            assert (PLACEHOLDER in row["qry_text"]) == bool(row["qry_img_path"])
            used |= {row["qry_img_path"], *row["tgt_img_path"]}
    for split in ("train", "heldout"):
        table = pd.read_parquet(root / "corpus" / f"{split}.parquet")
        assert list(table.columns) == ["image_path", "kind", "question", "answer"]
        assert (table.groupby("image_path")["kind"].agg(list).map(sorted).map(tuple) == ("caption", *["qa"] * 3)).all()
        assert not table.duplicated().any() and table["answer"].all()
        used |= set(table["image_path"])
    assert used - {""} == files
    assert pd.read_parquet(root / "corpus" / "heldout.parquet")["image_path"].nunique() == 50


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_the_oracle_finds_the_right_candidate_wherever_it_stands(root, scenes, name):
    rng = np.random.default_rng(0)
    for row in eval_rows(root, name):
        assert oracle(name, row, scenes) == 0
        order = rng.permutation(len(row["tgt_text"]))
        shuffled = {**row, "tgt_text": row["tgt_text"][order], "tgt_img_path": row["tgt_img_path"][order]}
        assert order[oracle(name, shuffled, scenes)] == 0


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_candidates_of_a_row_are_distinct(root, name):
    for row in eval_rows(root, name):
        candidates = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
        assert len(set(candidates)) == len(candidates) >= 2
        assert all(bool(text) != bool(path) for text, path in candidates)


@pytest.mark.parametrize("task", [task for task in TASKS if task.name not in LABELS], ids=lambda task: task.name)
def test_candidates_drawn_from_other_rows_fill_up(task):
    """At the full number of queries every row has the declared number of candidates."""
    rng, rows = np.random.default_rng(0), []
    for i in range(task.n_candidates):
        _, right, wrong = MAKERS[task.name](rng, "eval")
        sides = enumerate([right, *wrong])
        rows.append((f"q{i}", "", [(side.text, "" if side.text else f"{i}-{j}", side.key) for j, side in sides]))
    table = _eval_rows(task, rows, seed=0)
    assert set(table["tgt_text"].map(len)) == {task.n_candidates}


@pytest.mark.parametrize("name", sorted(LABELS))
def test_labels_are_complete_at_any_size(root, name):
    n_candidates = {task.name: task.n_candidates for task in TASKS}[name]
    assert {len(row["tgt_text"]) for row in eval_rows(root, name)} == {n_candidates}


@pytest.mark.parametrize("name", SUBSETS)
def test_training_pairs_answer_their_own_question(root, scenes, name):
    """The positive is what `answer` says, the hard negative is not."""
    for row in train_rows(root, name).to_dict("records"):
        question = {"qry_text": row["qry"], "qry_img_path": row["qry_image_path"]}
        texts, paths = [row["neg_text"], row["pos_text"]], [row["neg_image_path"], row["pos_image_path"]]
        assert oracle(name, {**question, "tgt_text": texts, "tgt_img_path": paths}, scenes) == 1


def test_corpus_answers_are_true(root, scenes):
    for split in ("train", "heldout"):
        for row in pd.read_parquet(root / "corpus" / f"{split}.parquet").itertuples():
            assert scenes_answer(row.question or "Describe the picture.", scenes[row.image_path]) == row.answer


# ---- what is unseen -------------------------------------------------------------------------------------------------


def test_handwriting_of_training_and_evaluation_is_disjoint(scenes):
    used = {"train": set(), "eval": set()}
    for path, scene in scenes.items():
        split = "train" if path.startswith(("train/", "corpus/train/")) else "eval"
        used[split] |= {obj["digit"] for obj in scene if "digit" in obj}
    assert used["train"] and used["eval"] and not used["train"] & used["eval"]


def test_held_out_combinations_appear_in_their_task_only(root, scenes):
    for path, scene in scenes.items():
        assert path.startswith("eval/GroundingCombos/") or not combos(scene) & HELD_OUT
    for row in eval_rows(root, "GroundingCombos"):
        assert combos(scenes[row["tgt_img_path"][0]]) <= HELD_OUT
    words = {f"{color} {kind}" for color, kind in HELD_OUT}
    tables = [train_rows(root, name)[["qry", "pos_text", "neg_text"]] for name in SUBSETS]
    tables += [pd.read_parquet(path)[["question", "answer"]] for path in (root / "corpus").iterdir()]
    texts = [text for table in tables for text in table.to_numpy().ravel()]
    assert not [text for text in texts if any(word in text for word in words)]


def test_scenes_of_evaluation_are_never_shown_in_training(scenes):
    """By caption: whole scenes, not crops; in evaluation the queries, whose edited versions may be known scenes."""
    whole = {path: caption(scene) for path, scene in scenes.items() if "Grounding" not in path}
    train = {text for path, text in whole.items() if path.startswith(("train/", "corpus/train/"))}
    asked = {text for path, text in whole.items() if path.startswith("eval/") and path.endswith("_query.png")}
    asked |= {text for path, text in whole.items() if path.startswith("corpus/heldout/")}
    assert train and asked and not train & asked


def test_unseen_relation_and_transformations_are_not_in_the_training_pairs(root, scenes):
    assert not any("below" in text for name in SUBSETS for text in train_rows(root, name)["qry"])
    assert all("below" in row["qry_text"] for row in eval_rows(root, "RelationOOD"))
    transformed = {path.split("/")[1] for path, scene in scenes.items() if any("transform" in obj for obj in scene)}
    assert transformed == {"DigitsTransformed"}
    assert not any("object" in text for text in train_rows(root, "Grounding")["qry"])


# ---- scenes, words, pictures ----------------------------------------------------------------------------------------


def test_caption_and_answers_of_a_scene_made_by_hand():
    scene = [obj("7", "blue", "small", "bottom", digit=0), obj("circle", "red", "large", "top left")]
    assert caption(scene) == "a large red circle at the top left, a small blue 7 at the bottom"
    for question, answer in {
        "<|image_1|> What color is the circle?": "red",
        "<|image_1|> What color is the object at the bottom?": "blue",
        "<|image_1|> Which digit is in the picture?": "7",
        "<|image_1|> How many shapes and digits are there?": "one shape and one digit",
        "<|image_1|> What is right of the red circle?": "small blue 7",
        "<|image_1|> What is below the red circle?": "small blue 7",
        "<|image_1|> Find the object above the blue 7.": "large red circle",
        "Where is the blue 7?": "bottom",
        "Make the red circle green.": "a large green circle at the top left, a small blue 7 at the bottom",
        "Make the blue 7 large.": "a large red circle at the top left, a large blue 7 at the bottom",
        "Turn the red circle into a star.": "a large red star at the top left, a small blue 7 at the bottom",
        "Move the red circle to the center.": "a large red circle at the center, a small blue 7 at the bottom",
        "Remove the blue 7.": "a large red circle at the top left",
        "Swap the red circle and the blue 7.": "a small blue 7 at the top left, a large red circle at the bottom",
    }.items():
        assert scenes_answer(question, scene) == answer
    for question in ("Where is the green 7?", "What is left of the red circle?", "Is it late?"):
        with pytest.raises(ValueError, match="answer|question"):
            scenes_answer(question, scene)


def test_objects_never_touch_and_keep_inside_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(300):
        taken = np.zeros((CANVAS, CANVAS), dtype=int)
        for shown in sample_scene(rng, n_objects=4):
            x, y = _center(shown)
            half = SIDES[shown["size"]] // 2
            assert half <= min(x, y) and max(x, y) < CANVAS - half
            taken[y - half : y + half + 1, x - half : x + half + 1] += 1
        assert taken.max() == 1


def test_rendering_shows_colour_and_size_and_is_repeatable():
    scene = [obj("square", "green", "large", "center")]
    pixels = np.asarray(render(scene)).astype(int)
    assert pixels.shape == (64, 64, 3)
    np.testing.assert_array_equal(pixels, np.asarray(render(scene)))
    assert pixels[32, 32, 1] > 140 and pixels[5, 5].max() < 60
    small = np.asarray(render([obj("square", "green", "small", "center")])).astype(int)
    assert (pixels[..., 1] > 120).sum() > 2 * (small[..., 1] > 120).sum() > 0
    assert crop(render(scene), scene[0]).size == (24, 24)


def test_shapes_and_sizes_are_told_apart_by_their_masks():
    for size in SIDES.values():
        masks = [np.asarray(_shape_mask(kind, size)) > 0 for kind in SHAPES]
        for i, first in enumerate(masks):
            for second in masks[:i]:
                assert (first != second).sum() >= size  # pixels


def test_bad_arguments_of_a_scene_are_named():
    with pytest.raises(ValueError, match="split must be"):
        sample_scene(np.random.default_rng(0), "test")
    with pytest.raises(ValueError, match=r"n_objects must be in 1\.\.4"):
        sample_scene(np.random.default_rng(0), n_objects=5)
    with pytest.raises(ValueError, match="no task 'Colour'"):
        oracle("Colour", {}, {})


# ---- the floor ------------------------------------------------------------------------------------------------------


def test_pixel_bow_embed_is_normalised_and_reads_both_kinds(root):
    row = eval_rows(root, "EditToImage")[0]
    items = [
        {"text": row["qry_text"], "image": row["qry_img_path"]}, {"text": "", "image": row["qry_img_path"]},
        {"text": "a large red circle", "image": None}, {"text": "large circle, a red", "image": ""},
    ]  # fmt: skip
    vectors = pixel_bow_embed(items, root / "images")
    assert vectors.shape == (4, 512) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5 and similarity[1, 2] == 0 and similarity[2, 3] > 0.99
    with pytest.raises(ValueError, match="needs text or an image"):
        pixel_bow_embed([{"text": "", "image": ""}])
