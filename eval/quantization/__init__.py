"""The command `baselines`: quantised caches beside each other."""
