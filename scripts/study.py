"""Run a study: ``python scripts/study.py STUDY.yaml [out=studies/…] [processes=2] [option=value …] [key=value …]``.

STUDY names recipes, the axes along which their runs differ, and the figures to compare. The same command resumes an
interrupted study and does not repeat finished runs.
"""

import sys

from composer_prior.commands.cli import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
