"""The weights of ImageGain as pure functions of tensors."""

import torch
from torch import Tensor

from composer_prior.algorithms.prior.weights import check_arguments
from composer_prior.algorithms.prior.weights import raw_weights as prior_weights
from composer_prior.algorithms.token_weighting.normalize import Normalization, check_logprobs, normalize


def gain_weights(
    viewer_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    alpha: float = 1.0,
    normalization: Normalization = "sequence",
    floor: float = 0.1,
) -> Tensor:
    """Return weights ``floor + (1 - floor) (1 - P_r / max(P_r, P_v))^alpha``, normalized to a mean of 1.

    With ``P_v = 1`` they are PRIOR's. Where the image explains nothing (``P_v <= P_r``), the weight is the floor.

    Args:
        viewer_logprobs: ``[B, T]`` float, ``log P_v(token | image, text before it)`` under a model that sees the image.
        ref_logprobs: ``[B, T]`` float, ``log P_r(token | text before it)`` under the text-only reference, or the
            log-probabilities of the trained model itself, detached.
        mask: ``[B, T]`` bool, True on loss-generating tokens; values elsewhere are ignored.
        alpha: exponent, >= 0. Default: ``1.0``.
        normalization: as in :func:`.importance_weights`.
        floor: share of next-token prediction that is mixed in, in [0, 1). Default: ``0.1``.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False. Where the weights of a sequence sum to 0, they are 1.

    Raises:
        ValueError: for alpha < 0, floor outside [0, 1), an unknown normalization, tensors of different shapes, or
            log-probabilities that are NaN or positive.
    """
    check_arguments(alpha, normalization, floor)
    check_logprobs(viewer_logprobs, mask, "viewer_logprobs")
    check_logprobs(ref_logprobs, mask)
    return normalize(raw_weights(viewer_logprobs, ref_logprobs, mask, alpha, floor), mask, normalization)


def raw_weights(viewer_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, alpha: float, floor: float) -> Tensor:
    """Return weights before normalization, ``[B, T]`` float32, 0 where ``mask`` is False."""
    viewer, reference = viewer_logprobs.float(), ref_logprobs.float()
    # log of P_r / max(P_r, P_v); not a difference of maxima, which is NaN where both are -inf
    ratio = torch.where(viewer > reference, reference - viewer, 0.0)
    return prior_weights(ratio, mask, alpha, floor)
