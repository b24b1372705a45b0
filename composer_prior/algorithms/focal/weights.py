"""The focal loss's weights as a pure function of tensors (arXiv 1708.02002, equation 4)."""

import torch
from torch import Tensor

from composer_prior.algorithms.token_weighting.normalize import Normalization, normalize


def focal_weights(nll: Tensor, mask: Tensor, gamma: float = 2.0, normalization: Normalization = "none") -> Tensor:
    """Return weights ``(1 - P)^gamma`` from the model's own probability of each token.

    As in the paper the gradient flows through the weights too.

    Args:
        nll: ``[B, T]`` float, ``-log P(token)`` under the model that is trained.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        gamma: exponent, >= 0. The paper's is 2; 0 gives weights of exactly 1.
        normalization: see :func:`.normalize`. The paper's loss has none.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False.
    """
    check_gamma(gamma)
    return normalize(raw_weights(nll, mask, gamma), mask, normalization)


def raw_weights(nll: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return weights before normalization."""
    # -expm1(-x) is 1 - exp(-x). At 0 the power's gradient may be infinite; below the smallest number it is 0.
    doubt = (-torch.expm1(-nll.float())).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(mask, doubt.pow(gamma), 0.0)


def check_gamma(gamma: float) -> None:
    """Raise a ValueError for an impossible gamma."""
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma}: the exponent of (1 - P) must be 0 or more; the paper uses 2.")
