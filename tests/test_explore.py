"""Explorers: what they show is what the library computes, what users type is escaped."""

from __future__ import annotations

import copy
import datetime
import io
import itertools
import json
import re
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
import torch
from mmeb_files import write_task

from cocoa_lib.attention import EOS, LAYOUTS, dense_mask
from cocoa_lib.backbone import hidden_states, set_bidirectional
from cocoa_lib.data.tables import Task
from cocoa_lib.evaluate import paired_effects, score_arms
from cocoa_lib.evaluate.restore import restored_words
from cocoa_lib.evaluate.score import RANKS, RUN
from cocoa_lib.positions import position_ids
from cocoa_lib.show import arms, eos_attention, infonce, masks, panel, restored, retrieval

EVIL = "<script>alert(1)</script> & <b>bold</b>"


def upload(image):
    """What a FileUpload holds once a browser has sent a picture."""
    image.save(file := io.BytesIO(), "PNG")
    then = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    facts = {"name": "a.png", "type": "image/png", "size": file.tell(), "last_modified": then}
    return (facts | {"content": memoryview(file.getvalue())},)


def read_data(html: str):
    """What a page holds for `explorer.js`."""
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.S)[1])


@pytest.fixture
def bidirectional(small):
    model, inputs = small
    set_bidirectional(model, True)
    yield model, inputs
    set_bidirectional(model, False)


def test_an_explorer_is_live_in_jupyter_and_elsewhere_a_page_of_all_combinations():
    def answer(a, b):
        if a == 3:
            raise ValueError(EVIL)
        return f"<i>{a * b}</i>{EVIL}"

    menus = {"a": widgets.Dropdown(options=[1, 2, 3]), "b": widgets.Dropdown(options=[9])}
    box = panel.Explorer(menus, answer, {"a": {"one": 1, "two": 2}, "b": {"9": 9}})
    assert read_data(box.html) == {"one\t9": f"<i>9</i>{EVIL}", "two\t9": f"<i>18</i>{EVIL}"}
    held = box.html.split('<script type="application/json">')[1].split("</script>")[0]
    assert "</script> &" not in held and box.html.endswith(f"<script>{panel.SCRIPT}</script>")
    shown = box._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(shown)
    box.controls["a"].value = 2
    assert box.output.value.startswith("<i>18</i>")
    box.controls["a"].value = 3
    assert "&lt;script&gt;" in box.output.value and "<script" not in box.output.value
    box.controls["a"].value = 1
    assert box.output.value.startswith("<i>9</i>")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_of_a_layout_gives_its_mask(layout):
    ids, rule = masks.segments(3, 4), masks.tabulate_layouts()[layout]
    places = list(enumerate(ids[0].tolist()))
    made = [[rule[f"{q}{k}{np.sign(j - i)}"] for j, k in places] for i, q in places]
    assert np.array_equal(made, dense_mask(layout, ids)[0, 0])


def test_layers_are_counted_until_a_token_is_known():
    ids = masks.segments(2, 2)[0]
    bridged, strict = (masks.panel_after(f"eos_bridged{end}", ids, 9) for end in ("", "_strict"))
    assert bridged[4, 0] == bridged[0, 4] == 2 and bridged[2, 0] == 1
    assert strict[4, 0] == 2 and strict[0, 4] == 0, "A never learns of B"


def test_changed_tokens_move_what_the_mask_allows_and_nothing_else(small, picture):
    model, inputs = small
    batch = inputs.collate([{"text": "which square", "image": picture()}], ["a large red circle"])
    places = masks.choose_places(batch, inputs)
    segment = batch["segment_ids"]
    assert set(segment[0, places].tolist()) == {1, 2, 3}
    for layout in LAYOUTS:
        moves = masks.measure_moves(model, batch, layout, 2, places, inputs.text_ids("z")[0])
        known = masks.reachability(dense_mask(layout, segment)[0, 0], 2)[:, places].T.numpy()
        assert np.array_equal(moves > 0, known)
    assert len(model.model.language_model.layers) == 2, "the model is left as it was"
    moves = masks.measure_moves(model, batch, "eos_bridged", 1, places, inputs.text_ids("z")[0])
    table = masks.tabulate_moves(moves, segment, places)
    assert table.loc["A changes", "B"] == 0 and table.loc["B changes", "EOS"] > 0


def test_cells_image_gives_the_picture_back(small, picture):
    _, inputs = small
    image = picture(64, 32)
    pixels, grid = inputs.process_images([image])
    shown = np.asarray(restored.cells_image(pixels, grid[0], inputs), dtype=int)
    assert np.abs(shown - np.asarray(image)).max() <= 1


def test_words_are_marked_right_or_wrong_with_the_truth_escaped(bidirectional, picture):
    row = {"text": "", "image": picture(), "target": EVIL}
    batch, predicted, _ = restored.reconstruct(*bidirectional, row, text_rate=0.5)
    html = restored.words_html(batch, predicted, bidirectional[1])
    words = restored_words(batch, predicted, bidirectional[1])
    right = sum(text == truth for text, truth in words)
    assert f"<b>{right} of {len(predicted)}</b>" in html and "<b>bold" not in html
    assert html.count("&#10007;") == len(predicted) - right


def test_restored_explorer_compares_three_pictures(bidirectional, picture):
    model, inputs = bidirectional
    rows = [{"text": "", "image": picture(seed=i), "target": "a red circle"} for i in range(3)]
    box = restored.explore_restored(model, inputs, rows, text_rate=0.7, layout="eos_bridged")
    for title in ("right picture", "wrong picture", "grey picture"):
        assert f">{title}</figcaption>" in box.output.value
    for name, value in (("hidden", 0.2), ("words", EVIL)):
        before = box.output.value
        box.controls[name].value = value
        assert box.output.value != before and "hidden tokens are right" in box.output.value


def encode(items):
    """Vectors by the length of the text: longer texts point further round."""
    turn = np.array([len(item["text"]) / 40 for item in items])
    return np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)


def test_ranked_html_marks_the_right_one_and_a_tie_counts_against_it():
    query, candidates = {"text": "q"}, [{"text": f"text {i} {EVIL * (i == 0)}"} for i in range(10)]
    html = retrieval.ranked_html(query, candidates, np.arange(10.0), right=0, k=3)
    assert "ranks <b>10</b> of 10" in html and html.count("&#10003; right") == 1
    assert "<script" not in html and html.count("text ") == 4, "three best, and the right one"
    assert "ranks <b>10</b>" in retrieval.ranked_html(query, candidates, [0.5] * 10, right=0)


def test_retrieval_by_query_typed_text_and_uploaded_picture(picture):
    items = [{"text": "x" * n, "image": None} for n in (1, 10, 20, 30)]
    box = retrieval.explore_retrieval(encode, [({"text": "y" * 19, "image": None}, 2)], items)
    assert "ranks <b>1</b> of 4" in box.output.value
    box.controls["words"].value = "z" * 29
    first = re.findall(r"<div>(x+)</div>", box.output.value)[0]
    assert len(first) == 30 and "ranks" not in box.output.value
    box.controls["words"].value = ""
    box.controls["upload"].value = upload(picture())
    assert "data:image/png" in box.output.value
    box.controls["upload"].value = ()
    box.controls["k"].value = 2
    assert box.output.value.count("<b>") == 4, "the query, two, and the rank of the right one"


def test_confusions_are_counted(tmp_path):
    short, long = "x" * 10, "x" * 30
    asked = ((10, [short, long]), (29, [short, long]), (30, [long, short]))
    none = {"qry_img_path": "", "tgt_img_path": ["", ""]}
    write_task(tmp_path, "Kinds", [{"qry_text": "y" * n, "tgt_text": t, **none} for n, t in asked])
    embedder, task = SimpleNamespace(encode=encode), Task("Kinds", "classification", True, 2)
    _, table, wrong = retrieval.find_confusions(embedder, tmp_path, [task])
    names = [short, "x" * 20 + " ..."]
    assert table.loc[names, names].to_numpy().tolist() == [[1, 1], [0, 1]]
    ((query, candidates, scores),) = wrong
    assert query["text"] == "y" * 29 and candidates[0]["text"] == short and scores.argmax() == 1


@pytest.mark.parametrize("mode", [True, False])
def test_attention_is_the_models_own(small, picture, mode):
    """The weights are those that transformers itself returns from a model opened with eager attention."""
    model, inputs = small
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for each in (eager, model):
        set_bidirectional(each, mode)
    item, other = {"text": "a red circle", "image": picture()}, inputs.collate([{"text": "red"}])
    try:
        before = hidden_states(model, other)
        found = eos_attention.measure_attention(model, inputs, item)
        assert torch.equal(before, hidden_states(model, other)), "left as it was"
    finally:
        set_bidirectional(model, False)
    batch, place = found.batch, int((found.batch["segment_ids"][0] == EOS).nonzero())
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    given = {name: batch[name] for name in names} | {"position_ids": position_ids(eager, batch)}
    with torch.no_grad():
        truth = torch.cat(eager.model(**given, output_attentions=True).attentions).numpy()
    assert np.allclose(found.from_eos, truth[:, :, place], atol=1e-6)  # (layers, heads, L)
    assert np.allclose(found.to_eos, truth[:, :, :, place], atol=1e-6)


def test_the_area_of_a_square_is_its_weight(bidirectional, picture):
    inputs, item = bidirectional[1], {"text": EVIL, "image": picture()}
    found = eos_attention.measure_attention(*bidirectional, item)
    html = eos_attention.attention_html(found, inputs, layer=2, head=1, direction="to_eos")
    weights = found.to_eos[1, 0, found.batch["mm_token_type_ids"][0].numpy() == 1]
    sides = np.array(re.findall(r'class="weight".*?width="([\d.]+)"', html), dtype=float)
    assert np.allclose((sides / sides.max()) ** 2, weights / weights.max(), atol=0.01)


def test_attention_explorer_computes_once_an_input(bidirectional, picture, monkeypatch):
    passes, measure = [], eos_attention.measure_attention
    count = lambda *given: passes.append(1) or measure(*given)  # noqa: E731
    monkeypatch.setattr(eos_attention, "measure_attention", count)
    rows = [{"text": EVIL, "image": picture()}, {"text": "alone", "image": None}]
    box = eos_attention.explore_attention(*bidirectional, rows)
    for name, value in (("layer", 1), ("head", 1), ("direction", "to_eos")):
        box.controls[name].value = value
    assert len(passes) == 3, "one a case, then the first again"
    assert "Layer 1, head 1. Share" in box.output.value
    box.controls["upload"].value = upload(picture(seed=5))
    assert len(passes) == 4 and "the picture" in box.output.value


def test_the_matrix_is_that_of_the_loss():
    cosine = np.random.default_rng(0).uniform(-1, 1, (3, 3))
    item = {"text": EVIL, "image": None}
    box = infonce.explore_temperature(cosine, [(item, item)] * 3)
    for name, html in read_data(box.html).items():
        logits = torch.tensor(cosine / float(name))
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        assert f"Mean loss {loss:.2f}; ln 3 = 1.10" in html and "<script" not in html


@pytest.fixture(scope="module")
def ranks():
    """Ranks of a baseline, a better and an equal arm on three tasks, four seeds."""
    rng, table = np.random.default_rng(0), []
    tasks = (("Digits", "classification", True), ("Count", "vqa", True), ("Find", "vqa", False))
    for arm, seed, task in itertools.product(("base", "better", EVIL), range(4), tasks):
        drawn = 1 + rng.integers(0, 2 if arm == "better" else 6, size=40)
        table += [(arm, seed, *task, query, rank, 10, 0) for query, rank in enumerate(drawn)]
    return pd.DataFrame(table, columns=[*RUN, *RANKS])


def test_arms_explorer_holds_scores_and_paired_differences(ranks):
    tables = arms.tables_of_arms(ranks, "base", n_boot=200)
    found = read_data(arms.explore_arms(tables, "base").data)
    groups = ("overall", "classification", "vqa", "ind", "ood")
    assert set(found) == {f"{m}\t{group}" for m in ("p@1", "hit@5") for group in groups}
    row = paired_effects(ranks, "base", n_boot=200).set_index("arm").loc["better"]
    mean = score_arms(ranks).groupby("arm")["overall"].mean()["better"]
    html = found["p@1\toverall"]
    said = f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
    assert f"<td>better</td><td>{mean:.1f}</td>" in html and said in html and "<script" not in html
    assert html.index("better") < html.index("&lt;script"), "the best first"
    split = arms.split_by_group(tables)
    assert split["difference"].loc["better", "overall"] == pytest.approx(row["difference"])
    assert bool(split["clear"].loc["better", "overall"]) == (row["low"] > 0)


def test_an_interval_is_drawn_where_its_numbers_are():
    svg = arms.interval_svg(1.0, 3.0, 5.0, -2.0, 8.0)
    ends = [float(x) / arms.WIDTH * 10 - 2 for x in re.findall(r' x[12]="([\d.]+)"', svg)]
    assert ends == pytest.approx([0, 0, 1, 5], abs=0.01) and arms.COLOURS[0] in svg


def test_the_learning_curve_joins_arms_that_differ_in_steps_alone():
    known = {"cocoa": (250, "mean"), "cocoa_longer": (1100, "mean"), "other": (250, "eos")}
    recipes = [{"stage2": pool, "stage3": {"steps": n}} for n, pool in known.values()]
    runs = pd.DataFrame({"arm": known.keys(), "recipes": recipes})
    rows = [(arm, 10.0 + seed) for arm in known for seed in (0, 1, 2)]
    scores = pd.DataFrame(rows, columns=["arm", "overall"])
    curve = arms.learning_curve(scores, runs)
    assert curve["label"].tolist() == ["cocoa"] * 2 and curve["x"].tolist() == [250, 1100]
    assert curve[["value", "low"]].iloc[1].tolist() == pytest.approx([11, 8.516], abs=0.01)
    assert arms.learning_curve(scores, runs.iloc[1:]).empty


def test_the_curve_and_the_answer_are_said_in_a_sentence(ranks):
    rows = [("a", "better", 250), ("a", "base", 1100), ("b", "base", 250), ("b", EVIL, 1100)]
    curve = pd.DataFrame(rows, columns=["label", "arm", "x"])
    said = "a is ahead after 250 and level after 1,100 contrastive steps"
    assert arms.say_curve(ranks, curve, "a", "b") == said
    assert arms.say_curve(ranks, curve[1:2], "a", "b") == ""
    for low, high, n, said in (
        (0.5, 2, 3, "CoCoA is better than contrastive learning alone overall"),
        (-2, -0.5, 3, "CoCoA is worse than contrastive learning alone overall"),
        (-0.5, 2, 3, "CoCoA and contrastive learning alone cannot be told apart overall"),
        (0.5, 2, 1, "In one seed CoCoA is 1.2 points above contrastive learning alone"),
    ):
        row = pd.DataFrame([{"n_seeds": n, "difference": 1.25, "low": low, "high": high}])
        assert arms.say_effect(row, "cocoa", "contrastive") == said
