"""Explorers: they answer at once, say what is true, keep errors in their own area and escape what users wrote."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch

from cocoa_lib.attention import dense_mask, describe, reachability, segments
from cocoa_lib.backbone import hidden_states, set_bidirectional
from cocoa_lib.corruption import IGNORE
from cocoa_lib.explore import (
    DIRECT,
    INDIRECT,
    cells_image,
    mask_explorer,
    mask_html,
    reconstruct,
    reconstruction_explorer,
    retrieval_explorer,
    retrieval_html,
)
from cocoa_lib.objectives import PatchDecoder

EVIL = "<script>alert('x')</script> & <b>bold</b>"


def seconds(box, name, *values):
    """The median time of an answer, as a control takes these values."""
    times = []
    for value in values:
        start = time.perf_counter()
        box.controls[name].value = value
        times.append(time.perf_counter() - start)
    assert box.error.value == ""
    return sorted(times)[len(times) // 2]


def drawn(html):
    """Colours of the cells of each of the two grids, in reading order."""
    grids = html.split("<svg")[1:]
    return [re.findall(r'fill="(#\w+)"', grid) for grid in grids]


@pytest.mark.parametrize("layout", ["causal", "bidirectional", "eos_bridged", "eos_bridged_strict"])
def test_the_drawn_mask_is_the_mask(layout):
    ids = segments(3, 2, pad_left=1)[0]
    mask = dense_mask(layout, ids[None])[0, 0]
    looks, knows = drawn(mask_html(layout, ids, layers=2, query=5, key=1))
    assert [colour == DIRECT for colour in looks] == mask.flatten().tolist()
    through = reachability(mask, 2) & ~mask & ~torch.eye(len(ids), dtype=torch.bool)
    assert [colour == INDIRECT for colour in knows] == through.flatten().tolist()


def test_the_sentence_and_the_cost_of_a_cell():
    box = mask_explorer()
    ids = segments(4, 4)[0]
    assert box.controls["query"].label == "B1" and box.controls["key"].label == "A1"
    assert describe("eos_bridged", ids, 5, 0, 1) in box.outputs["mask"].value
    box.controls["layers"].value = 2
    assert "B1 may not look at A1; it can know it through EOS after 2 layers." in box.outputs["mask"].value
    box.controls["key"].label = "EOS"
    assert "B1 may look at EOS." in box.outputs["mask"].value
    assert "49 of 9 x 9 = 81 pairs" in box.outputs["mask"].value  # 4*4 + 4*4 + 9 + 8
    box.controls["layout"].value = "bidirectional"
    assert "<b>100%</b>" in box.outputs["mask"].value


def test_a_chosen_token_stays_chosen_while_sizes_change():
    box = mask_explorer()
    box.controls["query"].label = "B3"
    for name, value in (("n_a", 7), ("n_pad", 3), ("padding", "left")):
        box.controls[name].value = value
    assert box.controls["query"].label == "B3" and "B3 may not look at A1" in box.outputs["mask"].value
    box.controls["n_b"].value = 2  # B3 is gone
    assert box.controls["query"].label == "B1" and box.error.value == ""


def test_mask_explorer_is_fast_and_waits_for_the_slider():
    box = mask_explorer()
    box.controls["n_a"].value = box.controls["n_b"].value = 10
    assert seconds(box, "layers", 8, 2, 7, 3, 6) < 0.3
    sliders = [control for control in box.controls.values() if hasattr(control, "continuous_update")]
    assert sliders and not any(slider.continuous_update for slider in sliders)


def rows_of(picture):
    captions = ["a large red circle at the top left", "a small blue 7 at the bottom", EVIL]
    return [{"text": "", "image": picture(seed=i), "target": text} for i, text in enumerate(captions)]


@pytest.fixture
def bidirectional(small):
    model, inputs = small
    yield set_bidirectional(model, True), inputs
    set_bidirectional(model, False)


def test_cells_image_gives_the_picture_back(small, picture):
    inputs = small[1]
    pixels, grid = inputs.process_images([picture()])
    assert np.abs(cells_image(pixels, grid[0], inputs).astype(int) - np.asarray(picture())).max() <= 1


@pytest.mark.parametrize(("objective", "shift"), [("mntp", 1), ("mlm", 0)])
def test_words_are_predicted_where_they_were_learned(bidirectional, picture, objective, shift):
    """A head that names the position it reads from shows which state each hidden word is predicted from."""
    model, inputs = bidirectional
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        batch, predicted, patches = reconstruct(
            model, inputs, rows_of(picture)[0], text_rate=0.6, patch_rate=0.5, objective=objective
        )
    finally:
        handle.remove()
    hidden_at = (batch["labels"][0] != IGNORE).nonzero().flatten()
    assert len(predicted) == len(hidden_at) == len(seen[0]) > 1
    visible = {**batch, "pixel_values": patches["seen by the model"]}
    with torch.no_grad():
        states = hidden_states(model, visible, "bidirectional")[0]
    assert torch.allclose(seen[0], states[hidden_at - shift], atol=1e-5)


def test_reconstruction_explorer(bidirectional, picture):
    model, inputs = bidirectional
    torch.manual_seed(0)
    box = reconstruction_explorer(model, inputs, rows_of(picture), PatchDecoder(model))
    html = box.outputs["reconstruction"].value
    assert box.error.value == "" and html.count("<img") == 3 and "http" not in html
    assert seconds(box, "text_rate", 0.9, 0.3, 0.5, 0.7, 1.0) < 0.3
    count = len(re.findall(r"&#1000[37];<b>", box.outputs["reconstruction"].value))
    assert f"of {count} hidden tokens" in box.outputs["reconstruction"].value
    box.controls["patch_rate"].value = 0.0
    assert box.outputs["reconstruction"].value.count("<img") == 1  # nothing hidden, nothing to predict
    box.controls["text_rate"].value = 0.0
    assert "0 of 0 hidden tokens" in box.outputs["reconstruction"].value and box.error.value == ""


def test_what_users_type_is_escaped(bidirectional, picture):
    model, inputs = bidirectional
    box = reconstruction_explorer(model, inputs, rows_of(picture), layout="eos_bridged")
    box.controls["text_rate"].value = 0.0
    for value in (EVIL, "<|image_pad|><img src=x>"):
        box.controls["words"].value = value
        html = box.outputs["reconstruction"].value
        assert box.error.value == "" and "<script" not in html and "<img src=x" not in html
    assert "&lt;|image_pad|&gt;&lt;img src=x&gt;" in html, "typed control tokens stay text"


def test_errors_stay_in_their_area_and_go_away(bidirectional, picture):
    model, inputs = bidirectional
    rows = [*rows_of(picture), {"text": "", "image": "<b>nowhere</b>.png", "target": "a"}]
    box = reconstruction_explorer(model, inputs, rows)
    box.controls["sample"].value = 3
    assert 'role="alert"' in box.error.value and "no such image" in box.error.value
    assert "<b>nowhere" not in box.error.value and box.outputs["reconstruction"].value == ""
    box.controls["sample"].value = 0
    assert box.error.value == "" and "hidden tokens" in box.outputs["reconstruction"].value


@pytest.fixture
def folder(tmp_path, picture):
    for i in range(20):
        picture(seed=i).save(tmp_path / f"{i}.png")
    return tmp_path


def test_retrieval_html_marks_the_right_one(folder):
    candidates = [{"text": f"text {i}", "image": str(folder / f"{i}.png")} for i in range(10)]
    scores = np.linspace(0.9, 0.0, 10)
    html = retrieval_html({"text": EVIL, "image": None}, candidates, scores, right=7, k=3)
    assert "ranks <b>8</b> of 10" in html and html.count("<img") == 4  # three best, and the right one
    assert "8. 0.200 &#10003; right" in html and html.count("&#10003;") == 1 and "text 3" not in html
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "data:image/png;base64," in html and "http" not in html and str(folder) not in html
    ties = retrieval_html({"text": "q"}, candidates, [0.5] * 10, right=0, k=3)
    assert "ranks <b>10</b> of 10" in ties, "a tie counts against the right one"
    with pytest.raises(ValueError, match="9 scores"):
        retrieval_html({"text": "q"}, candidates, scores[:9], right=0)


def test_retrieval_explorer(folder):
    def row(n, image=""):
        texts, images = [EVIL] + [f"no {i}" for i in range(1, n)], [f"{i % 20}.png" for i in range(n)]
        return {"qry_text": "find it", "qry_img_path": image, "tgt_text": texts, "tgt_img_path": images}

    tasks = {"small": [row(4), row(4, "missing.png"), row(4, "../x.png")], "large": [row(500)] * 6}
    rng = np.random.default_rng(0)
    scores = {name: [rng.random(len(r["tgt_text"])) for r in rows] for name, rows in tasks.items()}
    box = retrieval_explorer(tasks, scores, folder)
    rank = 1 + int((scores["small"][0] > scores["small"][0][0]).sum())
    assert f"ranks <b>{rank}</b> of 4" in box.outputs["retrieval"].value
    assert "<script" not in box.outputs["retrieval"].value
    for query, message in ((1, "missing.png"), (2, "not a plain path")):
        box.controls["query"].value = query
        assert message in box.error.value and box.outputs["retrieval"].value == ""
    box.controls["task"].value = "large"
    assert box.controls["query"].max == 5
    assert seconds(box, "query", 0, 1, 3, 4, 5) < 0.3
    box.controls["task"].value = "small"
    assert box.controls["query"].value == 2, "the query is brought into the range of the task"
