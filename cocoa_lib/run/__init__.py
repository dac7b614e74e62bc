"""Runs: stages, trainers, checkpoints, estimates."""
