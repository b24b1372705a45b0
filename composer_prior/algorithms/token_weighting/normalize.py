"""Weights of tokens as pure functions of tensors; imports torch and nothing else."""

from typing import Literal, get_args

import torch
from torch import Tensor

Normalization = Literal["sequence", "batch", "none"]


def normalize(weights: Tensor, mask: Tensor, normalization: Normalization = "sequence") -> Tensor:
    """Scale weights to a mean of 1: over the tokens of each sequence, or of all sequences.

    Args:
        weights: ``[B, T]``, 0 or more, and 0 where ``mask`` is False.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        normalization: ``"sequence"``: the weights of each row sum to its number of tokens; ``"batch"``: those of all
            rows together do; ``"none"``: the weights stay as they are.

    Returns:
        ``[B, T]``, 0 where ``mask`` is False. Where the weights sum to 0, they become 1.
    """
    if normalization == "none":
        return weights
    dim = (1,) if normalization == "sequence" else (0, 1)
    return normalize_by(weights, mask, weights.sum(dim, keepdim=True), mask.sum(dim, keepdim=True))


def normalize_by(weights: Tensor, mask: Tensor, weight_sum: Tensor, token_count: Tensor) -> Tensor:
    """Return ``token_count * weights / weight_sum``, 1 where the sum is 0, 0 where ``mask`` is False; broadcasts."""
    # The product comes first: k * 1 / k is exactly 1, and tiny sums do not overflow.
    normalized = token_count * weights / torch.where(weight_sum > 0, weight_sum, 1.0)
    return torch.where(mask, torch.where(weight_sum > 0, normalized, 1.0), 0.0)


def sums_of_part(weights: Tensor, mask: Tensor) -> Tensor:
    """Return ``[2]`` float64: the sum of the weights of a part of a batch, and its tokens. Add those of all parts."""
    return torch.stack([weights.sum(dtype=torch.float64), mask.sum()])


def normalize_part(weights: Tensor, mask: Tensor, normalization: Normalization, sums: Tensor | None) -> Tensor:
    """Normalize a microbatch as :func:`normalize` does the whole batch.

    Args:
        weights: see :func:`normalize`.
        mask: see :func:`normalize`.
        normalization: see :func:`normalize`.
        sums: ``[2]``, the sums of :func:`sums_of_part` over all parts; None for a single part.
    """
    if normalization != "batch" or sums is None:
        return normalize(weights, mask, normalization)
    return normalize_by(weights.double(), mask, sums[0], sums[1]).float()


def mix_in(weights: Tensor, floor: float) -> Tensor:
    """Return weights with a share of next-token prediction: ``floor + (1 - floor) * weights``."""
    # w + f (1 - w) is the same, and exactly 1 when w is 1.
    return weights + floor * (1.0 - weights)


def check_normalization(normalization: str) -> None:
    """Raise a ValueError for an unknown normalization."""
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization={normalization!r}: expected one of {', '.join(get_args(Normalization))}.")


def check_floor(floor: float) -> None:
    """Raise a ValueError for a floor outside [0, 1)."""
    if not 0 <= floor < 1:
        raise ValueError(f"floor={floor}: the share of next-token prediction must be in [0, 1).")


def check_logprobs(logprobs: Tensor, mask: Tensor, name: str = "ref_logprobs") -> None:
    """Raise a ValueError unless every masked value can be a log-probability (synchronizes an accelerator)."""
    if logprobs.shape != mask.shape:
        raise ValueError(
            f"{name} {tuple(logprobs.shape)} and the mask of loss-generating tokens {tuple(mask.shape)} "
            "differ in shape; both must be aligned with labels, [B, T]."
        )
    bad = mask & ~(logprobs <= 0)  # not (x <= 0) is true of NaN too
    if bad.any():
        row, position = (int(i) for i in bad.nonzero()[0])
        whose = "reference" if name == "ref_logprobs" else name.partition("_")[0]
        raise ValueError(
            f"{int(bad.sum())} {whose} log-probabilities are NaN or positive, the first at row {row}, position "
            f"{position} ({float(logprobs[row, position])}): check the {whose} model or its stored scores."
        )
