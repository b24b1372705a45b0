"""``composer-prior convert SOURCE OUT [option=value ...]``."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer_prior.conversion.convert import card_of, convert_captions
from composer_prior.data.messages import one_line_exit, say


@one_line_exit()
def run(words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Convert image-caption pairs and print the summary."""
    source, out = words
    name = options.get("push_to_hub")
    if name is not None:
        from composer_prior.data.hub import check_push, push  # here: of safetensors, which conversion does not need

        check_push(name, "dataset", out)
    try:
        summary = convert_captions(source, out, **options)
    except KeyboardInterrupt:
        print("Run the same command again to go on.", file=sys.stderr)
        raise
    rejected = f"\nThe reasons are in {out}/rejected.jsonl." if summary.rejected or summary.ignored else ""
    say(f"{summary}{rejected}")
    if name is not None:
        say(push(out, name, "dataset", card_of(Path(out))))
