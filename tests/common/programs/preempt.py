"""For ``code_paths``: a callback by which the first rank receives SIGTERM after a batch, as from a launcher."""

import os
import signal

from composer.core import Callback
from composer.utils import dist

from composer_prior.registry import register


@register("callback", "preempt")
class Preempt(Callback):
    """SIGTERM comes after so many batches."""

    def __init__(self, batch: int):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch == self.batch and dist.get_global_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
