"""``composer-prior caption MODEL IMAGE|FOLDER|REMOTE ... [option=value ...]``."""

from collections.abc import Mapping, Sequence
from typing import Any

from composer_prior.data.messages import one_line_exit, say
from composer_prior.inference.caption import caption_images


@one_line_exit()
def run(words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Caption images and print how many."""
    counts = caption_images(words[0], words[1:], **options)
    before = f", {counts['before']} had been done before" if counts["before"] else ""
    say(f"{counts['captioned']} images captioned, {counts['errors']} could not be used{before}.")
