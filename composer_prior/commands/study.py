"""``composer-prior study STUDY.yaml [option=value ...] [key=value of the recipes ...]``."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from composer_prior.data.locks import LockedError
from composer_prior.data.messages import one_line, one_line_exit, say
from composer_prior.studies.job import parse_overrides, run_study
from composer_prior.studies.runner import Stopped


@one_line_exit()
def run(study: str, keys: Sequence[str], options: Mapping[str, Any]) -> int:
    """Run a study; return its exit status, 130 or 143 after a signal.

    Args:
        study: its file.
        keys: ``key=value`` of the recipes.
        options: of :func:`.run_study`.
    """
    try:
        return run_study(study, parse_overrides(keys), **options)
    except LockedError as error:
        sys.exit(f"error: another runner is at this study: {one_line(error)}")
    except Stopped as stop:
        say(f"Stopped by {stop}; the same command goes on where it was.")
        return 128 + stop.number
