"""``train_each.py RECIPE=ENDPOINT ...``: train recipes one after another, each from its own endpoint.

Pauses between attempts to download are a quarter as long as those of a real run.
"""

import os
import sys

from composer_prior.data import download
from composer_prior.training.config import load_recipe
from composer_prior.training.run import train

if __name__ == "__main__":
    download.FIRST_PAUSE /= 4
    for argument in sys.argv[1:]:
        recipe, _, os.environ["S3_ENDPOINT_URL"] = argument.partition("=")
        train(load_recipe(recipe))
