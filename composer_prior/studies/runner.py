"""The cells of a study as processes: prepared, resumed, watched, collected."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from composer_prior.data.messages import one_line, say, visible
from composer_prior.data.storage import is_remote
from composer_prior.studies.results import append_results, collect, finished, planned_steps, read_lines
from composer_prior.studies.shared import digest, preparations, share
from composer_prior.studies.study import Cell, Study, as_words
from composer_prior.training.config import TrainConfig

TRAIN = ("composer_prior", "train")
PREPARE = ("composer_prior.studies.prepare",)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_POLL = 0.5  # seconds between two looks at the processes


@dataclass(eq=False)  # a task is equal to itself alone
class Task:
    """A process of a study: a cell, or the preparation of some."""

    name: str
    module: tuple[str, ...]  # run by Python
    words: list[str]  # its arguments
    log: Path  # of its output; its lock and the seconds of each attempt are beside it
    cell: Cell | None = None  # None for a preparation
    places: frozenset[str] = frozenset()  # that a preparation makes
    process: "subprocess.Popen[bytes]" = field(init=False, repr=False)  # once it is started
    began: float = 0.0

    @property
    def metrics(self) -> Path:
        """The metrics of a cell's run."""
        return self.log.parent / self.name / "metrics.jsonl"


@dataclass
class Plan:
    """The tasks of a study."""

    cells: list[Task] = field(default_factory=list)  # in order
    preparations: dict[str, Task] = field(default_factory=dict)  # that must end before a cell begins, by its name
    further: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides that the runner adds, by cell


class Stopped(Exception):
    """A signal has come, and the processes have ended."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def plan_tasks(study: Study, out: Path) -> Plan:
    """Plan the processes of a study: one for each cell, and those that make what cells share."""
    plan = Plan()
    shared = [share(study.recipes[cell.name], cell.overrides, out / "shared") for cell in study.cells]
    for cell, one in zip(study.cells, shared, strict=True):
        further = plan.further[cell.name] = {**one.overrides, **_own(study.recipes[cell.name], cell, out)}
        words = [str(cell.recipe), *as_words({**cell.overrides, **further})]
        plan.cells.append(Task(cell.name, TRAIN, words, out / "cells" / f"{cell.name}.log", cell))
    tasks: dict[int, Task] = {}
    for cell, preparer in zip(study.cells, preparations([one.places for one in shared]), strict=True):
        if preparer is None:
            continue
        if preparer not in tasks:
            places = shared[preparer].places
            name = f"prepare-{digest(sorted(places))}"
            words = plan.cells[preparer].words
            tasks[preparer] = Task(name, PREPARE, words, out / "shared" / f"{name}.log", places=places)
        plan.preparations[cell.name] = tasks[preparer]
    return plan


def _own(recipe: TrainConfig, cell: Cell, out: Path) -> dict[str, Any]:
    """Return the overrides that the runner sets for a cell."""
    own: dict[str, Any] = {"run_name": cell.name, "run_folder": str(out / "cells" / cell.name), "progress_bar": False}
    if recipe.save_folder is not None:
        own["autoresume"] = True
    counted: dict[str, Any] = {"callbacks.compute_monitor": {}}
    for key in recipe.helpers:
        own[f"{key}.progress_bar"] = False
        counted[f"{key}.callbacks.compute_monitor"] = {}
    return own | {key: value for key, value in counted.items() if key not in cell.overrides}


class Runner:
    """Runs the cells that are not finished, so many processes at a time, and appends their results to a begun file."""

    def __init__(
        self, study: Study, plan: Plan, results: Path, lines: Sequence[Mapping[str, Any]], processes: int, threads: int
    ):
        self.study, self.plan, self.results, self.processes = study, plan, results, processes
        self.environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
        self.pending = [task for task in plan.cells if task.cell and finished(lines, task.cell.values) is None]
        self.running: list[Task] = []
        self.prepared = {task.name: True for task in plan.preparations.values() if _is_prepared(task)}  # False: failed
        self.failed: dict[str, Path] = {}
        self.signals: list[int] = []
        self.waited_for: set[str] = set()  # names of tasks that a killed runner's process still works on
        self.batches = {task.name: planned_steps(study.recipes[task.name]) or 1 for task in self.pending}
        self.bar: tqdm[Any]

    def run(self) -> dict[str, Path]:
        """Run all cells and return the log of each one that failed, by its name.

        Raises:
            Stopped: after SIGINT or SIGTERM, when the cells have saved and ended.
        """
        total, done = sum(self.batches.values()), sum(map(self._done, self.pending))
        name = visible(self.study.name)
        with _caught(self.signals), tqdm(total=total, initial=done, unit="ba", desc=name, disable=None) as self.bar:
            try:
                while (self.pending or self.running) and not self.signals:
                    self._start()
                    self._look()
                    time.sleep(_POLL)
            finally:
                self._stop()
        if self.signals:
            raise Stopped(self.signals[0])
        return self.failed

    def _start(self) -> None:
        """Start what can start, in the order of the cells."""
        for task in [*self.pending]:
            preparation = self.plan.preparations.get(task.name)
            prepared = preparation is None or self.prepared.get(preparation.name)
            if preparation is not None and prepared is False:
                self.pending.remove(task)
                self._fail(task, f"its preparation failed; see {preparation.log}", preparation.log)
                continue
            chosen = task if preparation is None or prepared else preparation
            if chosen.name not in self.waited_for and len(self.running) + len(self.waited_for) >= self.processes:
                continue
            if chosen.cell is None and any(other.cell is None for other in self.running):
                continue
            if self._launch(chosen) and chosen is task:
                self.pending.remove(task)

    def _launch(self, task: Task) -> bool:
        """Start a process, unless one that a killed runner left still works on it."""
        task.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", *task.module, *task.words]
        with open(task.log.with_suffix(".lock"), "a") as lock, open(task.log, "ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if task.name not in self.waited_for:
                    self.waited_for.add(task.name)
                    self._say(f"{task.name}: a process of an earlier start still works on it; waiting for its end")
                return False
            self.waited_for.discard(task.name)
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C is for the runner, which asks its processes to save. The lock goes with it.
            task.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
        task.began = time.monotonic()
        self.running.append(task)
        return True

    def _look(self) -> None:
        """Collect the processes that have ended, and show the progress of the others."""
        for task in [*self.running]:
            if (status := task.process.poll()) is None:
                continue
            self.running.remove(task)
            seconds = _add_attempt(task)
            if task.cell is None:
                self.prepared[task.name] = status == 0
                if status == 0:
                    task.log.with_suffix(".done").touch()
                else:
                    self._say(f"{task.name} failed: {last_words(task.log)}")
            elif status:
                self._fail(task, last_words(task.log) if status > 0 else f"ended by signal {-status}", task.log)
            else:
                self._collect(task, task.cell, seconds)
        left = [*self.pending, *(task for task in self.running if task.cell is not None)]
        self.bar.n = sum(self.batches.values()) - sum(self.batches[task.name] - self._done(task) for task in left)
        self.bar.refresh()

    def _done(self, task: Task) -> int:
        return min(self.batches[task.name], _last_batch(task.metrics))

    def _collect(self, task: Task, cell: Cell, seconds: float) -> None:
        try:
            lines = collect(cell.values, read_lines(task.metrics), cell.load(self.plan.further[task.name]), seconds)
        except (ValueError, OSError) as error:
            self._fail(task, one_line(error), task.log)
            return
        append_results(self.results, lines)
        benchmark, _, figure = next(iter(self.study.averaged), "").partition("/")
        value = (finished(lines, cell.values) or {}).get(benchmark, {}).get(figure)
        shown = f", {benchmark}/{figure} {value:.4g}" if value is not None else ""
        self._say(f"{task.name}: finished in {seconds / 60:.1f} minutes{shown}")

    def _fail(self, task: Task, reason: str, log: Path) -> None:
        self.failed[task.name] = log
        self._say(f"{task.name}: failed: {reason}")

    def _say(self, text: str) -> None:
        with self.bar.external_write_mode(file=sys.stdout):
            say(text)

    def _stop(self) -> None:
        """Ask the processes to save and end, and wait for them; a second signal kills them."""
        for task in self.running:
            task.process.send_signal(signal.SIGTERM)
        if self.running:
            self._say(f"Stopping {', '.join(task.name for task in self.running)}, which save first; again kills them.")
        while self.running:
            for task in [*self.running]:
                if len(self.signals) > 1:
                    os.killpg(task.process.pid, signal.SIGKILL)
                if task.process.poll() is not None:
                    _add_attempt(task)
                    self.running.remove(task)
            time.sleep(_POLL / 5)


@contextmanager
def _caught(signals: list[int]) -> Iterator[None]:
    """Note signals instead of ending at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: signals.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _is_prepared(task: Task) -> bool:
    """Return True if a preparation has succeeded before and its outputs still exist."""
    there = (is_remote(place) or Path(place).exists() for place in task.places)
    return task.log.with_suffix(".done").exists() and all(there)


def last_words(log: Path) -> str:
    """Return the line of a log that says why the program ended: its last ``error: ...``, or else its last line."""
    lines = [line.strip() for line in _tail(log, 20000).decode(errors="replace").splitlines() if line.strip()]
    mine = lines[max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=-1) + 1 :]
    errors = [line for line in mine if line.startswith("error: ")]
    return (errors or mine or ["it printed nothing"])[-1]


def _last_batch(metrics: Path) -> int:
    """Return the batch of the last whole line of a metrics file; 0 without one."""
    found = re.findall(rb'^\{"batch": (\d+)', _tail(metrics, 1 << 18), flags=re.M) if metrics.is_file() else []
    return int(found[-1]) if found else 0


def _tail(path: Path, size: int) -> bytes:
    """Return the last bytes of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read()


def _add_attempt(task: Task) -> float:
    """Note how long a process took, and return the seconds of all attempts at the task."""
    attempts = task.log.with_suffix(".seconds")
    with open(attempts, "a") as file:
        file.write(f"{time.monotonic() - task.began:.3f}\n")
    return sum(map(float, attempts.read_text().split()))
