"""The mathematics of PRIOR as pure functions of tensors (arXiv 2505.08971, section 3)."""

import torch
from torch import Tensor

from composer_prior.algorithms.token_weighting.normalize import (
    Normalization,
    check_floor,
    check_logprobs,
    check_normalization,
    mix_in,
    normalize,
)


def importance_weights(
    ref_logprobs: Tensor,
    mask: Tensor,
    alpha: float = 1.0,
    normalization: Normalization = "sequence",
    floor: float = 0.0,
) -> Tensor:
    """Return weights ``(1 - P_r)^alpha`` of caption tokens, normalized to a mean of 1.

    Args:
        ref_logprobs: ``[B, T]`` float, ``log P_r(token | text before it)`` under the text-only reference;
            values where ``mask`` is False are ignored.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        alpha: exponent, >= 0. The paper's is 1; 0 gives weights of exactly 1.
        normalization: ``"sequence"``: the weights of each row sum to its number of tokens (the paper);
            ``"batch"``: those of all rows together do; ``"none"``: the weights stay as they are.
        floor: ``f`` in [0, 1) mixes next-token prediction back in, ``w <- f + (1 - f) w`` before normalization.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False. Where every token is certain, so that the weights sum to 0,
        a normalized weight is 1.

    Raises:
        ValueError: for alpha < 0, floor outside [0, 1), an unknown normalization, tensors of different shapes, or
            log-probabilities that are NaN or positive.
    """
    check_arguments(alpha, normalization, floor)
    check_logprobs(ref_logprobs, mask)
    return normalize(raw_weights(ref_logprobs, mask, alpha, floor), mask, normalization)


def raw_weights(ref_logprobs: Tensor, mask: Tensor, alpha: float, floor: float) -> Tensor:
    """Return weights before normalization, ``[B, T]`` float32, 0 where ``mask`` is False."""
    # -expm1(x) is 1 - exp(x), and stays exact as P goes to 1; clamping turns -0.0 into 0.
    weights = (-torch.expm1(ref_logprobs.float())).clamp(min=0.0).pow(alpha)
    return torch.where(mask, mix_in(weights, floor), 0.0)


def check_arguments(alpha: float = 1.0, normalization: str = "sequence", floor: float = 0.0) -> None:
    """Raise a ValueError for an impossible alpha, normalization or floor."""
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}: the exponent of (1 - P_r) must be 0 or more; the paper uses 1.")
    check_floor(floor)
    check_normalization(normalization)
