"""The search for learning rate and steps: trials on development queries, none run twice, rows gathered."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from mmeb_files import Embedder, random_vector

from cocoa_lib.data.tables import load_eval
from cocoa_lib.evaluate import evaluate
from cocoa_lib.run import Run
from cocoa_lib.store.checkpoint import read_meta

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import search  # noqa: E402

FAST = {"steps": 2, "batch_size": 8, "max_length": 256}
TINY = {
    "benchmark": {"n_pairs": 64, "n_queries": 8, "n_corpus": 16},
    "evaluation": {"tasks": ["Naming", "Kinds"]},
    "stage1": FAST,
    "stage2": FAST,
    "stage3": FAST | {"mini_batch_size": 8},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`Run` of a tiny world, in a folder of this module's."""
    return partial(Run, changes=TINY, runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def searched(tiny):
    """The root of a run whose two arms have been searched, two trials and one."""
    search.search_arm(tiny("smoke", "contrastive"), [1e-3], [1, 2], 4)
    search.search_arm(tiny("smoke", "stage2_only"), [1e-3], [1], 4)
    return tiny("smoke").root


def search_again(tiny, monkeypatch, folder, *words):
    """Run the command; return its table."""
    monkeypatch.setattr(search, "Run", tiny)
    out = folder / "search.csv"
    search.main(["smoke", *words, "--n-queries", "4", "--out", str(out)])
    return pd.read_csv(out)


def test_rows_are_tidy_and_of_all_arms(searched):
    rows = search.gather(searched, 4)
    assert list(rows) == "arm seed learning_rate steps task value n".split()
    trials = rows.groupby(["arm", "steps"])["task"].agg(list).to_dict()
    assert list(trials) == [("contrastive", 1), ("contrastive", 2), ("stage2_only", 1)]
    assert all(tasks == ["Naming", "Kinds"] for tasks in trials.values())
    assert set(rows["n"]) == {4} and set(rows["seed"]) == {0}
    assert (rows["value"] % 25 == 0).all(), "percent of four queries"


def test_an_arm_starts_from_its_own_parent(searched, tiny):
    metas = {
        arm: read_meta(searched / "search" / "seed0" / arm / "rate0.001-steps1")["run"]
        for arm in ("contrastive", "stage2_only")
    }
    assert metas["contrastive"]["parent_stage"] == "causal"
    assert metas["stage2_only"]["parent_stage"] == "stage2"
    assert metas["contrastive"]["recipe"]["learning_rate"] == 1e-3
    assert metas["contrastive"]["recipe"]["steps"] == 1


def test_a_finished_trial_is_read_back(searched, tiny, monkeypatch, tmp_path, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("evaluated again")

    weights = searched.rglob("search/**/model.safetensors")
    before = {path: path.stat().st_mtime_ns for path in weights}
    monkeypatch.setattr(search, "evaluate", refuse)
    monkeypatch.setattr("cocoa_lib.run.stage._train", refuse)
    words = ["--arms", "contrastive", "--rates", "1e-3", "--steps", "1", "2"]
    rows = search_again(tiny, monkeypatch, tmp_path, *words)
    assert len(before) == 3 and all(path.stat().st_mtime_ns == at for path, at in before.items())
    pd.testing.assert_frame_equal(rows, search.gather(searched, 4))
    assert "contrastive, learning rate 0.001, 2 steps" in capsys.readouterr().out


def test_gathering_trains_nothing_and_draws_curves(searched, tiny, monkeypatch, tmp_path, capsys):
    figure = tmp_path / "figures" / "search.svg"
    rows = search_again(tiny, monkeypatch, tmp_path, "--gather", "--figure", str(figure))
    assert len(rows) == 6
    told = figure.with_suffix(".txt").read_text()
    assert told.startswith("After 2 contrastive steps: contrastive ")
    assert figure.is_file() and figure.with_suffix(".png").is_file()
    assert "the best of each arm" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no trial of 5 queries"):
        search.gather(searched, 5)
    with pytest.raises(SystemExit):
        search.main(["smoke", "--arms", "cocoa"])
    assert "--rates and --steps, or --gather" in capsys.readouterr().err


def test_the_best_is_over_tasks_of_one_seed():
    cells = [("a", 0, 1e-3, 5, 20.0, 40.0), ("a", 0, 2e-3, 5, 60.0, 10.0), ("a", 1, 1e-3, 5, 99.0, 99.0),
             ("a", 0, 2e-3, 10, 30.0, 34.0), ("b", 0, 1e-3, 10, 30.0, 35.0)]  # fmt: skip
    rows = pd.DataFrame(
        [(*cell, task, value, 4) for *cell, x, y in cells for task, value in (("T", x), ("U", y))],
        columns=search.COLUMNS,
    )
    trials = search.average_trials(rows, 0)
    best = search.find_best(trials, ["arm"]).set_index("arm")
    assert best.loc["a"].to_list() == [2e-3, 5, 35.0] and best.loc["b"].to_list() == [
        1e-3,
        10,
        32.5,
    ]
    assert search.find_best(trials, ["arm", "steps"])["value"].to_list() == [35.0, 32.0, 32.5]
    alt = search.draw_steps(trials, 4, 0).alt
    assert alt.startswith("After 10 contrastive steps: b 32.5, a 32.0. a, 5: 35.0;")


def test_development_queries_are_other_rows(searched, tiny, tmp_path):
    run = tiny("smoke")
    for task in run.tasks:
        test, dev = (load_eval(run.data, task.name, part=part)[:] for part in ("eval", "dev"))
        assert not set(test["qry_img_path"]) & set(dev["qry_img_path"])
    for name in ("dev", "images", "manifest.json"):
        (tmp_path / name).symlink_to(run.data.resolve() / name)
    embedder, options = Embedder(random_vector), {"tasks": run.tasks, "show_progress": False}
    evaluate(embedder, tmp_path, part="dev", **options)
    asked = {Path(path).name for path in dev["qry_img_path"]}
    assert asked <= {picture for _, picture in embedder.seen}
    with pytest.raises(FileNotFoundError, match="Naming"):
        evaluate(embedder, tmp_path, **options)


def test_a_trial_never_reads_test_queries(searched, tiny, tmp_path):
    run = tiny("smoke", "contrastive")
    for name in ("dev", "images", "manifest.json"):
        (tmp_path / name).symlink_to(run.data.resolve() / name)
    run.data = tmp_path
    recipe = replace(run.recipe("stage3"), learning_rate=1e-3, steps=1)
    assert search.run_trial(run, recipe, 3)["n"].to_list() == [3, 3]
