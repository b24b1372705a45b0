"""Permutation of weights as a pure function of tensors."""

import torch
from torch import Tensor


def permuted(weights: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """Permute the weights of each caption by its tokens' random numbers.

    Args:
        weights: ``[B, T]`` float.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        noise: ``[B, T]`` float, one number per token.

    Returns:
        ``[B, T]``, 0 where ``mask`` is False: the ``i``-th token of a caption gets the weight of the token with the
        ``i``-th smallest number.
    """
    source = noise.masked_fill(~mask, torch.inf).argsort(dim=1, stable=True)
    target = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # the tokens first, in order
    moved = torch.zeros_like(weights).scatter(1, target, weights.gather(1, source))
    return torch.where(mask, moved, 0.0)
