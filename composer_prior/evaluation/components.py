"""The benchmarks that there are: importing this registers them all."""

from composer_prior.evaluation import captioning, foils, hallucination, pope  # noqa: F401  each registers itself
