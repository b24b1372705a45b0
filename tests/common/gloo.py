"""Let FSDP2 average gradients over gloo, which on some versions of torch adds them up when it is asked for an average.

``COMPOSER_PRIOR_FSDP2_ON_CPU`` names this file in tests; a run executes it in each rank before it trains.
"""

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

_factors = _fsdp_collectives._get_gradient_divide_factors


def _of_float16(shards, copies, dtype, *rest):
    """FSDP2 then divides all gradients itself, as it does those in float16, which hold no large sums."""
    return _factors(shards, copies, torch.float16, *rest)


_fsdp_collectives._get_gradient_divide_factors = _of_float16
torch.cpu.Stream.record_event = lambda _: torch.cpu.Event()  # copies of the model need an event, which CPUs lack
