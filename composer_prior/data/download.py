"""Downloads that are whole and checked, or fail within a bounded time."""

import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from time import sleep
from typing import Any, cast

from streaming.base.format import FileInfo
from streaming.base.hashing import get_hash

from composer_prior.data.messages import DataError
from composer_prior.data.stores import is_final, service, told

_SHA3 = ("sha3_512", "sha3_384", "sha3_256", "sha3_224")
_SHA2 = ("sha512", "sha384", "sha256", "sha224")
STRONGEST_FIRST = (
    *_SHA3,
    *_SHA2,
    "blake2b",
    "blake2s",
    "sha1",
    "md5",
    "xxh3_128",
    "xxh128",
    "xxh3_64",
    "xxh64",
    "xxh32",
)
ATTEMPTS = 7
FIRST_PAUSE = 1.0  # seconds between the first two attempts; each pause is twice the one before


def download(
    fetch: Callable[[Path], None],
    file: Path,
    check: Callable[[Path], Any],
    attempts: int,
    seconds: float,
    clean_up: Callable[[], None] = lambda: None,
    remote: str = "",
) -> None:
    """Download a file under a temporary name, check it, and rename it; try again if that fails.

    An attempt takes at most ``seconds``; pauses between attempts are 1, 2, 4 … s.

    Args:
        fetch: downloads to the path that it is given.
        file: the final path.
        check: raises if the file is wrong.
        attempts: number of attempts.
        seconds: the longest time of an attempt.
        clean_up: called after a failed attempt.
        remote: the file's URL, for messages.

    Raises:
        DataError: with the error of the last attempt as its cause.
    """
    for attempt in range(attempts):
        try:
            _attempt(fetch, file, check, seconds, attempt, remote)
            return
        except Exception as error:
            clean_up()
            if is_final(error) or attempt + 1 == attempts:
                times = f"{attempt + 1} attempts, the last: " if attempt else ""
                raise DataError(f"{times}{told(error, remote)}") from error
        sleep(FIRST_PAUSE * 2.0**attempt)


def patience(attempts: int, seconds: float) -> float:
    """Return the longest time in seconds that a download may take, all attempts together."""
    return attempts * (seconds + 1) + FIRST_PAUSE * 2.0**attempts


def _attempt(
    fetch: Callable[[Path], None], file: Path, check: Callable[[Path], Any], seconds: float, attempt: int, remote: str
) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}-{attempt}.partial")
    fetched = in_thread(lambda: fetch(partial))
    try:
        fetched.result(seconds)
        check(partial)
        os.replace(partial, file)
    except FutureTimeoutError:
        by = f" of {service(remote)}" if service(remote) else ""
        raise TimeoutError(f"no answer{by}, or not all of it, within {seconds:g} s") from None
    finally:  # at once, or when an abandoned download has ended
        fetched.add_done_callback(lambda _: partial.unlink(missing_ok=True))


def check_file(file: Path, expected: FileInfo, algorithm: str | None = None) -> None:
    """Refuse a file whose size or hash differs from the index.

    Args:
        file: to check.
        expected: its size and hashes.
        algorithm: one of the hashes; default: the strongest.

    Raises:
        ValueError: saying what differs.
    """
    size = file.stat().st_size
    if size != expected.bytes:
        raise ValueError(f"{size} bytes arrived, {expected.bytes} were expected")
    algorithm = algorithm or next((name for name in STRONGEST_FIRST if name in expected.hashes), None)
    if algorithm is None or size == 0:
        return
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if get_hash(algorithm, cast(bytes, data)) != expected.hashes[algorithm]:
            raise ValueError(f"what arrived has another {algorithm} than the index says")


def in_thread(job: Callable[[], Any]) -> "Future[None]":
    """Run a job in a daemon thread."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
