"""One writer at a time: locks on folders and files, which the system takes back from a process that is killed."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from composer_prior.data.storage import StorageError, WriteError, full_disk_told

LOCK = ".lock"  # in a folder that a job writes to, while it does
_REQUEUED = 180  # seconds that a job which Slurm has put back waits: a network disk frees a failed node's locks late
# How many processes a launcher started that sets no RANK and WORLD_SIZE: Slurm, Open MPI, MPICH.
_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class LockedError(StorageError):
    """A folder or file that another process writes to."""


@contextmanager
def locked(file: Path, seconds: float = -1, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock that a file stands for, or raise :class:`LockedError` if another process does for so many seconds.

    ``-1`` waits as long as it takes; ``waiting`` is called once if another process holds it.
    """
    lock = FileLock(file)
    patience: float = 0
    while not lock.is_locked:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=patience)
        except FileNotFoundError:  # who held it has removed the folder
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
def sole_writer(place: str | Path, key: str, inside: bool = False) -> Iterator[None]:
    """Hold the only right to write to a folder or file, or raise one line at once if another process does or none can.

    Args:
        place: what a recipe or command names by ``key``.
        key: for messages.
        inside: the lock lies in the folder, and not beside it. Default: ``False``.
    """
    path = Path(place).expanduser().absolute()
    file = path / LOCK if inside else path.with_name(f".{path.name}{LOCK}")
    made: list[Path] = []
    with ExitStack() as stack:
        try:
            made += (folder for folder in file.parents if not folder.exists())
            stack.enter_context(locked(file, seconds=_REQUEUED if "SLURM_RESTART_COUNT" in os.environ else 0))
        except LockedError:
            raise LockedError(
                f"{key}={place}: another process is writing there; let it end first, or name another place."
            ) from None
        except OSError as error:
            raise WriteError(f"{key}={place} cannot be written to ({error.strerror}).") from error
        try:
            with full_disk_told(place):
                yield
        finally:
            with suppress(OSError):
                file.unlink()  # who waits for the lock takes a new file
                for folder in made:
                    folder.rmdir()  # unless something was written there


def check_ranks() -> None:
    """End the program with one line if it is one of many of which each would take itself for the only rank."""
    in_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ  # of sbatch, which starts one
    for name in _TASKS if not in_script and not {"RANK", "WORLD_SIZE"} & {*os.environ} else ():
        if os.environ.get(name, "1") not in ("", "0", "1"):
            sys.exit(
                f"error: {name}={os.environ[name]} processes were started, and none knows its rank (RANK, WORLD_SIZE): "
                "start the ranks of each node with composer-prior launch, or one process alone (srun -n 1)."
            )
