"""Cells as processes: order, resumption, failures, signals. Programs that train nothing stand for the runs."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from common.commands import study as main
from common.recipes import ROOT
from common.studies import FAKE, write_study

from composer_prior.studies import runner
from composer_prior.studies.results import read_results
from composer_prior.studies.runner import Runner, last_words, plan_tasks
from composer_prior.studies.study import read_study

METHODS = {"methods": {"method": "all", "seed": 1}}
PROGRAM = """
import sys
from composer_prior.studies import runner
from composer_prior.commands.cli import main
runner.TRAIN, runner.PREPARE, runner._POLL = ("fake_train",), ("fake_prepare",), 0.02
main(["study", *sys.argv[1:]])
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fake_train", "fake_prepare"):
        (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(runner, "TRAIN", ("fake_train",))
    monkeypatch.setattr(runner, "PREPARE", ("fake_prepare",))
    monkeypatch.setattr(runner, "_POLL", 0.02)
    write_study("study.yaml", grids=METHODS)
    return tmp_path


def calls():
    file = Path("calls.txt")
    return [line.rsplit(" ", 1)[0] for line in file.read_text().splitlines()] if file.exists() else []


def lines():
    return read_results(Path("studies/tiny/results.jsonl"))[1]


def finished():
    return ["-".join(line["cell"].values()) for line in lines() if line["benchmark"] == "training"]


def wait_for(what):
    end = time.monotonic() + 30
    while what not in calls():
        assert time.monotonic() < end, (what, calls())
        time.sleep(0.02)


def start(*words):
    log = Path("runner.txt").open("a")  # noqa: SIM115  the process writes to it
    return subprocess.Popen([sys.executable, "-c", PROGRAM, "study.yaml", *words], stdout=log, stderr=log)


def test_cells_run_after_their_preparation_and_are_not_repeated(capsys):
    assert main(["study.yaml"]) == 0
    order = ["prepare", "ntp-seed1", "prior-seed1", "floor-seed1"]
    assert calls() == [f"{what} {name}" for name in order for what in ("begin", "end")]
    assert finished() == ["ntp-4-1", "prior-4-1", "floor-4-1"]
    assert lines()[0]["figures"] == {"loss": 1.5}
    assert lines()[0]["curve"] == {"batch": [1, 2, 3, 4], "loss": [3.0, 2.0, 1.0 + 2 / 3, 1.5]}
    shown = capsys.readouterr().out
    assert "tiny: 3 cells, 0 of them finished; results go to studies/tiny/results.jsonl" in shown
    assert "prior-seed1: finished in 0.0 minutes, validation/loss 1.5\n" in shown
    cores = str(len(os.sched_getaffinity(0)))
    assert Path("calls.txt").read_text().splitlines()[0] == f"begin prepare {cores}"
    assert main(["study.yaml"]) == 0
    assert "3 cells, 3 of them finished" in capsys.readouterr().out
    write_study("study.yaml", grids={"methods": {"method": "all", "seed": [1, 2]}})
    assert main(["study.yaml", "threads=3"]) == 0
    assert calls()[8:] == [
        f"{what} {name}"
        for name in ("prepare", *(f"{m}-seed2" for m in ("ntp", "prior", "floor")))
        for what in ("begin", "end")
    ]  # the programs make nothing: what the preparation made is missing
    assert Path("calls.txt").read_text().splitlines()[-1] == "end floor-seed2 3"
    assert len(finished()) == 6


def test_a_preparation_whose_work_is_there_is_not_repeated():
    assert main(["study.yaml"]) == 0
    folder = Path("studies/tiny/shared")
    words = next(folder.glob("*.log")).read_text().split()
    keys = ("data.out=", "tokenizer.name=", "reference.run_folder=", "train_loader.dataset.scores=")
    for word in words:
        if word.startswith(keys):
            Path(word.partition("=")[2]).mkdir(parents=True, exist_ok=True)
    write_study("study.yaml", grids={"methods": {"method": "prior", "seed": [1, 2]}})
    assert main(["study.yaml"]) == 0
    assert calls()[8:] == ["begin prior-seed2", "end prior-seed2"]


def test_a_cell_starts_before_one_that_waits_for_its_preparation():
    slow = 'while "end prior-seed1" not in here.read_text(): time.sleep(0.02)'
    Path("fake_prepare.py").write_text(FAKE.replace('\nsay("end")', f'\n{slow}\nsay("end")'))
    study = read_study("study.yaml")
    plan = plan_tasks(study, Path("out"))
    del plan.preparations["prior-seed1"]
    assert Runner(study, plan, Path("results.jsonl"), [], processes=2, threads=1).run() == {}
    assert calls().index("end prior-seed1") < calls().index("end prepare") < calls().index("begin ntp-seed1")
    assert "end ntp-seed1" in calls()


def test_a_cell_starts_before_one_that_another_process_works_on():
    lock = Path("studies/tiny/cells/ntp-seed1.lock")
    lock.parent.mkdir(parents=True)
    held = lock.open("a")
    fcntl.flock(held, fcntl.LOCK_EX)

    def release():
        try:
            wait_for("end prior-seed1")
        finally:
            held.close()

    with ThreadPoolExecutor() as pool:
        released = pool.submit(release)
        assert main(["study.yaml", "processes=2"]) == 0
        released.result()
    assert calls()[2:4] == ["begin prior-seed1", "end prior-seed1"]
    assert sorted(finished()) == ["floor-4-1", "ntp-4-1", "prior-4-1"]


def test_a_cell_that_fails_is_said_and_the_others_go_on(capsys):
    axes = {
        "method": {"broken": {"optimizer.lr": "fast"}, "ntp": {"algorithms.prior": None}},
        "seed": [1, 2],
    }
    write_study("study.yaml", axes=axes, grids={"methods": {"method": "all", "seed": "all"}})
    assert main(["study.yaml", "processes=2"]) == 1
    # The preparation is of the first cell's recipe, which is broken.
    shown = capsys.readouterr().out
    assert "failed: error: optimizer.lr='fast': expected float." in shown
    assert "ntp-seed2: failed: its preparation failed; see studies/tiny/shared/prepare-" in shown
    assert "4 of 4 cells failed; the same command tries them again:\n  broken-seed1: studies/tiny/shared/" in shown
    axes["method"] = {"ntp": {"algorithms.prior": None}, "broken": {"optimizer.lr": "fast"}}
    write_study("study.yaml", axes=axes, grids={"methods": {"method": "all", "seed": "all"}})
    assert main(["study.yaml", "processes=2"]) == 1
    shown = capsys.readouterr().out
    assert "broken-seed1: failed: error: optimizer.lr='fast': expected float.\n" in shown
    assert "2 of 4 cells failed; the same command tries them again:\n" in shown
    assert "\n  broken-seed2: studies/tiny/cells/broken-seed2.log\n" in shown
    assert sorted(finished()) == ["ntp-1", "ntp-2"]
    assert Path("calls.txt").read_text().splitlines()[-1].endswith(str(max(1, len(os.sched_getaffinity(0)) // 2)))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_cells_save_and_a_new_start_goes_on(number, status):
    Path("slow").touch()
    process = start("processes=2")
    try:
        wait_for("begin ntp-seed1")
        wait_for("begin prior-seed1")
        time.sleep(0.5)  # they are in their loop
        process.send_signal(number)
        assert process.wait(30) == status
    finally:
        process.kill()
    assert sorted(calls()[-2:]) == ["saved ntp-seed1", "saved prior-seed1"]
    said = Path("runner.txt").read_text()
    assert f"Stopped by {number.name}; the same command goes on where it was." in said
    assert finished() == []
    Path("studies/tiny/results.jsonl").unlink()  # the unfinished runs would go on with another batch size
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, "study.yaml", "global_train_batch_size=4"], capture_output=True
    )
    assert said.returncode == 1
    assert (
        b"(overrides.global_train_batch_size: 8 there, 4 here). Give another out=, or delete studies/tiny."
        in said.stderr
    )
    Path("slow").unlink()
    assert main(["study.yaml"]) == 0
    assert finished() == ["ntp-4-1", "prior-4-1", "floor-4-1"]


@pytest.mark.slow
def test_two_runners_are_refused_and_a_process_that_outlived_one_is_waited_for(capsys):
    Path("slow").touch()
    process = start()
    try:
        wait_for("begin ntp-seed1")
        assert main(["study.yaml"]) == 1
        assert "error: another runner is at this study: studies/tiny/study.lock" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    follower = start()
    try:
        end = time.monotonic() + 30
        while "ntp-seed1: a process of an earlier start still works on it" not in Path("runner.txt").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert calls().count("begin ntp-seed1") == 1
        assert "begin prior-seed1" not in calls()  # one process at a time
        Path("slow").unlink()  # the old process ends
        assert follower.wait(60) == 0
    finally:
        follower.kill()
        follower.wait()
    mine = [call for call in calls() if call.endswith("ntp-seed1")]
    assert mine == ["begin ntp-seed1", "end ntp-seed1"] * 2
    assert finished() == ["ntp-4-1", "prior-4-1", "floor-4-1"]


def test_a_run_without_metrics_is_a_failure(capsys):
    Path("fake_train.py").write_text("")
    assert main(["study.yaml"]) == 1
    assert "ntp-seed1: failed: it has left no metrics." in capsys.readouterr().out


def test_the_page_takes_nothing_down(capsys, monkeypatch):
    class Broken:
        @staticmethod
        def write_report(file):
            raise RuntimeError(f"no page of {file}")

    monkeypatch.setitem(sys.modules, "composer_prior.studies.study_page", Broken)
    assert main(["study.yaml"]) == 0
    assert "The page of studies/tiny/results.jsonl could not be made: RuntimeError: no page" in capsys.readouterr().out
    assert main(["study.yaml", "report=only"]) == 1
    assert "could not be made: RuntimeError: no page of studies/tiny/results.jsonl" in capsys.readouterr().out
    Broken.write_report = staticmethod(lambda file: [file.with_name(f"study.{end}") for end in ("md", "html", "svg")])
    assert main(["study.yaml", "report=only"]) == 0
    assert capsys.readouterr().out == "page: studies/tiny/study.md\npage: studies/tiny/study.html\n"
    assert main(["study.yaml", "report=only", "out=nowhere"]) == 1
    assert "There are no results in nowhere/results.jsonl yet." in capsys.readouterr().err


def test_results_may_lie_elsewhere():
    assert main(["study.yaml", "out=here", "results=there/r.jsonl", "global_train_batch_size=4"]) == 0
    header, found = read_results(Path("there/r.jsonl"))
    assert header["overrides"]["global_train_batch_size"] == 4
    assert len(found) == 6
    assert not Path("here/results.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["procesess=2"], "procesess is neither an option nor a key of a recipe. Did you mean 'processes'?"),
        (["processes=0"], "processes=0: expected at least 1"),
        (["report=all"], "report=all is not accepted. Accepted: only"),
        (["measured=x"], "measured=x is for plan=true"),
        (["max_duration=[1"], "max_duration=[1"),
        (["model.visoin=3", "optimizer=[1"], "optimizer=[1"),
    ],
)
def test_words_that_cannot_be(capsys, words, message):
    assert main(["study.yaml", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert calls() == []


def test_usage(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: composer-prior study STUDY.yaml")


def test_last_words(tmp_path):
    log = tmp_path / "log"
    log.write_text("$ first\nerror: old\n$ second\nTraceback\nValueError: new\n\n")
    assert last_words(log) == "ValueError: new"
    log.write_text("$ a\nerror: this\nresource_tracker: warning\n")
    assert last_words(log) == "error: this"
    log.write_text("$ a\n")
    assert last_words(log) == "it printed nothing"


@pytest.mark.slow
def test_the_runner_needs_no_composer(here):
    code = f"""
import atexit
atexit.register(lambda: print({{'torch', 'composer', 'streaming', 'transformers'}} & set(sys.modules)))
{PROGRAM}"""
    done = subprocess.run([sys.executable, "-c", code, "study.yaml"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()", json.dumps(done.stdout)
