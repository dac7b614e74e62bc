"""The committed measurements are well formed, the README's ratios are theirs, and the cheap ones run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
RECORDS = {line["name"]: line for path in FILES for line in json.loads(path.read_text(encoding="utf-8"))["results"]}
KEYS = {"name", "compared", "ratio", "n", "lowest", "highest", "machine", "commit"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_says_what_was_compared_where_and_how_often(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["name"] == path.stem and content["results"]
    for line in content["results"]:
        assert set(line) >= KEYS, KEYS - set(line)
        assert line["lowest"] <= line["ratio"] <= line["highest"] and line["n"] >= 1


def test_every_script_is_run_by_make_bench_and_left_its_result():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"common", "gpu"}
    listed = re.search(r"^bench:.*\n\t@for script in (.*?); do", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[
        1
    ]
    assert set(listed.split()) == scripts == {path.stem for path in FILES} - {"gpu", "attention_gpu", "encode_many"}


def test_the_readmes_ratios_are_the_measured_ones():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Speed\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .*? \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \| `(.+?)` \|$", section, re.M)
    assert len(rows) >= 8 and len(rows) == section.count("\n| ") - 1  # every row but the heading
    for *numbers, name in rows:
        line = RECORDS[name]
        assert numbers == [f"{line[key]:.2f}" for key in ("ratio", "lowest", "highest")], name


def test_the_docs_say_what_smaller_vectors_cost():
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "precision.csv")
    docs = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    first, others = table.iloc[0], table.iloc[1:]
    assert first["form"] == "float32" and f"| float32 | {first['bytes']:.0f} | {first['p@1']:.1f} | |" in docs
    for row in others.to_dict("records"):
        cells = "{form} | {bytes:.0f} | {p@1:.1f} | {difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row)
        assert f"| {cells} |" in docs, cells
        assert row["n_seeds"] == 3 and row["n_queries"] == 6000 and row["arm"] in docs
    assert list(others.loc[others["p_holm"] < 0.05, "form"]) == ["1 bit"]  # "the only form whose loss is certain"
    assert (others.set_index("form").loc[["float16", "int8"], "low"] < 0).all()
    assert (others.set_index("form").loc[["float16", "int8"], "high"] > 0).all()


@pytest.mark.parametrize("form", ["float32", "float16", "int8", "1 bit", "half the dimensions, int8"])
def test_a_stored_form_is_compared_as_search_compares_it(form):
    from precision import FORMS, stored

    from cocoa_lib.embedder import search, smaller

    vectors = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    share, kind = FORMS[form]
    dim = 16 // share
    kept, read = stored(vectors, dim, kind)
    cut = smaller(vectors, dim, "float32", None)
    assert kept.nbytes == 60 * dim * {"float32": 32, "float16": 16, "int8": 8, "ubinary": 1}[kind] / 8
    scores, rows = search(cut[:5], kept, k=60, ranges=np.stack([cut.min(axis=0), cut.max(axis=0)]))
    np.testing.assert_allclose(scores, np.take_along_axis(cut[:5] @ read.T, rows, axis=1), atol=1e-6)


def test_a_ratio_is_taken_within_each_round():
    from common import record

    line = record("x", "a / b", [2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert (line["ratio"], line["lowest"], line["highest"], line["n"]) == (2.0, 1.0, 3.0, 3)


def test_two_sides_run_in_turn_after_a_round_that_is_not_counted():
    from common import in_turn

    order: list[str] = []
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, n=2)
    assert "".join(order) == "ababab" and [len(values) for values in seconds.values()] == [2, 2]
    in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, n=2, warm=True)
    assert "".join(order[6:]) == "abab"


def test_head_on_masked_positions_changes_no_loss(monkeypatch):
    import logits

    monkeypatch.setattr(logits, "VOCABULARY", 500)
    for stage in logits.STAGES:
        full, masked = (logits.setup(stage, full, batch=2, length=24)() for full in (True, False))
        assert full == pytest.approx(masked, abs=1e-5)


def test_batches_by_tokens_hold_every_item_once_and_no_more_than_plain_ones_of_the_longest():
    from cocoa_lib.embedder import token_batches

    rng = np.random.default_rng(0)
    cells = np.where(rng.random(500) < 0.4, rng.integers(1, 600, 500), 0)
    lengths = cells + rng.integers(1, 60, 500)
    lengths[0], cells[0] = 3000, 0  # one long text must not let pictures come by the hundred
    batches = list(token_batches(lengths, cells, 8))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    for chosen in batches:
        assert len(chosen) * lengths[chosen].max() <= 8 * lengths.max()
        assert cells[chosen].sum() <= 8 * cells.max()
    assert len(batches) < 500 / 8  # short items came together in larger batches
    plain = sum(8 * lengths[at : at + 8].max() for at in range(0, 500, 8))
    assert sum(len(chosen) * lengths[chosen].max() for chosen in batches) < 0.5 * plain


def test_encode_knows_an_items_length_before_it_makes_the_batch(small, picture):
    from cocoa_lib.embedder import item_lengths

    items = [{"text": "a large red circle"}, {"text": "<|image_1|> what is it", "image": picture(200, 40)},
             {"text": "", "image": [picture(16, 16), picture(64, 32)]}]  # fmt: skip
    lengths, cells = item_lengths(items, small[1])
    batch = small[1].collate(items)
    assert lengths.tolist() == batch["attention_mask"].sum(1).tolist()
    assert cells.tolist() == batch["mm_token_type_ids"].sum(1).tolist()


def test_the_gpu_script_runs_and_keeps_nothing_from_a_cpu(monkeypatch):
    import gpu

    def refuse(*args, **kwargs):
        raise AssertionError("a CPU's numbers were kept")

    monkeypatch.setattr(gpu, "save", refuse)
    lines = gpu.main(["--device", "cpu", "--tiny", "--batch", "2", "--length", "16"])
    assert [line["name"].split(",")[0] for line in lines] == ["stage1", "stage2", "stage3"]
    assert all(0 < line["ratio"] < 1 and line["tokens_per_second"] > 0 for line in lines)
