"""The jobs of ``composer-prior``, run in this process."""

import sys
from functools import partial

from composer_prior.commands.cli import main


def run_job(name, words):
    """Run ``composer-prior NAME WORDS`` and return its exit status; the line of an error goes to stderr."""
    try:
        main([name, *words])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0


def run_to_end(name, words):
    """Run ``composer-prior NAME WORDS``; an error is a SystemExit."""
    try:
        main([name, *words])
    except SystemExit as end:
        if end.code:
            raise


advise, caption, convert, evaluate, inspect, study = (
    partial(run_job, name) for name in ("advise", "caption", "convert", "evaluate", "inspect", "study")
)
train, score = partial(run_to_end, "train"), partial(run_to_end, "score")
