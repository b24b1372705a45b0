"""CAL's weights as a pure function of tensors (arXiv 2405.17871, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from composer_prior.algorithms.token_weighting.normalize import Normalization, normalize


def contrast_weights(
    difference: Tensor,
    mask: Tensor,
    low: float = 1.0,
    high: float = 5.0,
    window: int = 3,
    normalization: Normalization = "sequence",
) -> Tensor:
    """Compute weights from the difference of each label's logit with and without the image: clamped, then smoothed.

    Args:
        difference: ``[B, T]`` float, logit of the label with the image minus that without it.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        low: lower bound of the difference. The paper's is 1.
        high: upper bound of the difference. The paper's is 5.
        window: odd number of neighbouring loss-generating tokens, including the token, for the mean. The paper's is 3.
        normalization: see :func:`.normalize`.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False.
    """
    check_arguments(low, high, window)
    return normalize(raw_weights(difference, mask, low, high, window), mask, normalization)


def raw_weights(difference: Tensor, mask: Tensor, low: float, high: float, window: int) -> Tensor:
    """Weights before normalization."""
    clamped = torch.where(mask, difference.float().clamp(low, high), 0.0)
    total, count = (_pooled(values, window) for values in (clamped, mask.float()))
    return torch.where(mask, total / count.clamp(min=1.0 / window), 0.0)


def _pooled(values: Tensor, window: int) -> Tensor:
    """Mean over the window around each position, with zeros outside."""
    return F.avg_pool1d(values[:, None], window, stride=1, padding=window // 2)[:, 0]


def check_arguments(low: float, high: float, window: int) -> None:
    """Raise a ValueError for impossible bounds or an impossible window."""
    if not 0 < low <= high:
        raise ValueError(f"low={low}, high={high}: expected 0 < low <= high; the paper uses 1 and 5.")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}: expected an odd number of tokens; the paper uses 3.")
