"""Benchmarks: decoding, harvest, training of gates."""
