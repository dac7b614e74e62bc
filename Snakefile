"""The grid of a profile: the data, one process an arm and seed, then the notebooks. `Run` says where everything lies.

    snakemake --cores 2 --config profile=laptop [model=...] [data=...] [seeds='0 1 2'] [changes='{...}']

A step's output is a marker, NAME.done: checkpoints, ranks and data know by themselves whether they are whole, and snakemake
deletes the outputs of a step before it runs it again. Stages that several arms share are made first, once.
"""

import json, os, shlex, sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from snakemake.exceptions import WorkflowError
sys.path.insert(0, str(Path(workflow.basedir)))
from cocoa_lib.run import Run
from cocoa_lib.store.files import locked

SEEDS = [int(seed) for seed in str(config.get("seeds", "")).split()]
given = {name: str(config[name]) for name in ("profile", "model", "data") if config.get(name)}
MAIN = Run(**given, seed=(SEEDS or [0])[0], changes=config.get("changes"), retrain=True)
RUNS = [MAIN.other(arm=arm, seed=seed) for arm, n in MAIN.grid.items() for seed in SEEDS or range(n)]
PLACE = str(MAIN.root)
STAGES_AT = {str(run.folder(stage)): (run, stage) for run in reversed(RUNS) for stage in run.stages}
USED = Counter(str(run.folder(stage)) for run in RUNS for stage in run.stages)
PYTHON = shlex.quote(sys.executable)
NOTEBOOKS = sorted(path.stem for path in Path("notebooks").glob("0*.ipynb"))

if workflow.is_main_process and not workflow.output_settings.dryrun:
    # Snakemake's own lock stays behind when it is killed, and the same command is then refused: `make` passes --nolock.
    ALONE = ExitStack()
    ALONE.enter_context(locked(Path(PLACE), WorkflowError))

# Several GPUs (`make` counts them): each step takes the first that no other step has; `gpu` keeps them to one each.
GPUS = int(config.get("gpus", 0))
CARDS = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card][:GPUS] or list(map(str, range(GPUS)))
SLOT = f"for g in {shlex.join(CARDS)}; do exec 9> {PLACE}/.gpu$g; flock -n 9 && break; done; export CUDA_VISIBLE_DEVICES=$g; " if GPUS > 1 else ""
OFFLINE = "" if MAIN.model else "HF_HUB_OFFLINE=1 "
shell.prefix(f"export {OFFLINE}TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg OMP_NUM_THREADS=${{{{OMP_NUM_THREADS:-1}}}}; ")

def shared_before(run, stage="stage4"):
    """Marker of the last stage before this one that several runs share."""
    shared = [folder for name in run.stages if name < stage and USED[folder := str(run.folder(name))] > 1]
    return [f"{folder}.done" for folder in shared[-1:]]

def command(run, step):
    """The line that does a step, its output in a log whose end is shown when it fails."""
    log = shlex.quote(f"{PLACE}/logs/{run.arm}-seed{run.seed}-{step}.log")
    line = f"{PYTHON} -m cocoa_lib.run {step} {shlex.join(run.arguments())}"
    return f"mkdir -p {shlex.quote(PLACE + '/logs')} && {line} > {log} 2>&1 || (tail -20 {log} >&2; exit 1)"

def run_of(wildcards):
    return MAIN.other(arm=wildcards.arm, seed=int(wildcards.seed))

def stage_of(wildcards):
    """(a run that has this stage, the stage)."""
    return STAGES_AT["{}/seed{}/{}/{}".format(PLACE, wildcards.seed, wildcards.stage, wildcards.key)]

wildcard_constraints:
    seed=r"\d+", stage="stage[12]", arm=r"\w+",

rule all:
    input:
        expand(f"{PLACE}/notebooks/{{notebook}}.ipynb", notebook=NOTEBOOKS),

rule data:
    """The data, and a backbone of another shape where the run names one."""
    output:
        touch(f"{PLACE}/data.done"),
    benchmark: f"{PLACE}/times/data/data.tsv"
    params:
        values=json.dumps([MAIN.values.get(name) for name in ("benchmark", "pairs", "backbone")]),
        line=command(MAIN, "prepare"),
    threads: workflow.cores
    resources: gpu=1
    shell: SLOT + "{params.line}"

rule shared:
    """A stage that several arms share."""
    input:
        f"{PLACE}/data.done",
        lambda w: shared_before(*stage_of(w)),
    output:
        touch(f"{PLACE}/seed{{seed}}/{{stage}}/{{key}}.done"),
    benchmark: f"{PLACE}/times/shared/seed{{seed}}-{{stage}}-{{key}}.tsv"
    params:
        recipe=lambda w: str(stage_of(w)[0].recipe(w.stage)),
        line=lambda w: command(*stage_of(w)),
    resources: gpu=1
    shell: SLOT + "{params.line}"

rule run:
    """One arm with one seed: what is missing of its stages, the evaluation, the probes."""
    input:
        f"{PLACE}/data.done",
        lambda w: shared_before(run_of(w)),
    output:
        touch(f"{PLACE}/seed{{seed}}/evaluate/{{arm}}.done"),
    benchmark: f"{PLACE}/times/run/{{arm}}-seed{{seed}}.tsv"
    params:
        values=lambda w: json.dumps(run_of(w).values, sort_keys=True),
        line=lambda w: command(run_of(w), "all"),
    resources: gpu=1
    shell: SLOT + "{params.line}"

rule notebook:
    """A notebook of the main arm, written aside and renamed when all its cells have run."""
    input:
        lambda w: f"notebooks/{w.notebook}.ipynb",
        lambda w: f"{PLACE}/data.done" if w.notebook.startswith("00") else [f"{PLACE}/seed{run.seed}/evaluate/{run.arm}.done" for run in RUNS],
    output:
        f"{PLACE}/notebooks/{{notebook}}.ipynb",
    benchmark: f"{PLACE}/times/notebook/{{notebook}}.tsv"
    params:
        names=shlex.join(MAIN.parameters()),
        aside=lambda w: f"{PLACE}/notebooks/{w.notebook}.partial.ipynb",
    resources: gpu=1
    shell:
        SLOT + "cd notebooks && {PYTHON} -m papermill {wildcards.notebook}.ipynb ../{params.aside} {params.names}"
        " --no-progress-bar -k python3 && mv ../{params.aside} ../{output}"
