"""The road as a graph: notebook -> artefact -> notebook, and the arms of the ablation.

    snakemake --cores 2 --config profile=laptop [pairs=path/to/pairs.jsonl] [seeds='0 1 2']

Numbered notebooks run the main arm (`cocoa`, first seed) and make the figures; the other arms and seeds run the same
library from the command line, one core each, in parallel. Snakemake deletes the outputs of a step before it runs it
again, so a step's output is a marker, NAME.done: checkpoints and data know by themselves whether they are whole. A notebook
or recipe that changed makes what depends on it stale; what is finished is not made again.
"""

import json
import os
import re
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.basedir)))
from cocoa_lib.data.pairs import source_hash
from cocoa_lib.run.arms import read_arms
from cocoa_lib.run.profiles import load_profile
from cocoa_lib.store.files import locked
from cocoa_lib.recipes import unknown_name

PROFILE = config.get("profile", "laptop")
PAIRS = config.get("pairs", "")
PAIR_OPTIONS = {name: config[name] for name in ("image_column", "text_column", "class_column", "image_root", "on_bad_row") if config.get(name)}
P = load_profile(PROFILE)
NAME = PROFILE + ("-" + re.sub(r"[^\w.-]+", "_", Path(PAIRS).stem) if PAIRS else "")  # names folders, stands in commands
RUN = f"runs/{NAME}"
SEEDS = [int(seed) for seed in str(config.get("seeds", "")).split()] or P["seeds"]
SEEDS_OF = {arm: SEEDS for arm in P["arms"]} | {arm: SEEDS[:3] for arm in P.get("sweeps", [])}  # of an arm
for name in SEEDS_OF:
    if name not in read_arms():
        raise unknown_name(name, list(read_arms()), f"profile {PROFILE}, arms and sweeps")
if lost := {"cocoa", "contrastive"} - set(SEEDS_OF):
    raise WorkflowError(f"profile {PROFILE}: arms must hold {' and '.join(sorted(lost))}, which the notebooks need")
ARMS = {name: arm for name, arm in read_arms().items() if name in SEEDS_OF}
MAIN, SEED = "cocoa", SEEDS[0]
DATA = f"{RUN}/benchmark"
BACKBONE = "data/backbone"
PYTHON = shlex.quote(sys.executable)
PAIRS_PARAMETER = f"pairs={shlex.quote(json.dumps({'path': PAIRS, **PAIR_OPTIONS}))}" if PAIRS else ""  # of notebook 00
NOTEBOOK = f"{PYTHON} -m cocoa_lib.run.profiles notebooks/{{params.name}}.ipynb --profile {PROFILE} --out {{output.notebook}}"

if workflow.is_main_process and not workflow.output_settings.dryrun:  # `workflow.dryrun` is not set yet
    # Snakemake's own lock stays behind when it is killed, and the same command is then refused: `make` passes --nolock.
    ALONE = ExitStack()
    ALONE.enter_context(locked(Path(RUN), WorkflowError))

# Several GPUs (`make` counts them): each step takes the first that no other step of this run has; `gpu` keeps them to one each.
GPUS = int(config.get("gpus", 0))
CARDS = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card][:GPUS] or list(map(str, range(GPUS)))
SLOT = f"for g in {shlex.join(CARDS)}; do exec 9> {RUN}/.gpu$g; flock -n 9 && break; done; export CUDA_VISIBLE_DEVICES=$g; " if GPUS > 1 else ""
shell.prefix("export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}; ")


def recipe_of(*parts):
    """What a notebook takes from the profile: if that changes, not if another arm is added, its step is stale."""
    return json.dumps({part: P.get(part) for part in parts}, sort_keys=True)


def stage_dir(stage, arm, seed):
    """Where an arm's checkpoint of a stage lies; arms that agree up to a stage share it."""
    return f"{RUN}/seed{seed}/{stage}/{ARMS[arm].key(stage)}"


def backbone_dir(arm):
    """Where an arm's causal checkpoint lies: the committed one, or one of another shape that this run trains."""
    changes = ARMS[arm].backbone
    return f"{RUN}/backbones/" + "_".join(f"{name}{value}" for name, value in sorted(changes.items())) if changes else BACKBONE


def parent_dir(stage, arm, seed):
    """The checkpoint a stage starts from: the last stage before it that the arm has."""
    order = ["stage1", "stage2", "stage3"]
    for before in reversed(order[: order.index(stage)]):
        if getattr(ARMS[arm], before) is not None:
            return stage_dir(before, arm, seed)
    return backbone_dir(arm)


def done(folder):
    """What marks a checkpoint as there: the committed backbone's own file, or the step's marker beside the folder."""
    return f"{folder}/cocoa.json" if folder == BACKBONE else f"{folder}.done"


STEPS = {}  # (stage, key, seed) -> the first arm that needs it
for arm in ARMS:
    for seed in SEEDS_OF[arm]:
        for stage in ("stage1", "stage2", "stage3"):
            if getattr(ARMS[arm], stage) is not None:
                STEPS.setdefault((stage, ARMS[arm].key(stage), str(seed)), arm)


def step_of(wildcards):
    return STEPS[(wildcards.stage, wildcards.key, wildcards.seed)]


def step_recipe(wildcards):
    return json.dumps({**P[wildcards.stage], **getattr(ARMS[step_of(wildcards)], wildcards.stage)}, sort_keys=True)


wildcard_constraints:
    stage="stage[123]",
    seed=r"\d+",
    key=r"\w+",


SHAPES = {Path(backbone_dir(arm)).name: P["backbone"] | ARMS[arm].backbone for arm in ARMS if ARMS[arm].backbone}

ruleorder: pretraining > stage
ruleorder: contrastive > stage


rule all:
    input:
        f"{RUN}/notebooks/01_attention_masks.ipynb",
        f"{RUN}/notebooks/04_mmeb_evaluation.ipynb",
        f"{RUN}/notebooks/05_ablations.ipynb",


rule backbone:
    """`make backbone`: notebook 00 trains the small causal model anew; it then replaces data/backbone."""
    output:
        f"{RUN}/backbone.done",
    params:
        out=f"{RUN}/backbone",
    threads: workflow.cores
    shell:
        "rm -rf {params.out} && "
        + NOTEBOOK.replace("{output.notebook}", "{RUN}/notebooks/00_backbone.ipynb").replace("{params.name}", "00_data_and_backbone")
        + " --set data={RUN}/benchmark backbone_folder={params.out} retrain=true"
        " && rm -rf {BACKBONE} && cp -r {params.out} {BACKBONE} && touch {output}"


rule shape:
    """Notebook 00 trains a backbone of another shape for the arms that name one."""
    input:
        data=f"{DATA}.done",
    output:
        done=touch(f"{RUN}/backbones/{{shape}}.done"),
        notebook=f"{RUN}/backbones/{{shape}}.ipynb",
    params:
        name="00_data_and_backbone",
        out=f"{RUN}/backbones/{{shape}}",
        backbone=lambda w: shlex.quote("backbone=" + json.dumps(SHAPES[w.shape])),
    resources:
        gpu=1,
    shell:
        SLOT + NOTEBOOK + " --set data={DATA} backbone_folder={params.out} retrain=true {params.backbone} {PAIRS_PARAMETER}"


rule benchmark:
    """Notebook 00: the data and the backbone, looked at."""
    input:
        "notebooks/00_data_and_backbone.ipynb",
        PAIRS or [],
    output:
        done=touch(f"{DATA}.done"),
        notebook=f"{RUN}/notebooks/00_data_and_backbone.ipynb",
    params:
        name="00_data_and_backbone",
        recipe=recipe_of("benchmark", "backbone", "causal"),
        pairs=PAIR_OPTIONS,
        source=source_hash(Path(PAIRS)) if PAIRS else "",  # of a folder, what lies below it too
    threads: workflow.cores
    shell:
        NOTEBOOK + " --set figures_folder={RUN}/figures data={DATA} backbone_folder={BACKBONE} {PAIRS_PARAMETER}"


rule masks:
    """Notebook 01: attention layouts, explored and proved."""
    input:
        "notebooks/01_attention_masks.ipynb",
    output:
        notebook=f"{RUN}/notebooks/01_attention_masks.ipynb",
    params:
        name="01_attention_masks",
    shell:
        NOTEBOOK + " --set figures={RUN}/figures"


rule pretraining:
    """Notebook 02: stages 1 and 2 of the main arm."""
    input:
        "notebooks/02_reconstruction_pretraining.ipynb",
        data=f"{DATA}.done",
        backbone=f"{BACKBONE}/cocoa.json",
    output:
        stage1=touch(f"{stage_dir('stage1', MAIN, SEED)}.done"),
        stage2=touch(f"{stage_dir('stage2', MAIN, SEED)}.done"),
        notebook=f"{RUN}/notebooks/02_reconstruction_pretraining.ipynb",
    params:
        name="02_reconstruction_pretraining",
        recipe=recipe_of("stage1", "stage2"),
        stage1_out=stage_dir("stage1", MAIN, SEED),
        stage2_out=stage_dir("stage2", MAIN, SEED),
    resources:
        gpu=1,
    shell:
        SLOT + NOTEBOOK + " --set figures_folder={RUN}/figures data={DATA} backbone_folder={BACKBONE} seed={SEED}"
        " stage1_out={params.stage1_out} stage2_out={params.stage2_out}"


rule contrastive:
    """Notebook 03: stage 3 of the main arm."""
    input:
        "notebooks/03_contrastive_training.ipynb",
        data=f"{DATA}.done",
        parent=f"{stage_dir('stage2', MAIN, SEED)}.done",
    output:
        stage3=touch(f"{stage_dir('stage3', MAIN, SEED)}.done"),
        notebook=f"{RUN}/notebooks/03_contrastive_training.ipynb",
    params:
        name="03_contrastive_training",
        recipe=recipe_of("stage3"),
        stage1_out=stage_dir("stage1", MAIN, SEED),
        stage2_out=stage_dir("stage2", MAIN, SEED),
        out=stage_dir("stage3", MAIN, SEED),
    resources:
        gpu=1,
    shell:
        SLOT + NOTEBOOK + " --set figures_folder={RUN}/figures data={DATA} backbone_folder={BACKBONE} seed={SEED}"
        " stage1_out={params.stage1_out} stage2_out={params.stage2_out} stage3_out={params.out}"


rule stage:
    """One stage of another arm or seed, without a notebook."""
    input:
        data=f"{DATA}.done",
        parent=lambda w: done(parent_dir(w.stage, step_of(w), w.seed)),
    output:
        touch(f"{RUN}/seed{{seed}}/{{stage}}/{{key}}.done"),
    params:
        parent=lambda w: parent_dir(w.stage, step_of(w), w.seed),
        out=lambda w: f"{RUN}/seed{w.seed}/{w.stage}/{w.key}",
        recipe=lambda w: shlex.quote(step_recipe(w)),
    resources:
        gpu=1,
    log:
        f"{RUN}/logs/{{stage}}-{{key}}-seed{{seed}}.log",
    shell:
        SLOT + "{PYTHON} -m cocoa_lib.run {wildcards.stage} --parent {params.parent} --data {DATA} --out {params.out}"
        " --recipe {params.recipe} --seed {wildcards.seed} --allow-parent > {log} 2>&1 || (tail -20 {log} >&2; exit 1)"


rule evaluate:
    """All tasks of the benchmark with one checkpoint."""
    input:
        data=f"{DATA}.done",
        model=lambda w: f"{stage_dir('stage3', w.arm, w.seed)}.done",
    output:
        f"{RUN}/results/{{arm}}/seed{{seed}}/results.csv",
    params:
        model=lambda w: stage_dir("stage3", w.arm, w.seed),
        out=f"{RUN}/results/{{arm}}/seed{{seed}}",
    resources:
        gpu=1,
    log:
        f"{RUN}/logs/evaluate-{{arm}}-seed{{seed}}.log",
    shell:
        SLOT + "{PYTHON} -m cocoa_lib.evaluate {params.model} --root {DATA} --out {params.out}"
        " > {log} 2>&1 || (tail -20 {log} >&2; exit 1)"


rule probe:
    """What the state at EOS of one checkpoint holds; the labels are the scenes of the built-in benchmark."""
    input:
        data=f"{DATA}.done",
        model=lambda w: f"{stage_dir('stage3', w.arm, w.seed)}.done",
    output:
        f"{RUN}/results/{{arm}}/seed{{seed}}/probe.csv",
    params:
        model=lambda w: stage_dir("stage3", w.arm, w.seed),
    resources:
        gpu=1,
    log:
        f"{RUN}/logs/probe-{{arm}}-seed{{seed}}.log",
    shell:
        SLOT + "{PYTHON} -m cocoa_lib.evaluate.probe {params.model} --data {DATA} --out {output} > {log} 2>&1 || (tail -20 {log} >&2; exit 1)"


rule evaluation:
    """Notebook 04: scores of the main arm by task and meta-task, beside the published table."""
    input:
        "notebooks/04_mmeb_evaluation.ipynb",
        results=f"{RUN}/results/{MAIN}/seed{SEED}/results.csv",
    output:
        notebook=f"{RUN}/notebooks/04_mmeb_evaluation.ipynb",
    params:
        name="04_mmeb_evaluation",
        model=stage_dir("stage3", MAIN, SEED),
        results=f"{RUN}/results/{MAIN}/seed{SEED}",
    shell:
        NOTEBOOK + " --set figures_folder={RUN}/figures data={DATA} model={params.model} results={params.results}"


rule ablations:
    """Notebook 05: what each part is worth."""
    input:
        "notebooks/05_ablations.ipynb",
        [f"{RUN}/results/{arm}/seed{seed}/results.csv" for arm in ARMS for seed in SEEDS_OF[arm]],
        [] if PAIRS else [f"{RUN}/results/{arm}/seed{seed}/probe.csv" for arm in ARMS for seed in SEEDS_OF[arm]],
        contrastive=f"{RUN}/notebooks/03_contrastive_training.ipynb",
    output:
        notebook=f"{RUN}/notebooks/05_ablations.ipynb",
    params:
        name="05_ablations",
    shell:
        NOTEBOOK + " --set figures_folder={RUN}/figures run={RUN} beside=''"
