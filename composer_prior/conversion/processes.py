"""The distributor ``processes``: units of work are converted in this process, or in several of this machine."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from composer_prior.conversion.options import ConversionError
from composer_prior.conversion.units import Advance, Result, Results, Task, Units, convert_unit

_REPORT_EVERY = 32


def convert_in_processes(task: Task, units: Units, advance: Advance) -> Results:
    """Convert units and yield their numbers and results as they finish.

    Args:
        task: what is converted, and how.
        units: numbers and units; no more than two for each process are taken from it before they finish.
        advance: called with captions and image bytes as they are done.

    Raises:
        ConversionError: if a process died.
    """
    processes = task.options.processes or len(os.sched_getaffinity(0))
    if processes == 1:
        for number, unit in units:
            yield number, convert_unit(task, number, unit, advance)
        return
    try:
        yield from _in_parallel(task, units, processes, advance)
    except BrokenProcessPool:
        raise ConversionError(
            f"{task.output.label}: a process died (out of memory?); run the same command again to go on, with fewer "
            "processes= if memory is short."
        ) from None


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

    def convert(self, number: int, unit: Any) -> Result:
        """Convert one unit."""
        self._waiting = (0, 0, 0)
        result = convert_unit(self.task, number, unit, self._advance)
        self._report()
        return result

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


def _work(number: int, unit: Any) -> tuple[int, Result]:
    return number, _worker.convert(number, unit)


class _Counters:
    """Samples and bytes that all processes count, and one reports."""

    def __init__(self, shared: Any, advance: Advance):
        self.shared = shared
        self.advance = advance
        self._told = (0, 0)

    def tell(self) -> None:
        """Tell what was added."""
        samples, size = self.shared[:]
        self.advance(samples - self._told[0], size - self._told[1])
        self._told = samples, size


def _in_parallel(task: Task, units: Units, processes: int, advance: Advance) -> Results:
    """Keep every process busy, with no more than two units each in memory."""
    # Forked processes start at once, and do not run a script again that calls this without a main guard.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    counters, stop = _Counters(context.Array("q", 2), advance), context.Event()
    arguments = (task, counters.shared, stop, os.getpid())
    with ProcessPoolExecutor(processes, context, _start_worker, arguments) as pool:
        try:
            pending: set[Future[tuple[int, Result]]] = set()
            for number, unit in units:
                pending.add(pool.submit(_work, number, unit))
                while len(pending) >= 2 * processes:
                    yield from _finished(pending, counters)
            while pending:
                yield from _finished(pending, counters)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finished(pending: set[Future[tuple[int, Result]]], counters: _Counters) -> Results:
    """Take out what has finished, waiting a little; an error in one of them is raised."""
    done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
    counters.tell()
    pending -= done
    for future in done:
        yield future.result()
