"""Score captions with the reference, once: ``[composer] scripts/score_captions.py RECIPE.yaml [out=…] [key=value …]``.

RECIPE is that of a training run; its data, tokenizer and reference are made first if they are missing. Without one,
give ``out=… reference=… tokenizer.name=… dataset.local=…``. Killed and started again, it goes on where it was.
"""

import sys

from composer_prior.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
