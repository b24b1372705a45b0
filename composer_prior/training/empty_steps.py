"""Steps of which no sample could be used."""

import logging

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from composer_prior.data.batch import IGNORE_INDEX

log = logging.getLogger(__name__)


class SkipEmptySteps(Callback):
    """Let a step without any label, over all ranks, change neither weights nor the optimizer's moments.

    With ``on_bad_sample="skip"`` the samples that cannot be used count for nothing; where a whole batch consists of
    them, the gradient is 0, and an optimizer would still decay the weights and move them by its momentum.
    """

    def after_train_batch(self, state: State, logger: Logger) -> None:
        labels = (state.batch["labels"] != IGNORE_INDEX).sum()
        count = state.device.tensor_to_device(torch.as_tensor(labels))
        dist.all_reduce(count, reduce_operation="SUM")
        if count.item() == 0:
            log.warning("Batch %d holds no sample that can be used: it changes nothing.", int(state.timestamp.batch))
            change_nothing(state.model)


def change_nothing(model: nn.Module) -> None:
    """Let the step that follows change neither weights nor moments."""
    for parameter in model.parameters():
        parameter.grad = None  # optimizers pass over these
