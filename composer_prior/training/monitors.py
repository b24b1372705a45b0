"""Figures of a run beside its metrics: of each stream, floating-point operations, the wait for data, learning rates."""

import json
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from composer.callbacks import LRMonitor
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.flop_counter import FlopCounterMode

from composer_prior.algorithms.token_weighting.token_weighting import unwrapped
from composer_prior.data.batch import IGNORE_INDEX, stream_masks, stream_names
from composer_prior.data.messages import announce, one_line
from composer_prior.registry import Count


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter with what its list lacks: attention on the CPU, of grouped queries, of a frozen tower.

    Attention counts in full where it is causal too, and its backward pass, which computes the scores again, as 2.5
    forward passes.
    """
    aten = torch.ops.aten
    known: dict[Any, Any] = {aten._native_multi_head_attention: _attention_with_projections}
    for kernel in ("flash", "efficient", "cudnn"):
        known[getattr(aten, f"_scaled_dot_product_{kernel}_attention")] = _attention
        known[getattr(aten, f"_scaled_dot_product_{kernel}_attention_backward")] = _attention_backward
    known[aten._scaled_dot_product_flash_attention_for_cpu] = _attention
    known[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward
    return FlopCounterMode(display=False, custom_mapping=known)


def _attention(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Count two products of ``query [B, H, T, D]`` with keys and values ``[B, H or fewer, S, D]``."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward(_: Any, query: torch.Size, key: torch.Size, *__: Any, **___: Any) -> int:
    return _attention(query, key) * 5 // 2


def _attention_with_projections(query: torch.Size, *_: Any, **__: Any) -> int:
    """Count the four projections of ``query [B, T, D]``, and its products with keys and values."""
    batch, length, width = query
    return 8 * batch * length * width**2 + 4 * batch * length**2 * width


class ComputeMonitor(Callback):
    """Log ``compute/flops``: floating-point operations of products, attention and convolutions so far, of all ranks.

    They are counted by PyTorch's ``FlopCounterMode`` in one step of every ``interval``, forward and backward, with what
    algorithms compute beside the model (a live reference, a second pass), and carried over to the steps between by
    their tokens. Validation is not counted. Inside a compiled model nothing can be counted. Composer's ``SpeedMonitor``
    reads them: ``throughput/device/flops_per_sec``, and on a GPU whose peak it knows ``throughput/device/mfu``.

    Args:
        interval: steps from one that is counted to the next. Default: ``20``.
    """

    def __init__(self, interval: Count = 20):
        self.interval = interval
        self._counter: FlopCounterMode | None = None
        self._flops = 0.0
        self._flops_per_token = 0.0
        self._tokens = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        model: Any = unwrapped(state.model)
        model.flops_per_batch = lambda batch: self._flops_per_token * int(batch["attention_mask"].sum())

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) % self.interval == 0 or not self._flops_per_token:
            self._counter = flop_counter()
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


class PlanMonitor(Callback):
    """Print, after the second step, the peak memory of a GPU beside the one that a plan predicts.

    Args:
        plan: the file that ``composer-prior plan ... out=FILE`` has written.
    """

    def __init__(self, plan: str):
        try:
            found = json.loads(Path(plan).read_text())
            self.planned, self.ranks, self.microbatch = (found[key] for key in ("memory", "world_size", "microbatch"))
        except (OSError, ValueError, LookupError, TypeError) as error:
            command = "composer-prior plan RECIPE.yaml out=FILE"
            raise ValueError(
                f"plan={plan}: not the file of a plan ({one_line(error)}); {command} makes one."
            ) from error
        self._steps = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.device.name == "gpu":
            torch.cuda.reset_peak_memory_stats()  # of loading, and of a reference that was trained before

    def batch_end(self, state: State, logger: Logger) -> None:
        self._steps += 1
        if self._steps != 2 or state.device.name != "gpu":  # in the first step there are no moments yet
            return
        peak = state.device.tensor_to_device(torch.tensor(float(torch.cuda.max_memory_allocated())))
        dist.all_reduce(peak, reduce_operation="MAX")
        planned = sum(self.planned.values())
        ratio = float(peak) / planned
        line = (
            f"Peak memory of a GPU: {float(peak) / 2**30:.2f} GiB, planned {planned / 2**30:.2f} GiB ({ratio:.2f} x)."
        )
        ranks, microbatch = dist.get_world_size(), state.device_train_microbatch_size
        if (ranks, microbatch) != (self.ranks, self.microbatch):
            of_plan = f"{self.ranks} GPUs and a microbatch of {self.microbatch}"
            line += f" The plan is of {of_plan}, not of {ranks} and {microbatch}."
        elif abs(ratio - 1) > 0.15:
            line += " They differ by more than 15 %: was the plan made with the recipe and the overrides of this run?"
        announce(line)


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


class StreamMonitor(Callback):
    """Log the figures of each stream of data that mix several; a run adds it by itself.

    Of a step: ``loss/train/{stream}`` (nats per token, unweighted), ``metrics/train/{stream}/accuracy``,
    ``metrics/train/{stream}/share`` (of the samples, skipped ones included), and ``metrics/train/{stream}/tokens``, the
    loss-generating tokens since the start of training. Of a validation as a whole: ``metrics/eval/{stream}/loss``, and
    the others likewise. They are sums over microbatches and ranks, divided once. A stream without a token has no loss
    and no accuracy.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._sums: dict[str, Any] = {}  # of samples, tokens, losses and hits by stream
        self._logged = False

    def batch_start(self, state: State, logger: Logger) -> None:
        self._logged = False

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._sums = {}  # of a pass that ran out of memory, or of an optimizer that takes two

    def after_loss(self, state: State, logger: Logger) -> None:
        names, batch, outputs = stream_names(state.dataloader), state.batch, cast(Any, state.outputs)
        if len(names) < 2:
            return
        mask = batch["labels"] != IGNORE_INDEX
        for name, rows in stream_masks(batch, names).items():
            mine = mask & rows
            terms = rows, mine, torch.where(mine, outputs["nll"].detach(), 0.0), outputs["correct"] & mine
            self._sums[name] = self._sums.get(name, 0.0) + torch.stack([one.sum(dtype=torch.float64) for one in terms])

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if not self._logged:
            self._log(logger, "loss/train/{}", "metrics/train", self._tokens)
        self._logged = True

    eval_start, eval_after_forward = before_train_batch, after_loss

    def eval_end(self, state: State, logger: Logger) -> None:
        place = f"metrics/{state.dataloader_label}"
        self._log(logger, place + "/{}/loss", place, {})

    def _log(self, logger: Logger, loss: str, place: str, tokens_so_far: dict[str, int]) -> None:
        """Log figures of the sums over all ranks, and add to the tokens so far."""
        if not self._sums:
            return
        sums = torch.stack([*self._sums.values()])
        dist.all_reduce(sums, reduce_operation="SUM")
        metrics, whole = dict[str, float](), float(sums[:, 0].sum())
        for name, (samples, tokens, nll, correct) in zip(self._sums, sums.tolist(), strict=True):
            tokens_so_far[name] = tokens_so_far.get(name, 0) + int(tokens)
            metrics |= {f"{place}/{name}/share": samples / whole, f"{place}/{name}/tokens": tokens_so_far[name]}
            if tokens:
                metrics |= {loss.format(name): nll / tokens, f"{place}/{name}/accuracy": correct / tokens}
        logger.log_metrics(metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tokens = dict(state["tokens"])


class GroupLRMonitor(LRMonitor):
    """Composer's LRMonitor, which logs groups by name: ``lr-AdamW/vision``, and ``group0`` for weights of no group."""

    def batch_end(self, state: State, logger: Logger) -> None:
        for optimizer in state.optimizers:
            name = type(optimizer).__name__
            logger.log_metrics({f"lr-{name}/{group['name']}": group["lr"] for group in optimizer.param_groups})
