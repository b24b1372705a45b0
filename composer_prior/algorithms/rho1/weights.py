"""Rho-1's selection of tokens as a pure function of tensors (arXiv 2404.07965, section 2.2)."""

import torch
from torch import Tensor


def selection_weights(nll: Tensor, ref_logprobs: Tensor, mask: Tensor, share: float = 0.6) -> Tensor:
    """Return 1 on the tokens of each caption with the highest excess loss, the first of equal ones, and 0 on others.

    Args:
        nll: ``[B, T]`` float, ``-log P(token)`` under the model that is trained.
        ref_logprobs: ``[B, T]`` float, ``log P_r(token)`` under the reference; the excess loss is their sum.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        share: of a caption's tokens that are kept, in (0, 1]; rounded up to whole tokens.

    Returns:
        ``[B, T]`` float32 without gradient, 0 where ``mask`` is False.
    """
    return highest(nll.detach().float() + ref_logprobs.float(), mask, share)


def highest(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return 1 on the share of each caption's tokens with the highest scores, the first of equal ones, and 0 on others.

    Args:
        scores: ``[B, T]`` float.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        share: in (0, 1].

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False.
    """
    rank = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = (mask.sum(1, keepdim=True).double() * share - 1e-9).ceil()  # 0.6 * 5 is 3, not 4
    return (mask & (rank < kept)).float()


def check_share(share: float) -> None:
    """Raise a ValueError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: the share that is kept must be in (0, 1].")
