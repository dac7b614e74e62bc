"""The built-in benchmark: concepts and their words, scenes, questions, tasks, files."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cocoa_lib.data import tables
from cocoa_lib.world import build as files
from cocoa_lib.world.concepts import held_out_size, load_concepts, read_name, select_names
from cocoa_lib.world.pictures import draw, paste
from cocoa_lib.world.questions import answer, apply_edit, list_questions
from cocoa_lib.world.scenes import (
    CANVAS,
    SIDES,
    STYLES,
    WINDOW,
    Drawn,
    Scene,
    center,
    crop,
    describe,
    find_split,
    is_clear,
    list_names,
    overlaps,
    render,
    sample_scene,
)
from cocoa_lib.world.tasks import MAKERS, SUBSETS, TASKS, Source, list_labels, paired_names
from cocoa_lib.world.words import pluralise, read_names, read_vocabulary, with_article

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import out_of_style  # noqa: E402

SNAKE = Drawn("snake", "large", "top left", 2, 3)
APPLE = Drawn("red apple", "small", "bottom", 30, 54)
FOXES = (Drawn("fox", "small", "left", 2, 30), Drawn("fox", "large", "right", 45, 30))
SCENE, AN_APPLE = Scene((SNAKE, APPLE), 3), "a small red apple at the bottom"


# ---- concepts and words -------------------------------------------------------------------------


def test_there_are_some_hundred_nouns_with_drawings():
    concepts = load_concepts()
    assert 400 <= len(concepts) <= 860
    for concept in concepts.values():
        assert draw(concept.emoji, 24).shape[2] == 4


def test_the_vocabulary_names_only_emoji_that_exist():
    groups = read_vocabulary()["groups"]
    lines = [line for kinds in groups.values() for line in kinds.values()]
    every = {read_name(char) for line in lines for char in line.split(" ")}
    excluded = read_names("not_things") | read_names("not_told_by_eye")
    assert excluded <= every
    assert not excluded & set(load_concepts())
    listed = [name for line in read_vocabulary()["look_alike"] for name in line.split(", ")]
    for names in (listed, read_names("uncounted"), read_vocabulary()["plurals"]):
        assert set(names) <= set(load_concepts())
    assert len(listed) == len(set(listed))


def test_a_family_has_one_role_and_the_roles_their_shares():
    roles = defaultdict(set)
    for concept in load_concepts().values():
        roles[concept.family].add((concept.role, concept.half))
    assert all(len(found) == 1 for found in roles.values())
    counts = Counter(role for ((role, _),) in roles.values())
    shares = {role: count / len(roles) for role, count in counts.items()}
    assert shares == pytest.approx({"paired": 0.75, "captioned": 0.15, "unknown": 0.1}, abs=0.01)
    assert load_concepts()["green book"].family == load_concepts()["blue book"].family
    assert load_concepts()["cat"].family == load_concepts()["cat face"].family


def test_half_of_the_paired_concepts_are_in_the_first_half_of_their_families():
    assert len(paired_names(0.5)) == pytest.approx(len(paired_names(1.0)) / 2, rel=0.05)
    assert set(paired_names(0.25)) < set(paired_names(0.5)) < set(paired_names(1.0))


@pytest.mark.parametrize(
    ("name", "article", "plural"),
    [
        ("snake", "a snake", "snakes"),
        ("owl", "an owl", "owls"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("unicorn", "a unicorn", "unicorns"),
        ("ewe", "a ewe", "ewes"),
        ("one-piece swimsuit", "a one-piece swimsuit", "one-piece swimsuits"),
        ("x-ray", "an x-ray", "x-rays"),
        ("butterfly", "a butterfly", "butterflies"),
        ("monkey", "a monkey", "monkeys"),
        ("wolf", "a wolf", "wolves"),
        ("wine glass", "a wine glass", "wine glasses"),
        ("toothbrush", "a toothbrush", "toothbrushes"),
    ],
)
def test_articles_and_plurals(name, article, plural):
    assert with_article(name) == article
    assert pluralise(name) == plural


def test_uncounted_names_take_some():
    assert with_article("grapes") == "some grapes"
    assert with_article("large grapes") == "some large grapes"
    assert with_article("large owl") == "a large owl"
    assert list_names(Scene((FOXES[0], SNAKE, FOXES[1]))) == "two foxes and a snake"
    grapes = Scene((Drawn("grapes", "small", "top", 30, 3), Drawn("bread", "small", "left", 3, 30)))
    assert {"Where are the grapes?", "Where is the bread?"} <= set(list_questions(grapes))
    assert answer("Are the grapes small or large?", grapes) == {"small"}


# ---- pictures -----------------------------------------------------------------------------------


def test_a_drawing_is_trimmed_and_has_the_side_asked_for():
    for side in SIDES.values():
        drawing = draw("🐍", side)
        assert max(drawing.shape[:2]) == side
        assert drawing[..., 3].any(axis=0).all() or drawing[..., 3].any(axis=1).all()


def test_paste_blends_by_alpha():
    canvas = np.full((2, 2, 3), 200, dtype=np.uint8)
    drawing = np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], dtype=np.uint8)
    paste(canvas, drawing, 0, 1)
    assert canvas[:, :, 0].tolist() == [[200, 200], [0, 200]]


def test_a_crop_shows_its_drawing_whole():
    picture = render(SCENE)
    assert picture.shape == (CANVAS, CANVAS, 3)
    for one in SCENE.drawings:
        assert crop(picture, one).shape == (WINDOW, WINDOW, 3)
    corner = crop(render(Scene((SNAKE,), 0)), SNAKE)
    height, width = SNAKE.picture.shape[:2]
    assert (corner[height + 4 :] == 255).all()


# ---- scenes -------------------------------------------------------------------------------------


def test_every_style_says_the_same_in_other_words():
    assert [style(SCENE) for style in STYLES] == [
        "a large snake at the top left, a small red apple at the bottom",
        "at the top left a large snake, at the bottom a small red apple",
        "There is a large snake at the top left and a small red apple at the bottom.",
        "top left: large snake; bottom: small red apple",
    ]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_sampled_scenes_are_clear_and_of_their_split(split):
    rng, names = np.random.default_rng(0), paired_names(1.0)
    scenes = [sample_scene(rng, split, names) for _ in range(200)]
    assert {len(scene) for scene in scenes} == {1, 2, 3, 4}
    for scene in scenes:
        assert is_clear(scene)
        assert find_split(scene) == split
        assert Scene.from_json(scene.to_json()) == scene


def test_overlapping_drawings_are_refused():
    over = Drawn("fox", "large", "center", 6, 8)
    assert overlaps(SNAKE, over)
    assert not is_clear(Scene((SNAKE, over)))
    assert not is_clear(Scene((SNAKE, SNAKE)))


# ---- questions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is at the top left?", {"snake"}),
        ("Where is the red apple?", {"at the bottom"}),
        ("Is the snake small or large?", {"large"}),
        ("What kind of thing is the snake?", {"reptile"}),
        ("How many drawings are there?", {"two"}),
        ("How many red apples are there?", {"one"}),
        ("How many foxes are there?", {"no"}),
        ("What is below the snake?", {"red apple"}),
        ("What is left of the red apple?", {"snake"}),
        ("Find the drawing above the red apple.", {"large snake"}),
        ("Find the small red apple.", {"small red apple"}),
    ],
)
def test_answers(question, expected):
    assert answer(f"<|image_1|> {question}", SCENE) == expected


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Make the snake small.", f"a small snake at the top left, {AN_APPLE}"),
        ("Turn the snake into an owl.", f"a large owl at the top left, {AN_APPLE}"),
        ("Move the snake to the right.", f"a large snake on the right, {AN_APPLE}"),
        ("Remove the snake.", AN_APPLE),
        (
            "Swap the snake and the red apple.",
            "a small red apple at the top left, a large snake at the bottom",
        ),
    ],
)
def test_edits(instruction, expected):
    edited = apply_edit(SCENE, instruction)
    assert describe(edited) == expected
    assert edited == apply_edit(SCENE, instruction)
    assert expected in answer(instruction, SCENE)


@pytest.mark.parametrize(
    "question", ["What is in the picture?", "Where is the fox?", "Paint the snake red."]
)
def test_questions_without_one_answer_are_refused(question):
    with pytest.raises(ValueError):
        answer(question, SCENE)


def test_listed_questions_have_one_answer_each():
    rng, names = np.random.default_rng(1), paired_names(1.0)
    for _ in range(100):
        scene = sample_scene(rng, "train", names)
        for text in list_questions(scene):
            assert len(answer(text, scene)) == 1, text


# ---- tasks --------------------------------------------------------------------------------------


def make(name: str, split: str, i: int, place: int = 10**8):
    return MAKERS[name](Source.open(np.random.default_rng([7, i]), split, place))


def shown(sides) -> set[tuple[str, str]]:
    """(name, size) of all drawings of all pictures."""
    return {(one.name, one.size) for side in sides if side.scene for one in side.scene.drawings}


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_example_has_one_right_candidate(name, split):
    if split == "train" and name not in SUBSETS:
        return
    for i in range(30):
        query, right, wrong = make(name, split, i)
        accepted = answer(query.text, query.scene)
        assert accepted & right.truths
        assert wrong and not any(accepted & side.truths for side in wrong)


@pytest.mark.parametrize("name", SUBSETS)
def test_training_shows_nothing_that_is_held_out(name):
    for i in range(60):
        query, right, wrong = make(name, "train", i)
        for one, size in shown([query, right, *wrong]):
            assert load_concepts()[one].role == "paired"
            assert held_out_size(one) != size
        assert "below" not in query.text
        for side in (query, right, *wrong):
            assert side.scene is None or find_split(side.scene) == "train"
        texts = " ".join([query.text, right.text, *(side.text for side in wrong)])
        assert not any(f" {name} " in texts for name in ("rose", "lobster"))


def test_early_pairs_show_the_first_concepts_only():
    for place, share in ((0, 0.25), (499, 0.25), (1999, 0.5), (7999, 0.75)):
        known = set(paired_names(share))
        for name in SUBSETS:
            for query, right, wrong in (make(name, "train", i, place) for i in range(10)):
                assert {one for one, _ in shown([query, right, *wrong])} <= known


@pytest.mark.parametrize(
    ("name", "role"), [("NamingUnpaired", "captioned"), ("GroundingUnknown", "unknown")]
)
def test_development_and_test_ask_for_other_unseen_concepts(name, role):
    asked = {}
    for split in ("dev", "test"):
        rights = [make(name, split, i)[1] for i in range(60)]
        asked[split] = {side.focus.name if side.focus else side.text for side in rights}
        assert asked[split] <= set(select_names(role, split))
    assert not asked["dev"] & asked["test"]


def test_composed_targets_have_their_held_out_size():
    for i in range(30):
        query, right, wrong = make("GroundingComposed", "test", i)
        assert right.focus.size == held_out_size(right.focus.name)
        assert any(side.focus.name == right.focus.name for side in wrong)


def test_task_sizes_are_those_of_their_labels():
    for task in TASKS:
        labels = list_labels().get(task.name)
        assert labels is None or len(labels) == len(set(labels)) >= task.n_candidates
    found = {t.name: t.n_candidates for t in TASKS if t.meta_task == "classification"}
    kinds = ("Naming", "Kinds", "NamingUnpaired")
    assert found == {name: len(list_labels()[name]) for name in kinds}


# ---- files --------------------------------------------------------------------------------------

SETTINGS = {"n_pairs": 20, "n_queries": 8, "n_corpus": 12}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings") / "world"
    files.build(folder, **SETTINGS)
    return folder


@pytest.mark.parametrize("part", ["eval", "dev"])
def test_the_oracle_answers_every_row(root, part):
    scenes = files.read_scenes(root)
    for task in TASKS:
        rows = tables.load_eval(str(root if part == "eval" else root / part), task.name)
        assert len(rows) == SETTINGS["n_queries"]
        for row in rows:
            assert len(row["tgt_text"]) == files.count_candidates(task, len(rows))
            assert files.oracle(row, scenes) == 0


def test_pictures_are_as_their_scenes_say(root):
    for path, side in files.read_scenes(root).items():
        with Image.open(root / "images" / path) as image:
            if side.focus is None:
                assert np.array_equal(np.asarray(image), render(side.scene))
            else:
                assert image.size == (WINDOW, WINDOW)


def test_pairs_are_dealt_out_to_the_subsets(root):
    lengths = [len(tables.load_train(str(root), name, negatives=True)) for name in SUBSETS]
    assert lengths == [3, 3, 3, 3, 2, 2, 2, 2]


def test_a_finished_build_is_returned_as_is_and_another_refused(root):
    before = (root / "manifest.json").stat().st_mtime_ns
    manifest = files.build(root, **SETTINGS)
    assert manifest["tasks"][0] == ["Naming", "classification", True, 430]
    assert (root / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="n_pairs"):
        files.build(root, **SETTINGS | {"n_pairs": 24})
    with pytest.raises(ValueError, match="at least 8"):
        files.build(root / "other", **SETTINGS | {"n_pairs": 7})


def test_the_content_depends_on_the_arguments_alone(root, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FEW", 10)  # so all cores make it
    again = files.build(tmp_path / "again", **SETTINGS)
    assert again["content_hash"] == files.build(root, **SETTINGS)["content_hash"]
    other = files.build(tmp_path / "other", **SETTINGS | {"seed": 1})
    assert other["content_hash"] != again["content_hash"]


def test_a_smaller_set_of_pairs_is_the_beginning_of_a_larger_one(root, tmp_path):
    files.build(tmp_path, **SETTINGS | {"n_pairs": 12})
    for name in SUBSETS:
        small, large = (tables.load_train(str(folder), name)[:] for folder in (tmp_path, root))
        n = len(small["qry"])
        assert all(large[column][:n] == small[column] for column in small)


def test_every_whole_scene_of_the_corpus_has_labels(root):
    labels = pd.read_parquet(root / "corpus" / "labels.parquet")
    parts = [pd.read_parquet(root / "corpus" / f"{name}.parquet") for name in ("train", "heldout")]
    crops = {path for path, side in files.read_scenes(root).items() if side.focus}
    assert set(labels["image_path"]) == set(pd.concat(parts)["image_path"]) - crops
    assert set(labels.columns) == {"image_path", "count", "kind", "size", "position"}


def test_the_folder_names_the_designers(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "OpenMoji" in text and "CC BY-SA 4.0" in text


def test_a_drawing_alone_is_in_the_middle_of_white():
    pixels = np.asarray(center(draw(load_concepts()["owl"].emoji, SIDES["large"]), WINDOW))
    assert pixels.shape == (WINDOW, WINDOW, 3) and (pixels[0] == 255).all()
    assert (pixels[10:30, 10:30] != 255).any()


def test_another_designers_drawings_are_ranked_in_both_styles(shared_data):
    """An embedder that knows the truth scores 100, one that knows nothing stays near chance."""
    truth = SimpleNamespace(encode=lambda items: np.eye(len(items)))
    found = out_of_style.compare_styles(truth, shared_data / "emoji")
    assert set(found["style"]) == {"OpenMoji", "another"} and (found["value"] == 100).all()
    assert found.groupby(["style", "task"])["n"].sum().nunique() == 1
    rng = np.random.default_rng(0)
    blind = SimpleNamespace(encode=lambda items: rng.normal(size=(len(items), 8)))
    assert out_of_style.compare_styles(blind, shared_data / "emoji")["value"].max() < 6
