"""Explorers: they answer at once, say what is true, keep errors in their own area and escape what users wrote."""

from __future__ import annotations

import base64
import copy
import datetime
import gc
import io
import re
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cocoa_lib.attention import EOS, dense_mask
from cocoa_lib.backbone import hidden_states, open_backbone, position_ids, set_bidirectional
from cocoa_lib.corruption import IGNORE
from cocoa_lib.evaluate import effects as analysis
from cocoa_lib.evaluate.restore import cell_errors, count_right, reconstruct
from cocoa_lib.inputs import Inputs
from cocoa_lib.reconstruction import PatchDecoder
from cocoa_lib.run.arms import read_arms
from cocoa_lib.run.profiles import ROOT
from cocoa_lib.show.ablation import ablation_explorer, ablation_html
from cocoa_lib.show.eos_attention import UPLOADED, attention_explorer, attention_html, eos_attention
from cocoa_lib.show.masks import (
    DIRECT,
    INDIRECT,
    describe,
    mask_explorer,
    mask_html,
    reachability,
    segments,
)
from cocoa_lib.show.restored import cells_image, reconstruction_explorer
from cocoa_lib.show.retrieval import retrieval_explorer, retrieval_html

EVIL = "<script>alert('x')</script> & <b>bold</b>"


def seconds(box, name, *values):
    """The slowest answer as a control takes these values, in seconds of a core: other work does not count, nor, as in
    `timeit`, does collecting what other tests have left in this process."""
    times = []
    gc.disable()
    try:
        for value in values:
            start = time.process_time()
            box.controls[name].value = value
            times.append(time.process_time() - start)
    finally:
        gc.enable()
    assert box.error.value == ""
    return max(times)


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


def test_hovering_a_cell_tells_what_it_means():
    html = mask_html("eos_bridged", segments(4, 4)[0], layers=2, query=0, key=0)
    looks, knows = (re.findall(r"<title>(.*?)</title>", grid) for grid in html.split("<svg")[1:])
    assert looks == knows and len(looks) == 81
    assert "B2 may not look at A1; it can know it through EOS after 2 layers." in knows
    assert "EOS looks at A1" in knows and not any("never" in words for words in knows)
    one = mask_html("eos_bridged", segments(4, 4)[0], layers=1, query=0, key=0)
    assert "<title>B2 never knows A1</title>" not in one and "<title>B2 does not know A1 by then</title>" in one


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


def test_errors_are_those_of_hidden_cells_alone():
    """Two pictures of two cells of one patch; the average patch is over all four."""
    hidden, unread = torch.tensor([True, False]), torch.full((2, 1), 9.0)
    restored = [
        (
            {"hidden_cells": hidden},
            [],
            {"original": torch.tensor([[0.0], [2]]), "hidden cells predicted": torch.tensor([[1.0], [7]])},
        ),
        (
            {"hidden_cells": hidden},
            [],
            {"original": torch.tensor([[4.0], [6]]), "hidden cells predicted": torch.tensor([[1.0], [7]])},
        ),
        ({}, [], {"original": unread}),  # a text without a picture has no cells
    ]
    decoder, average = cell_errors(restored, merge_size=1)
    assert decoder == (1 + 9) / 2 and average == (9 + 1) / 2


def test_restored_tokens_are_counted_by_row_and_whatever_the_pictures_hide_the_same(
    bidirectional, picture, monkeypatch
):
    model, inputs = bidirectional
    rows, how = rows_of(picture)[:2], {"text_rate": 0.7, "layout": "eos_bridged"}
    own, swapped = [row["image"] for row in rows], [row["image"] for row in rows][::-1]
    first, second = (count_right(model, inputs, rows, pictures, **how) for pictures in (own, swapped))
    assert first.shape == (2, 2) and (first[:, 0] <= first[:, 1]).all() and (first[:, 1] > 0).all()
    assert (first[:, 1] == second[:, 1]).all()
    given = []

    def perfect(model, inputs, row, *, draw, **how):
        given.append((row["image"], draw))
        labels = torch.tensor([[IGNORE, 5, 6]])
        return {"labels": labels}, [5, 6 + draw], {}

    monkeypatch.setattr("cocoa_lib.evaluate.restore.reconstruct", perfect)
    assert count_right(model, inputs, rows, swapped, **how).tolist() == [[2, 2], [1, 2]]
    assert given == [(swapped[0], 0), (swapped[1], 1)]


def test_reconstruction_explorer(bidirectional, picture):
    model, inputs = bidirectional
    torch.manual_seed(0)
    box = reconstruction_explorer(model, inputs, rows_of(picture), PatchDecoder(model))
    html = box.outputs["reconstruction"].value
    assert box.error.value == "" and html.count("<img") == 3 and "http" not in html
    assert seconds(box, "text_rate", 0.9, 0.3, 0.5, 0.7, 1.0) < 0.3
    count = len(re.findall(r"</b>&#1000[37];", box.outputs["reconstruction"].value))
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


@pytest.mark.parametrize("mode", [True, False])
def test_attention_is_the_models_own(small, picture, mode):
    """The weights are those that transformers itself returns from a model opened with eager attention."""
    model, inputs = small
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    set_bidirectional(eager, mode)
    set_bidirectional(model, mode)
    try:
        before = hidden_states(model, inputs.collate([{"text": "red"}]))
        found = eos_attention(model, inputs, {"text": "a red circle", "image": picture()})
        assert torch.equal(before, hidden_states(model, inputs.collate([{"text": "red"}]))), "left as it was"
        assert model.model.language_model.config._attn_implementation == "sdpa"
    finally:
        set_bidirectional(model, False)
    batch, place = found.batch, int((found.batch["segment_ids"][0] == EOS).nonzero())
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    with torch.no_grad():
        truth = eager.model(
            **{name: batch[name] for name in names}, position_ids=position_ids(eager, batch), output_attentions=True
        ).attentions
    truth = torch.cat(truth).numpy()  # (layers, heads, L, L)
    assert found.from_eos.shape == (2, 2, batch["input_ids"].shape[1])
    assert np.allclose(found.from_eos, truth[:, :, place], atol=1e-6)
    assert np.allclose(found.to_eos, truth[:, :, :, place], atol=1e-6)
    assert np.allclose(found.from_eos.sum(-1), 1, atol=1e-5)
    seen = np.delete(found.to_eos, place, axis=-1)
    assert (seen > 0).all() if mode else (seen == 0).all(), "a causal model lets nobody before EOS look at it"


def test_squares_and_bars_have_the_size_of_their_weights(bidirectional, picture):
    model, inputs = bidirectional
    item = {"text": "a red circle", "image": [picture(), picture(64, 32, seed=1)]}
    found = eos_attention(model, inputs, item)
    at_picture = found.batch["mm_token_type_ids"][0].numpy() == 1
    grids = (found.batch["image_grid_thw"][:, 1:] // 2).tolist()
    assert len({tuple(grid) for grid in grids}) == 2, "two pictures of different shapes"
    files = re.findall(
        r'<img src="data:image/png;base64,([^"]*)"', attention_html(found, inputs, layer=1, head=1, direction="to_eos")
    )
    for file, given in zip(files, item["image"], strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(file))), dtype=int)
        assert np.abs(shown - np.asarray(given)).max() <= 1, "each picture is the one that was given"
    for head, direction, heads in ((None, "from_eos", found.from_eos[1].mean(0)), (2, "to_eos", found.to_eos[1, 1])):
        html = attention_html(found, inputs, layer=2, head=head, direction=direction)
        titles = re.findall(r"<title>row (\d+), column (\d+): ([\d.]+)%</title>", html)
        order = [(y + 1, x + 1) for rows, columns in grids for y in range(rows) for x in range(columns)]
        assert [(int(y), int(x)) for y, x, _ in titles] == order
        assert np.allclose([float(w) for *_, w in titles], 100 * heads[at_picture], atol=0.0051)
        for shown, cells in zip(
            html.split("<svg")[1:], np.split(heads[at_picture], [grids[0][0] * grids[0][1]]), strict=True
        ):
            side = float(re.search(r'y="0" width="(\d+)" height="\1" fill="none"', shown)[1]) - 2
            widths = [float(w) for w in re.findall(r'class="weight".*?width="([\d.]+)"', shown)]
            assert np.allclose(np.square(widths) / side**2, cells / heads.max(), atol=0.02), "area is weight"
            assert f"largest weight {cells.max():.1%}" in shown
        bars = [float(w) for w in re.findall(r'class="bar" style="width:([\d.]+)px', html)]
        assert np.allclose(bars, 90 * heads[~at_picture] / heads.max(), atol=0.06)
        share = heads[at_picture].sum() if direction == "from_eos" else heads[at_picture].mean()
        assert f"<b>{share:.0%}</b> {'to' if direction == 'from_eos' else 'by'} the picture" in html


def upload(name: str, content: bytes):
    """What a FileUpload holds once a browser has sent a file."""
    then = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    file = {"name": name, "type": "image/png", "size": len(content), "last_modified": then}
    return ({**file, "content": memoryview(content)},)


def test_they_answer_in_time_at_the_size_of_the_committed_backbone(picture):
    """The laptop profile's model; the tests around this one have a smaller one."""
    model, inputs = (
        open_backbone(ROOT / "data" / "backbone", bidirectional=True),
        Inputs.load(ROOT / "data" / "backbone"),
    )
    rows = rows_of(picture)
    box = reconstruction_explorer(model, inputs, rows, PatchDecoder(model))
    assert box.error.value == "" and seconds(box, "text_rate", 0.9, 0.3, 0.5) < 0.3
    box = attention_explorer(model, inputs, rows)
    assert box.error.value == "" and seconds(box, "sample", 1, 2, 0) < 0.3 and seconds(box, "layer", 1, 4, 2) < 0.3


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_attention_explorer_computes_once_a_sample(bidirectional, picture):
    model, inputs = bidirectional
    passes = []
    handle = model.model.register_forward_hook(lambda *args: passes.append(1))
    try:
        rows = [
            {"text": EVIL, "image": picture()},
            {"text": "alone", "image": None},
            {"text": "again", "image": picture()},
        ]
        box = attention_explorer(model, inputs, rows)
        html = box.outputs["attention"].value
        assert box.error.value == "" and "<script" not in html and "http" not in html and html.count("<svg") == 1
        assert html.count("&lt;") == EVIL.count("<"), "tokens are escaped"
        assert "Layer 2, mean over 2 heads. EOS gives" in html and 'role="img" aria-label="picture 1 as 4 x 4' in html
        assert seconds(box, "layer", 1, 2, 1) < 0.3 and seconds(box, "head", 1, 2, None) < 0.3
        box.controls["direction"].value = "to_eos"
        assert "Given to EOS" in box.outputs["attention"].value and len(passes) == 1
        assert seconds(box, "sample", 2, 1) < 0.3 and len(passes) == 3
        assert seconds(box, "sample", 0, 2, 1) < 0.3 and len(passes) == 3, "a sample seen before is not computed again"
        assert "<svg" not in box.outputs["attention"].value and "EOS</span>" in box.outputs["attention"].value
        box.controls["words"].value = "<b>mine</b>"
        assert len(passes) == 4 and "<b>mine" not in box.outputs["attention"].value and box.error.value == ""
        assert not box.controls["words"].continuous_update and not box.controls["layer"].continuous_update
    finally:
        handle.remove()


def test_an_uploaded_picture_is_shown_or_refused_by_name(bidirectional, picture, monkeypatch):
    model, inputs = bidirectional
    box = attention_explorer(model, inputs, [{"text": "alone", "image": None}])
    box.controls["sample"].value = UPLOADED
    assert "no picture is uploaded yet" in box.error.value and box.outputs["attention"].value == ""
    box.controls["upload"].value = upload("a.png", png(picture()))
    first = box.outputs["attention"].value
    assert box.error.value == "" and "as 4 x 4 cells" in first
    box.controls["upload"].value = upload("a.png", png(picture(seed=3)))
    assert box.outputs["attention"].value != first, "another picture under the same name"
    box.controls["sample"].value = 0
    assert "<svg" not in box.outputs["attention"].value, "a sample is shown again when it is chosen"
    box.controls["upload"].value = upload("b.png", png(picture()))
    assert box.controls["sample"].value == UPLOADED and box.outputs["attention"].value == first
    for content in (b"nonsense", png(picture())[:-60]):
        box.controls["upload"].value = upload("<b>x</b>.png", content)
        assert "&lt;b&gt;x&lt;/b&gt;.png: not a readable image" in box.error.value and "BytesIO" not in box.error.value
        assert box.outputs["attention"].value == ""
    monkeypatch.setattr("cocoa_lib.items.MAX_PIXELS", 5000)
    box.controls["upload"].value = upload("large.png", png(Image.new("RGB", (100, 51))))
    assert "large.png: 100 x 51 pixels is over the limit of 5,000" in box.error.value


@pytest.fixture(scope="module")
def grid_of_arms():
    """(results, per_query) of a baseline, a better and an equal arm on three tasks, two seeds, as of `gather_results`
    and `gather_ranks`."""
    rng = np.random.default_rng(0)
    tasks = {"Digits": ("classification", True), "Count": ("vqa", True), "Find": ("vqa", False)}
    ranks, scores = [], []
    for arm, shift in (("base", 3), ("better", 1), (EVIL, 3)):
        for seed in (0, 1):
            for task, (meta_task, inside) in tasks.items():
                rank = 1 + rng.integers(0, 2 * shift, size=40)
                facts = {"arm": arm, "seed": seed, "task": task, "meta_task": meta_task, "in_distribution": inside}
                ranks.append(pd.DataFrame({**facts, "query": range(40), "rank": rank, "n_candidates": 10}))
                for metric, k in (("p@1", 1), ("hit@5", 5)):
                    scores.append({**facts, "metric": metric, "value": 100 * np.mean(rank <= k)})
    return pd.DataFrame(scores), pd.concat(ranks, ignore_index=True)


def cells(html: str) -> list[list[str]]:
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S) if "<td>" in row]


def test_ablation_explorer_shows_scores_and_paired_differences(grid_of_arms):
    results, per_query = grid_of_arms
    box = ablation_explorer(results, per_query, "base", n_boot=200)
    assert box.error.value == "" and box.controls["arms"].value == (EVIL, "better")
    assert box.controls["group"].options == ("overall", "classification", "vqa", "ind", "ood")
    html = box.outputs["ablation"].value
    assert "<script" not in html and html.count("<svg") == 2 and "http" not in html
    effects = analysis.paired_effects(per_query, "base", n_boot=200).set_index("arm")
    means = analysis.arm_scores(results).groupby("arm")["overall"].mean()
    for row, arm in zip(cells(html), (EVIL, "better"), strict=True):
        assert row[2:4] == [f"{means[arm]:.1f}", f"{effects.loc[arm, 'difference']:+.1f}"]
        assert row[4] == f"{effects.loc[arm, 'low']:+.1f} to {effects.loc[arm, 'high']:+.1f}" and row[7:] == [
            "2",
            "120",
        ]
    assert f"Baseline base: {means['base']:.1f} %" in html
    box.controls["arms"].value = ("better",)
    (row,) = cells(box.outputs["ablation"].value)
    assert row[5] == f"{effects.loc['better', 'p_holm']:.3f}", "corrected for the arms that are hidden too"
    assert seconds(box, "group", "ood", "overall") < 0.3 and seconds(box, "metric", "hit@5", "p@1") < 0.3


@pytest.mark.parametrize(
    ("low", "middle", "high", "seeds", "p", "colour", "fill", "shape"),
    [(1, 3, 5, 3, 0.01, "#0072B2", "#0072B2", "circle"), (1, 3, 5, 3, 0.2, "#0072B2", "white", "circle"),
     (-5, -3, 1, 3, 0.2, "grey", "white", "path"), (1, 3, 5, 1, 0.01, "grey", "white", "path")],
)  # fmt: skip
def test_an_arm_is_drawn_where_its_numbers_are(low, middle, high, seeds, p, colour, fill, shape):
    row = {"arm": "a", "low": low, "difference": middle, "high": high, "n_seeds": seeds, "p_holm": p, "n_queries": 9}
    html = ablation_html(
        pd.DataFrame([row]), pd.Series({"a": 2.0, "b": 1.0}), baseline="b", metric="p@1", group="vqa"
    )
    left, right = min(low, 0) - 1, high + 1
    assert f"<th>{left:+d} to {right:+d} points</th>" in html
    zero, bar = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', html)
    drawn = [left + float(x) * (right - left) / 220 for x in (*zero, *bar)]
    assert drawn == pytest.approx([0, 0, low, high], abs=0.01)
    (at,) = re.findall(r'<(?:circle cx="|path d="M )([\d.]+)', html)
    assert left + float(at) * (right - left) / 220 == pytest.approx(middle, abs=0.01)
    assert f'stroke="{colour}" fill="{fill}"/></svg>' in html and f"<{shape} " in html


def test_ablation_explorer_answers_in_time_with_all_arms_of_the_committed_run():
    results = analysis.gather_results(ROOT / "reports" / "long")
    per_query = analysis.gather_ranks(ROOT / "reports" / "long", results)
    shown = [name for name, arm in read_arms().items() if arm.kind == "arm"]
    results, per_query = (table[table["arm"].isin(shown)] for table in (results, per_query))
    box = ablation_explorer(results, per_query, "contrastive", n_boot=200)
    assert len(box.controls["arms"].value) >= 12 and seconds(box, "group", "vqa", "ood", "overall") < 0.3


def test_ablation_explorer_follows_metric_and_group(grid_of_arms):
    results, per_query = grid_of_arms
    box = ablation_explorer(results, per_query, "base", n_boot=200)
    box.controls["arms"].value = ("better",)
    box.controls["metric"].value, box.controls["group"].value = "hit@5", "vqa"
    (row,) = cells(box.outputs["ablation"].value)
    part = results[(results["metric"] == "hit@5") & (results["meta_task"] == "vqa")].groupby("arm")["value"].mean()
    assert row[2] == f"{part['better']:.1f}" and row[3] == f"{part['better'] - part['base']:+.1f}" and row[8] == "80"
    assert "hit@5, %" in box.outputs["ablation"].value
    box.controls["arms"].value = ()
    assert "no arm is chosen" in box.error.value and box.outputs["ablation"].value == ""
    with pytest.raises(ValueError, match="nobody"):
        ablation_explorer(results, per_query, "nobody", n_boot=20)
