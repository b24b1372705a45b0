"""Folders that are whole or not there, however many processes write them and whenever they are killed."""

import multiprocessing
import os

from composer_prior.data.storage import whole_folder


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
