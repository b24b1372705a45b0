"""Corrections of mosaicml-streaming 0.13, one function or method per fault, each with its public report.

Importing this module replaces two functions of streaming, for all of its data sets in the process; the rest are methods
of :class:`FixedDataset`. Three overrides are for speed: without one of them, ``python -m benchmarks.libraries`` takes
the times that the override states to read captions from a remote that is cached, with 2 and with 8 workers.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path
from tempfile import gettempdir
from time import sleep
from typing import Any

import torch
from filelock import FileLock
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, DEFAULT_TIMEOUT, LOCALS, SHM_TO_CLEAN, TICK
from streaming.base.dataset import _Iterator
from streaming.base.shared import memory as streaming_memory
from streaming.base.shared import prefix
from streaming.base.shared.memory import SharedMemory
from streaming.base.storage.download import CloudDownloader, S3Downloader
from streaming.base.storage.upload import CloudUploader, S3Uploader
from streaming.base.world import World

from composer_prior.data.messages import DataError, one_line

_CLAIMS = 20
_NUMBERS = 10**6  # streaming writes them with six digits
_SIZED_WITHIN = 2.0  # seconds; it takes microseconds, and longer where many processes share few cores
_LOCK_TICK = 0.001  # seconds between looks at the lock of the workers' barrier, which is held for microseconds


def open_when_sized(name: str, create: bool, size: int) -> BuiltinSharedMemory:
    """Open shared memory, and wait while its maker has not yet given it a size; Python fails on empty memory.

    No public report; https://github.com/mosaicml/streaming/issues/901 supposes one in ``SharedMemory``.
    Memory whose maker was killed at that moment stays empty: a PermissionError, which a search passes over.
    """
    for _ in range(int(_SIZED_WITHIN / TICK)):
        try:
            return BuiltinSharedMemory(name, create, size)
        except ValueError:
            sleep(TICK)
    raise PermissionError(f"the shared memory {name} is empty: the program that made it was killed at that moment")


def claim_number(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """Return a number in shared memory that no other data set of the node has, and the memory that holds it.

    In streaming each rank looks for itself: two programs take one number, or ranks wait for a rank that has failed
    (https://github.com/mosaicml/streaming/issues/901, https://github.com/mosaicml/streaming/issues/884). Here the first
    rank of a node takes one and tells the others.
    """
    prefix._check_self(streams_local)
    number, memory, failure = -1, None, None
    if world.is_local_leader:
        try:
            number, memory = _take_number(streams_local, streams_remote, retry)
        except (ValueError, OSError) as error:
            failure = one_line(error)
    mine = (world.node if world.is_local_leader else None, number, failure)
    found = [mine]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
    failures = [failure for _, _, failure in found if failure is not None]
    if failures:
        raise DataError(failures[0])
    number = next(number for node, number, _ in found if node == world.node)
    return number, memory or SharedMemory(prefix._get_path(number, LOCALS), False)


def _take_number(streams_local: list[str], streams_remote: list[str | None], retry: int) -> tuple[int, SharedMemory]:
    caches = [local for local, remote in zip(streams_local, streams_remote, strict=True) if remote]
    for _ in range(_CLAIMS):
        number = free_number(caches, retry)
        data = prefix._pack_locals(streams_local, number)
        try:
            memory = SharedMemory(prefix._get_path(number, LOCALS), True, len(data))
        except FileExistsError:  # another program took it meanwhile
            continue
        memory.buf[: len(data)] = data
        return number, memory
    raise FileExistsError(f"no number in shared memory could be had in {_CLAIMS} attempts")


def free_number(caches: Sequence[str], retry: int = 0) -> int:
    """Return a number that no data set uses, not even one that was killed and left files behind.

    Streaming opens the memory of all data sets of the node and never closes it, until the process has no file
    descriptors left (https://github.com/mosaicml/streaming/issues/457), and it stops at memory of another user
    (https://github.com/mosaicml/streaming/issues/332).

    If another data set uses one of the folders ``caches``, this looks ``retry`` times more, then raises ValueError.
    """
    number = 0 if caches else bisect_left(range(_NUMBERS), True, key=lambda number: not _is_taken(number))
    while _is_taken(number):
        while shared := {*caches} & {*_locals_of(number)}:
            if not retry:
                raise ValueError(f"Reused local directory: {', '.join(sorted(shared))}. Provide a different one.")
            retry -= 1
            sleep(TICK)
        number += 1
    return number


def _locals_of(number: int) -> list[str]:
    """Return the folders of a data set of this user that has not begun an epoch; none otherwise."""
    if _has_locks(number):
        return []
    try:
        memory = SharedMemory(prefix._get_path(number, LOCALS), False, auto_cleanup=False)
    except (FileNotFoundError, PermissionError):
        return []
    folders, _ = prefix._unpack_locals(bytes(memory.buf))
    memory.cleanup()
    return folders


def _has_locks(number: int) -> bool:
    names = (prefix._get_path(number, name) for name in (BARRIER_FILELOCK, CACHE_FILELOCK))
    return any(Path(gettempdir(), name).exists() for name in names)


def _is_taken(number: int) -> bool:
    """Return whether a data set of this number has left anything."""
    if _has_locks(number):
        return True
    for name in SHM_TO_CLEAN:
        try:
            memory = SharedMemory(prefix._get_path(number, name), False, auto_cleanup=False)
        except FileNotFoundError:
            continue
        except PermissionError:  # another user's, or empty
            return True
        memory.cleanup()
        return True
    return False


streaming_memory.BuiltinSharedMemory = open_when_sized  # type: ignore[misc, assignment]
streaming_dataset.get_shm_prefix = claim_number


class _S3(S3Downloader):
    """Streaming's downloader, which repeats a request without credentials after each status 400 forever; here once.

    No public report.
    """

    _unsigned = False

    def _create_s3_client(self, unsigned: bool = False, timeout: float = DEFAULT_TIMEOUT) -> None:
        if unsigned and self._unsigned:
            raise  # the answer that streaming is handling
        self._unsigned = unsigned
        super()._create_s3_client(unsigned, timeout)


def downloader_of(remote: str | None) -> CloudDownloader:
    """Return streaming's downloader of a remote or a folder."""
    return _S3() if remote is not None and remote.startswith("s3://") else CloudDownloader.get(remote)


class _S3Upload(S3Uploader):
    """Streaming's, which asks for the whole bucket first; credentials for one folder may not.

    No public report.
    """

    def check_bucket_exists(self, remote: str) -> None:
        """Do nothing: the first request for an object says so."""


def uploader_of(local: str, remote: str) -> CloudUploader:
    """Return streaming's uploader from an empty folder to a remote; it tries once and keeps the files."""
    upload = _S3Upload if remote.startswith("s3://") else CloudUploader.get
    return upload((local, remote), keep_local=True, retry=1)


class FixedDataset(StreamingDataset):
    """Streaming's data set, corrected: the end of an epoch, errors of background threads, and three speeds."""

    _failure: Exception | None = None

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the state, with the next epoch if the last one is complete.

        Composer counts so at an epoch's end, but streaming would begin the same epoch again: see
        https://github.com/mosaicml/streaming/issues/869.
        """
        state = super().state_dict(num_samples, from_beginning)
        over = from_beginning and num_samples == 0 and self.next_epoch > 0
        return {**state, "epoch": self.next_epoch} if over else state

    def on_exception(self, future: "Future[None]") -> None:
        """Keep the error of a background thread for the loop that waits for its samples.

        Streaming ends that loop without an error, and with it the epoch. No public report of that since
        https://github.com/mosaicml/streaming/pull/304.
        """
        error = future.exception()
        if isinstance(error, Exception):
            self._failure = error
            self._event.set()

    def raise_failure(self) -> None:
        """Raise the error of a background thread, if there was one."""
        if self._failure is not None:
            raise DataError(one_line(self._failure)) from self._failure

    def __iter__(self) -> Iterator[Any]:
        """Return the samples, with a faster lock: streaming's polls 20 times a second.

        Short epochs take 1.1 and 1.4 times as long with streaming's lock.
        """
        if not hasattr(self._shared_barrier, "lock"):
            self._shared_barrier.lock = FileLock(self._shared_barrier.filelock_path, poll_interval=_LOCK_TICK)
        return super().__iter__()

    def _ready_thread(self, it: _Iterator) -> None:
        """Do nothing, as readers already block on their shard; streaming's thread takes 1.25 and 1.15 times as long."""
        it.on_exit()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        while it.yield_index < it.total and not (it.should_exit() or self._event.is_set()):
            sample_id = it.sample_ids[it.yield_index]
            if sample_id != -1:
                yield sample_id
            it.yield_index += 1
            it.ready_index = it.yield_index
        it.on_exit()
        self.raise_failure()
