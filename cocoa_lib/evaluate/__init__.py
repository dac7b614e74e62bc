"""Scores, effects with intervals, probes."""
