"""``python -m composer_prior.studies.prepare RECIPE [key=value ...]``: what a run needs, without the run.

The data, tokenizer, reference and scores of a recipe are made, unless they are there.
"""

import runpy
import sys
from collections.abc import Sequence

from composer_prior.data.messages import one_line_exit
from composer_prior.training.config import load_recipe
from composer_prior.training.keys import check_keys
from composer_prior.training.run import ensure_scores, prepare


def main(arguments: Sequence[str]) -> None:
    """Prepare a recipe; errors end the program with one line."""
    with one_line_exit():
        recipe = load_recipe(arguments[0], arguments[1:])
        for path in recipe.code_paths:
            runpy.run_path(path)
        # No more than what is made: what else may be wrong with a cell is that cell's, others share this.
        for key, helper in recipe.helpers.items():
            check_keys(helper, f"{key}.")
        if not recipe.helpers:
            check_keys(recipe)
        prepare(recipe, itself=False)
        ensure_scores(recipe)


if __name__ == "__main__":
    main(sys.argv[1:])
