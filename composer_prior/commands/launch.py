"""``composer-prior launch [option=value ...] JOB ...``."""

from collections.abc import Mapping, Sequence
from typing import Any

from composer_prior.training.launch import launch


def run(job: Sequence[str], options: Mapping[str, Any]) -> int:
    """Return the exit status of the job's ranks."""
    return launch(job, **options)
