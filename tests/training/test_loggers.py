"""metrics.jsonl of runs that are killed and go on."""

import json
from pathlib import Path
from types import SimpleNamespace

from composer_prior.training.loggers import MetricsFile


def at(batch):
    return SimpleNamespace(timestamp=SimpleNamespace(batch=batch))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_run(path):
    """Killed after a checkpoint at batch 2, when the line of that batch had only begun, and some steps later."""
    metrics = MetricsFile(path)
    metrics.fit_start(at(0), None)
    for batch in range(4):
        metrics.log_metrics({"loss": float(batch)}, batch)
        metrics.log_metrics({"lr": batch + 0.5}, batch + 1)
        metrics.batch_checkpoint(at(batch + 1), None)


def test_a_resumed_run_drops_the_steps_behind_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first_run(path)
    metrics = MetricsFile(path)
    metrics.fit_start(at(2), None)
    metrics.log_metrics({"loss": 20.0}, 2)
    metrics.fit_end(at(3), None)
    assert lines(path) == [
        {"batch": 0, "loss": 0.0},
        {"batch": 1, "lr": 0.5, "loss": 1.0},
        {"batch": 2, "lr": 1.5, "loss": 20.0},
    ]


def test_a_run_killed_as_soon_as_it_goes_on_loses_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first_run(path)
    for _ in range(2):
        MetricsFile(path).fit_start(at(2), None)
        assert lines(path)[-1]["batch"] == 2
        assert lines(path)[-1]["lr"] == 1.5
    assert len(lines(path)) == 3


def test_half_a_line_is_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"batch": 0, "loss": 1.0}\n{"batch": 1, "lo')
    MetricsFile(path).fit_start(at(1), None)
    assert lines(path) == [{"batch": 0, "loss": 1.0}]


def test_a_finished_run_that_is_evaluated_again_keeps_its_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first_run(path)
    before = lines(path)
    metrics = MetricsFile(path)
    metrics.eval_standalone_start(at(4), None)
    metrics.log_metrics({"metrics/eval/loss": 2.0}, 4)
    metrics.close(at(4), None)
    assert lines(path) == [*before[:4], {**before[4], "metrics/eval/loss": 2.0}]


def test_what_never_began_writes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first_run(path)
    before = path.read_text()
    metrics = MetricsFile(path)
    metrics.log_metrics({"loss": 9.0}, 0)
    metrics.close(at(0), None)
    assert path.read_text() == before


def test_what_is_closed_writes_no_more(tmp_path, monkeypatch):
    """Composer closes at the end of a run and again at that of the program, when other runs have been."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first_run(Path("metrics.jsonl"))
    metrics = MetricsFile("metrics.jsonl")
    metrics.fit_start(at(4), None)
    metrics.log_metrics({"metrics/eval/loss": 2.0}, 4)
    monkeypatch.chdir(tmp_path / "there")
    Path("metrics.jsonl").write_text("another run's\n")
    metrics.close(at(4), None)
    assert Path("metrics.jsonl").read_text() == "another run's\n"
    assert lines(tmp_path / "here/metrics.jsonl")[-1]["metrics/eval/loss"] == 2.0
    (tmp_path / "here/metrics.jsonl").write_text("that of a run of the same name\n")
    metrics.close(at(4), None)
    assert (tmp_path / "here/metrics.jsonl").read_text() == "that of a run of the same name\n"
