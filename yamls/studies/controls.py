"""Distillation from a viewer, a control of studies: a recipe loads it with ``code_paths``."""

from typing import cast

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor

from composer_prior.algorithms.token_weighting.token_weighting import unwrapped
from composer_prior.data.batch import loss_mask
from composer_prior.models.language import causal_lm_of, decoder_of, head_of
from composer_prior.models.viewer import Viewer
from composer_prior.registry import register


@register("algorithm", "distillation")
class Distillation(Algorithm):
    """Learn from a viewer's probabilities of its most likely tokens beside the captions.

    Args:
        viewer: the folder of a model that reads the same batches.
        share: weight of the divergence from the viewer; the loss of the captions has the rest. Default: ``0.5``.
        top: number of the viewer's most likely tokens; all others count as one. Default: ``32``.
    """

    ours: Tensor  # the last hidden states of a forward pass
    theirs: Tensor

    def __init__(self, viewer: str | None = None, share: float = 0.5, top: int = 32):
        self.share, self.top = share, top
        if viewer is not None:  # checks of a recipe give none
            self.viewer = Viewer.of(viewer)

    def match(self, event: Event, state: State) -> bool:
        """Return True at the events that this algorithm needs."""
        return event in (Event.FIT_START, Event.BEFORE_FORWARD, Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Keep the hidden states of both models, and change the loss."""
        if event == Event.FIT_START:
            self.viewer.to(cast(torch.device, state.device._device)).check_inputs(unwrapped(state.model))
            for name, model in (("ours", unwrapped(state.model).model), ("theirs", self.viewer.model.model)):
                decoder = decoder_of(causal_lm_of(model))
                decoder.register_forward_hook(lambda *call, name=name: setattr(self, name, call[-1].last_hidden_state))
        elif event == Event.BEFORE_FORWARD:
            with torch.no_grad():
                self.viewer.model(state.batch)
        else:
            mask = loss_mask(state.batch, "Distillation")[:, 1:]
            ours, theirs = (
                head_of(model)(hidden[:, :-1][mask]).float().log_softmax(-1)
                for model, hidden in (
                    (unwrapped(state.model).model, self.ours),
                    (self.viewer.model.model, self.theirs),
                )
            )
            divergence = kl_of_top(ours, theirs.detach(), self.top).mean()
            state.loss = (1 - self.share) * cast(Tensor, state.loss) + self.share * divergence


def kl_of_top(ours: Tensor, theirs: Tensor, top: int) -> Tensor:
    """Return the divergence of our distribution from theirs, ``[n]``, over their ``top`` tokens and the rest as one.

    Args:
        ours: ``[n, V]`` log-probabilities.
        theirs: ``[n, V]`` log-probabilities.
        top: number of tokens.
    """
    values, ids = theirs.topk(top)
    pairs = []
    for known in (values, ours.gather(1, ids)):
        rest = (1 - known.exp().sum(1, keepdim=True)).clamp(min=1e-6).log()
        pairs.append(torch.cat([known, rest], 1))
    return (pairs[0].exp() * (pairs[0] - pairs[1])).sum(1)
