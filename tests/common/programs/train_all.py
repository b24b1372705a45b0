"""``train_all.py RECIPE JOBS``: train a recipe with each of the lists of overrides in a file of JSON, one by one."""

import json
import sys
from pathlib import Path

from composer_prior.training.config import load_recipe
from composer_prior.training.run import train

if __name__ == "__main__":
    for overrides in json.loads(Path(sys.argv[2]).read_text()):
        train(load_recipe(sys.argv[1], overrides))
