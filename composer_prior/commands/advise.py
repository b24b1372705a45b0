"""``composer-prior advise DATA [option=value ...]``."""

from collections.abc import Mapping, Sequence
from typing import Any

from composer_prior.data.messages import announce, one_line_exit
from composer_prior.inference.advise import advise


@one_line_exit()
def run(words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Print how much of the captions the image explains, and which weights find it."""
    announce(str(advise(words[0], **options)))
