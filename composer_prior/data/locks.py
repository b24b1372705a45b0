"""Locks on folders and files; the system releases those of a killed process."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from composer_prior.data.storage import StorageError, WriteError, full_disk_told

LOCK = ".lock"  # in a folder while a job writes to it
_REQUEUED = 180  # seconds that a requeued Slurm job waits, as a network disk releases a failed node's locks late


class LockedError(StorageError):
    """A folder or file that another process writes to."""


@contextmanager
def locked(file: Path, seconds: float = -1, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file, or raise :class:`LockedError` if another process holds it for that many seconds.

    ``-1`` waits without limit; ``waiting`` is called once if another process holds the lock.
    """
    lock = FileLock(file)
    patience: float = 0
    while not lock.is_locked:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=patience)
        except FileNotFoundError:  # its last holder removed the folder
            continue
        except Timeout as error:
            if patience == seconds:
                raise LockedError(f"{file} is held by another process.") from error
            waiting()
            patience = seconds
    try:
        yield
    finally:
        lock.release()


@contextmanager
def sole_writer(path: str | Path, key: str, inside: bool = False) -> Iterator[None]:
    """Lock a folder or file for writing, or raise one line at once if it is locked or cannot be written.

    ``key`` is that of the recipe or command which names it; ``inside`` puts the lock into the folder, not beside it.
    """
    target = Path(path).expanduser().absolute()
    file = target / LOCK if inside else target.with_name(f".{target.name}{LOCK}")
    made: list[Path] = []
    with ExitStack() as stack:
        try:
            made += (folder for folder in file.parents if not folder.exists())
            stack.enter_context(locked(file, seconds=_REQUEUED if "SLURM_RESTART_COUNT" in os.environ else 0))
        except LockedError:
            raise LockedError(
                f"{key}={path}: another process is writing there; let it end first, or name another path."
            ) from None
        except OSError as error:
            raise WriteError(f"{key}={path} cannot be written to ({error.strerror}).") from error
        try:
            with full_disk_told(path):
                yield
        finally:
            with suppress(OSError):
                file.unlink()  # waiting processes lock a new file
                for folder in made:
                    folder.rmdir()  # fails unless it is empty
