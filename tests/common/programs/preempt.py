"""For ``code_paths``: callbacks by which SIGTERM comes after a batch, as from a launcher, or saving takes long."""

import os
import signal
import time

from composer.core import Callback
from composer.utils import dist

from composer_prior.registry import register


@register("callback", "preempt")
class Preempt(Callback):
    """The first rank receives SIGTERM after so many batches."""

    def __init__(self, batch: int):
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch == self.batch and dist.get_global_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@register("callback", "slow_save")
class SlowSave(Callback):
    """A checkpoint takes so many seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def state_dict(self):
        time.sleep(self.seconds)
        return {}
