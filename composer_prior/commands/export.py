"""``composer-prior export MODEL OUT [option=value ...]``."""

from collections.abc import Mapping, Sequence
from typing import Any

from composer_prior.data.messages import one_line_exit, say
from composer_prior.inference.export import export_model


@one_line_exit()
def run(words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Export a model and print what was measured."""
    say(export_model(*words, **options))
