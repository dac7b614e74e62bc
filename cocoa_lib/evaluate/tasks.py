"""The 36 tasks of MMEB-V1, their averages, and published scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..data.tables import META_TASKS, Task, read_manifest

PUBLISHED = Path(__file__).resolve().parent.parent.parent / "data" / "published_mmeb.csv"


def _tasks(meta_task: str, ind: str, ood: str) -> list[Task]:
    """Names, or name:candidates where it is not 1000."""
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


def groups(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Each of MMEB's averages and the names of the tasks that it is over, without weights: `overall` is over all tasks, not
    over the four meta-tasks' means."""
    groups = {meta: [task.name for task in tasks if task.meta_task == meta] for meta in META_TASKS}
    groups["ind"] = [task.name for task in tasks if task.in_distribution]
    groups["ood"] = [task.name for task in tasks if not task.in_distribution]
    return {**groups, "overall": [task.name for task in tasks]}


def published() -> pd.DataFrame:
    """Published P@1: model, size, the four meta-tasks, ind, ood, overall, evaluator, source; recomputed, consistent.

    `recomputed` is the overall mean that follows from a row's own four means, `consistent` whether it is within 0.15 of
    the printed one (rounding explains 0.1).
    """
    table = pd.read_csv(PUBLISHED)
    counts = [sum(task.meta_task == meta for task in TASKS) for meta in META_TASKS]
    table["recomputed"] = table[list(META_TASKS)].to_numpy() @ counts / len(TASKS)
    table["consistent"] = (table["overall"] - table["recomputed"]).abs() <= 0.15
    return table


def compared() -> pd.DataFrame:
    """Rows of `published` for a picture: the 3 B models that CoCoA is compared with, one each, with a `label`."""
    table = published().assign(label=lambda t: t["model"] + " " + t["size"])
    table = table[
        table["model"].str.contains("CoCoA|MoCa|contrastive only") & (table["size"] == "3B")
    ].drop_duplicates("label")
    return table.sort_values("model", key=lambda model: model.str.startswith("MoCa"), kind="stable")


def choose_tasks(names: Sequence[str], root: str) -> tuple[Task, ...]:
    """Task names -> tasks. "all": every task that `root` has by its manifest, else MMEB's 36.

    Raises ValueError for an unknown name.
    """
    path, known = Path(root) / "manifest.json", TASKS
    manifest = read_manifest(root) if path.is_file() else {}
    if "tasks" in manifest:
        try:
            known = tuple(Task(*fields) for fields in manifest["tasks"])
            if not [META_TASKS.index(task.meta_task) for task in known]:
                raise ValueError("none listed")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: tasks: expected lists of name, meta-task, in-distribution, candidates ({error})"
            ) from error
    by_name = {task.name: task for task in known}
    if unknown := sorted(set(names) - {"all", *by_name}):
        raise ValueError(f"unknown task(s) {', '.join(unknown)}; known: {', '.join(by_name)}")
    return known if "all" in names else tuple(by_name[name] for name in dict.fromkeys(names))
