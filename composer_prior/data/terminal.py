"""Words for whoever started a program, which never decide how it ends."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

__all__ = ["say"]


def say(message: object) -> None:
    """Print a line, whatever characters the terminal knows, and also when nobody reads any more or the disk is full."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(str(message).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        with suppress(OSError, ValueError):  # what is left in its buffer goes there too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
