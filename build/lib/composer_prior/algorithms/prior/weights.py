"""The mathematics of PRIOR as pure functions of tensors (arXiv 2505.08971, section 3)."""

from typing import Literal, get_args

import torch
from torch import Tensor

Normalization = Literal["sequence", "batch", "none"]


def importance_weights(
    ref_logprobs: Tensor,
    mask: Tensor,
    alpha: float = 1.0,
    normalization: Normalization = "sequence",
    floor: float = 0.0,
) -> Tensor:
    """Weights ``(1 - P_r)^alpha`` of caption tokens, normalized to a mean of 1.

    Args:
        ref_logprobs: ``[B, T]`` float, ``log P_r(token | text before it)`` under the text-only reference;
            what stands where ``mask`` is False does not matter.
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
    weights = raw_weights(ref_logprobs, mask, alpha, floor)
    if normalization == "none":
        return weights
    dim = (1,) if normalization == "sequence" else (0, 1)
    return normalize(weights, mask, weights.sum(dim, keepdim=True), mask.sum(dim, keepdim=True))


def raw_weights(ref_logprobs: Tensor, mask: Tensor, alpha: float, floor: float) -> Tensor:
    """Weights before normalization, ``[B, T]`` float32, 0 where ``mask`` is False."""
    # -expm1(x) is 1 - exp(x), and stays exact as P goes to 1; clamping turns -0.0 into 0.
    weights = (-torch.expm1(ref_logprobs.float())).clamp(min=0.0).pow(alpha)
    # w + f (1 - w) is f + (1 - f) w, and exactly 1 when w is 1.
    weights = weights + floor * (1.0 - weights)
    return torch.where(mask, weights, 0.0)


def normalize(weights: Tensor, mask: Tensor, weight_sum: Tensor, token_count: Tensor) -> Tensor:
    """``token_count * weights / weight_sum``, and 1 where the sum is 0. Broadcasts; 0 where ``mask`` is False."""
    # The product comes first: k * 1 / k is exactly 1, and tiny sums do not overflow.
    normalized = token_count * weights / torch.where(weight_sum > 0, weight_sum, 1.0)
    return torch.where(mask, torch.where(weight_sum > 0, normalized, 1.0), 0.0)


def check_arguments(alpha: float, normalization: str, floor: float) -> None:
    """Raise a ValueError for an impossible alpha, normalization or floor."""
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}: the exponent of (1 - P_r) must be 0 or more; the paper uses 1.")
    if not 0 <= floor < 1:
        raise ValueError(f"floor={floor}: the share of next-token prediction must be in [0, 1); the paper uses 0.")
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization={normalization!r}: expected one of {', '.join(get_args(Normalization))}.")


def check_logprobs(ref_logprobs: Tensor, mask: Tensor) -> None:
    """Raise a ValueError unless every masked value can be a log-probability (synchronizes an accelerator)."""
    if ref_logprobs.shape != mask.shape:
        raise ValueError(
            f"ref_logprobs {tuple(ref_logprobs.shape)} and the mask of loss-generating tokens {tuple(mask.shape)} "
            "differ in shape; both must be aligned with labels, [B, T]."
        )
    bad = mask & ~(ref_logprobs <= 0)  # not (x <= 0) is true of NaN too
    if bad.any():
        row, position = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{int(bad.sum())} reference log-probabilities are NaN or positive, the first at row {row}, position "
            f"{position} ({float(ref_logprobs[row, position])}): check the reference model or its stored scores."
        )
