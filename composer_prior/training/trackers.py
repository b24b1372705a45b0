"""W&B, MLflow and TensorBoard: one run there for each run here, with its recipe, and each point once."""

import json
import uuid
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import dist
from omegaconf import OmegaConf

from composer_prior.training.checkpoints.identity import flat
from composer_prior.training.config import TrainConfig, written
from composer_prior.training.metrics_file import MetricsFile

WANDB_ID = "wandb_id.txt"  # a file of the run: its id there


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
            file = _file_of(logger)
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
        self._record = {**_file_of(logger).current, **self._record}  # of a start from a checkpoint what was before

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


def _file_of(logger: Logger) -> MetricsFile:
    return next(one for one in logger.destinations if isinstance(one, MetricsFile))
