"""`Run`: six names give recipes and folders, wrong ones are refused with a word, and the road runs on real forms."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

import pytest
import yaml
from conftest import SHARED
from PIL import Image
from published_form import write_data, write_model
from transformers import TrainingArguments

from cocoa_lib.evaluate import read_probes, read_ranks, read_runs
from cocoa_lib.items import InputError
from cocoa_lib.recipes import RecipeError, make_recipe
from cocoa_lib.run import Run, launch, stage
from cocoa_lib.run.__main__ import main
from cocoa_lib.run.profiles import PROFILES, load_profile, merge, read_arms
from cocoa_lib.run.resume import TrainingError
from cocoa_lib.run.trainers import training_arguments
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
    assert run.recipe("stage3").steps == 800 and run.recipe("stage3").batch_size == 32
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
    real = {"model": "Qwen/Qwen2-VL-2B-Instruct", "data": "data"}
    run = Run(name, **(real if name in ("paper", "qwen2vl_2b") else {}))
    assert {"contrastive", "cocoa"} <= run.grid.keys()
    for arm in run.grid:
        one = run.other(arm=arm)
        assert [one.recipe(stage).steps for stage in one.stages]


def test_a_later_layer_changes_values_and_a_stage_that_is_off_stays_off():
    layers = (
        {"stage1": {"steps": 1, "bf16": True}},
        {"stage1": {"steps": 2}, "stage2": False},
        {"stage2": {"steps": 3}},
    )
    assert merge(*layers) == {"stage1": {"steps": 2, "bf16": True}, "stage2": False}


@pytest.mark.parametrize(
    "text, message",
    [
        ("stage1: {stepz: 3}", "unknown name 'stepz'; did you mean 'steps'"),
        ("stage9: {}", "unknown name 'stage9'"),
        ("stage1: {steps: many}", "stage1.steps: .*'many'"),
        ("stage1: [1]", "stage1: expected names and values"),
        ("benchmark: {n_pairs: many}", "benchmark.n_pairs: expected int"),
        ("extends: nothing", "mine.yaml: unknown name 'nothing'"),
        ("extends: mine", "unknown name 'mine'"),
        ("grid: {cocao: 5}", "grid: unknown name 'cocao'; did you mean 'cocoa'"),
        ("grid: {cocoa: many}", "grid.cocoa: expected int"),
        ("grid: [cocoa]", "grid: expected names and values"),
        ("[1]", "expected names and values, found list"),
        ("{", "not valid YAML"),
    ],
)
def test_a_profile_that_is_none(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_profile("mine", tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("$(rm x): {hypothesis: a}", r"\$\(rm x\): an arm's name is letters, digits and _"),
        ("x: {stage1: off}", "x: expected a hypothesis in one sentence"),
        ("x: {hypothesis: a, stage3: off}", "x: stage3: expected names and values"),
        ("x: {hypothesis: a, stage3: {stepz: 1}}", "x: .*unknown name 'stepz'"),
        ("x: {hypothesis: a, backbone: {hiden_size: 8}}", "did you mean 'hidden_size'"),
    ],
)
def test_a_table_of_arms_that_is_none(tmp_path, text, message):
    (tmp_path / "arms.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_arms(tmp_path / "arms.yaml")


def test_arms_share_what_is_the_same_and_nothing_else():
    folders = {arm: Run("smoke", arm) for arm in read_arms()}
    second = {arm: run for arm, run in folders.items() if "stage2" in run.stages}
    shared = {arm: str(run.folder("stage2")) for arm, run in second.items()}
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


WRONG = [
    ({"profile": "laptp"}, "profile: unknown name 'laptp'; did you mean 'laptop'"),
    ({"arm": "coca"}, "arm: unknown name 'coca'; did you mean 'cocoa'"),
    ({"seed": "1"}, "seed: expected int, found '1'"),
    ({"seed": True}, "seed: expected int"),
    ({"changes": '{"stage3": {}}'}, "changes: expected dict, found .* pass it with -y"),
    ({"changes": {"stage3": "{'steps': 5}"}}, "stage3: expected names and values"),
    ({"changes": {"stage9": {}}}, "unknown name 'stage9'; did you mean 'stage3'"),
    ({"changes": {"stage3": {"steps": "5"}}}, "stage3.steps: .*got '5'"),
    ({"model": "nope"}, "model 'nope': no such folder here, and not a hub name"),
    ({"data": "nope.jsonl"}, "data 'nope.jsonl': no such file or folder; data takes"),
    ({"data": "MMEB"}, "data takes MMEB, once `python -m cocoa_lib.data.download"),
    ({"profile": "paper"}, "profile paper has no built-in backbone; give model"),
]


@pytest.mark.parametrize("given, message", WRONG)
def test_a_wrong_name_or_type_is_an_error_that_names_what_is_known(given, message):
    with pytest.raises((RecipeError, InputError, CheckpointError), match=message):
        Run(**{"profile": "smoke"} | given)


INJECTED = [
    ({"sed": 1}, "unknown name 'sed'; did you mean 'seed'"),
    ({"stage3": '{"steps": 5}'}, r"stage3 is a section of a profile.*-y '\{changes: \{stage3"),
    (yaml.safe_load((PROFILES / "laptop.yaml").read_text()), "-p profile NAME"),
    ({"changes": "{}"}, "pass it with -y"),
    ({"seed": 2, "changes": {"stage3": {"steps": 5}}}, ""),
]


@pytest.mark.parametrize("injected, message", INJECTED, ids=range(5))
def test_what_papermill_injects_by_mistake_is_refused(injected, message):
    """Other names of the kernel are no matter."""
    cell = "".join(f"{name} = {value!r}\n" for name, value in injected.items())
    kernel = {"In": ["", 'profile = "smoke"', f"# Parameters\n{cell}"], "profile": "smoke", "n": 3}
    with pytest.raises(RecipeError, match=message) if message else nullcontext():
        run = Run.from_namespace(kernel | injected)
        assert (run.profile, run.seed, run.recipe("stage3").steps) == ("smoke", 2, 5)


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


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(model folder, data folder) in the published forms."""
    home = tmp_path_factory.mktemp("real")
    return write_model(home / "model", "qwen2_vl", SHARED), write_data(home / "mmeb")


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


def test_bf16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="bf16 needs a GPU"):
        recipe = make_recipe("stage1", {"bf16": True})
        training_arguments(TrainingArguments, recipe, tmp_path, seed=0)


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
        Run("smoke", data=str(table), runs=runs).prepare()


def test_the_command_is_the_same_run(tiny, capsys, monkeypatch):
    monkeypatch.setattr(stage, "_train", None)
    main(["evaluate", *tiny.arguments()])
    assert capsys.readouterr().out.strip() == str(tiny.folder("evaluate"))
    small = tiny.other(changes={"stage3": {"learning_rate": 1e-5}}).arguments()
    assert yaml.safe_load(small[3].partition("=")[2]) == {"stage3": {"learning_rate": 1e-5}}
    with pytest.raises(SystemExit, match="unknown name 'cocao'; did you mean 'cocoa'"):
        main(["stage1", "--profile", "smoke", "--arm", "cocao"])


def test_a_launch_streams_lines_and_fails_with_the_workers_message():
    lines, command = [], launch.command({"processes": 2}, "stage1", ["--seed=1"])
    assert command[command.index("--num_processes") + 1] == "2" and command[-1] == "--seed=1"
    assert launch.count_processes({}) == 1
    worker = "print('step 1', flush=True); raise SystemExit('stopped: 15 does not divide')"
    with pytest.raises(TrainingError, match="on several processes: 15 does not divide"):
        launch.launch([sys.executable, "-c", worker], lines.append)
    assert lines == ["step 1", "stopped: 15 does not divide"]
