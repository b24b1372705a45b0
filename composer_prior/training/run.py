"""The run of a recipe: what ``train.py`` calls."""

import os
import re
import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from composer import Trainer

from composer_prior.data.messages import OneLineError, one_line
from composer_prior.training.checks import check_recipe
from composer_prior.training.config import TrainConfig, load_recipe
from composer_prior.training.prepare import ensure_scores, prepare, sole_run
from composer_prior.training.trainer import build_trainer, finish


def main(arguments: Sequence[str]) -> None:
    """``train.py RECIPE [key=value ...]``: errors of the recipe and of the data end the program with one line."""
    if not arguments:
        sys.exit("usage: composer-prior train RECIPE.yaml [key=value ...]; --help lists the keys")
    held = ExitStack()
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
        for path in recipe.code_paths:
            runpy.run_path(path)
        check_recipe(recipe)
        held.enter_context(sole_run(recipe))
        trainer = start(recipe)
    except (ValueError, OSError, OneLineError) as error:
        held.close()  # what did not start leaves no folder
        sys.exit(f"error: {one_line(error)}")
    try:
        with held:
            finish(recipe, trainer)
    except OneLineError as error:
        sys.exit(f"error: {one_line(error)}")
    except RuntimeError as error:
        if not re.search("Connection (closed|reset) by peer", str(error)):
            raise
        sys.exit("error: another rank has ended; its own message says why.")


def train(recipe: TrainConfig) -> Trainer:
    """Run a recipe to its end; what it needs and does not find is made first.

    Args:
        recipe: from :func:`.load_recipe`.

    Raises:
        ValueError, FileNotFoundError: before training, if the recipe cannot run.
    """
    check_recipe(recipe)
    with sole_run(recipe):
        return finish(recipe, start(recipe))


def start(recipe: TrainConfig) -> Trainer:
    """Everything up to the first step: data, tokenizer, reference, and the Trainer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    prepare(recipe)
    ensure_scores(recipe)
    return build_trainer(recipe)
