"""Folders that are whole or not there, however many processes write them and whenever they are killed."""

import errno
import multiprocessing
import os

import pytest

from composer_prior.data.storage import WriteError, full_disk_told, whole_folder


def begin(folder, begun, end):
    with whole_folder(folder) as temporary:
        (temporary / "file").write_text("theirs")
        begun.set()
        end.wait(60)
        os._exit(1)  # killed before it was whole


def test_a_process_writes_in_a_folder_of_its_own_and_removes_what_killed_ones_left(tmp_path):
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()
    other = context.Process(target=begin, args=(tmp_path / "made", begun, end))
    other.start()
    assert begun.wait(60)
    with whole_folder(tmp_path / "made") as temporary:
        (temporary / "file").write_text("ours")
        assert len([*tmp_path.iterdir()]) == 2, "one of another process that is alive is left alone"
    assert (tmp_path / "made/file").read_text() == "ours"
    end.set()
    other.join(60)
    with whole_folder(tmp_path / "again"):
        pass
    assert len([*tmp_path.glob(".made.*.partial")]) == 1, "nor is one of another folder"
    (tmp_path / "made/file").unlink()
    with whole_folder(tmp_path / "made"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "made"]


def test_what_this_program_wrote_is_replaced_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/mine").write_text("mine")
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    for content in ("one", "two"):
        with whole_folder(tmp_path / "model", replace=True) as temporary:
            (temporary / "file").write_text(content)
    assert (tmp_path / "model/file").read_text() == "two"
    assert (tmp_path / "disk/mine").read_text() == "mine"
    assert (tmp_path / "model").is_symlink()


def test_the_disk_that_is_full_is_the_one_that_is_named(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cache/0.mds"))
    for error, said in ((full, "cache/0.mds cannot"), (OSError(errno.ENOSPC, "No space left on device"), "out cannot")):
        with pytest.raises(WriteError, match=said), full_disk_told(tmp_path / "out"):
            raise error
    shared = RuntimeError("unable to write to file </torch_12_3>: No space left on device (28)")
    with pytest.raises(RuntimeError, match="torch_12_3"), full_disk_told(tmp_path / "out"):
        raise shared
