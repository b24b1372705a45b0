"""Converts the units of a source that are not done yet, in one process or in several."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from composer_prior.conversion.options import ConversionError, ConversionOptions
from composer_prior.conversion.sources import Source
from composer_prior.conversion.units import Task, convert_unit, digest, unit_file
from composer_prior.data.storage import Place

_REPORT_EVERY = 32


def convert_units(source: Source, place: Place, options: ConversionOptions) -> int:
    """Converts every unit that is not done yet; how many units there are."""
    task = Task(source, place, options, source.folder)
    count = 0

    def missing() -> Iterator[tuple[int, Any]]:
        nonlocal count
        present = place.names()
        for number, unit in enumerate(source.units()):
            count = number + 1
            done = _done(place.state, number, unit, present)
            if done is None:
                yield number, unit
            else:
                progress.skip(done)

    disable = None if options.progress is None else not options.progress
    disable = True if sys.stderr is None else disable
    processes = options.processes or len(os.sched_getaffinity(0))
    with tqdm(total=source.total, unit=" samples", smoothing=0.1, disable=disable, dynamic_ncols=True) as bar:
        progress = Progress(bar)
        try:
            if processes == 1:
                for number, unit in missing():
                    convert_unit(task, number, unit, progress.advance)
            else:
                _run_parallel(task, missing(), processes, progress)
        except BrokenProcessPool:
            raise ConversionError(
                f"{place.label}: a process died (out of memory?); run the same command again to go on, with fewer "
                "processes= if memory is short."
            ) from None
    return count


def _done(state: Path, number: int, unit: Any, present: set[str] | None) -> int | None:
    """How many captions a finished unit read, or ``None`` if it has to be converted."""
    try:
        known = json.loads(unit_file(state, number).read_bytes())
    except FileNotFoundError:
        return None
    names = {shard["raw_data"]["basename"] for shard in known["shards"]}
    whole = known["unit"] == digest(unit) and (present is None or names <= present)
    return known["read"] if whole else None


class Progress:
    """A progress bar in samples/s and MB/s; several processes add to counters that they share, and one shows them."""

    def __init__(self, bar: "tqdm[Any]", counters: Any = None):
        self.bar = bar
        self.counters = counters
        self.bytes = 0
        self.start = time.monotonic()
        self._shown = (0, 0)

    def advance(self, samples: int, size: int) -> None:
        """Count what was converted."""
        self.bytes += size
        if not self.bar.disable:
            rate = self.bytes / (time.monotonic() - self.start + 1e-9) / 1e6
            self.bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
            self.bar.update(samples)

    def skip(self, samples: int) -> None:
        """Count what was converted before, which says nothing about the speed."""
        if not self.bar.disable:
            self.bar.initial += samples
            self.bar.update(samples)

    def show(self) -> None:
        """Show what the processes have added to the counters."""
        samples, size = self.counters[:]
        self.advance(samples - self._shown[0], size - self._shown[1])
        self._shown = samples, size


class _Stopped(Exception):
    """The main process asks the others to stop."""


class _Worker:
    """A process that converts units: it leaves Ctrl-C to its parent, and ends soon after its parent has died."""

    def __init__(self, task: Task, counters: Any, stop: Any, parent: int):
        self.task = task
        self.counters = counters
        self.stop = stop
        self._waiting = (0, 0, 0)  # records, samples and bytes that the counters do not have yet
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._follow, args=(parent,), daemon=True).start()

    def convert(self, number: int, unit: Any) -> None:
        """Convert one unit."""
        self._waiting = (0, 0, 0)
        convert_unit(self.task, number, unit, self._advance)
        self._report()

    def _advance(self, samples: int, size: int) -> None:
        records, all_samples, all_bytes = self._waiting
        self._waiting = records + 1, all_samples + samples, all_bytes + size
        if records + 1 == _REPORT_EVERY:
            self._report()
            if self.stop.is_set():
                raise _Stopped

    def _report(self) -> None:
        with self.counters.get_lock():
            self.counters[0] += self._waiting[1]
            self.counters[1] += self._waiting[2]
        self._waiting = (0, 0, 0)

    def _follow(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)


_worker: _Worker  # one in each process of the pool, which can only be reached through its module


def _start_worker(*arguments: Any) -> None:
    global _worker
    _worker = _Worker(*arguments)


def _work(number: int, unit: Any) -> None:
    _worker.convert(number, unit)


def _run_parallel(task: Task, units: Iterator[tuple[int, Any]], processes: int, progress: Progress) -> None:
    """Keep every process busy, with no more than two units each in memory."""
    # Forked processes start at once, and do not run a script again that calls this without a main guard.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    progress.counters, stop = context.Array("q", 2), context.Event()
    arguments = (task, progress.counters, stop, os.getpid())
    with ProcessPoolExecutor(processes, context, _start_worker, arguments) as pool:
        try:
            pending: set[Future[None]] = set()
            for number, unit in units:
                pending = _wait_for(pending | {pool.submit(_work, number, unit)}, 2 * processes - 1, progress)
            _wait_for(pending, 0, progress)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _wait_for(pending: set[Future[None]], limit: int, progress: Progress) -> set[Future[None]]:
    """Wait until no more than so many units are left; an error in one of them is raised."""
    while len(pending) > limit:
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        progress.show()
        for future in done:
            future.result()
    return pending
