"""The next built-in benchmark: scenes of real drawings with real names. Its backbone is not trained yet."""
