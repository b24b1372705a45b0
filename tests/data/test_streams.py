"""Data sets of one node side by side: each has a number of its own in shared memory, whoever looks at the same time."""

import tempfile
from pathlib import Path

import pytest
from common.data import write_tiles
from streaming.base.constant import BARRIER_FILELOCK, CACHE_USAGE, LOCALS
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
