"""For ``code_paths``: callbacks that spoil a batch, a gradient or a weight, kill a run, or write down what it reads."""

import json
import os
import signal
from pathlib import Path

import torch
from composer.core import Callback, Event
from composer.utils import dist

from composer_prior.registry import register


class _At(Callback):
    """Once or more, before or after a batch, on one rank."""

    def __init__(self, at: list[int], rank: int = 0):
        self.at, self.rank = at, rank

    def due(self, state):
        return int(state.timestamp.batch) in self.at and dist.get_global_rank() == self.rank


@register("callback", "spoil_batch")
class SpoilBatch(_At):
    """The images of a batch are NaN."""

    def batch_start(self, state, logger):
        if self.due(state):
            state.batch["pixel_values"].fill_(float("nan"))


@register("callback", "spoil_gradient")
class SpoilGradient(_At):
    """The loss stays what it is, and a gradient is infinite."""

    def after_loss(self, state, logger):
        if self.due(state):
            weight = next(p for p in state.model.parameters() if p.requires_grad)
            state.loss = state.loss + (weight - weight.detach()).abs().sum().sqrt() * 1e-30


@register("callback", "spoil_weight")
class SpoilWeight(_At):
    """A weight is NaN when a batch has been trained on."""

    def batch_end(self, state, logger):
        if self.due(state):
            weight = next(p for p in state.model.parameters() if p.requires_grad)
            with torch.no_grad():
                (weight.to_local() if hasattr(weight, "to_local") else weight).view(-1)[0] = float("nan")


@register("callback", "kill")
class Kill(Callback):
    """SIGKILL at an event after so many batches, once."""

    def __init__(self, at: int, event: str):
        self.at, self.event = at, Event(event)

    def run_event(self, event, state, logger):
        flag = Path(f"killed-{state.run_name}-{dist.get_global_rank()}")
        if event == self.event and int(state.timestamp.batch) == self.at and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@register("callback", "spy")
class Spy(Callback):
    """A line for each batch in ``{run_name}.{rank}``: its number, its samples and the captions that they have drawn."""

    def batch_start(self, state, logger):
        line = [
            int(state.timestamp.batch),
            state.batch["sample_id"].tolist(),
            [row[row >= 0].tolist() for row in state.batch["labels"]],
        ]
        with open(f"{state.run_name}.{dist.get_global_rank()}", "a") as file:
            file.write(json.dumps(line) + "\n")
