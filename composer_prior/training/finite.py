"""Steps that change nothing: those without a label, and those whose loss or gradient is not finite."""

import logging
import math
from typing import Any

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from torch import Tensor, nn

from composer_prior.data.batch import IGNORE_INDEX, stream_masks, stream_names
from composer_prior.data.messages import OneLineError, announce

log = logging.getLogger(__name__)
_FIRST_SAMPLES = 100
_KINDS = ("loss", "gradient norm")
_REMEDY = "earlier checkpoints stay; look at that batch, lower optimizer.lr, clip gradients"


class NotFiniteError(OneLineError, ValueError):
    """A loss, a gradient or a weight that is not finite."""


class FiniteSteps(Callback):
    """Stop at the first step whose loss or gradient norm is not finite, on any rank, before it changes anything.

    With a gradient scaler (``amp_fp16``) a gradient that is not finite lowers the scale, and stops the run where the
    scale is 1 or less.

    Args:
        allowed: so many such steps, of each start of the run, change neither weights, nor buffers, nor the optimizer's
            moments, nor metrics, and training goes on. Default: ``0``.

    Raises:
        NotFiniteError: on every rank, naming the batch.
    """

    def __init__(self, allowed: int = 0):
        self.allowed, self._left_out = allowed, 0
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._found = torch.zeros(len(_KINDS))  # 0, or else not finite

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._found = state.device.tensor_to_device(torch.zeros(len(_KINDS)))
        if self.allowed:
            self._buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]

    def before_backward(self, state: State, logger: Logger) -> None:
        losses: Any = state.loss.values() if isinstance(state.loss, dict) else ensure_tuple(state.loss)
        for loss in losses:
            self._found[0] += loss.detach().float().sum() * 0

    def after_backward(self, state: State, logger: Logger) -> None:  # here: later it may have been clipped
        scale = state.scaler.get_scale() if state.precision == Precision.AMP_FP16 and state.scaler is not None else 1.0
        gradients = [_local(weight.grad) for weight in state.model.parameters() if weight.grad is not None]
        if scale <= 1 and gradients:
            norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
            self._found[1] += norms.norm().to(self._found.device) * 0

    def after_train_batch(self, state: State, logger: Logger) -> None:
        marks = torch.stack([*dist.all_gather((~self._found.isfinite()).to(torch.uint8))]).T.tolist()
        ranks = {
            kind: [rank for rank, mark in enumerate(of_kind) if mark]
            for kind, of_kind in zip(_KINDS, marks, strict=True)
        }
        what = next((kind for kind in _KINDS if ranks[kind]), None)
        if what is None:
            return
        where = f" on rank {', '.join(map(str, ranks[what]))}" if dist.get_world_size() > 1 else ""
        message = f"{state.run_name}, batch {state.timestamp.batch.value}: the {what} is not finite{where}"
        weight = not_finite_weight(state.model)
        if weight is not None:
            raise NotFiniteError(f"{message}, nor is the weight {weight}. Nothing of it is saved; {_REMEDY}.")
        if self._left_out == self.allowed:
            more = f"or let such steps change nothing with nan_steps={self.allowed + 1}"
            raise NotFiniteError(f"{message}. Nothing of it is saved; {_REMEDY}, {more}.")
        self._left_out += 1
        change_nothing(state.model)
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for metric in (state.train_metrics or {}).values():
            metric.reset()
        announce(f"{message}. The step changes nothing ({self._left_out} of nan_steps={self.allowed}).")


class SkipEmptySteps(Callback):
    """Let a step without any label, over all ranks, change neither weights nor the optimizer's moments.

    With ``on_bad_sample="skip"`` the samples that cannot be used count for nothing; where a whole batch consists of
    them, the gradient is 0, and an optimizer would still decay the weights and move them by its momentum.

    Raises:
        ValueError: if the first 100 samples of a stream cannot be used. A shorter run prints a warning at its end.
    """

    def __init__(self) -> None:
        self._unused: dict[str, float] = {}  # samples by stream, infinitely less once one of them could be used

    def state_dict(self) -> dict[str, Any]:
        return {"unused": self._unused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unused = dict(state.get("unused", {}))  # earlier versions saved none

    def after_train_batch(self, state: State, logger: Logger) -> None:
        mask = state.batch["labels"] != IGNORE_INDEX
        streams = stream_masks(state.batch, stream_names(state.dataloader))
        counts = torch.stack([torch.stack([rows.sum(), (mask & rows).sum()]) for rows in streams.values()])
        counts = state.device.tensor_to_device(counts)
        dist.all_reduce(counts, reduce_operation="SUM")
        for name, (samples, labels) in zip(streams, counts.tolist(), strict=True):
            self._unused[name] = self._unused.get(name, 0) + (-math.inf if labels else samples)
            if self._unused[name] >= _FIRST_SAMPLES:
                raise ValueError(f"train_loader: {self._none_used(name)} Mend the data or its settings.")
        if not counts[:, 1].any():
            log.warning("Batch %d holds no sample that can be used: it changes nothing.", int(state.timestamp.batch))
            change_nothing(state.model)

    def fit_end(self, state: State, logger: Logger) -> None:
        for name in (name for name, samples in self._unused.items() if samples > 0):
            announce(f"Warning: {self._none_used(name)} The model learned nothing from {name}.")

    def _none_used(self, name: str) -> str:
        return (
            f"the first {self._unused[name]:.0f} samples of {name} cannot be used; the log gives the reason for each."
        )


def change_nothing(model: nn.Module) -> None:
    """Let the step that follows change neither weights nor moments."""
    for parameter in model.parameters():
        parameter.grad = None  # optimizers pass over these


def check_weights(model: nn.Module, what: str) -> None:
    """Raise NotFiniteError on every rank for a weight that is not finite, ``what`` first; every rank calls it."""
    weight = not_finite_weight(model)
    if weight is not None:
        raise NotFiniteError(f"{what}: the weight {weight} is not finite.")


@torch.no_grad()
def not_finite_weight(model: nn.Module) -> str | None:
    """Return the name of a weight that is not finite on some rank, or None; every rank calls it."""
    weights = {name: _local(weight).isfinite().all() for name, weight in model.named_parameters()}
    finite = torch.stack([mark.cpu() for mark in weights.values()]).tolist() if weights else []
    ours = next((name for name, good in zip(weights, finite, strict=True) if not good), None)
    found = next((name for name in dist.all_gather_object(ours) if name is not None), None)
    return found and found.removeprefix("module.").removeprefix("model.")


def _local(tensor: Any) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
