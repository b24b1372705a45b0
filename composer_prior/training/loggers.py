"""The metrics of a run: a file that any program can read, and W&B, MLflow and TensorBoard.

There is one run there for each run here, with its recipe, and each point once.
"""

import json
import math
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from composer.core import State
from composer.loggers import Logger, LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import dist

from composer_prior.data.messages import announce
from composer_prior.data.storage import full_disk_told
from composer_prior.training.checkpoints.identity import flat
from composer_prior.training.config import TrainConfig, written


class MetricsFile(LoggerDestination):
    """Write ``metrics.jsonl``: one JSON object per step, ``batch`` and then Composer's metric names.

    A value that is not finite, such as the mean over no token, is ``null``: JSON has no NaN. A resumed run drops the
    steps after its checkpoint and continues from there.

    Args:
        path: of the file; written by rank 0.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()  # the working directory may be another one when the run is closed
        self._record: dict[str, Any] = {}  # of the current step
        self._start = 0  # where its line begins in the file
        self._found = False

    @staticmethod
    def of(logger: Logger) -> "MetricsFile":
        """Return the file among a run's loggers."""
        return next(one for one in logger.destinations if isinstance(one, MetricsFile))

    def fit_start(self, state: State, logger: Logger) -> None:
        self._find_place(state)

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        if not self._found:  # a finished run that is evaluated again
            self._find_place(state)

    def _find_place(self, state: State) -> None:
        """Find where the file continues, and drop later steps."""
        self._found = True
        if dist.get_global_rank() != 0:
            return
        done = int(state.timestamp.batch)
        kept = [record for record in self._read() if record["batch"] <= done] if done else []
        current = kept.pop() if kept and kept[-1]["batch"] == done else {}
        self._record = {**current, **self._record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one step, and with the current line: this run may be killed before it has written anything.
        lines = [json.dumps(record) + "\n" for record in (*kept, self._record) if record]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(lines))
        os.replace(partial, self.path)
        self._start = sum(len(line.encode()) for line in lines[: len(kept)])

    @property
    def current(self) -> dict[str, Any]:
        """Return the metrics of the current step; of a resumed run also those before its checkpoint."""
        return dict(self._record)

    def records(self) -> Iterator[dict[str, Any]]:
        """Write the current step, and return all steps, on rank 0, line by line."""
        self._write()
        return self._read()

    def _read(self) -> Iterator[dict[str, Any]]:
        """Yield the whole lines of the file; a run that was killed may have left half of one at its end."""
        if self.path.is_file():
            with self.path.open() as lines:
                yield from (json.loads(line) for line in lines if line.endswith("\n"))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if dist.get_global_rank() != 0 or step is None:
            return
        if self._record and step != self._record["batch"]:
            self._start = self._write()
            self._record = {}
        self._record = {"batch": step, **self._record, **{name: _number(value) for name, value in metrics.items()}}

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._write()  # before the checkpoint, so that what it has behind it is on disk

    epoch_checkpoint = fit_end = batch_checkpoint  # the same before the checkpoint of an epoch, and at the end

    def close(self, state: State, logger: Logger) -> None:
        self._write()  # the last evaluation may come after the end of training
        self._record = {}  # Composer closes again when the program ends: the file may be another run's by then

    def _write(self) -> int:
        """Write the line of the current step, again if it was there, and return where the next one begins."""
        if not self._record or not self._found or not self.path.is_file():
            return self._start
        record, self._record = self._record, {}  # on a full disk it is not tried again when the run is closed
        with full_disk_told(self.path), self.path.open("r+") as file:
            file.seek(self._start)
            file.write(json.dumps(record) + "\n")
            file.truncate()
            end = file.tell()
        self._record = record
        return end


def _number(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tracker(LoggerDestination):
    """Write the metrics of each step once, when the step is whole: Composer logs some twice at the end of an epoch.

    Args:
        recipe: of the run, its configuration there.
        run_id: of the run, which its checkpoints hold. A run of another name that starts from one is another run.
        kwargs: of Composer's logger.
    """

    def __init__(self, recipe: TrainConfig, run_id: str, **kwargs: Any):
        super().__init__(**kwargs)
        self._recipe, self._run = written(recipe), uuid.uuid5(uuid.NAMESPACE_OID, f"{recipe.run_name} {run_id}").hex
        self._record: dict[str, Any] = {}  # of the current step
        self._begun = False

    def fit_start(self, state: State, logger: Logger) -> None:
        if self._begun:  # it is trained further or evaluated again: the steps before are there
            return
        self._begun = True
        held, self._record = self._record, {}
        before = () if dist.get_global_rank() else self._before(MetricsFile.of(logger))  # the file is that of rank 0
        for record in (*before, held):
            self.log_metrics({name: value for name, value in record.items() if name != "batch"}, record.get("batch"))

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        self.fit_start(state, logger)

    def _before(self, file: MetricsFile) -> Iterator[dict[str, Any]]:
        """Yield steps from before this start; those that are there already are not written again."""
        return file.records()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if not metrics:
            return
        if self._record.get("batch", step) != step:
            self._write()
        self._record = {"batch": step, **self._record, **metrics}

    def _write(self) -> None:
        record, self._record = self._record, {}
        step = record.pop("batch", None)
        if record:
            super().log_metrics({name: value for name, value in record.items() if value is not None}, step)

    def publish(self, files: Mapping[str, str]) -> None:
        """Store the text of files, by their names, with the run."""

    def close(self, state: State, logger: Logger) -> None:
        self._write()
        super().close(state, logger)


class WandB(Tracker, WandBLogger):
    """Composer's, with the recipe as its configuration; a start from a checkpoint resumes the same run.

    Without a network each start leaves a folder of its own, of which the last holds the whole run.
    """

    def init(self, state: State, logger: Logger) -> None:
        import wandb  # an optional package

        resumed = {"id": self._run, "resume": "allow"} if self._rank_zero_only else {}
        self._init_kwargs = {"config": self._recipe, "allow_val_change": True, **resumed, **self._init_kwargs}
        super().init(state, logger)
        self._first = cast(Any, wandb.run).starting_step if self._enabled else 0  # W&B takes no earlier step

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        import wandb  # an optional package

        if self._enabled:  # a resumed run may have another number of nodes
            wandb.config.update(hyperparameters, allow_val_change=True)

    def _before(self, file: MetricsFile) -> Iterator[dict[str, Any]]:
        if self._first:
            announce(f"W&B has the steps before {self._first} already; their metrics are not logged again.")
        return super()._before(file)

    def _write(self) -> None:
        if self._record.get("batch", 0) < self._first:
            self._record = {}
        super()._write()

    def close(self, state: State, logger: Logger) -> None:
        unfinished = state.timestamp.get(cast(Any, state.max_duration).unit) < cast(Any, state.max_duration)
        if unfinished or sys.exception() is not None:  # an error may come after the last step, in its evaluation
            self._record = {}  # the resumed run has the rest of this step, and logs it whole
        super().close(state, logger)

    def publish(self, files: Mapping[str, str]) -> None:
        import wandb  # an optional package

        if self._enabled:
            artifact = wandb.Artifact(f"run-{self._run}", "run")
            for name, text in files.items():
                with artifact.new_file(name) as file:
                    file.write(text)
            wandb.log_artifact(artifact)


class MLFlow(Tracker, MLFlowLogger):
    """Composer's, with the recipe as its parameters; a start from a checkpoint resumes the same run."""

    _run_id: Any  # a text where the logger is enabled

    def __init__(self, recipe: TrainConfig, run_id: str, **kwargs: Any):
        # Composer leaves out a value that is that of the step before.
        super().__init__(recipe, run_id, **{"log_duplicated_metric_every_n_steps": 1, "resume": True, **kwargs})
        self.tags, self._last = dict(self.tags), dict[str, int]()

    def _start_mlflow_run(self, state: State) -> None:
        self.tags["run_name"] += f"-{self._run}"  # by which Composer finds a run
        super()._start_mlflow_run(state)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log parameters that are not there, cut to what MLflow takes: it neither changes nor shortens one."""
        if not self._enabled:
            return
        from mlflow.utils import validation as limits  # an optional package

        there = self._mlflow_client.get_run(self._run_id).data.params
        new = {
            name: str(value)[: limits.MAX_PARAM_VAL_LENGTH]
            for key, value in hyperparameters.items()
            if (name := re.sub(r"[^\w./: -]", "_", key)[: limits.MAX_ENTITY_KEY_LENGTH]) not in there
        }
        names, most = [*new], limits.MAX_PARAMS_TAGS_PER_BATCH
        for begin in range(0, len(names), most):
            super().log_hyperparameters({name: new[name] for name in names[begin : begin + most]})

    def after_load(self, state: State, logger: Logger) -> None:
        super().after_load(state, logger)
        if self._enabled:
            there, client = self._mlflow_client.get_run(self._run_id).data, self._mlflow_client
            self._last = {
                name: max(point.step for point in client.get_metric_history(self._run_id, name))
                for name in there.metrics
            }
            self.log_hyperparameters(flat(self._recipe))

    def _write(self) -> None:
        step = self._record.get("batch", 0)
        self._record = {k: v for k, v in self._record.items() if step > self._last.get(self.rename(k), -1)}
        super()._write()

    def publish(self, files: Mapping[str, str]) -> None:
        if self._enabled:
            for name, text in files.items():
                self._mlflow_client.log_text(self._run_id, text, name)


class TensorBoard(Tracker, TensorboardLogger):
    """Composer's, with the recipe as a text and as hyperparameters; a start from a checkpoint drops later points."""

    _opened: Any = None

    def __init__(self, recipe: TrainConfig, run_id: str, **kwargs: Any):
        import tensorboard  # noqa: F401  an optional package, missed before anything is made

        super().__init__(recipe, run_id, **kwargs)

    def _initialize_summary_writer(self) -> None:
        """Do nothing: the step is not known yet."""

    def fit_start(self, state: State, logger: Logger) -> None:
        from torch.utils.tensorboard import SummaryWriter, summary  # an optional package

        if self.writer is None and not (self.rank_zero_only and dist.get_global_rank()):
            begin, folder = state.timestamp.batch.value, Path(str(self.log_dir), str(self.run_name))
            self.writer = self._opened = SummaryWriter(folder, purge_step=begin, flush_secs=365 * 24 * 3600)
            self.writer.add_text("recipe", f"```\n{json.dumps(self._recipe, indent=2)}\n```", begin)
            values = {k: v if isinstance(v, int | float | None) else str(v) for k, v in flat(self._recipe).items()}
            compared = dict.fromkeys(("metrics/eval/loss", "metrics/eval/accuracy"), 0.0)
            for part in summary.hparams({**self.hyperparameters, **values}, compared):
                self.writer.file_writer.add_summary(part)
        super().fit_start(state, logger)

    def _before(self, file: MetricsFile) -> Iterator[dict[str, Any]]:
        return filter(None, [file.current])  # the steps before are in files of earlier starts

    def publish(self, files: Mapping[str, str]) -> None:
        if self.writer is not None:
            for name, text in files.items():
                if not name.endswith(".html"):
                    self.writer.add_text(name, f"```\n{text}\n```", self._record.get("batch"))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._flush(logger)  # the steps before; this one is in the run's own file

    def eval_end(self, state: State, logger: Logger) -> None:
        self._flush(logger)  # Composer writes the last metrics a second time here

    def _flush(self, logger: Logger) -> None:
        """Upload one file for each start: Composer begins another each time, and their names do not sort in order."""
        if self.writer is not None:
            self.writer.flush()
            file = self.writer.file_writer.event_writer._file_name
            name = f"tensorboard_logs/{{run_name}}/{Path(file).stem}-{dist.get_global_rank()}"
            logger.upload_file(remote_file_name=name, file_path=file, overwrite=True)

    def post_close(self) -> None:
        if self._opened is not None:
            self._opened.close()
