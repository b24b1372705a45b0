"""Pre-train a model from a recipe: ``composer train.py RECIPE.yaml [key=value ...]``."""

import sys

from composer_prior.commands.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
