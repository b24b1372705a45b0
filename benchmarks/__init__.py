"""What is measured, each by a command of its own, such as ``python -m benchmarks.step``."""
