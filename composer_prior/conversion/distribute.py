"""Convert the unfinished units of a source with the distributor that the options name.

A distributor is a function that takes units of work and yields their results as they finish, in any order. Here is the
one of processes: this one, or several of this machine.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from composer_prior.conversion.options import ConversionError, ConversionOptions
from composer_prior.conversion.sources import Source
from composer_prior.conversion.units import Result, Results, Task, Units, convert_unit, digest, json_line, unit_file
from composer_prior.data.files import parse_json
from composer_prior.data.remote import Output
from composer_prior.data.storage import write_whole

Distributor = Callable[[Task, Units], Results]


def distributor_of(options: ConversionOptions) -> Distributor:
    """Return the distributor that the options name, or raise ConversionError if its package is missing."""
    if options.distributor == "processes":
        return convert_in_processes
    try:
        import ray  # noqa: F401  tested alone, so that a missing module of ours is not reported as a missing package
    except ImportError as error:
        raise ConversionError("distributor=ray needs the package ray: pip install 'composer-prior[ray]'.") from error
    from composer_prior.conversion.on_ray import convert_on_ray

    return convert_on_ray


def convert_units(source: Source, output: Output, options: ConversionOptions, distributor: Distributor) -> int:
    """Convert every unfinished unit, and return the number of all units."""
    count = 0

    def missing() -> Units:
        nonlocal count
        present = output.names()
        for number, unit in enumerate(source.units()):
            count = number + 1
            done = _done(output.state, number, unit, present)
            if done is None:
                yield number, unit
            elif not bar.disable:
                bar.initial += done  # converted before, so not part of the speed
                bar.update(done)

    hidden = None if options.progress is None else not options.progress
    disable = sys.stderr is None or hidden
    with tqdm(total=source.total, unit=" samples", smoothing=0.1, disable=disable, dynamic_ncols=True) as bar:
        task, written, start = Task(source, output, options), 0, time.monotonic()
        with closing(distributor(task, missing())) as results:
            for number, result in results:
                write_whole(unit_file(output.state, number), json_line(result))
                written += sum(shard["raw_data"]["bytes"] for shard in result["shards"])
                bar.set_postfix_str(f"{written / (time.monotonic() - start + 1e-9) / 1e6:.1f} MB/s", refresh=False)
                bar.update(result["read"])
    return count


def _done(state: Path, number: int, unit: Any, present: set[str] | None) -> int | None:
    """Return the number of captions that a finished unit read, or None if it has to be converted."""
    try:
        known = parse_json(unit_file(state, number).read_bytes())
        names = {shard["raw_data"]["basename"] for shard in known["shards"]}
        whole = known["unit"] == digest(unit) and (present is None or names <= present)
        return known["read"] if whole else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # missing or damaged
        return None


def convert_in_processes(task: Task, units: Units) -> Results:
    """Convert units and yield their numbers and results as they finish; ConversionError if a process died."""
    processes = task.options.processes or len(os.sched_getaffinity(0))
    if processes == 1:
        for number, unit in units:
            yield number, convert_unit(task, number, unit)
        return
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
        except BaseException as error:
            stop.value = 1
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise ConversionError(
                    f"{task.output.label}: a process died (out of memory?); run the same command again to go on, with "
                    "fewer processes= if memory is short."
                ) from None
            raise


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


def _finished(pending: set[Future[tuple[int, Result]]]) -> Results:
    """Remove finished units from ``pending`` and yield their results, or raise their errors."""
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    pending -= done
    for future in done:
        yield future.result()
