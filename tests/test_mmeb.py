"""MMEB: tasks, rows, ranking, scores. Every rule of the evaluation has a test in which breaking it shows."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from cocoa_lib.data.tables import META_TASKS, Task, load_eval, load_train, resolve_image
from cocoa_lib.embedder import CocoaEmbedder, EosEmbedding
from cocoa_lib.evaluate.__main__ import main
from cocoa_lib.evaluate.encode import encode_distinct, item_key
from cocoa_lib.evaluate.score import average_intervals, evaluate, rank, score_ranks
from cocoa_lib.evaluate.tasks import TASKS, compared, groups, published

N_QUERIES, DIM = 40, 32
SMALL = tuple(replace(task, n_candidates=min(task.n_candidates, 8)) for task in TASKS)
ONE = (Task("DocVQA", "vqa", True, 3),)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Arrow files that `datasets` makes of the parquet files go away with the test."""
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("arrow")
    yield
    datasets.config.HF_DATASETS_CACHE = before


class Embedder:
    """Vectors from a function of (text, image path or None); counts what it encodes, stops after `limit` calls."""

    def __init__(self, vector, fingerprint="a", limit=10**9):
        self.vector, self.fingerprint, self.limit = vector, fingerprint, limit
        self.calls, self.seen = 0, []

    def encode(self, items, batch_size, show_progress):
        if self.calls >= self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        self.seen += [(item["text"], item["image"] and item["image"].name) for item in items]
        vectors = np.stack([self.vector(item["text"], item["image"]) for item in items]).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_vector(text, image):
    seed = item_key({"text": text, "image": image})
    return np.random.default_rng(list(seed)).normal(size=DIM)


def oracle_vector(text, image):
    """By the number in the text: query 7 and its answer 7 get the same vector."""
    return np.random.default_rng(int(re.findall(r"\d+", text)[-1])).normal(size=DIM)


def write_task(
    root: Path, task: str, rows: list[dict] | pd.DataFrame, file: str = "test-00000-of-00001.parquet"
) -> Path:
    path = root / task / file
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path, index=False)
    return path


def make_rows(task: Task, n: int = N_QUERIES, shuffle: int | None = None) -> list[dict]:
    """Query i is answered by candidate i; the others are other numbers, drawn for each row."""
    rng, rows = np.random.default_rng(len(task.name)), []
    for i in range(n):
        wrong = rng.choice([j for j in range(n) if j != i], task.n_candidates - 1, replace=False)
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(wrong)
        texts = [f"{task.name} answer {j}" for j in (i, *wrong)]
        row = {"qry_text": f"{task.name} query {i}", "qry_img_path": ""}
        rows.append({**row, "tgt_text": texts, "tgt_img_path": [""] * len(texts)})
    return rows


@pytest.fixture(scope="module")
def all_tasks(tmp_path_factory) -> Path:
    """MMEB-eval's layout with all 36 names."""
    root = tmp_path_factory.mktemp("mmeb")
    for task in SMALL:
        write_task(root, task.name, make_rows(task))
    return root


def run(embedder, root, tasks=SMALL, **settings):
    return evaluate(embedder, str(root), tasks=tasks, show_progress=False, **settings)


def p_at_1(results: pd.DataFrame) -> dict[str, float]:
    return results[results["metric"] == "p@1"].set_index("task")["value"].to_dict()


# Tasks and averages


def test_the_36_tasks():
    names = [task.name for task in TASKS]
    assert len(set(names)) == len(names) == 36
    assert [sum(task.meta_task == meta for task in TASKS) for meta in META_TASKS] == [10, 10, 12, 4]
    assert sum(task.in_distribution for task in TASKS) == 20
    few = {task.name: task.n_candidates for task in TASKS if task.n_candidates != 1000}
    assert few == {"N24News": 24, "HatefulMemes": 2, "VOC2007": 20, "SUN397": 397, "Place365": 365,
                   "ImageNet-R": 200, "ObjectNet": 313, "Country211": 211}  # fmt: skip
    assert all(task.meta_task == "classification" for task in TASKS if task.name in few)


def test_averages_are_those_computed_by_hand():
    # Classification 10..100, VQA all 50, retrieval 0 in distribution and 30 out of it, grounding 80, 20, 20, 20.
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
        "overall": 36.3889,  # (550 + 500 + 120 + 140) / 36; the mean of the four means would be 37.5
    }
    means = {name: np.mean([scores[task] for task in names]) for name, names in groups(TASKS).items()}
    assert means == pytest.approx(expected, abs=1e-4)
    found = per_query({task: [1] * round(score / 10) + [2] * round(10 - score / 10) for task, score in scores.items()})
    table = average_intervals(found).set_index("average")
    assert table["value"].to_dict() == pytest.approx(expected, abs=1e-4)
    assert table["n_tasks"].tolist() == [10, 10, 12, 4, 20, 16, 36]


def test_missing_tasks_are_left_out_and_unknown_ones_refused():
    table = average_intervals(per_query({"GQA": [1] * 4 + [2] * 6})).set_index("average")
    assert table.loc[["vqa", "ood", "overall"], "value"].tolist() == [40, 40, 40]
    assert table.loc[["grounding", "ind"], "value"].isna().all()
    assert table["n_tasks"].tolist() == [0, 1, 0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="unknown.*GQQ"):
        average_intervals(per_query({"GQQ": [1]}))


def test_published_rows_that_do_not_follow_from_their_own_scores():
    table = published()
    marked = table[~table["consistent"]]
    found = {(row.model, row.size): (row.overall, round(row.recomputed, 1)) for row in marked.itertuples()}
    assert found == {
        ("CoCoA (Qwen2-VL)", "2B"): (66.0, 66.2),
        ("UniME (Phi-3.5-V)", "4.2B"): (64.2, 61.3),
        ("UniME (LLaVA-1.6)", "7B"): (66.6, 63.6),
        ("VLM2Vec (Qwen2-VL)", "2B"): (59.3, 60.1),  # another table prints 60.1 over the same four scores
    }
    assert table["source"].notna().all() and table["evaluator"].notna().all()
    assert not table.duplicated(["model", "size", "overall", "evaluator", "source"]).any()


# Rows


def test_all_36_names_are_read_from_a_local_copy(all_tasks, tmp_path):
    for task in SMALL:
        rows = load_eval(str(all_tasks), task.name, n_candidates=task.n_candidates)
        assert rows[:] == pd.DataFrame(make_rows(task)).to_dict("list")
    (tmp_path / "data [old]").mkdir()  # a name with glob characters, and the layout with eval/ in it
    (tmp_path / "data [old]" / "eval").symlink_to(all_tasks)
    assert len(load_eval(str(tmp_path / "data [old]"), "GQA")) == N_QUERIES


def test_several_shards_and_a_changed_file_are_read_as_they_are(tmp_path):
    rows = make_rows(ONE[0], 6)
    write_task(tmp_path, "DocVQA", rows[:2], "test-00000-of-00002.parquet")
    write_task(tmp_path, "DocVQA", rows[2:4], "test-00001-of-00002.parquet")
    assert load_eval(str(tmp_path), "DocVQA")["qry_text"][:] == [row["qry_text"] for row in rows[:4]]
    write_task(tmp_path, "DocVQA", rows[4:], "test-00001-of-00002.parquet")
    assert load_eval(str(tmp_path), "DocVQA")["qry_text"][2:] == [row["qry_text"] for row in rows[4:]]


def test_the_hub_is_the_same_code_with_another_root(tmp_path, monkeypatch):
    asked, local = [], datasets.Dataset.from_list(make_rows(ONE[0], 4))
    record = lambda files, split, cache_dir: asked.append((files, split, cache_dir)) or local  # noqa: E731
    monkeypatch.setattr(datasets.Dataset, "from_parquet", record)
    rows = load_eval("TIGER-Lab/MMEB-eval", "DocVQA", revision="abc", n_candidates=3)
    assert asked == [({"test": "hf://datasets/TIGER-Lab/MMEB-eval@abc/DocVQA/test-*.parquet"}, "test", None)]
    assert len(rows) == 4
    with pytest.raises(ValueError, match="image_root"):
        evaluate(Embedder(random_vector), "TIGER-Lab/MMEB-eval")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_eval(str(tmp_path / "nowhere"), "DocVQA")
    with pytest.raises(FileNotFoundError, match="DocVQA.*test-.*folders in .*: GQA"):
        (tmp_path / "GQA").mkdir()
        load_eval(str(tmp_path), "DocVQA")


def edit(row: int, **fields):
    return lambda rows: [{**r, **fields} if i == row else r for i, r in enumerate(rows)]


def drop(name: str):
    return lambda rows: [{key: value for key, value in row.items() if key != name} for row in rows]


BAD_ROWS = {
    "no column": (drop("tgt_img_path"), r"no column tgt_img_path; found qry_text"),
    "a number for a text": (
        lambda rows: [{**row, "qry_text": 3} for row in rows],
        r"column qry_text must hold strings",
    ),
    "a text for a list": (lambda rows: [{**row, "tgt_text": "a"} for row in rows], r"column tgt_text must hold lists"),
    "empty query": (edit(2, qry_text="  "), r"row 2, column qry_text/qry_img_path: neither text nor image"),
    "empty candidate": (
        edit(1, tgt_text=["a", "", "c"]),
        r"row 1, column tgt_text/tgt_img_path: candidate 1 has neither",
    ),
    "unequal lists": (edit(3, tgt_text=["a", "b"]), r"row 3, column tgt_text/tgt_img_path: lists of 2 and 3"),
    "null list": (edit(0, tgt_text=None, tgt_img_path=None), r"row 0, column tgt_text: 0 candidates, expected 3"),
    "too few": (edit(4, tgt_text=["a"], tgt_img_path=[""]), r"row 4, column tgt_text: 1 candidates, expected 3"),
    "copy of the answer": (
        edit(2, tgt_text=["a", "b", "a"]),
        r"row 2, column tgt_text/tgt_img_path: candidate 2 is the",
    ),
    "no rows": (lambda rows: pd.DataFrame(rows)[:0], "empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_name_file_row_and_column(case, tmp_path):
    change, message = BAD_ROWS[case]
    path = write_task(tmp_path, "DocVQA", change(make_rows(ONE[0], 5)))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
        load_eval(str(tmp_path), "DocVQA", n_candidates=3)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    path = write_task(tmp_path, "DocVQA", make_rows(ONE[0], 5))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*not readable as parquet"):
        load_eval(str(tmp_path), "DocVQA")


def test_a_copy_of_the_answer_counts_once_if_asked(tmp_path):
    write_task(tmp_path, "DocVQA", edit(2, tgt_text=["answer 2", "b 9", "answer 2"])(make_rows(ONE[0], 5)))
    with pytest.raises(ValueError, match="duplicates='once'"):
        run(Embedder(oracle_vector), tmp_path, ONE)
    results, per_query = run(Embedder(oracle_vector), tmp_path, ONE, duplicates="once")
    assert p_at_1(results) == {"DocVQA": 100.0}
    assert per_query["n_candidates"].tolist() == [3, 3, 2, 3, 3]


def test_training_rows(tmp_path):
    row = {"qry": "<|image_1|> what?", "qry_image_path": "a.png", "pos_text": "a cat", "pos_image_path": ""}
    write_task(tmp_path / "train", "ChartQA", [row] * 5, "original-00000-of-00001.parquet")
    write_task(tmp_path / "train", "ChartQA", [{**row, "qry": "x"}], "diverse_instruction-00000-of-00001.parquet")
    rows = load_train(str(tmp_path), "ChartQA", n=3)
    assert len(rows) == 3 and rows[0] == row
    assert len(load_train(str(tmp_path / "train"), "ChartQA", n=99)) == 5
    with pytest.raises(ValueError, match="no column neg_text"):
        load_train(str(tmp_path), "ChartQA", negatives=True)
    path = write_task(tmp_path / "train", "GQA", [row, {**row, "pos_text": None}], "original-0.parquet")
    with pytest.raises(ValueError, match=re.escape(str(path)) + ", row 1, column pos_text/pos_image_path: neither"):
        load_train(str(tmp_path), "GQA")
    with pytest.raises(ValueError, match="no column qry_image_path"):
        write_task(tmp_path / "train", "OVEN", drop("qry_image_path")([row]), "original-0.parquet")
        load_train(str(tmp_path), "OVEN")


def test_image_paths_stay_in_the_folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "sub" / "a.png").write_bytes(b"y")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "sub" / "a.png")
    assert resolve_image(root, "sub/a.png").read_bytes() == b"y"
    assert resolve_image(root, "in.png").read_bytes() == b"y"
    absolute = str(tmp_path / "secret.png")
    for rel in ("../secret.png", "sub/../../secret.png", absolute, "out.png", "C:/a.png", "..\\secret.png", "a\0.png"):
        with pytest.raises(ValueError, match="image path"):
            resolve_image(root, rel)
    for rel in ("sub/b.png", "sub"):
        with pytest.raises(FileNotFoundError, match=rel):
            resolve_image(root, rel)


@pytest.mark.parametrize("column", ["qry_img_path", "tgt_img_path"])
def test_a_path_that_escapes_names_its_row(column, tmp_path):
    (tmp_path / "images").mkdir()
    value = "../x.png" if column == "qry_img_path" else ["../x.png", "", ""]
    write_task(tmp_path, "DocVQA", edit(3, **{column: value})(make_rows(ONE[0], 5)))
    embedder = Embedder(random_vector)
    with pytest.raises(ValueError, match=f"DocVQA, row 3, column {column}: image path '../x.png'"):
        run(embedder, tmp_path, ONE)
    assert embedder.calls == 0


def test_a_bad_row_of_the_last_task_is_found_before_anything_is_encoded(all_tasks, tmp_path):
    tasks = SMALL[:2]
    for task in tasks:
        shutil.copytree(all_tasks / task.name, tmp_path / task.name)
    (tmp_path / "images").mkdir()
    last = tasks[-1]
    write_task(tmp_path, last.name, edit(3, qry_text="", qry_img_path="")(make_rows(last)))
    embedder = Embedder(random_vector)
    with pytest.raises(ValueError, match=f"{last.name}.*row 3, column qry_text/qry_img_path: neither"):
        run(embedder, tmp_path, tasks)
    assert embedder.calls == 0


def test_lists_of_nothing_but_nothing_are_empty_paths(tmp_path):
    rows = make_rows(ONE[0], 5)
    write_task(tmp_path, "DocVQA", [{**row, "tgt_img_path": [None] * len(row["tgt_text"])} for row in rows])
    assert len(load_eval(str(tmp_path), "DocVQA")) == 5


# Scores


def test_a_random_embedder_scores_at_chance(all_tasks):
    results, _ = run(Embedder(random_vector), all_tasks)
    first = results[results["metric"] == "p@1"]
    assert first["task"].tolist() == [task.name for task in TASKS]
    chance = 1 / first["n_candidates"]
    hits = (first["value"] * first["n"] / 100).round().astype(int)
    tests = [binomtest(h, n, c).pvalue for h, n, c in zip(hits, first["n"], chance, strict=True)]
    assert min(tests) > 0.05 / 36
    # 95 % intervals: about 2 of 36 miss chance.
    assert ((first["low"] <= 100 * chance) & (100 * chance <= first["high"])).sum() >= 30
    # hit@5 and MRR of a uniform rank among 8: 5/8 and H(8)/8.
    eight = results[results["n_candidates"] == 8].groupby("metric")["value"].mean()
    assert eight["hit@5"] == pytest.approx(100 * 5 / 8, abs=4)
    assert eight["mrr"] == pytest.approx(100 * sum(1 / r for r in range(1, 9)) / 8, abs=3)


def test_identical_embeddings_score_0_and_100_by_the_public_rule(all_tasks):
    same = Embedder(lambda text, image: np.ones(DIM))
    ours, _ = run(same, all_tasks)
    assert set(p_at_1(ours).values()) == {0.0} and (ours["ties"] == N_QUERIES).all()
    public, _ = run(same, all_tasks, ties="public")
    assert set(p_at_1(public).values()) == {100.0} and (public["ties"] == N_QUERIES).all()
    assert ours["evaluator"].unique().tolist() == ["cocoa_lib mmeb, ties against the answer"]


def test_an_oracle_scores_100_everywhere(all_tasks):
    results, per_query = run(Embedder(oracle_vector), all_tasks)
    assert (results["value"] == 100).all() and (results["low"] == 100).all() and (results["ties"] == 0).all()
    assert len(results) == 36 * 4 and len(per_query) == 36 * N_QUERIES and (per_query["rank"] == 1).all()
    assert average_intervals(per_query).set_index("average").loc["overall", "value"] == 100


def test_shuffled_candidates_and_rows_change_nothing(all_tasks, tmp_path):
    task = replace(SMALL[10], n_candidates=8)
    write_task(tmp_path, task.name, make_rows(task, shuffle=5))
    before, ranks = run(Embedder(random_vector), all_tasks, (task,))
    after, shuffled = run(Embedder(random_vector), tmp_path, (task,))
    pd.testing.assert_frame_equal(before, after)
    pd.testing.assert_frame_equal(ranks, shuffled)
    write_task(tmp_path, task.name, make_rows(task)[::-1])
    backwards, _ = run(Embedder(random_vector), tmp_path, (task,))
    pd.testing.assert_frame_equal(before, backwards)


def test_a_sample_of_queries_keeps_row_numbers(all_tasks):
    _, every = run(Embedder(random_vector), all_tasks, SMALL[:2])
    results, some = run(Embedder(random_vector), all_tasks, SMALL[:2], n_queries=10, seed=3)
    assert (results["n"] == 10).all() and some["query"].max() > 10
    both = some.merge(every, on=["task", "query"])
    assert len(both) == 20 and (both["rank_x"] == both["rank_y"]).all()


def test_one_image_with_two_texts_is_two_candidates(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"not decoded here")
    row = {
        "qry_text": "query 1",
        "qry_img_path": "",
        "tgt_text": ["caption 1", "caption 2"],
        "tgt_img_path": ["a.png"] * 2,
    }
    write_task(tmp_path, "WebQA", [row])
    embedder = Embedder(oracle_vector)
    results, _ = run(embedder, tmp_path, (Task("WebQA", "retrieval", True, 2),))
    assert p_at_1(results) == {"WebQA": 100.0}
    assert sorted(embedder.seen, key=str) == [("caption 1", "a.png"), ("caption 2", "a.png"), ("query 1", None)]


def test_metrics_and_intervals():
    rows = {row["metric"]: row for row in score_ranks(np.array([1, 2, 3, 11]))}
    assert rows["p@1"]["value"] == 25 and rows["hit@5"]["value"] == 75 and rows["p@1"]["n"] == 4
    assert rows["mrr"]["value"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3 + 1 / 11) / 4)
    assert rows["ndcg@10"]["value"] == pytest.approx(100 * (1 + 1 / np.log2(3) + 1 / 2) / 4)
    ranks = np.repeat([1, 5], [300, 700])
    row = score_ranks(ranks, n_boot=4000)[0]
    width = 1.96 * 100 * np.sqrt(0.3 * 0.7 / 1000)
    assert [row["low"], row["high"]] == pytest.approx([30 - width, 30 + width], abs=0.3)
    assert score_ranks(ranks[::-1]) == score_ranks(ranks)
    with pytest.raises(ValueError, match="no queries"):
        score_ranks(np.array([]))


# Ranking

ints = st.integers(-2, 2)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rank_is_what_counting_gives(data):
    """Small integers: products are exact, ties are many, pools have any length and any overlap."""
    n, q = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 6))
    vectors = np.array(data.draw(st.lists(st.tuples(ints, ints), min_size=n + q, max_size=n + q)), dtype=np.float32)
    queries, candidates = vectors[:q], vectors[q:]
    lists = [np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))) for _ in range(q)]
    against = rank(queries, candidates, lists, block=data.draw(st.integers(1, 64)))
    public = rank(queries, candidates, lists, ties="public")
    for i, index in enumerate(lists):
        scores = candidates[index] @ queries[i]
        assert against["rank"][i] == 1 + (scores[1:] >= scores[0]).sum()
        assert public["rank"][i] == 1 + (scores > scores[0]).sum()
        assert against["ties"][i] == public["ties"][i] == (scores[1:] == scores[0]).sum()
        assert (public["rank"][i] == 1) == (scores.argmax() == 0)


@pytest.mark.parametrize("n_pool", [7, 997])
def test_equal_vectors_tie_wherever_they_stand(n_pool):
    """1536 dimensions, odd sizes: columns fall into different corners of a blocked product."""
    rng = np.random.default_rng(0)
    queries, one = rng.normal(size=(5, 1536)).astype(np.float32), rng.normal(size=1536).astype(np.float32)
    lists = [np.arange(n_pool)] * 5
    assert (rank(queries, np.tile(one, (n_pool, 1)), lists)["ties"] == n_pool - 1).all()


@pytest.mark.parametrize("n_candidates", [40, 2000], ids=["one pool", "a pool a row"])
def test_near_ties_do_not_depend_on_the_order_of_candidates(n_candidates):
    """Candidates that differ in the last bits: any order of table and lists gives the same ranks."""
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(20, 700)).astype(np.float32)
    base = rng.normal(size=700)
    candidates = (base + 1e-7 * rng.normal(size=(n_candidates, 700))).astype(np.float32)
    lists = [rng.choice(n_candidates, 33, replace=False) for _ in range(20)]
    before = rank(queries, candidates, lists)
    moved = rng.permutation(n_candidates)
    place = np.argsort(moved)
    shuffled = [place[np.r_[index[:1], rng.permutation(index[1:])]] for index in lists]
    pd.testing.assert_frame_equal(rank(queries, candidates[moved], shuffled), before)


def test_rank_refuses_what_it_cannot_rank():
    queries, candidates = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    broken = candidates.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match="candidate 1 has values that are not finite"):
        rank(queries, broken, [np.arange(3)] * 3)
    with pytest.raises(ValueError, match="query 1"):
        rank(broken, candidates, [np.arange(3)] * 3)
    with pytest.raises(ValueError, match="3 queries need as many lists"):
        rank(queries, candidates, [np.arange(3)] * 2)
    with pytest.raises(ValueError, match="ties must be"):
        rank(queries, candidates, [np.arange(3)] * 3, ties="lucky")


# Embeddings on disk


def test_each_distinct_item_is_encoded_once_in_order_of_length():
    texts = ["long " * 5, "b", "b", "a", "long " * 5]
    embedder = Embedder(random_vector)
    vectors = encode_distinct(embedder, [{"text": t, "image": None} for t in texts], show_progress=False)
    assert len(embedder.seen) == 3 and embedder.seen[-1][0] == texts[0]
    expected = Embedder(random_vector).encode([{"text": t, "image": None} for t in texts], 1, False)
    np.testing.assert_array_equal(vectors, expected)


def test_an_interrupted_evaluation_goes_on_and_a_second_one_encodes_nothing(all_tasks, tmp_path):
    options = {"cache_dir": tmp_path, "batch_size": 4, "tasks": SMALL[:3]}
    plain, _ = run(Embedder(random_vector), all_tasks, SMALL[:3], batch_size=4)
    cut = Embedder(random_vector, limit=7)
    with pytest.raises(KeyboardInterrupt):
        run(cut, all_tasks, **options)
    resumed = Embedder(random_vector)
    results, _ = run(resumed, all_tasks, **options)
    pd.testing.assert_frame_equal(results, plain)
    assert len(cut.seen) == 7 * 16 and not set(cut.seen) & set(resumed.seen)
    assert len(cut.seen) + len(resumed.seen) == len(set(cut.seen + resumed.seen))
    again = Embedder(random_vector)
    results, _ = run(again, all_tasks, **options)
    assert again.calls == 0
    pd.testing.assert_frame_equal(results, plain)
    other = Embedder(oracle_vector, fingerprint="another model")
    results, _ = run(other, all_tasks, **options)
    assert other.calls > 0 and set(p_at_1(results).values()) == {100.0}
    with pytest.raises(ValueError, match="fingerprint"):
        run(Embedder(random_vector, fingerprint=""), all_tasks, **options)


def test_two_processes_share_the_work_and_give_the_same_table(all_tasks, tmp_path):
    plain, _ = run(Embedder(random_vector), all_tasks, SMALL[:4], batch_size=4)
    meet, tables, embedders = threading.Barrier(2, timeout=30), {}, [Embedder(random_vector), Embedder(random_vector)]

    def process(i):
        shares = {"process_index": i, "num_processes": 2, "wait": meet.wait}
        tables[i], _ = run(embedders[i], all_tasks, SMALL[:4], batch_size=4, cache_dir=tmp_path, **shares)

    threads = [threading.Thread(target=process, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pd.testing.assert_frame_equal(tables[0], plain)
    pd.testing.assert_frame_equal(tables[1], plain)
    first, second = (embedder.seen for embedder in embedders)
    assert not set(first) & set(second) and min(len(first), len(second)) > 0.3 * len(first + second)


def test_every_process_has_its_share_of_the_pictures(tmp_path):
    """They are last in the order by length, and what takes the time: 60 of them among 120 texts, batches of 8."""
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(bytes([i]))
    items = [{"text": f"{i}", "image": None} for i in range(120)]
    items += [{"text": "", "image": tmp_path / f"{i}.png"} for i in range(60)]
    counts = []
    for i in range(4):
        seen = []
        spy = SimpleNamespace(encode=lambda some, seen=seen, **_: seen.extend(some) or np.ones((len(some), 1)))
        with contextlib.suppress(RuntimeError):  # the others' shares are missing
            encode_distinct(spy, items, cache_dir=tmp_path / str(i), process_index=i, num_processes=4, batch_size=8,
                                 wait=lambda: None, show_progress=False)  # fmt: skip
        counts.append(sum(item["image"] is not None for item in seen))
    assert sum(counts) == 60 and max(counts) - min(counts) <= 8, counts


def test_a_share_that_is_missing_is_reported(tmp_path):
    items = [{"text": f"{i}", "image": None} for i in range(100)]
    share = {"process_index": 0, "num_processes": 2, "wait": lambda: None, "batch_size": 4, "show_progress": False}
    with pytest.raises(RuntimeError, match="48 of 100 embeddings are not in"):
        encode_distinct(Embedder(random_vector), items, cache_dir=tmp_path, **share)
    with pytest.raises(ValueError, match="cache_dir"):
        encode_distinct(Embedder(random_vector), items, **share)


def test_keys_follow_content(tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    a.write_bytes(b"1")
    b.write_bytes(b"1")
    key = item_key({"text": "t", "image": a})
    assert key == item_key({"text": "t", "image": b}) != item_key({"text": "u", "image": a})
    a.write_bytes(b"22")
    assert key != item_key({"text": "t", "image": a}) != item_key({"text": "t", "image": None})


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda items: np.full((len(items), 4), np.nan), "has length nan"),
        (lambda items: np.ones((len(items), 4)), "'text': 'x'.* has length 2, expected 1"),
        (lambda items: np.ones((len(items) + 1, 4)) / 2, r"shape \(2, 4\) for 1 items"),
    ],
)
def test_embeddings_that_cannot_be_compared_are_refused_and_not_kept(encode, message, tmp_path):
    embedder = SimpleNamespace(encode=lambda items, **_: encode(items))
    with pytest.raises(ValueError, match=message):
        encode_distinct(embedder, [{"text": "x", "image": None}], cache_dir=tmp_path, show_progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_shard_is_named(tmp_path):
    items = [{"text": "x", "image": None}]
    encode_distinct(Embedder(random_vector), items, cache_dir=tmp_path, show_progress=False)
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{shard.name}: damaged.*delete it"):
        encode_distinct(Embedder(random_vector), items, cache_dir=tmp_path, show_progress=False)


# Results


def per_query(ranks: dict[str, list[int]], n_candidates: int = 9) -> pd.DataFrame:
    parts = [pd.DataFrame({"task": task, "query": range(len(r)), "rank": r}) for task, r in ranks.items()]
    return pd.concat(parts, ignore_index=True).assign(n_candidates=n_candidates)


def test_intervals_of_the_averages_are_over_queries_within_tasks():
    tasks = (Task("GQA", "vqa", False, 9), Task("DocVQA", "vqa", True, 9), Task("OVEN", "retrieval", False, 9))
    found = per_query({"GQA": [1] * 300 + [2] * 700, "DocVQA": [1] * 20 + [2] * 20, "OVEN": [3] * 50})
    table = average_intervals(found, tasks, n_boot=8000).set_index("average")
    assert table.index.tolist() == ["classification", "vqa", "retrieval", "grounding", "ind", "ood", "overall"]
    assert table["value"].tolist() == pytest.approx([np.nan, 40, 0, np.nan, 50, 15, 80 / 3], nan_ok=True)
    # Standard errors by hand: of a task 100 sqrt(p (1 - p) / n), of a mean of m tasks the root of their squares over m.
    gqa, doc = 0.3 * 0.7 / 1000, 0.25 / 40
    for name, mean, error in (
        ("vqa", 40, np.sqrt(gqa + doc) / 2), ("ind", 50, np.sqrt(doc)), ("ood", 15, np.sqrt(gqa) / 2),
        ("overall", 80 / 3, np.sqrt(gqa + doc) / 3),
    ):  # fmt: skip
        width = 196 * error
        assert table.loc[name, ["low", "high"]].tolist() == pytest.approx([mean - width, mean + width], abs=0.2 * width)
    assert table.loc["retrieval", ["value", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc[["classification", "grounding"], ["value", "low", "high"]].isna().all(axis=None)
    assert table["n_tasks"].tolist() == [0, 2, 1, 0, 1, 2, 3] and table.loc["overall", "n"] == 1090
    same = average_intervals(found.sample(frac=1, random_state=0), tasks, n_boot=8000)
    pd.testing.assert_frame_equal(same.set_index("average"), table)
    with pytest.raises(ValueError, match="unknown task.*OVEN"):
        average_intervals(found, tasks[:2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "not a readable image"),
        ("half.png", None, "not a readable image"),
        ("no.png", b"text", "not a readable image"),
    ],
)
def test_a_bad_picture_of_a_row_is_named(small, picture, tmp_path, name, content, message):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / name)
    content = (tmp_path / "images" / name).read_bytes()[:2000] if content is None else content
    (tmp_path / "images" / name).write_bytes(content)
    write_task(tmp_path, "DocVQA", edit(3, qry_img_path=name)(make_rows(ONE[0], 5)))
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        run(CocoaEmbedder(EosEmbedding(*small)), tmp_path, ONE)
    (tmp_path / "images" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"row 3, column qry_img_path: image '{name}' not found"):
        run(CocoaEmbedder(EosEmbedding(*small)), tmp_path, ONE)


def test_the_command_line_writes_what_the_notebook_does(all_tasks, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    (folder / "eval").mkdir(parents=True)
    for task in SMALL[:2]:
        (folder / "eval" / task.name).symlink_to(all_tasks / task.name)
    fields = [[t.name, t.meta_task, t.in_distribution, t.n_candidates] for t in SMALL[:2]]
    (folder / "manifest.json").write_text(json.dumps({"generator": "pairs", "tasks": fields, "content_hash": "c0ffee"}))
    model = SimpleNamespace(load=lambda path, dtype: Embedder(oracle_vector, fingerprint=path))
    monkeypatch.setitem(sys.modules, "cocoa_lib.embedder", SimpleNamespace(CocoaEmbedder=model))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "the-model").mkdir()
    (tmp_path / "the-model" / "cocoa.json").write_text('{"eos_token": "", "max_length": 9, "weights_sha256": "5a5a"}')
    out = tmp_path / "out"
    main(["the-model", "--root", str(folder), "--out", str(out), "--n-queries", "12"])
    printed = capsys.readouterr().out
    assert re.search(r"classification +100\.0 \[100\.0, 100\.0\]", printed) and "vqa" not in printed
    assert re.search(r"overall +100\.0 \[", printed)
    averages = pd.read_csv(out / "averages.csv").set_index("average")
    assert averages.loc["overall", ["value", "n_tasks", "n"]].tolist() == [100, 2, 24]
    results = pd.read_csv(out / "results.csv")
    assert results["task"].nunique() == 2 and (results["n"] == 12).all()
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["evaluator"] == "cocoa_lib mmeb, ties against the answer" and facts["fingerprint"] == "the-model"
    assert facts["data"] == "c0ffee"
    assert len(pd.read_parquet(out / "per_query.parquet")) == 24
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    main(["the-model", "--root", str(folder), "--out", str(out), "--tasks", "ImageNet-1K"])
    assert "MISSING: N24News" in capsys.readouterr().out
    card = (tmp_path / "the-model" / "README.md").read_text(encoding="utf-8")
    assert "5a5a" in card and "| overall | 1 | 100.0 | 100.0 to 100.0 |" in card and "Missing tasks: N24News" in card
    assert f"on `{tmp_path.name}/data`, 1 tasks, 40 queries" in card and card.count("## Scores") == 1
    with pytest.raises(ValueError, match="unknown task.*GQA"):
        main(["the-model", "--root", str(folder), "--out", str(out), "--tasks", "GQA"])
    with pytest.raises(FileNotFoundError, match="runs/lap/data: no such folder, and not a hub name"):
        main(["the-model", "--root", "runs/lap/data", "--image-root", ".", "--out", str(out)])


def test_the_compared_models_are_the_baselines_then_cocoa_and_moca():
    rows = compared()
    assert set(rows["size"]) == {"3B"} and rows["label"].is_unique
    causal, bidirectional, ours, moca = rows["label"]
    assert "causal, contrastive only" in causal and "bidirectional, contrastive only" in bidirectional
    assert ours.startswith("CoCoA") and moca.startswith("MoCa")
