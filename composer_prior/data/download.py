"""Downloads that are whole and checked, or fail within a bounded time."""

import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from time import sleep
from typing import Any, cast

from streaming.base.format import FileInfo
from streaming.base.hashing import get_hash

from composer_prior.data.messages import DataError
from composer_prior.data.stores import is_final, service, told

STRONGEST_FIRST = (
    *("sha3_512", "sha3_384", "sha3_256", "sha3_224", "sha512", "sha384", "sha256", "sha224", "blake2b", "blake2s"),
    *("sha1", "md5", "xxh3_128", "xxh128", "xxh3_64", "xxh64", "xxh32"),
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
    """Download a file under a temporary name, check it, and rename it; try again after 1, 2, 4 … s if that fails.

    ``fetch`` downloads to the path that it is given, in at most ``seconds``. ``check`` raises if that file is wrong.
    ``clean_up`` is called after a failed attempt. ``remote`` is the file's URL, for messages. The error of the last
    attempt is the cause of a DataError.
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


def _attempt(
    fetch: Callable[[Path], None], file: Path, check: Callable[[Path], Any], seconds: float, attempt: int, remote: str
) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}-{attempt}.partial")
    fetched: Future[None] = Future()

    def run() -> None:
        try:
            fetch(partial)
            fetched.set_result(None)
        except BaseException as error:
            fetched.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        fetched.result(seconds)
        check(partial)
        os.replace(partial, file)
    except TimeoutError:
        by = f" of {service(remote)}" if service(remote) else ""
        raise TimeoutError(f"no answer{by}, or not all of it, within {seconds:g} s") from None
    finally:  # at once, or when an abandoned download has ended
        fetched.add_done_callback(lambda _: partial.unlink(missing_ok=True))


def check_file(file: Path, expected: FileInfo, algorithm: str | None = None) -> None:
    """Raise ValueError if a file has another size or hash than expected; ``algorithm`` is the strongest by default."""
    size = file.stat().st_size
    if size != expected.bytes:
        raise ValueError(f"{size} bytes arrived, {expected.bytes} were expected")
    algorithm = algorithm or next((name for name in STRONGEST_FIRST if name in expected.hashes), None)
    if algorithm is None or size == 0:
        return
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if get_hash(algorithm, cast(bytes, data)) != expected.hashes[algorithm]:
            raise ValueError(f"what arrived has another {algorithm} than the index says")
