"""The benchmarks that a command or a recipe can name without further code: importing this registers them."""

from composer_prior.evaluation import image_dependence, scene_foils, scene_questions  # noqa: F401
