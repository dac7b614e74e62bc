"""How the small backbone learns: patches, Muon, lessons, a run that is stopped and goes on."""

from __future__ import annotations

import csv
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_lib.backbone import open_backbone
from cocoa_lib.store.checkpoint import load_inputs, read_meta, weights_hash
from cocoa_lib.world import exam, pretrain
from cocoa_lib.world.backbone import answer
from cocoa_lib.world.concepts import load_concepts
from cocoa_lib.world.lessons import (
    BACKGROUND,
    IGNORE,
    known_concepts,
    label_cells,
    make_crops,
    make_readings,
    make_scenes,
)
from cocoa_lib.world.muon import Muon, orthogonalise
from cocoa_lib.world.patches import EQUAL_PICTURES, cut_patches
from cocoa_lib.world.scenes import CANVAS, WINDOW, Drawn, Scene, render

TINY = pretrain.Schedule(
    hidden_size=32,
    layers=1,
    heads=2,
    vision_dim=32,
    vision_layers=1,
    vocab_size=400,
    texts=20,
    warmup=2,
    measure_every=2,
    save_every=1,
    phases=(
        pretrain.Phase("crops", 2, 4, head=1, words=0),
        pretrain.Phase("scenes", 2, 4, head=1, words=0),
        pretrain.Phase("names", 2, 4, head=0.3, words=1),
        pretrain.Phase("talk", 3, 4, head=0.3, words=1),
        pretrain.Phase("reading", 2, 4, head=0, words=1, tower=0, fresh=True),
    ),
)


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT", 6)
    monkeypatch.setattr(pretrain, "topics", {"a": "Any text."})


def open_tiny(folder):
    return pretrain.open_pupil(pretrain.make_start(folder / "init", TINY, seed=0), seed=0)


@pytest.mark.parametrize("side", [WINDOW, CANVAS])
def test_patches_are_those_of_the_image_processor(side):
    pictures = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=10, size={"shortest_edge": 400, "longest_edge": CANVAS**2}
    )
    wanted = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    values, grids = cut_patches(pictures, 10)
    torch.testing.assert_close(values, wanted["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(grids, wanted["image_grid_thw"])


def test_attention_to_equal_pictures_is_the_towers_own(tmp_path):
    pupil = open_tiny(tmp_path)
    values, grids = cut_patches(make_scenes(np.random.default_rng(0), 3, ["owl"]).pictures, 10)
    visual = pupil.model.model.visual
    with torch.inference_mode():
        fast = visual(values, grid_thw=grids).pooler_output
        assert visual.config._attn_implementation == EQUAL_PICTURES
        visual.config._attn_implementation = "sdpa"
        torch.testing.assert_close(visual(values, grid_thw=grids).pooler_output, fast)


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_muon_makes_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert 0.5 < values.min() and values.max() < 1.5


def test_muon_lowers_a_loss():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(32, 8)
    wanted = x @ torch.randn(8, 4)
    optimizer = Muon([layer.weight], lr=0.05, weight_decay=0)
    losses = []
    for _ in range(100):
        loss = (layer(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 20


def test_muon_holds_the_weights_small():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
    held, free = Muon(weights[:1], lr=0.02), Muon(weights[1:], lr=0.02, weight_decay=0)
    for _ in range(300):
        for weight in weights:
            weight.grad = torch.randn(64, 64)
        held.step()
        free.step()
    assert weights[0].std() < weights[1].std() / 2


# ---- lessons ------------------------------------------------------------------------------------


def test_cells_are_labelled_with_what_covers_them():
    label = known_concepts().index("owl") + 1
    cells, spots = label_cells([Drawn("owl", "large", "top left", 3, 3)], CANVAS)
    assert (spots[cells == label] == 1).all() and (spots[cells != label] == IGNORE).all()
    cells = cells.reshape(4, 4)
    assert cells[0, 0] == label
    assert (cells[2:] == BACKGROUND).all() and (cells[:, 2:] == BACKGROUND).all()
    assert set(cells[:2, :2].ravel().tolist()) <= {label, IGNORE, BACKGROUND}


def test_every_drawing_labels_a_cell():
    for name in known_concepts():
        cells, spots = label_cells([Drawn(name, "small", "center", 28, 28)], CANVAS)
        assert known_concepts().index(name) + 1 in cells and 4 * 2 in spots


@pytest.mark.parametrize(("make", "side"), [(make_crops, WINDOW), (make_scenes, CANVAS)])
def test_lessons_hold_pictures_labels_and_words(make, side):
    lesson = make(np.random.default_rng(0), 12, known_concepts())
    again = make(np.random.default_rng(0), 12, known_concepts())
    assert lesson.pictures.shape == (12, side, side, 3)
    assert lesson.cells.shape == (12, (side // 20) ** 2)
    assert lesson.turns == again.turns and np.array_equal(lesson.pictures, again.pictures)
    assert all(reply for turns in lesson.turns for _, reply in turns)


def test_a_reading_asks_only_what_its_caption_says():
    asked = set()
    for (first, reply), *others in make_readings(np.random.default_rng(0), 200, known_concepts()):
        caption, question = first.split("\n")
        for text, said in [(question, reply), *others]:
            asked.add(text.split()[0])
            if text.startswith(("Where", "What is")):
                assert said.split()[-1] in caption
            if "small or large" in text:
                assert said in caption
    assert {"What", "Where", "How"} <= asked


def test_nothing_unknown_is_taught():
    assert all(load_concepts()[name].role != "unknown" for name in known_concepts())


# ---- the run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "backbone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "HELD_OUT", 6)
        patch.setattr(pretrain, "topics", {"a": "Any text."})
        return pretrain.train_backbone(out, TINY, seed=1)


def test_the_folder_opens_as_any_other(folder):
    meta = read_meta(folder)
    assert meta["stage"] == "causal" and meta["run"]["seed"] == 1
    model, inputs = open_backbone(folder, bidirectional=False), load_inputs(folder, meta)
    item = {"image": Image.fromarray(render(Scene(()))), "text": "What is in the picture?"}
    assert len(answer(model, inputs, [item], max_new_tokens=3)) == 1


def test_the_exam_asks_every_kind_and_knows_the_commonest_answer(folder):
    table = exam.examine(folder, n=3)
    assert list(table["kind"]) and set(table["kind"]) == set(exam.KINDS)
    assert (table["n"] == 3).all() and (table["constant"] >= 33).all()
    assert ((table["right"] >= 0) & (table["right"] <= 100)).all()


def test_the_log_has_a_row_a_measurement(folder):
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["phase"], row["step"]) for row in rows] == [
        ("crops", "2"), ("scenes", "2"), ("names", "2"), ("talk", "2"), ("talk", "3"), ("reading", "2"),
    ]  # fmt: skip
    assert rows[0]["naming"] == rows[-2]["reading"] == rows[-1]["cell_naming"] == ""
    assert 0 <= float(rows[-1]["naming"]) <= 1 and 0 <= float(rows[-1]["reading"]) <= 1


def test_a_fresh_phase_needs_nothing_but_the_weights_before_it(folder, tmp_path):
    before = pretrain.train_backbone(
        tmp_path / "before", replace(TINY, phases=TINY.phases[:-1]), seed=1
    )
    steps, (start, step) = TINY.phases[-1].steps, (len(TINY.phases) - 1, 0)
    pupil = pretrain.open_pupil(before, seed=1)
    pupil.phase, pupil.step = start, step
    assert len(list(pretrain.go_on(pupil, TINY, seed=1))) == steps
    whole = open_backbone(folder, bidirectional=False).state_dict()
    assert all(torch.equal(whole[name], w) for name, w in pupil.model.state_dict().items())


@pytest.mark.parametrize("stop_after", [1, 4, 10])
def test_a_stopped_run_goes_on_bit_for_bit(folder, tmp_path, monkeypatch, stop_after):
    class Stopped(Exception):
        pass

    steps, learn = [], pretrain.train_step

    def stop(*args):
        if len(steps) == stop_after:
            raise Stopped
        steps.append(1)
        return learn(*args)

    monkeypatch.setattr(pretrain, "train_step", stop)
    with pytest.raises(Stopped):
        pretrain.train_backbone(tmp_path / "backbone", TINY, seed=1)
    monkeypatch.setattr(pretrain, "train_step", learn)
    monkeypatch.setattr(pretrain, "sample_texts", lambda n: ["texts of changed code"])
    again = pretrain.train_backbone(tmp_path / "backbone", TINY, seed=1)
    assert weights_hash(again) == weights_hash(folder)


def test_an_answer_is_right_if_all_its_tokens_are(monkeypatch):
    inputs = SimpleNamespace(eos_id=2, text_ids=lambda text: [0])  # 0: a line break
    labels, rows = torch.tensor([3, 1, 2, 2, 1]), torch.tensor([0, 0, 1, 2, 3])
    logits = torch.eye(4)[[3, 0, 2, 0, 1]]  # the second token of the first answer is wrong
    monkeypatch.setattr(pretrain, "read_words", lambda *_: (None, logits, labels, rows))
    lesson = pretrain.Lesson(np.zeros(4), np.zeros(4), np.zeros(4), [[]] * 4)
    pupil = SimpleNamespace(inputs=inputs)
    assert pretrain.answer_right(pupil, lesson) == [False, True, True, True]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    pupil = open_tiny(tmp_path)
    with torch.no_grad():
        pupil.head.weight.fill_(float("nan"))
    phase = TINY.phases[0]
    lesson = pretrain.make_lesson(phase, np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="lower its rate"):
        pretrain.train_step(pupil, phase, lesson)
