"""The metrics of a run as a file that any program can read."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_prior.data.storage import full_disk_told


class MetricsFile(LoggerDestination):
    """Write ``metrics.jsonl``: one JSON object per step, ``batch`` and then Composer's metric names.

    A value that is not finite, such as the mean over no token, is ``null``: JSON has no NaN.

    A resumed run drops the steps after its checkpoint and continues from there.

    Args:
        path: of the file; written by rank 0.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()  # the working directory may be another one when the run is closed
        self._record: dict[str, Any] = {}  # of the current step
        self._start = 0  # where its line begins in the file
        self._found = False

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

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._write()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._write()

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
