"""Random numbers for tokens that no cut of the batch changes."""

import numpy as np
import torch
from composer.core import State
from torch import Tensor

from composer_prior.data.batch import sample_ids


def token_noise(sample_ids: Tensor, mask: Tensor, seed: int, step: int) -> Tensor:
    """Draw uniform numbers in [0, 1) from the seed, the step, the sample and the token's position in its caption.

    Args:
        sample_ids: ``[B]`` int64.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        seed: 0 or more.
        step: of the training.

    Returns:
        ``[B, T]`` float64 on the mask's device, 0 where ``mask`` is False.
    """
    counts = mask.sum(1).tolist()
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, sample])).random(count)
        for sample, count in zip(sample_ids.tolist(), counts, strict=True)
    ]
    numbers = torch.from_numpy(np.concatenate([np.empty(0), *rows])).to(mask.device)
    return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_scatter(mask, numbers)


def noise_of(state: State, mask: Tensor, seed: int, method: str) -> Tensor:
    """Return :func:`token_noise` of the batch of a step.

    Raises:
        ValueError: if the batch does not say which samples it has.
    """
    return token_noise(sample_ids(state.batch, method), mask, seed, int(state.timestamp.batch))
