"""The floating-point operations of a run."""

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from composer_prior.registry import Count


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
            self._counter = FlopCounterMode(display=False, custom_mapping=_further_operations())
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


def _further_operations() -> dict[Any, Any]:
    """Return the operations of the CPU that PyTorch's own list lacks."""
    operations: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    return {operation: count for operation, count in operations.items() if operation not in flop_registry}


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
