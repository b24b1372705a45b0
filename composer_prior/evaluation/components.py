"""The benchmarks that there are: importing this registers them all."""

from composer_prior.evaluation import captioning, foils, hallucination, pope

__all__ = ["captioning", "foils", "hallucination", "pope"]
