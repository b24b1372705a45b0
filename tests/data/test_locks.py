"""One writer at a time: the second is told so at once, and a lock ends with its process however that ends."""

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from common.recipes import recipe
from filelock import FileLock

from composer_prior.commands.cli import main
from composer_prior.data.locks import LockedError, locked, sole_writer
from composer_prior.inference.caption import caption_images
from composer_prior.inference.export import export_model
from composer_prior.training.run import train

BUSY = "another process is writing there; let it end first"


def hold(place, inside, held):
    with sole_writer(place, "out", inside):
        if os.fork() == 0:  # as DataLoader's workers, which live on for seconds
            signal.pause()
        held.set()
        signal.pause()


@contextmanager
def another_process(place, inside=False):
    """One that writes to a place until it is killed."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(place, inside, held))
    process.start()
    assert held.wait(60)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    try:
        yield
    finally:
        process.kill()
        process.join()
    with sole_writer(place, "out", inside):
        pass
    for child in children:
        os.kill(int(child), signal.SIGKILL)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("key", ["run_folder", "save_folder"])
def test_a_run_that_is_started_twice(key):
    with another_process("busy", inside=True), pytest.raises(LockedError, match=f"^{key}=busy: {BUSY}"):
        train(recipe("reference", f"{key}=busy"))
    assert [path.name for path in Path.cwd().iterdir()] == ["busy"]


def test_two_runs_that_would_train_one_reference():
    with another_process("busy", inside=True), pytest.raises(LockedError, match=f"^reference.run_folder=busy: {BUSY}"):
        train(recipe("prior_vit", "reference.run_folder=busy"))
    assert not Path("data").exists()


@pytest.mark.parametrize("command", [["train", "reference.yaml"], ["caption", "model", "a.png", "out=busy"]])
def test_a_command_ends_with_one_line(command, capsys):
    Path("a.png").touch()
    words = ["run_folder=busy"] if command[0] == "train" else []
    with another_process("busy", inside=command[0] == "train"), pytest.raises(SystemExit) as end:
        main([*command, *words])
    said = f"{end.value.code}\n{capsys.readouterr().err}"
    assert f"=busy: {BUSY}" in said
    assert "Traceback" not in said


def test_captions_and_exports():
    Path("a.png").touch()
    with another_process("busy"):
        with pytest.raises(LockedError, match=f"^out=busy: {BUSY}"):
            caption_images("model", ["a.png"], out="busy")
        with pytest.raises(LockedError, match=f"^out=busy: {BUSY}"):
            export_model("model", "busy")
    assert [path.name for path in Path.cwd().iterdir()] == ["a.png"]


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/bad"])
def test_a_folder_that_cannot_be_written_to_is_found_before_anything_is_made(place):
    Path("file").touch()
    for key, name in (("run_folder", "reference"), ("reference.run_folder", "prior_vit")):
        with pytest.raises(OSError, match=f"^{key}={place} cannot be written to"):
            train(recipe(name, f"{key}={place}"))
    assert not Path("data").exists()


def test_a_process_of_one_waits_for_its_turn():
    with locked(Path("lock"), seconds=0):
        pass
    with (
        another_process("busy"),
        pytest.raises(LockedError, match="is held by another process"),
        locked(Path(".busy.lock"), seconds=0),
    ):
        pass


def test_a_job_that_slurm_has_put_back_waits_for_the_locks_of_a_node_that_failed(monkeypatch):
    lock = FileLock(Path(".out.lock"), thread_local=False)
    lock.acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(0.5, lock.release).start()
    with sole_writer("out", "out"):
        assert not lock.is_locked
