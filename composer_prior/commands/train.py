"""``composer-prior train RECIPE.yaml [key=value ...]``."""

import re
import sys
from contextlib import ExitStack

from composer_prior.data.messages import OneLineError, one_line_exit
from composer_prior.training.config import TrainConfig
from composer_prior.training.run import sole_run, start
from composer_prior.training.trainer import finish


def run(recipe: TrainConfig) -> None:
    """Train a model; errors of the recipe and of the data end the program with one line."""
    with ExitStack() as held, one_line_exit((OneLineError,)):
        with one_line_exit():
            held.enter_context(sole_run(recipe))
            trainer = start(recipe)
        try:
            finish(recipe, trainer)
        except RuntimeError as error:
            if not re.search("Connection (closed|reset) by peer", str(error)):
                raise
            sys.exit("error: another rank has ended; its own message says why.")
