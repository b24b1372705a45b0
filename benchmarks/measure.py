"""Clocks, interleaving and memory."""

import ctypes
import gc
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from composer.core import Callback, State
from composer.loggers import Logger


class Stamps:
    """End times and losses of steps."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def stamp(self) -> None:
        """Record the end of a step."""
        self.times.append(time.perf_counter())

    def composer(self) -> Callback:
        """Return a callback of Composer that records each step and its loss."""
        stamps = self

        class Stamp(Callback):
            def after_loss(self, state: State, logger: Logger) -> None:
                loss: Any = state.loss
                stamps.losses.append(float(loss))

            def batch_end(self, state: State, logger: Logger) -> None:
                stamps.stamp()

        return Stamp()


def interleaved_steps(
    runs: Mapping[str, tuple[Callable[[int], Any], Stamps]], repetitions: int, steps: int = 2
) -> dict[str, list[float]]:
    """Return the seconds per step of each trainer, one value for each turn; the first step starts the clock."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repetitions + 1):
        for name, (step, stamps) in runs.items():
            stamps.times.clear()
            step(steps + 1)
            if turn:  # the first turn warms up
                seconds[name].append((stamps.times[-1] - stamps.times[0]) / steps)
    return seconds


def interleaved(functions: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each call, the functions in turn; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repetitions + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median over turns of the ratio within a turn, which cancels slow changes of the machine."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def matrix_product() -> Callable[[], torch.Tensor]:
    """Return a float32 product of two matrices of 2,048 squared, of ``2 * 2048**3`` operations."""
    a, b = torch.randn(2, 2048, 2048)
    return lambda: a @ b


PRODUCT_FLOPS = 2 * 2048**3


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return the peak memory of a call above the level before it, as the kernel counts it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def anonymous_bytes() -> int:
    """Return the anonymous memory of the process in bytes, without pages of mapped files."""
    return _status("RssAnon")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, and return its result."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=prepare_process, initargs=(torch.get_num_threads(),)) as executor:
        return executor.submit(function, *args).result()


def prepare_process(threads: int) -> None:
    """Set the number of threads, and silence logs and warnings."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
