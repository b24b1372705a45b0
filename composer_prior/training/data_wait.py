"""The time that training steps wait for data."""

from collections import deque
from time import perf_counter

from composer.core import Callback, State
from composer.loggers import Logger

from composer_prior.registry import Count


class DataWaitMonitor(Callback):
    """Log ``throughput/data_wait_fraction``: the share of the last steps' time that went by waiting for the loader.

    More workers (``train_loader.num_workers``) or a faster disk help while it is above a few hundredths; below, the
    loader keeps up with the step.

    Args:
        window_size: steps over which the share is taken. Default: ``100``, as Composer's ``SpeedMonitor``.
    """

    def __init__(self, window_size: Count = 100):
        self._steps: deque[tuple[float, float]] = deque(maxlen=window_size)  # seconds waited, and in all
        self._asked = 0.0
        self._received: float | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        self._received = None  # the first step also waits for the workers to start

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked = perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        now = perf_counter()
        if self._received is not None:
            self._steps.append((now - self._asked, now - self._received))
            waited, passed = map(sum, zip(*self._steps, strict=True))
            logger.log_metrics({"throughput/data_wait_fraction": waited / passed})
        self._received = now
