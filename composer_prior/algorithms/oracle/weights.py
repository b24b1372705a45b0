"""The oracle's weights as a pure function of tensors."""

import torch
from torch import Tensor

from composer_prior.algorithms.token_weighting.normalize import Normalization, check_floor, mix_in, normalize


def oracle_weights(
    image_related: Tensor, mask: Tensor, floor: float = 0.0, normalization: Normalization = "sequence"
) -> Tensor:
    """Weight 1 on image-related tokens and ``floor`` on the others, normalized to a mean of 1.

    Args:
        image_related: ``[B, T]`` bool.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        floor: weight of the other tokens, in [0, 1).
        normalization: see :func:`.normalize`; a caption without an image-related token gets weights of 1.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False.
    """
    check_floor(floor)
    return normalize(raw_weights(image_related, mask, floor), mask, normalization)


def raw_weights(image_related: Tensor, mask: Tensor, floor: float) -> Tensor:
    """Return weights before normalization."""
    return torch.where(mask, mix_in(image_related.float(), floor), 0.0)
