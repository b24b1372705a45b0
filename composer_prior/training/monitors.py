"""Figures of a run beside its metrics: its floating-point operations, the wait for data, and the learning rates."""

from collections import deque
from time import perf_counter
from typing import Any

import torch
from composer.callbacks import LRMonitor
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from composer_prior.registry import Count

_FLASH = "_scaled_dot_product_flash_attention"


def _on_cpu() -> dict[Any, Any]:
    """Return how attention on the CPU is counted, which PyTorch's list of operations lacks: as on a GPU."""
    return {
        getattr(torch.ops.aten, f"{_FLASH}_for_cpu{end}"): flop_registry[
            getattr(torch.ops.aten, f"{_FLASH}{end}")
        ].__wrapped__  # FlopCounterMode wraps functions itself
        for end in ("", "_backward")
    }


class ComputeMonitor(Callback):
    """Log ``compute/flops``: floating-point operations of products, attention and convolutions so far, of all ranks.

    They are counted by PyTorch's ``FlopCounterMode`` in one step of every ``interval``, forward and backward, with what
    algorithms compute beside the model (a live reference, a second pass), and carried over to the steps between by
    their tokens. Validation is not counted. Inside a compiled model nothing can be counted.

    Args:
        interval: steps from one that is counted to the next. Default: ``20``.
    """

    def __init__(self, interval: Count = 20):
        self.interval = interval
        self._counter: FlopCounterMode | None = None
        self._flops = 0.0
        self._flops_per_token = 0.0
        self._tokens = 0

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) % self.interval == 0 or not self._flops_per_token:
            self._counter = FlopCounterMode(display=False, custom_mapping=_on_cpu())
            self._counter.__enter__()

    def batch_end(self, state: State, logger: Logger) -> None:
        tokens = int(state.timestamp.token) - self._tokens
        self._tokens += tokens
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            counted = state.device.tensor_to_device(torch.tensor(float(self._counter.get_total_flops())))
            self._counter = None
            dist.all_reduce(counted, reduce_operation="SUM")
            self._flops_per_token = float(counted) / max(1, tokens)
        self._flops += self._flops_per_token * tokens
        logger.log_metrics({"compute/flops": self._flops})

    def state_dict(self) -> dict[str, Any]:
        return {"flops": self._flops, "tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._flops, self._tokens = state["flops"], state["tokens"]


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


class GroupLRMonitor(LRMonitor):
    """Composer's LRMonitor, which logs groups by name: ``lr-AdamW/vision``, and ``group0`` for weights of no group."""

    def batch_end(self, state: State, logger: Logger) -> None:
        for optimizer in state.optimizers:
            name = type(optimizer).__name__
            logger.log_metrics({f"lr-{name}/{group['name']}": group["lr"] for group in optimizer.param_groups})
