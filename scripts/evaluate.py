"""Evaluate a model: ``python scripts/evaluate.py MODEL benchmark=NAME [limit=1000] [out=evaluation] …``.

MODEL is a run folder, a model folder, a checkpoint, or any image-text-to-text model of transformers. Without
``benchmark=`` the command lists the names.
"""

import sys

from composer_prior.commands.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
