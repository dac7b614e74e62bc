"""Scores, effects with intervals, probes."""

from .effects import contrast as contrast
from .effects import paired_effects as paired_effects
from .results import read_probes as read_probes
from .results import read_ranks as read_ranks
from .results import read_runs as read_runs
from .results import write_ranks as write_ranks
from .results import write_report as write_report
from .score import evaluate as evaluate
from .score import score_arms as score_arms
from .score import score_averages as score_averages
from .score import score_tasks as score_tasks
from .tasks import TASKS as TASKS
from .tasks import averages as averages
