"""The benchmarks that a command or a recipe can name without further code: importing this registers them."""

from composer_prior.evaluation import (  # noqa: F401
    captioning,
    foils,
    hallucination,
    image_dependence,
    pope,
    scene_choices,
)
