"""A study of real runs: stopped, started again, one cell that fails."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common.commands import study as main
from common.recipes import ROOT, run_program
from common.studies import study_content, write_study

from composer_prior.studies.results import read_lines, read_results

pytestmark = pytest.mark.slow

METHODS = {"prior": study_content()["axes"]["method"]["prior"], "broken": {"optimizer.lr": "fast"}}
SMALLER = [
    "max_duration=8ba",
    "eval_interval=4ba",
    "benchmarks.hallucination=null",
    "benchmarks.captioning=null",
    "sample_captions=0",
]


def test_a_study_is_stopped_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    study = {
        "axes": {"method": METHODS, "seed": [1, 2]},
        "grids": {"methods": {"method": "all"}},
        "baseline": "prior",
        "figures": {"averaged": {"scene_foils/image_gain": "higher"}, "beside": {}},
    }
    file = write_study("study.yaml", **study)
    words = [file, "out=study", *SMALLER]
    command = [sys.executable, str(ROOT / "scripts/study.py"), *words]
    with open("runner.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    metrics = Path("study/cells/prior-seed1/metrics.jsonl")
    try:
        end = time.monotonic() + 200
        while not any(record["batch"] >= 3 for record in read_lines(metrics)):
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
    saved = Path("study/cells/prior-seed1.log").read_text()
    assert "prior-seed1 was stopped by SIGTERM after batch" in saved
    before = metrics.read_text().splitlines()[:3]

    said, _ = run_program(*command, "processes=2", ok=False)
    assert "2 cells, 0 of them finished" in said
    assert "broken-seed1: failed: error: optimizer.lr='fast': expected float." in said
    assert "prior-seed1: finished in" in said
    assert (
        "1 of 2 cells failed; the same command tries them again:\n  broken-seed1: study/cells/broken-seed1.log" in said
    )
    assert metrics.read_text().splitlines()[:3] == before  # with the times of the first start: it was resumed
    assert [record["batch"] for record in read_lines(metrics)] == [*range(9)]
    (log,) = Path("study/shared").glob("prepare-*.log")
    assert log.read_text().count("\n$ ") == 0  # not repeated
    results = Path("study/results.jsonl")
    _, lines = read_results(results)
    assert {line["cell"]["method"] for line in lines} == {"prior"}
    found = {line["benchmark"]: line for line in lines}
    assert {*found} == {"validation", "scene_foils", "training"}
    assert found["validation"]["curve"]["batch"] == [4, 8]
    assert found["validation"]["curve"]["loss"][-1] == found["validation"]["figures"]["loss"] > 0
    assert 0 <= found["scene_foils"]["figures"]["image_gain"] <= 1
    training = found["training"]["figures"]
    assert (training["steps"], training["samples"], training["unique_samples"]) == (8, 64, 64)
    assert training["seconds"] > 0
    assert training["reference_flops"] > training["scoring_flops"] > 0
    assert found["training"]["versions"]["torch"].startswith("2.")

    page = Path("study/study.md").read_text()
    assert "1 of 2 runs are finished." in page
    assert "Missing: 1 run: broken, seed 1." in page
    assert "| prior | 1 of 1 | 8 | 64 | 64 |" in page
    assert "page: study/study.md\npage: study/study.html\n" in said

    study["grids"]["methods"]["method"] = "prior"
    write_study("study.yaml", **study)
    assert main(words) == 0
    assert "1 cells, 1 of them finished" in capsys.readouterr().out
    assert read_results(results)[1] == lines
    assert Path("study/cells/prior-seed1.log").read_text().count("$ ") == 2  # a finished cell is not repeated
    assert "1 of 1 runs are finished." in Path("study/study.md").read_text()
    assert main([*words, "max_duration=9ba"]) == 1
    assert "made by another study (overrides.max_duration: 8ba there, 9ba here)" in capsys.readouterr().err
