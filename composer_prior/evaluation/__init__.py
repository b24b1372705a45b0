"""Benchmarks: what a model sees in images, in figures with intervals."""
