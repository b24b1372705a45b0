"""Draws from a distribution of weights as a pure function of tensors."""

import torch
from torch import Tensor


def drawn(pool: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """Draw for each token the weight of a pool at its random number's quantile.

    Args:
        pool: ``[n]`` float, sorted; at least one if any token is masked.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        noise: ``[B, T]`` float in [0, 1).

    Returns:
        ``[B, T]``, 0 where ``mask`` is False.
    """
    weights = torch.zeros(mask.shape, dtype=pool.dtype, device=pool.device)
    return weights.masked_scatter(mask, pool[(noise[mask] * len(pool)).long()])
