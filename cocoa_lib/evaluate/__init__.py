"""Scores, effects with intervals, probes."""

from ..data.tables import Task
from .effects import contrast, paired_effects
from .results import read_probes, read_ranks, read_runs, write_ranks, write_report
from .score import evaluate, score_arms, score_averages, score_tasks
from .tasks import TASKS, averages, choose_tasks

__all__ = [
    "TASKS",
    "Task",
    "averages",
    "choose_tasks",
    "contrast",
    "evaluate",
    "paired_effects",
    "read_probes",
    "read_ranks",
    "read_runs",
    "score_arms",
    "score_averages",
    "score_tasks",
    "write_ranks",
    "write_report",
]
