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
from composer_prior.conversion.units import Result, Results, Task, Units, convert_unit


def convert_in_processes(task: Task, units: Units) -> Results:
    """Convert units and yield their numbers and results as they finish.

    Args:
        task: source, output and options.
        units: numbers and units; at most two for each process are in work at a time.

    Raises:
        ConversionError: if a process died.
    """
    processes = task.options.processes or len(os.sched_getaffinity(0))
    if processes == 1:
        for number, unit in units:
            yield number, convert_unit(task, number, unit)
        return
    try:
        yield from _in_parallel(task, units, processes)
    except BrokenProcessPool:
        raise ConversionError(
            f"{task.output.label}: a process died (out of memory?); run the same command again to go on, with fewer "
            "processes= if memory is short."
        ) from None


_task: Task  # of this process of the pool


def _start_worker(task: Task, stop: Any, parent: int) -> None:
    """Ignore Ctrl-C, and exit soon after the parent has ended or asks to stop."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        while os.getppid() == parent and not stop.value:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(number: int, unit: Any) -> tuple[int, Result]:
    return number, convert_unit(_task, number, unit)


def _in_parallel(task: Task, units: Units, processes: int) -> Results:
    """Convert units in several processes, at most two units each in memory."""
    # Forked processes start at once, and do not rerun a script that lacks a main guard.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    stop = context.RawValue("b", 0)  # without a lock, which a killed process would keep
    with ProcessPoolExecutor(processes, context, _start_worker, (task, stop, os.getpid())) as pool:
        try:
            pending: set[Future[tuple[int, Result]]] = set()
            for number, unit in units:
                pending.add(pool.submit(_work, number, unit))
                while len(pending) >= 2 * processes:
                    yield from _finished(pending)
            while pending:
                yield from _finished(pending)
        except BaseException:
            stop.value = 1
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finished(pending: set[Future[tuple[int, Result]]]) -> Results:
    """Remove finished units from ``pending`` and yield their results, or raise their errors."""
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    pending -= done
    for future in done:
        yield future.result()
