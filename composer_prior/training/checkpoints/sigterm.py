"""Stop a run on SIGTERM."""

import signal
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist


class Preempted(Exception):
    """Training was asked to stop by SIGTERM."""


class StopOnSigterm(Callback):
    """Stop at the end of the batch when any rank has received SIGTERM, as nodes that are taken away do."""

    def __init__(self) -> None:
        self._received = False

    def fit_start(self, state: State, logger: Logger) -> None:
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_: Any) -> None:
        self._received = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        received = state.device.tensor_to_device(torch.tensor([self._received], dtype=torch.uint8))
        dist.all_reduce(received, reduce_operation="MAX")
        if received.item():
            raise Preempted
