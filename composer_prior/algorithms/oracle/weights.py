"""The oracle's weights as a pure function of tensors."""

import torch
from torch import Tensor

from composer_prior.algorithms.token_weighting.normalize import mix_in


def oracle_weights(image_related: Tensor, mask: Tensor, floor: float = 0.0) -> Tensor:
    """Return weight 1 on image-related tokens and ``floor`` on the others, not normalized.

    Args:
        image_related: ``[B, T]`` bool.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        floor: weight of the other tokens, in [0, 1).

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False.
    """
    return torch.where(mask, mix_in(image_related.float(), floor), 0.0)
