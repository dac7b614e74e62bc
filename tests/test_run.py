"""`Run`: six names give recipes and folders, wrong ones are refused with a word, and the road runs on real forms."""

from __future__ import annotations

import json
import shutil
import sys

import nbformat
import pytest
import yaml
from conftest import SHARED
from PIL import Image
from published_form import write_data, write_model

from cocoa_lib.evaluate import read_probes, read_ranks, read_runs
from cocoa_lib.items import InputError
from cocoa_lib.recipes import RecipeError
from cocoa_lib.run import Run, launch, stage
from cocoa_lib.run.__main__ import main
from cocoa_lib.run.checks import check_model
from cocoa_lib.run.profiles import PROFILES, ROOT, load_profile, read_arms
from cocoa_lib.run.resume import TrainingError
from cocoa_lib.store.checkpoint import CheckpointError, read_meta

FAST = {"steps": 2, "batch_size": 8, "max_length": 256}
TINY = {
    "benchmark": {"n_pairs": 64, "n_queries": 8, "n_corpus": 16},
    "stage1": FAST,
    "stage2": FAST,
    "stage3": FAST | {"mini_batch_size": 8},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder of this module's."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tiny(runs):
    """A finished run of the full method on the shipped backbone."""
    run = Run("smoke", changes=TINY, runs=runs)
    run.evaluate(show_progress=False)
    return run


def test_a_recipe_is_the_profiles_then_the_arms_then_the_changes():
    run = Run("smoke", "contrastive_longer")
    assert run.recipe("stage3").steps == 1100 and run.recipe("stage3").batch_size == 32
    run = run.other(changes={"stage3": {"steps": 7}})
    assert run.recipe("stage3").steps == 7 and run.recipe("stage3").schedule == "linear"
    with pytest.raises(RecipeError, match="arm contrastive_longer has no stage1; it has stage3"):
        run.recipe("stage1")


def test_a_profile_takes_over_what_it_extends():
    laptop, smoke = load_profile("laptop"), load_profile("smoke")
    assert smoke["backbone"] == laptop["backbone"] and smoke["stage1"]["preset"] == "figure"
    assert smoke["stage1"]["steps"] == 6 and smoke["grid"] != laptop["grid"]


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_profiles_and_their_grids_are_whole(name):
    real = (
        {"model": "Qwen/Qwen2-VL-2B-Instruct", "data": "data"}
        if name in ("paper", "qwen2vl_2b")
        else {}
    )
    run = Run(name, **real)
    assert {"contrastive", "cocoa"} <= run.grid.keys()
    for arm in run.grid:
        one = run.other(arm=arm)
        assert [one.recipe(stage).steps for stage in one.stages]


def test_arms_are_fourteen_at_most_each_with_a_hypothesis():
    arms = read_arms()
    assert len(arms) <= 14 and all(arm.hypothesis.endswith(".") for arm in arms.values())
    assert Run("smoke", "contrastive_mean").stages == ("stage3",)


def test_arms_share_what_is_the_same_and_nothing_else():
    folders = {arm: Run("smoke", arm) for arm in read_arms()}
    shared = {
        arm: str(run.folder("stage2")) for arm, run in folders.items() if "stage2" in run.stages
    }
    assert shared["cocoa"] == shared["cocoa_mean"] == shared["cocoa_few"] != shared["cocoa_strict"]
    assert shared["stage2_only"] not in (shared["cocoa"], shared["no_truncation"])
    assert folders["cocoa"].folder("stage1") == folders["stage1_only"].folder("stage1")
    assert folders["contrastive"].parent("stage3") == folders["cocoa"].parent("stage1")
    assert len({run.folder("stage3") for run in folders.values()}) == len(folders)


def test_two_runs_never_share_a_folder(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b").mkdir()
    names = [{}, {"model": "a/b"}, {"model": "c/b"}, {"data": str(tmp_path / "a.jsonl")},
             {"data": str(tmp_path / "b")}, {"changes": {"stage3": {"steps": 5}}},
             {"changes": {"stage3": {"steps": 6}}}, {"profile": "laptop"},
             {"changes": {"backbone": {"seed": 2}}}]  # fmt: skip
    places = [Run(**{"profile": "smoke"} | given) for given in names]
    assert len({run.root for run in places}) == len(places)
    assert len({str(run.backbone) for run in places}) == 4, "shipped, two models, another seed"
    assert Run("smoke", seed=1).folder("stage3") != Run("smoke").folder("stage3")
    assert Run("smoke", changes={}).root == Run("smoke").root
    assert places[1].root.name.startswith("smoke-b-")
    assert places[1].backbone == "a/b", "a hub name is never turned into a path"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"profile": "laptp"}, "profile: unknown name 'laptp'; did you mean 'laptop'"),
        ({"arm": "coca"}, "arm: unknown name 'coca'; did you mean 'cocoa'"),
        ({"seed": "1"}, "seed: expected int, found '1'"),
        ({"seed": True}, "seed: expected int"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"changes": '{"stage3": {}}'}, "changes is the text .* pass it with -y"),
        ({"changes": {"stage3": "{'steps': 5}"}}, "stage3 must be names and values"),
        ({"changes": {"stage9": {}}}, "unknown name 'stage9'; did you mean 'stage3'"),
        ({"changes": {"stage3": {"steps": "5"}}}, "stage3.steps: .*got '5'"),
        ({"changes": {"stage3": {"stepz": 5}}}, "unknown name 'stepz'; did you mean 'steps'"),
        ({"changes": {"evaluation": {"n_queries": "all"}}}, "evaluation.n_queries: expected int"),
        ({"model": "nope"}, "model 'nope': no such folder here, and not a hub name"),
        ({"data": "nope.jsonl"}, "data 'nope.jsonl': no such file or folder; data takes"),
        ({"data": "MMEB"}, "data MMEB: not there yet; run `python -m cocoa_lib.data.download"),
        ({"profile": "paper"}, "profile paper has no built-in backbone; give model"),
    ],
)
def test_a_wrong_name_or_type_is_an_error_that_names_what_is_known(given, message):
    with pytest.raises((RecipeError, InputError, CheckpointError), match=message):
        Run(**{"profile": "smoke"} | given)


def inject(**values):
    """A kernel's cells after papermill."""
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return {"In": ["", 'profile = "smoke"', cell], "profile": "smoke", "np": sys, **values}


def test_a_notebook_makes_its_run_and_other_names_of_the_kernel_are_no_matter():
    run = Run.from_namespace(inject(seed=2, changes={"stage3": {"steps": 5}}) | {"n_shown": 3})
    assert (run.profile, run.seed, run.recipe("stage3").steps) == ("smoke", 2, 5)


@pytest.mark.parametrize(
    "injected, message",
    [
        ({"sed": 1}, "unknown name 'sed'; did you mean 'seed'"),
        ({"stage3": '{"steps": 5}'}, r"stage3 is a section of a profile.*-y '\{changes: \{stage3"),
        (yaml.safe_load((PROFILES / "laptop.yaml").read_text()), "-p profile laptop"),
        ({"changes": "{}"}, "pass it with -y"),
    ],
    ids=["misspelt", "section", "a whole profile", "text"],
)
def test_what_papermill_injects_by_mistake_is_refused(injected, message):
    with pytest.raises(RecipeError, match=message):
        Run.from_namespace(inject(**injected))


def test_the_road_leaves_tables_and_opens_what_is_there(tiny, runs, monkeypatch):
    probes = tiny.probe()
    ranks, facts = read_ranks(tiny.root), read_runs(tiny.root)
    assert set(ranks["arm"]) == {"cocoa"} and len(ranks) == 8 * len(tiny.tasks)
    assert list(facts["recipes"][0]) == list(facts["seconds"][0]) == ["stage1", "stage2", "stage3"]
    assert len(read_probes(tiny.root)) == len(probes) > 3
    assert [tiny.done(step) for step in ("stage1", "stage3", "evaluate", "probe")] == [True] * 4
    monkeypatch.setattr(stage, "_train", None)  # nothing may be trained
    again = Run("smoke", changes=TINY, runs=runs)
    assert again.evaluate(show_progress=False).equals(ranks)
    assert read_meta(again.stage("stage2", show_progress=False))["run"]["parent_stage"] == "stage1"


def test_a_folder_of_other_parameters_is_refused_before_anything_trains(tiny, monkeypatch):
    """As where the profile was edited since: of the last stage already at the first."""
    monkeypatch.setattr(stage, "_train", None)
    edited = Run("smoke", changes=TINY, runs=tiny.runs)
    edited.values["stage3"] = edited.values["stage3"] | {"learning_rate": 0.5}
    with pytest.raises(
        CheckpointError, match="stage3/cocoa: holds a run of another.*learning_rate"
    ):
        edited.stage("stage1", show_progress=False)


def test_bf16_without_a_gpu_is_refused(runs):
    run = Run("smoke", changes=TINY | {"stage1": FAST | {"bf16": True}}, runs=runs)
    with pytest.raises(
        TrainingError, match="stage1 of profile smoke trains in bf16, which needs a GPU"
    ):
        run.check()


# --- models and data of others --------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(model folder, data folder) in the published forms."""
    home = tmp_path_factory.mktemp("real")
    return write_model(home / "model", "qwen2_vl", SHARED), write_data(home / "mmeb", SHARED)


def test_the_road_runs_on_a_published_model_and_mmeb(real, runs):
    """Two bf16 shards, slow tokenizer files, no cocoa.json; no corpus: stage 1 reads pairs with a text."""
    model, data = real
    assert len(list(model.glob("*.safetensors"))) == 2 and not (model / "tokenizer.json").exists()
    run = Run("smoke", model=str(model), data=str(data), changes=TINY, runs=runs)
    ranks = run.evaluate(show_progress=False)
    assert set(ranks["task"]) == {"VOC2007", "Country211"} and len(ranks) == 16 and not run.built_in
    assert read_meta(run.folder("stage1"))["run"]["parent_stage"] == "causal"
    with pytest.raises(InputError, match="ground truth"):
        run.probe()


def test_a_model_that_cannot_be_used_is_said(real, tmp_path):
    model = shutil.copytree(real[0], tmp_path / "model")
    shard = sorted(model.glob("*-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shards are missing, e.g. {shard.name}"):
        check_model(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        CheckpointError, match="is a llama without a vision tower; CoCoA needs one of"
    ):
        check_model(model)
    with pytest.raises(CheckpointError, match="hub could not be reached or has no such model"):
        check_model("someone/no-such-model")


def test_data_without_pictures_are_refused(real, runs, tmp_path):
    data = shutil.copytree(real[1], tmp_path / "mmeb")
    shutil.rmtree(data / "images")
    with pytest.raises(InputError, match="no pictures in .*images; unpack"):
        Run("smoke", data=str(data), runs=runs).check()


def test_a_users_pairs_become_a_data_folder_and_a_changed_file_is_refused(runs, tmp_path):
    rows = [{"image": f"{i}.png", "text": f"thing {i}"} for i in range(12)]
    for i, row in enumerate(rows):
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / row["image"])
    table = tmp_path / "mine.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    run = Run("smoke", data=str(table), runs=runs)
    assert [task.name for task in run.tasks] and not run.built_in
    assert Run("smoke", data=str(table), runs=runs).data == run.data
    table.write_text("\n".join(map(json.dumps, rows[1:])))
    with pytest.raises(InputError, match="holds other data .*delete the folder"):
        Run("smoke", data=str(table), runs=runs).check()


# --- the command, and several processes -----------------------------------------------------------


def test_the_command_is_the_same_run(tiny, capsys, monkeypatch):
    monkeypatch.setattr(stage, "_train", None)
    main(["evaluate", *tiny.arguments()])
    assert capsys.readouterr().out.strip() == str(tiny.folder("evaluate"))
    with pytest.raises(SystemExit, match="unknown name 'cocao'; did you mean 'cocoa'"):
        main(["stage1", "--profile", "smoke", "--arm", "cocao"])


def test_a_launch_streams_lines_and_fails_with_the_workers_message(tiny, monkeypatch):
    run, lines = tiny.other(changes=TINY | {"launch": {"processes": 2}}), []
    line = launch.command(run, "stage1")
    assert line[line.index("--num_processes") + 1] == "2" and launch.processes(tiny) == 1
    worker = (
        "print('step 1', flush=True); raise SystemExit('stopped: batch_size 15 does not divide')"
    )
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", worker])
    with pytest.raises(TrainingError, match="stage1 on 2 processes: batch_size 15 does not divide"):
        run.stage("stage1", show_progress=lines.append)
    assert lines == ["step 1", "stopped: batch_size 15 does not divide"]


def test_notebooks_declare_the_six_names():
    names = ["profile", "arm", "seed", "model", "data", "changes"]
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        source = next(
            cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])
        )
        assert [line.split(" = ")[0] for line in source.splitlines()] == names, path.name
