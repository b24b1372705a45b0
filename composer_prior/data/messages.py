"""Messages for the user: errors of one line, and output that never ends the program."""

import os
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of Unicode: controls, formats, surrogates, separators
NO_INDEX = "{}: no index.json here; name a data set made by composer-prior convert."
_HIDDEN: dict[str, str] = {}  # value: the text shown instead


class OneLineError(Exception):
    """An error whose message is one line, also if DataLoader has put a worker's traceback around it."""

    def __init__(self, message: str):
        last = message.rstrip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


class DataError(OneLineError, OSError):
    """An index or a shard that cannot be read; the message names it."""


def hide(value: str, text: str) -> None:
    """Show ``text`` instead of a value in errors; values of less than 4 characters are not hidden."""
    if len(value) >= 4:
        _HIDDEN[value] = text


def hidden(text: str) -> str:
    """Replace the values of :func:`hide` in a text."""
    for value in sorted(_HIDDEN, key=len, reverse=True):
        text = text.replace(value, _HIDDEN[value])
    return text


def visible(text: str, keep: str = "") -> str:
    """Escape characters that are invisible, reorder text or control a terminal, such as ``[U+001B]``.

    The joiners of scripts and emoji and the characters of ``keep`` stay.
    """
    return "".join(
        f"[U+{ord(char):04X}]" if unicodedata.category(char) in _UNSEEN and char not in f"\u200c\u200d{keep}" else char
        for char in text
    )


def one_line(error: BaseException, length: int = 500) -> str:
    """Return the message of an error as one line that a terminal shows as it is, or its type."""
    return visible(" ".join(hidden(str(error)).split()))[:length] or type(error).__name__


def short(text: str, length: int = 200) -> str:
    """Return the beginning of a text that may be of any length."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


@contextmanager
def one_line_exit(expected: tuple[type[Exception], ...] = (ValueError, OSError, OneLineError)) -> Iterator[None]:
    """End the program with one line for an expected error; others are raised with their traceback. Also a decorator."""
    try:
        yield
    except expected as error:
        sys.exit(f"error: {one_line(error)}")


def say(message: object) -> None:
    """Print a line; ignore a closed pipe or a full disk, and escape characters that the terminal lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(visible(str(message), keep="\n\t").encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        with suppress(OSError, ValueError):  # discard the rest of its buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def failure(error: BaseException) -> str:
    """Return the message of an error as one line, and below it its origin and where its traceback is logged."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{one_line(error)}\n  ({where.filename}, line {where.lineno}; the traceback is in the log, on stderr)"


def announce(message: object) -> None:
    """Print a message on rank 0, unless it is empty."""
    from composer.utils import dist  # here: conversion and inspection start without Composer

    text = str(message)
    if text and dist.get_global_rank() == 0:
        say(text)
