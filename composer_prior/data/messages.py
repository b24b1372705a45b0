"""What a user is told: one line for an error, and words that never decide how a program ends."""

import os
import sys
from contextlib import suppress


class OneLineError(Exception):
    """An error whose message is one line, also where DataLoader has put a worker's traceback around it."""

    def __init__(self, message: str):
        last = message.rstrip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


class DataError(OneLineError, OSError):
    """Data that cannot be read, named: an index, a shard."""


def one_line(error: BaseException, length: int = 500) -> str:
    """The message of an error as one line, or its type."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def say(message: object) -> None:
    """Print a line, whatever characters the terminal knows, and also when nobody reads any more or the disk is full."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(str(message).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        with suppress(OSError, ValueError):  # what is left in its buffer goes there too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def announce(message: object) -> None:
    """Say something on rank 0."""
    from composer.utils import dist  # here: conversion and inspection start without Composer

    if dist.get_global_rank() == 0:
        say(message)
