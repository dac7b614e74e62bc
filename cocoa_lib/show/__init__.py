"""Figures and explorers for the notebooks."""

import datasets
from transformers.utils import logging

# Bars for the second that loading takes stay on a page for ever.
logging.disable_progress_bar()
datasets.disable_progress_bars()
