"""The evaluation, rule by rule: tasks, averages, ranks, ties, scores, intervals."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmeb_files import (
    DIM,
    N_QUERIES,
    ONE,
    SMALL,
    Embedder,
    edit,
    make_ranks,
    make_rows,
    oracle_vector,
    random_vector,
    write_task,
)
from scipy.stats import binomtest

from cocoa_lib.data.tables import META_TASKS
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding
from cocoa_lib.evaluate import TASKS, evaluate, read_ranks, read_runs, score_averages, score_tasks
from cocoa_lib.evaluate import __main__ as command
from cocoa_lib.evaluate.score import RANKS, rank
from cocoa_lib.evaluate.tasks import averages, read_published


@pytest.fixture(scope="module")
def all_tasks(tmp_path_factory):
    """MMEB-eval's layout with all 36 names."""
    root = tmp_path_factory.mktemp("mmeb")
    for task in SMALL:
        write_task(root, task.name, make_rows(task))
    return root


def run(embedder, root, tasks=SMALL, **options):
    return evaluate(embedder, root, tasks=tasks, show_progress=False, **options)


def test_the_36_tasks():
    assert len({task.name for task in TASKS}) == len(TASKS) == 36
    assert [sum(task.meta_task == meta for task in TASKS) for meta in META_TASKS] == [10, 10, 12, 4]
    assert sum(task.in_distribution for task in TASKS) == 20
    few = {t.name: t.n_candidates for t in TASKS if t.n_candidates != 1000}
    first = {"N24News": 24, "HatefulMemes": 2, "VOC2007": 20, "SUN397": 397, "Place365": 365}
    assert few == first | {"ImageNet-R": 200, "ObjectNet": 313, "Country211": 211}


def test_averages_are_those_computed_by_hand():
    # Classification 10..100, VQA all 50, retrieval 0 and 30 (ood), grounding 80, 20, 20, 20.
    scores = {task.name: 10.0 * (i + 1) for i, task in enumerate(TASKS[:10])}
    scores |= {task.name: 50.0 for task in TASKS[10:20]}
    scores |= {task.name: 0.0 if task.in_distribution else 30.0 for task in TASKS[20:32]}
    scores |= dict(zip([task.name for task in TASKS[32:]], [80.0, 20.0, 20.0, 20.0], strict=True))
    expected = {
        "classification": 55.0,  # 550 / 10
        "vqa": 50.0,
        "retrieval": 10.0,  # 4 * 30 / 12
        "grounding": 35.0,  # 140 / 4
        "ind": 26.5,  # (10+20+30+40+50 + 6*50 + 0 + 80) / 20
        "ood": 48.75,  # (60+70+80+90+100 + 4*50 + 4*30 + 3*20) / 16
        "overall": 36.3889,  # (550 + 500 + 120 + 140) / 36; the mean of the four would be 37.5
    }
    assert list(averages(scores)) == list(expected)
    assert averages(scores) == pytest.approx(expected, abs=1e-4)
    hits = {name: round(score / 10) for name, score in scores.items()}
    ranks = make_ranks({name: [1] * n + [2] * (10 - n) for name, n in hits.items()})
    table = score_averages(ranks).set_index("average")
    assert table["value"].to_dict() == pytest.approx(expected, abs=1e-4)
    assert table["n_tasks"].tolist() == [10, 10, 12, 4, 20, 16, 36]
    some = averages({"GQA": 40.0})
    assert (some["vqa"], some["ood"], some["overall"]) == (40, 40, 40) and np.isnan(some["ind"])
    with pytest.raises(ValueError, match="unknown.*GQQ"):
        averages({"GQQ": 1.0})


def test_published_rows_that_do_not_follow_from_their_own_scores():
    table = read_published()
    marked = table[~table["consistent"]]
    found = {(r.model, r.size): (r.overall, round(r.recomputed, 1)) for r in marked.itertuples()}
    assert found == {
        ("CoCoA (Qwen2-VL)", "2B"): (66.0, 66.2),
        ("UniME (Phi-3.5-V)", "4.2B"): (64.2, 61.3),
        ("UniME (LLaVA-1.6)", "7B"): (66.6, 63.6),
        ("VLM2Vec (Qwen2-VL)", "2B"): (59.3, 60.1),  # another table prints 60.1 over the same four
    }
    assert table["source"].notna().all() and table["evaluator"].notna().all()


def test_a_random_embedder_scores_at_chance(all_tasks):
    scores = score_tasks(run(Embedder(random_vector), all_tasks))
    first = scores[scores["metric"] == "p@1"]
    assert first["task"].tolist() == [task.name for task in TASKS]
    chance = 1 / first["n_candidates"]
    hits = (first["value"] * first["n"] / 100).round().astype(int)
    tests = [binomtest(h, n, c).pvalue for h, n, c in zip(hits, first["n"], chance, strict=True)]
    assert min(tests) > 0.05 / 36
    # 95 % intervals: about 2 of 36 miss chance.
    assert ((first["low"] <= 100 * chance) & (100 * chance <= first["high"])).sum() >= 30
    # hit@5 and MRR of a uniform rank among 8: 5/8 and H(8)/8.
    eight = scores[scores["n_candidates"] == 8].groupby("metric")["value"].mean()
    assert eight["hit@5"] == pytest.approx(100 * 5 / 8, abs=4)
    assert eight["mrr"] == pytest.approx(100 * sum(1 / r for r in range(1, 9)) / 8, abs=3)


@pytest.mark.parametrize(
    ("vector", "here", "public"), [(oracle_vector, 100, 100), (lambda *_: np.ones(DIM), 0, 100)]
)
def test_an_oracle_scores_100_and_equal_embeddings_0_but_100_by_the_public_rule(
    all_tasks, vector, here, public
):
    ranks = run(Embedder(vector), all_tasks)
    assert list(ranks.columns) == RANKS and len(ranks) == 36 * N_QUERIES
    assert (ranks["ties"] == ranks["rank"] - 1).all()
    for value, table in ((here, ranks), (public, ranks.assign(rank=ranks["rank"] - ranks["ties"]))):
        assert (score_averages(table)[["value", "low", "high"]] == value).all(axis=None)


def test_a_sample_of_queries_keeps_row_numbers(all_tasks):
    every = run(Embedder(random_vector), all_tasks, SMALL[:2])
    some = run(Embedder(random_vector), all_tasks, SMALL[:2], n_queries=10)
    assert some.groupby("task").size().tolist() == [10, 10] and some["query"].max() > 10
    both = some.merge(every, on=["task", "query"])
    assert len(both) == 20 and (both["rank_x"] == both["rank_y"]).all()


def test_all_is_checked_before_anything_is_encoded(all_tasks, tmp_path):
    first, last, embedder = SMALL[0], SMALL[1], Embedder(random_vector)
    write_task(tmp_path, first.name, make_rows(first))
    write_task(tmp_path, last.name, edit(make_rows(last), 3, qry_img_path="no.png"))
    with pytest.raises(FileNotFoundError, match=f"1 pictures .*{last.name}, row 3, qry_img_path"):
        run(embedder, tmp_path, (first, last))
    mmeb = next(task for task in TASKS if task.name == "GQA")  # must have its 1000 candidates
    with pytest.raises(ValueError, match="8 texts and 8 pictures of candidates, expected 1000"):
        run(embedder, all_tasks, (first, mmeb))
    assert embedder.calls == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qry_img_path": "half.png"}, "half.png: not a readable image"),
        ({"qry_text": "", "qry_img_path": ""}, "neither text nor image"),
    ],
)
def test_a_row_that_cannot_be_encoded_is_named(small, picture, tmp_path, fields, message):
    (tmp_path / "images").mkdir()
    picture().save(path := tmp_path / "images" / "half.png")
    path.write_bytes(path.read_bytes()[:2000])
    write_task(tmp_path, "DocVQA", edit(make_rows(ONE, 5), 3, **fields))
    with pytest.raises(ValueError, match=f"row 3, qry_img_path: .*{message}"):
        run(CocoaEmbedder(EosEmbedding(*small)), tmp_path, (ONE,))


ints = st.integers(-2, 2)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rank_is_what_counting_gives(data):
    """Small integers: products are exact, ties are many, pools have any length and any overlap."""
    n, q = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 6))
    pair = st.tuples(ints, ints)
    vectors = np.array(data.draw(st.lists(pair, min_size=n + q, max_size=n + q)), dtype=np.float32)
    queries, candidates = vectors[:q], vectors[q:]
    pool = st.lists(st.integers(0, n - 1), min_size=1, max_size=8)
    lists = [np.array(data.draw(pool)) for _ in range(q)]
    found = rank(queries, candidates, lists)
    for i, index in enumerate(lists):
        scores = candidates[index] @ queries[i]
        assert found["rank"][i] == 1 + (scores[1:] >= scores[0]).sum()
        assert found["ties"][i] == (scores[1:] == scores[0]).sum()
        assert (found["rank"][i] - found["ties"][i] == 1) == (scores.argmax() == 0)


@pytest.mark.parametrize("n_pool", [7, 997])
def test_equal_vectors_tie_wherever_they_stand(n_pool):
    """1536 dimensions, odd sizes: columns fall into different corners of a blocked product."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(5, 1536)).astype(np.float32)
    pool = np.tile(rng.normal(size=1536).astype(np.float32), (n_pool, 1))
    assert (rank(queries, pool, [np.arange(n_pool)] * 5)["ties"] == n_pool - 1).all()


@pytest.mark.parametrize("block", [64, 1 << 24])
@pytest.mark.parametrize("n_candidates", [40, 2000], ids=["one pool", "a pool a row"])
def test_near_ties_do_not_depend_on_the_order_of_candidates(n_candidates, block, monkeypatch):
    """Candidates that differ in the last bits: any order of table and lists gives the same ranks."""
    monkeypatch.setattr("cocoa_lib.evaluate.score.BLOCK", block)
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(20, 700)).astype(np.float32)
    base = rng.normal(size=700)
    pool = (base + 1e-7 * rng.normal(size=(n_candidates, 700))).astype(np.float32)
    lists = [rng.choice(n_candidates, 33, replace=False) for _ in range(20)]
    moved = rng.permutation(n_candidates)
    place = np.argsort(moved)
    shuffled = [place[np.r_[index[:1], rng.permutation(index[1:])]] for index in lists]
    pd.testing.assert_frame_equal(rank(queries, pool[moved], shuffled), rank(queries, pool, lists))


@pytest.mark.parametrize(("value", "lists"), [(np.nan, 3), (1, 2)], ids=["nan", "a list short"])
def test_rank_refuses_what_it_cannot_rank(value, lists):
    one = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="not finite|3 queries need as many lists"):
        rank(one, one * value, [np.arange(3)] * lists)


def test_metrics_and_intervals():
    rows = score_tasks(make_ranks({"GQA": [1, 2, 3, 11]})).set_index("metric")
    assert rows.loc["p@1", ["value", "n"]].tolist() == [25, 4] and rows.loc["hit@5", "value"] == 75
    assert rows.loc["mrr", "value"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3 + 1 / 11) / 4)
    assert rows.loc["ndcg@10", "value"] == pytest.approx(100 * (1 + 1 / np.log2(3) + 1 / 2) / 4)
    table = score_tasks(make_ranks({"GQA": [1] * 300 + [5] * 700}), n_boot=4000)
    width = 1.96 * 100 * np.sqrt(0.3 * 0.7 / 1000)
    assert table.loc[0, "low"] == pytest.approx(30 - width, abs=0.3)
    assert table.loc[0, "high"] == pytest.approx(30 + width, abs=0.3)


def test_intervals_of_the_averages_are_over_queries_within_tasks():
    ranks = {"GQA": [1] * 300 + [2] * 700, "DocVQA": [1] * 20 + [2] * 20, "OVEN": [3] * 50}
    table = score_averages(make_ranks(ranks), n_boot=8000).set_index("average")
    values = [np.nan, 40, 0, np.nan, 50, 15, 80 / 3]
    assert table["value"].tolist() == pytest.approx(values, nan_ok=True)
    # Of a task 100 sqrt(p (1 - p) / n); of a mean of m tasks the root of their squares over m.
    gqa, doc = 0.3 * 0.7 / 1000, 0.25 / 40
    errors = {"vqa": (gqa + doc) / 4, "ind": doc, "ood": gqa / 4, "overall": (gqa + doc) / 9}
    for name, squared in errors.items():
        width, middle = 196 * np.sqrt(squared), table.loc[name, "value"]
        wanted = pytest.approx([middle - width, middle + width], abs=0.2 * width)
        assert table.loc[name, ["low", "high"]].tolist() == wanted
    assert table.loc[["classification", "grounding"], ["low", "high"]].isna().all(axis=None)
    assert table["n_tasks"].tolist() == [0, 2, 1, 0, 1, 2, 3] and table.loc["overall", "n"] == 1090


def test_the_command_writes_ranks_prints_averages_and_fills_the_card(
    all_tasks, tmp_path, monkeypatch, capsys
):
    folder, out, model = tmp_path / "data", tmp_path / "out", tmp_path / "the-model"
    for task in SMALL[:2]:
        shutil.copytree(all_tasks / "eval" / task.name, folder / "eval" / task.name)
    fields = [[t.name, t.meta_task, t.in_distribution, t.n_candidates] for t in SMALL[:3]]
    manifest = pd.Series({"tasks": fields, "content_hash": "c0ffee"})
    manifest.to_json(folder / "manifest.json")
    load = SimpleNamespace(load=lambda path, dtype: Embedder(oracle_vector, fingerprint="f00"))
    monkeypatch.setattr(command, "CocoaEmbedder", load)
    model.mkdir()
    note = '{"eos_token": "", "max_length": 9, "weights_sha256": "5a5a"}'
    (model / "cocoa.json").write_text(note)
    command.main([str(model), "--root", str(folder), "--out", str(out), "--n-queries", "12"])
    printed = capsys.readouterr().out
    assert f"MISSING: {SMALL[2].name}" in printed and "vqa" not in printed
    shown = ["overall", "100.0", "100.0", "100.0", "2", "24"]  # value, low, high, tasks, queries
    assert shown in [line.split() for line in printed.splitlines()]
    ranks, run_facts = read_ranks(out), read_runs(out).iloc[0]
    assert list(ranks.columns) == ["arm", "seed", *RANKS] and len(ranks) == 24
    assert set(ranks["arm"]) == {"the-model"}
    assert (run_facts["data"], run_facts["fingerprint"]) == ("c0ffee", "f00")
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "5a5a" in card and f"Missing tasks: {SMALL[2].name}" in card
    assert shown in [line.split() for line in card.splitlines()]
