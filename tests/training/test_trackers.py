"""A run that goes on from a checkpoint: one run in each tracker, with the recipe, and each point once."""

import json
import sys
from pathlib import Path

import pytest
from common.commands import train as main
from common.data import write_tiles
from common.recipes import ROOT, SHRUNKEN, VIT
from composer.core import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from composer_prior.registry import register

pytestmark = pytest.mark.slow


class Stopped(Exception):
    pass


@register("callback", "stop_at")
class StopAt(Callback):
    def __init__(self, batch: int):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch == self.batch:
            raise Stopped


@pytest.fixture
def run(tiles, tmp_path, monkeypatch):
    """A run that was stopped after batch 6 of 9, two behind its checkpoint, and has gone on; again when finished."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests/common/programs/trackers")

    def start(*loggers):
        validation = f"eval_loader.dataset.local={write_tiles(tmp_path / 'validation', 4)}"
        recipe = [change for change in tiles if change != "eval_loader=null"] + [validation, *loggers]
        recipe += ["autoresume=true", "save_interval=4ba", "eval_interval=2ba"]
        command = [str(ROOT / "yamls/ntp_vit.yaml"), *SHRUNKEN, *VIT, *recipe]
        with pytest.raises(Stopped):
            main([*command, "callbacks.stop_at.batch=6", "max_duration=8ba"])
        for _ in range(2):
            main([*command, "max_duration=9ba"])
        lines = map(json.loads, Path("runs/ntp_vit/metrics.jsonl").read_text().splitlines())
        steps = {}
        for line in lines:
            for name in (name for name, value in line.items() if value is not None and name != "batch"):
                steps.setdefault(name, []).append(line["batch"])
        return steps

    yield start
    for name in [name for name in sys.modules if name.split(".")[0] in ("wandb", "mlflow")]:
        del sys.modules[name]


def test_tensorboard(run):
    steps = run("loggers.tensorboard.log_dir=board")
    board = EventAccumulator("board/ntp_vit", size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    tags = board.Tags()
    assert {name: [point.step for point in board.Scalars(name)] for name in tags["scalars"]} == steps
    recipe = board.Tensors("recipe/text_summary")
    assert [text.step for text in recipe] == [0, 4, 9]
    assert b'"max_duration": "9ba"' in recipe[-1].tensor_proto.string_val[0]


def test_wandb(run):
    steps = run("loggers.wandb.project=p")
    lines = [json.loads(line) for line in Path("wandb.jsonl").read_text().splitlines()]
    starts = [line["start"] for line in lines if "start" in line]
    assert len(starts) == 3
    assert len({start["id"] for start in starts}) == 1
    assert [start["config"]["max_duration"] for start in starts] == ["8ba", "9ba", "9ba"]
    assert all(start["config"]["model"]["language"]["config"]["hidden_size"] == 32 for start in starts)
    for begin in [number for number, line in enumerate(lines) if "start" in line][1:]:
        logged = {}
        for line in lines[begin + 1 :]:
            if "start" in line:
                break
            for name in line["metrics"]:
                logged.setdefault(name, set()).add(line["step"])
        assert logged == {name: {*numbers} for name, numbers in steps.items()}, "the whole run in each of the two"


def test_mlflow(run):
    steps = run("loggers.mlflow.log_system_metrics=false")
    import mlflow

    (found,) = mlflow.runs.values()
    assert found.points["loss/train/total"] == steps["loss/train/total"]
    assert found.points["metrics/eval/loss"] == steps["metrics/eval/loss"]
    for name, points in found.points.items():  # Composer leaves out a value that is that of the step before
        assert len({*points}) == len(points)
        assert {*points} <= {*steps[name]}
    assert found.params["model.language.config.hidden_size"] == "32"
    assert found.params["max_duration"] == "8ba"
