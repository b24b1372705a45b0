"""``composer-prior convert SOURCE OUT [option=value ...]``."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from composer_prior.conversion.convert import convert_captions
from composer_prior.data.messages import one_line_exit, say


@one_line_exit()
def run(words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Convert image-caption pairs and print the summary."""
    source, out = words
    try:
        summary = convert_captions(source, out, **options)
    except KeyboardInterrupt:
        print("Run the same command again to go on.", file=sys.stderr)
        raise
    rejected = f"\nThe reasons are in {out}/rejected.jsonl." if summary.rejected or summary.ignored else ""
    say(f"{summary}{rejected}")
