"""Benchmarks, each with its command, such as ``python -m benchmarks.step``."""
