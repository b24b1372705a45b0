"""``composer-prior inspect DATA [option=value ...]``."""

from collections.abc import Mapping, Sequence
from typing import Any

from composer_prior.data.messages import one_line_exit, say
from composer_prior.reports.inspection import inspect_captions


@one_line_exit()
def run(words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Print the figures of a data set."""
    say(inspect_captions(words[0], **options))
