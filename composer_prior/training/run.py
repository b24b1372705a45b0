"""Train the model of a recipe."""

import os

from composer import Trainer

from composer_prior.training.config import TrainConfig
from composer_prior.training.keys import check_keys
from composer_prior.training.prepare import ensure_scores, prepare, sole_run
from composer_prior.training.trainer import build_trainer, finish


def train(recipe: TrainConfig) -> Trainer:
    """Run a recipe to its end; missing inputs are created first.

    Args:
        recipe: from :func:`.load_recipe`.

    Raises:
        ValueError, FileNotFoundError: before training, if the recipe cannot run.
    """
    check_keys(recipe)
    with sole_run(recipe):
        return finish(recipe, start(recipe))


def start(recipe: TrainConfig) -> Trainer:
    """Prepare data, tokenizer and reference, and build the Trainer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    prepare(recipe)
    ensure_scores(recipe)
    return build_trainer(recipe)
