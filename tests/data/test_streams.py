"""Data sets of one node side by side: each has a number of its own in shared memory, whoever looks at the same time."""

import _posixshmem
import os
import tempfile
import threading
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path

import pytest
from common.data import write_tiles
from streaming.base.constant import BARRIER_FILELOCK, CACHE_USAGE, LOCALS, RESUME
from streaming.base.shared import memory as streaming_memory
from streaming.base.shared import prefix
from streaming.base.shared.memory import SharedMemory

from composer_prior.data import streams
from composer_prior.data.messages import DataError
from composer_prior.data.streams import CheckedDataset


@pytest.fixture
def tiles(tmp_path):
    return write_tiles(tmp_path / "tiles", 4)


def test_a_number_that_another_program_takes_meanwhile_is_left_to_it(tiles, monkeypatch):
    first = CheckedDataset(local=tiles, batch_size=1)
    look, looks = streams._free_number, []

    def late(*arguments):
        """What was free when it looked has been taken since, the first time."""
        looks.append(arguments)
        return first._shm_prefix_int if len(looks) == 1 else look(*arguments)

    monkeypatch.setattr(streams, "_free_number", late)
    second = CheckedDataset(local=tiles, batch_size=1)
    assert second._shm_prefix_int != first._shm_prefix_int
    assert len(looks) == 2
    assert second[3]["caption"].startswith("a tile of shade 3")
    taken = SharedMemory(prefix._get_path(second._shm_prefix_int, LOCALS), False)
    assert prefix._unpack_locals(bytes(taken.buf))[0] == [tiles]


def test_where_no_number_is_to_be_had_there_is_one_line(tiles, monkeypatch):
    first = CheckedDataset(local=tiles, batch_size=1)
    monkeypatch.setattr(streams, "_free_number", lambda *_: first._shm_prefix_int)
    with pytest.raises(DataError, match=r"^no number in shared memory could be had in 20 attempts$"):
        CheckedDataset(local=tiles, batch_size=1)


@pytest.mark.parametrize("remote", [False, True])
def test_a_number_with_leftovers_of_a_killed_program_is_passed_over(remote, tiles, tmp_path):
    place = {"local": tiles, "remote": None} if not remote else {"local": str(tmp_path / "cache"), "remote": tiles}
    first = CheckedDataset(local=tiles, batch_size=1)
    places = [place["local"]], [place["remote"]]
    expected = streams._free_number(*places, retry=0)
    leftover = SharedMemory(prefix._get_path(expected, CACHE_USAGE), True, 8)
    second = streams._free_number(*places, retry=0)
    lock = Path(tempfile.gettempdir(), prefix._get_path(second, BARRIER_FILELOCK))
    lock.touch()
    try:
        third = CheckedDataset(**place, batch_size=1)
    finally:
        lock.unlink()
        leftover.cleanup()
    assert third._shm_prefix_int not in {first._shm_prefix_int, expected, second}
    assert third[3]["caption"].startswith("a tile of shade 3")


def empty_memory(number, name):
    """Shared memory as it is between the two calls of the system that make it."""
    return _posixshmem.shm_open(f"/{prefix._get_path(number, name)}", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)


@pytest.mark.parametrize("remote", [False, True])
def test_a_number_whose_program_was_killed_as_it_took_it_is_passed_over(remote, tiles, tmp_path, monkeypatch):
    place = {"local": tiles, "remote": None} if not remote else {"local": str(tmp_path / "cache"), "remote": tiles}
    monkeypatch.setattr(streams, "_SIZED_WITHIN", 0.05)
    number = streams._free_number([place["local"]], [place["remote"]], retry=0)
    os.close(empty_memory(number, LOCALS))
    try:
        dataset = CheckedDataset(**place, batch_size=1)
    finally:
        _posixshmem.shm_unlink(f"/{prefix._get_path(number, LOCALS)}")
    assert dataset._shm_prefix_int != number
    assert streaming_memory.BuiltinSharedMemory is streams._open_when_whole  # as conftest.py has it for all tests
    assert dataset[3]["caption"].startswith("a tile of shade 3")


def test_memory_that_another_rank_is_making_is_waited_for(tiles):
    """Ranks resume side by side, and the first to come makes the memory for it."""
    dataset = CheckedDataset(local=tiles, batch_size=1)
    descriptor = empty_memory(dataset._shm_prefix_int, RESUME)
    name = prefix._get_path(dataset._shm_prefix_int, RESUME)
    maker = threading.Timer(0.3, os.ftruncate, (descriptor, 4096))
    try:
        maker.start()
        with pytest.raises(ValueError, match=r"^cannot mmap an empty file$"):
            BuiltinSharedMemory(name, create=False)
        dataset.load_state_dict({"epoch": 2})
        assert bytes(SharedMemory(name, False).buf).startswith(b'{"epoch": 2}\0')
    finally:
        maker.join()
        os.close(descriptor)
        _posixshmem.shm_unlink(f"/{name}")
