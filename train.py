"""``composer train.py RECIPE.yaml [key=value ...]``: pre-train a model from a recipe."""

import sys

from composer_prior.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
