"""The metrics of a run: a file that any program can read, and W&B, MLflow and TensorBoard.

There is one run there for each run here, with its recipe, and each point once.
"""

import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import dist
from omegaconf import OmegaConf

from composer_prior.data.storage import full_disk_told
from composer_prior.training.checkpoints.identity import flat
from composer_prior.training.config import TrainConfig, written

WANDB_ID = "wandb_id.txt"  # a file of the run: its id there


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


class WandB(WandBLogger):
    """Composer's, with the recipe as its configuration; a start from a checkpoint goes on with the same run.

    Without a network each start leaves a folder of its own, of which the last holds the whole run.
    """

    def __init__(self, recipe: TrainConfig, goes_on: bool, **kwargs: Any):
        super().__init__(**kwargs)
        self._recipe, self._goes_on = written(recipe), goes_on

    def init(self, state: State, logger: Logger) -> None:
        file = Path(OmegaConf.create(self._recipe)["run_folder"], WANDB_ID)  # it may name an environment variable
        known = file.read_text() if self._goes_on and file.is_file() else uuid.uuid4().hex[:8]
        if self._enabled and self._rank_zero_only:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(known)
            self._init_kwargs = {"id": known, "resume": "allow", **self._init_kwargs}
        self._init_kwargs = {"config": self._recipe, "allow_val_change": True, **self._init_kwargs}
        super().init(state, logger)

    def fit_start(self, state: State, logger: Logger) -> None:
        import wandb  # an optional package

        if self._enabled and wandb.run is not None:
            file = MetricsFile.of(logger)
            for record in filter(None, file.records() if wandb.run.offline else [file.current]):
                self.log_metrics({name: value for name, value in record.items() if name != "batch"}, record["batch"])

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        self.fit_start(state, logger)


class WholeSteps(LoggerDestination):
    """Write the metrics of each step once, when it is whole: Composer logs some twice at the end of an epoch."""

    def __init__(self, recipe: TrainConfig, goes_on: bool, **kwargs: Any):
        super().__init__(**kwargs)
        self._recipe, self._goes_on = written(recipe), goes_on
        self._record: dict[str, Any] = {}  # of the current step

    def fit_start(self, state: State, logger: Logger) -> None:
        # A run that goes on has metrics of the current step from before its start.
        self._record = {**MetricsFile.of(logger).current, **self._record}

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        self.fit_start(state, logger)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._record.get("batch", step) != step:
            self._write()
        self._record = {"batch": step, **self._record, **metrics}

    def _write(self) -> None:
        record, self._record = self._record, {}
        step = record.pop("batch", None)
        if record:
            super().log_metrics({name: value for name, value in record.items() if value is not None}, step)

    def close(self, state: State, logger: Logger) -> None:
        self._write()
        super().close(state, logger)


class MLFlow(WholeSteps, MLFlowLogger):
    """Composer's, with the recipe as its parameters; a start from a checkpoint goes on with the same run."""

    def __init__(self, recipe: TrainConfig, goes_on: bool, **kwargs: Any):
        super().__init__(recipe, goes_on, **kwargs)
        self._recipe = flat(self._recipe)
        self.resume, self._last = self.resume or goes_on, dict[str, int]()

    def after_load(self, state: State, logger: Logger) -> None:
        super().after_load(state, logger)
        if self._enabled:
            there, client = self._mlflow_client.get_run(self._run_id).data, self._mlflow_client
            self._last = {
                name: max(point.step for point in client.get_metric_history(self._run_id, name))
                for name in there.metrics
            }
            self.log_hyperparameters({name: v for name, v in self._recipe.items() if name not in there.params})

    def _write(self) -> None:
        step = self._record.get("batch", 0)
        self._record = {k: v for k, v in self._record.items() if step > self._last.get(self.rename(k), -1)}
        super()._write()


class TensorBoard(WholeSteps, TensorboardLogger):
    """Composer's, with the recipe as a text; a start from a checkpoint drops the points behind it."""

    _opened: Any = None

    def __init__(self, recipe: TrainConfig, goes_on: bool, **kwargs: Any):
        import tensorboard  # noqa: F401  an optional package, missed before anything is made

        super().__init__(recipe, goes_on, **kwargs)

    def _initialize_summary_writer(self) -> None:
        """Do nothing: the step is not known yet."""

    def fit_start(self, state: State, logger: Logger) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        if self.writer is None and not (self.rank_zero_only and dist.get_global_rank()):
            begin, folder = state.timestamp.batch.value, Path(str(self.log_dir), str(self.run_name))
            self.writer = self._opened = SummaryWriter(folder, purge_step=begin, flush_secs=365 * 24 * 3600)
            self.writer.add_text("recipe", f"```\n{json.dumps(self._recipe, indent=2)}\n```", begin)
        super().fit_start(state, logger)

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
