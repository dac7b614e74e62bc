"""The 36 tasks of MMEB-V1, their averages, and published scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..data.tables import META_TASKS, Task, find_part, read_manifest

PUBLISHED = Path(__file__).resolve().parent.parent.parent / "data" / "published_mmeb.csv"


def _tasks(meta_task: str, ind: str, ood: str) -> list[Task]:
    """Parse names, or name:candidates where it is not 1000."""
    named = [(name, True) for name in ind.split()] + [(name, False) for name in ood.split()]
    split = [(*name.partition(":")[::2], known) for name, known in named]
    return [Task(name, meta_task, known, int(size or 1000)) for name, size, known in split]


TASKS: tuple[Task, ...] = (
    *_tasks(
        "classification",
        "ImageNet-1K N24News:24 HatefulMemes:2 VOC2007:20 SUN397:397",
        "Place365:365 ImageNet-A ImageNet-R:200 ObjectNet:313 Country211:211",
    ),
    *_tasks(
        "vqa",
        "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
        "ScienceQA VizWiz GQA TextVQA",
    ),
    *_tasks(
        "retrieval",
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "OVEN FashionIQ EDIS Wiki-SS-NQ",
    ),
    *_tasks("grounding", "MSCOCO", "Visual7W-Pointing RefCOCO RefCOCO-Matching"),
)


def group_tasks(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Name the tasks behind each of MMEB's averages: the four meta-tasks, ind, ood, overall."""
    groups = {meta: [task.name for task in tasks if task.meta_task == meta] for meta in META_TASKS}
    groups["ind"] = [task.name for task in tasks if task.in_distribution]
    groups["ood"] = [task.name for task in tasks if not task.in_distribution]
    return {**groups, "overall": [task.name for task in tasks]}


def averages(scores: Mapping[str, float], tasks: Sequence[Task] = TASKS) -> dict[str, float]:
    """Average task scores as MMEB does: classification, vqa, retrieval, grounding, ind, ood, overall.

    Unweighted means over the tasks that have a score; `overall` is over all tasks, not over the
    four meta-task means. An average over no task is nan. Raises ValueError for an unknown task.
    """
    if unknown := sorted(set(scores) - {task.name for task in tasks}):
        raise ValueError(f"unknown task(s) {', '.join(unknown)}")
    present = group_tasks([task for task in tasks if task.name in scores])
    return {
        group: math.fsum(scores[name] for name in names) / len(names) if names else math.nan
        for group, names in present.items()
    }


def read_published() -> pd.DataFrame:
    """Read published P@1: model, size, the averages, evaluator, source, recomputed, consistent.

    `recomputed` is the overall mean that follows from a row's own four means; `consistent` says
    whether it is within 0.15 of the printed one (rounding explains 0.1).
    """
    table = pd.read_csv(PUBLISHED)
    counts = [sum(task.meta_task == meta for task in TASKS) for meta in META_TASKS]
    table["recomputed"] = table[list(META_TASKS)].to_numpy() @ counts / len(TASKS)
    table["consistent"] = (table["overall"] - table["recomputed"]).abs() <= 0.15
    return table


def list_known(root: str | Path) -> tuple[Task, ...]:
    """List the tasks that a data folder's manifest names, or else MMEB's 36."""
    if not (Path(root) / "manifest.json").is_file():
        return TASKS
    named = read_manifest(root).get("tasks")
    return TASKS if named is None else tuple(Task(*fields) for fields in named)


def choose_tasks(names: Sequence[str], root: str | Path) -> tuple[Task, ...]:
    """Turn task names into tasks of `list_known`; "all" is every one with a folder below `root`.

    Raises ValueError for an unknown name, and for "all" where there is none.
    """
    known, folder = {task.name: task for task in list_known(root)}, find_part(root, "eval")
    if unknown := sorted(set(names) - {"all", *known}):
        raise ValueError(f"unknown task(s) {', '.join(unknown)}; known: {', '.join(known)}")
    if "all" in names:
        names = [name for name in known if (folder / name).is_dir()]
    if not names:
        raise ValueError(f"{folder}: no task's folder; expected some of {', '.join(known)}")
    return tuple(task for name, task in known.items() if name in names)
