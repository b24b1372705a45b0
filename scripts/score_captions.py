"""Score captions with the reference: ``[composer] scripts/score_captions.py RECIPE.yaml [out=…] [key=value …]``.

RECIPE is the recipe of a training run; missing data, tokenizer and reference are created first. Without a recipe, give
``out=… reference=… tokenizer.name=… dataset.local=…``. The same command resumes an interrupted job.
"""

import sys

from composer_prior.commands.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
