"""The benchmarks that a command or a recipe can name without further code."""

from composer_prior.evaluation import image_dependence  # noqa: F401
