"""A study of real runs: stopped, started again, one cell that fails."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common.recipes import ROOT, run_program
from common.studies import study_content, write_study

from composer_prior.studies.results import read_metrics, read_results

METHODS = {"broken": {"optimizer.lr": "fast"}, **study_content()["axes"]["method"]}
SMALLER = [
    "max_duration=8ba",
    "eval_interval=4ba",
    "benchmarks.hallucination=null",
    "benchmarks.captioning=null",
    "sample_captions=0",
]


def test_a_study_is_stopped_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    axes = {"method": {name: METHODS[name] for name in ("broken", "ntp", "prior")}, "seed": [1, 2]}
    figures = {"averaged": {"scene_foils/without_prior": "higher"}, "beside": {}}
    file = write_study("study.yaml", axes=axes, grids={"methods": {"method": "all"}}, figures=figures)
    command = [sys.executable, ROOT / "scripts/study.py", file, "processes=2", "out=study", *SMALLER]
    with open("runner.txt", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    metrics = Path("study/cells/ntp-seed1/metrics.jsonl")
    try:
        end = time.monotonic() + 200
        while not any(record["batch"] >= 3 for record in read_metrics(metrics)):
            assert time.monotonic() < end
            assert process.poll() is None, Path("runner.txt").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, Path("runner.txt").read_text()
    finally:
        process.kill()
        process.wait()
    said = Path("runner.txt").read_text()
    assert "Stopped by SIGTERM; the same command goes on where it was." in said
    saved = Path("study/cells/ntp-seed1.log").read_text()
    assert "ntp-seed1 was stopped by SIGTERM after batch" in saved
    before = metrics.read_text().splitlines()[:3]

    said, _ = run_program(*command, ok=False)
    assert "3 cells, 0 of them finished" in said
    assert "broken-seed1: failed: error: optimizer.lr='fast': expected float." in said
    assert (
        "1 of 3 cells failed; the same command tries them again:\n  broken-seed1: study/cells/broken-seed1.log" in said
    )
    assert metrics.read_text().splitlines()[:3] == before  # with the times of the first start: it was resumed
    assert [record["batch"] for record in read_metrics(metrics)] == [*range(9)]
    (log,) = Path("study/shared").glob("prepare-*.log")
    assert log.read_text().count("\n$ ") == 0  # not repeated
    _, lines = read_results(Path("study/results.jsonl"))
    found = {(line["cell"]["method"], line["benchmark"]): line for line in lines}
    assert set(found) == {
        (method, name) for method in ("ntp", "prior") for name in ("scene_foils", "validation", "training")
    }
    validation = found["prior", "validation"]
    assert validation["curve"]["batch"] == [4, 8]
    assert validation["curve"]["loss"][-1] == validation["figures"]["loss"] > 0
    assert validation["figures"]["loss"] != found["ntp", "validation"]["figures"]["loss"]
    assert 0 <= found["ntp", "scene_foils"]["figures"]["without_prior"] <= 1
    for method in ("ntp", "prior"):
        training = found[method, "training"]
        assert training["figures"]["steps"] == 8
        assert training["figures"]["samples"] == 64
        assert training["figures"]["unique_samples"] == 64
        assert training["figures"]["seconds"] > 0
        assert training["versions"]["torch"].startswith("2.")
    assert found["ntp", "training"]["figures"]["scoring_flops"] == 0

    said, _ = run_program(*command, "report=only")
    assert "study/results.jsonl" in said or "study/study" in said
    with pytest.raises(AssertionError, match=r"made by another study \(overrides\.max_duration: 8ba there, 9ba here\)"):
        run_program(*command, "max_duration=9ba")
