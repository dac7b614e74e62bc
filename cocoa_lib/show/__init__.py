"""Figures and explorers for the notebooks."""
