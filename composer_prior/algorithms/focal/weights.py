"""The focal loss's weights as a pure function of tensors (arXiv 1708.02002, equation 4)."""

import torch
from torch import Tensor


def focal_weights(nll: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """Return weights ``(1 - P)^gamma`` from the model's own probability of each token, not normalized.

    As in the paper the gradient flows through the weights too.

    Args:
        nll: ``[B, T]`` float, ``-log P(token)`` under the model that is trained.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        gamma: exponent, >= 0. The paper's is 2; 0 gives weights of exactly 1.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False.
    """
    # -expm1(-x) is 1 - exp(-x). At 0 the power's gradient may be infinite; below the smallest number it is 0.
    doubt = (-torch.expm1(-nll.float())).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(mask, doubt.pow(gamma), 0.0)
