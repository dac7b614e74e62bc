"""The built-in benchmark and its small backbone."""
