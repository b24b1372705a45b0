"""A run that is resumed from a checkpoint: one run in each tracker, with its recipe, each point once, and its files."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import mlflow
import pytest
import wandb
from common.commands import train as main
from common.data import write_tiles
from common.recipes import ROOT, SHRUNKEN, VIT
from composer.core import Callback, Time, Timestamp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from composer_prior.registry import register
from composer_prior.training.checkpoints.identity import flat
from composer_prior.training.config import load_recipe, written
from composer_prior.training.loggers import MetricsFile, WandB

FILES = {"report.html", "config.yaml", "samples.json", "benchmarks.json"}


class Stopped(Exception):
    pass


@register("callback", "stop_at")
class StopAt(Callback):
    def __init__(self, batch: int):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch == self.batch:
            raise Stopped


@pytest.fixture(scope="module")
def run(tiles, tmp_path_factory):
    """A run that was stopped after batch 6 of 9, two after its checkpoint, and was resumed; again when finished.

    The folder, the steps of each metric, and the recipe of the last start by joined keys.
    """
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database
        validation = f"eval_loader.dataset.local={write_tiles(folder / 'validation', 4)}"
        overrides = [
            *SHRUNKEN,
            *VIT,
            *[change for change in tiles if change != "eval_loader=null"],
            validation,
            *("autoresume=true", "save_interval=4ba", "eval_interval=2ba", "sample_captions=2"),
            *("loggers.tensorboard.log_dir=board", "loggers.wandb.project=p"),
            *("loggers.mlflow.log_system_metrics=false", f"loggers.mlflow.tracking_uri=file:{folder}/mlruns"),
            *(f"loggers.mlflow.tags.tag{number}=x" for number in range(40)),
            "loggers.mlflow.rename_metrics={'a#b': c}",
            f"loggers.wandb.init_kwargs.notes={'long ' * 1500}",
        ]
        recipe = str(ROOT / "yamls/ntp_vit.yaml")
        with pytest.raises(Stopped):
            main([recipe, *overrides, "callbacks.stop_at.batch=6", "max_duration=8ba"])
        for file in (file for file in (folder / "mlruns").glob("*/*/metrics/**/*") if file.is_file()):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))  # a killed run did not send more
        for _ in range(2):
            main([recipe, *overrides, "max_duration=9ba"])
        steps = {}
        for line in map(json.loads, (folder / "runs/ntp_vit/metrics.jsonl").read_text().splitlines()):
            for name in (name for name, value in line.items() if value is not None and name != "batch"):
                steps.setdefault(name, []).append(line["batch"])
        assert steps["loss/train/total"] == [*range(9)]
        yield folder, steps, flat(written(load_recipe(recipe, [*overrides, "max_duration=9ba"])))


@pytest.mark.slow
def test_tensorboard(run):
    folder, steps, recipe = run
    board = EventAccumulator(str(folder / "board/ntp_vit"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    tags = board.Tags()
    assert {name: [point.step for point in board.Scalars(name)] for name in tags["scalars"]} == steps
    text = board.Tensors("recipe/text_summary")
    assert [one.step for one in text] == [0, 4, 9]
    assert b'"max_duration": "9ba"' in text[-1].tensor_proto.string_val[0]
    metadata = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert {*values} >= {name for name, value in recipe.items() if value is not None}
    assert values["model.language.config.hidden_size"].number_value == 32
    assert b'"generated"' in board.Tensors("samples.json/text_summary")[-1].tensor_proto.string_val[0]


def read(file):
    """The run, its configuration, the steps of each metric and the names in artefacts, from the file of a start."""
    store, found, config, points, names = DataStore(), None, {}, {}, set()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        found = record.run.run_id or found
        config |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
        names |= {entry.path for entry in record.artifact.manifest.contents}
        items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for name in {*items} - {"_step", "_runtime", "_timestamp"}:
            points.setdefault(name, []).append(int(items["_step"]))
    return found, config, points, names


@pytest.mark.slow
def test_wandb(run):
    folder, steps, _ = run
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    ids, configs, points, names = zip(*map(read, files), strict=True)
    assert len({*ids}) == 1
    assert [config["max_duration"] for config in configs] == ["8ba", "9ba", "9ba"]
    assert all(config["model"]["language"]["config"]["hidden_size"] == 32 for config in configs)
    assert points[0] == {name: [step for step in numbers if step < 6] for name, numbers in steps.items()}
    assert points[1] == points[2] == steps, "the whole run in each of the two"
    assert names == (set(), FILES, FILES)


@pytest.fixture
def resumed(monkeypatch):
    """Start a run of a name whose W&B run has the steps before 3; what W&B is given is in two lists."""
    begun, logged = [], []
    monkeypatch.setattr(wandb, "run", Mock(spec_set=wandb.Run, starting_step=3))
    monkeypatch.setattr(wandb, "init", lambda **given: begun.append(given))
    monkeypatch.setattr(wandb, "config", wandb.Config())
    monkeypatch.setattr("composer.loggers.WandBLogger.log_metrics", lambda _, *given: logged.append(given))

    def start(name):
        tracker = WandB(load_recipe(ROOT / "yamls/ntp_vit.yaml", [f"run_name={name}"]), "id")
        tracker.init(SimpleNamespace(run_name=name), None)
        return tracker

    return start, begun, logged


def state_at(batch):
    return SimpleNamespace(timestamp=Timestamp(batch=batch), max_duration=Time.from_timestring("6ba"))


def test_wandb_that_has_steps_already_gets_the_later_ones_once(resumed, capsys):
    start, _, logged = resumed
    tracker, records = start("a"), [{"batch": step, "loss": 0.5} for step in range(5)]
    logger = SimpleNamespace(destinations=[Mock(spec=MetricsFile, records=lambda: iter(records))])
    tracker.fit_start(state_at(5), logger)
    assert "W&B has the steps before 3 already" in capsys.readouterr().out
    tracker.log_metrics({"loss": 0.5}, 5)
    tracker.eval_standalone_start(state_at(5), logger)
    tracker.fit_start(state_at(5), logger)
    tracker.close(state_at(6), logger)
    assert logged == [({"loss": 0.5}, step) for step in (3, 4, 5)]


def test_a_run_of_another_name_from_the_same_checkpoint_is_another_one(resumed):
    start, begun, _ = resumed
    for name in ("a", "b", "a"):
        start(name)
    first, other, again = (given["id"] for given in begun)
    assert first == again != other


def test_wandb_takes_another_value_of_a_hyperparameter(resumed):
    tracker = resumed[0]("a")
    for nodes in (1, 2):
        tracker.log_hyperparameters({"num_nodes": nodes})
    assert wandb.config["num_nodes"] == 2


def test_wandb_leaves_a_step_whose_evaluation_failed_to_the_resumed_run(resumed):
    start, _, logged = resumed
    for fails in (True, False):
        tracker = start("a")
        tracker.log_metrics({"loss": 0.5}, 6)
        try:
            if fails:
                raise Stopped
        except Stopped:
            tracker.close(state_at(6), None)
        tracker.close(state_at(6), None)
        assert len(logged) == (not fails)


@pytest.mark.slow
def test_mlflow(run):
    folder, steps, recipe = run
    client = mlflow.MlflowClient(f"file:{folder}/mlruns")
    (experiment,) = client.search_experiments(filter_string="name != 'Default'")
    (found,) = client.search_runs([experiment.experiment_id])
    name = found.info.run_id
    points = {metric: [one.step for one in client.get_metric_history(name, metric)] for metric in found.data.metrics}
    assert points == steps
    parameters = found.data.params
    assert {*parameters} >= {key.replace("#", "_") for key in recipe}
    assert len(recipe) > 100, "more than one request takes"
    assert parameters["max_duration"] == "8ba", "that of the first start"
    assert parameters["loggers.wandb.init_kwargs.notes"] == ("long " * 1500)[:6000]
    assert {file.path for file in client.list_artifacts(name)} == FILES
