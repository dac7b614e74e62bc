"""The built-in benchmark: scenes of OpenMoji drawings with their Unicode names."""
