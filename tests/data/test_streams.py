"""Data sets of one node side by side: each has a number of its own in shared memory, whoever looks at the same time."""

import pytest
from common.data import write_tiles
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import prefix
from streaming.base.shared.memory import SharedMemory

from composer_prior.data.messages import DataError
from composer_prior.data.streams import CheckedDataset


@pytest.fixture
def tiles(tmp_path):
    return write_tiles(tmp_path / "tiles", 4)


def test_a_number_that_another_program_takes_meanwhile_is_left_to_it(tiles, monkeypatch):
    first = CheckedDataset(local=tiles, batch_size=1)
    look, looks = prefix._check_and_find_retrying, []

    def late(*arguments):
        """What was free when it looked has been taken since, for the first round of looks."""
        looks.append(arguments)
        return first._shm_prefix_int if len(looks) <= len(SHM_TO_CLEAN) else look(*arguments)

    monkeypatch.setattr(prefix, "_check_and_find_retrying", late)
    second = CheckedDataset(local=tiles, batch_size=1)
    assert second._shm_prefix_int != first._shm_prefix_int
    assert len(looks) > len(SHM_TO_CLEAN)
    assert second[3]["caption"].startswith("a tile of shade 3")
    taken = SharedMemory(prefix._get_path(second._shm_prefix_int, LOCALS), False)
    assert prefix._unpack_locals(bytes(taken.buf))[0] == [tiles]


def test_where_no_number_is_to_be_had_there_is_one_line(tiles, monkeypatch):
    first = CheckedDataset(local=tiles, batch_size=1)
    monkeypatch.setattr(prefix, "_check_and_find_retrying", lambda *_: first._shm_prefix_int)
    with pytest.raises(DataError, match=r"^no number in shared memory could be had in 20 attempts$"):
        CheckedDataset(local=tiles, batch_size=1)
