"""Figures and explorers for the notebooks."""

from transformers.utils import logging

logging.disable_progress_bar()  # a bar for the second that loading takes stays on a page for ever
