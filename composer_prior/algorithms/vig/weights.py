"""VIG's selection of samples and tokens as pure functions of tensors (arXiv 2602.17186)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from composer_prior.algorithms.rho1.weights import check_share
from composer_prior.algorithms.token_weighting.normalize import Normalization, check_logprobs, normalize


def vig_weights(
    viewer_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    share: float = 0.7,
    threshold: float | None = None,
    normalization: Normalization = "batch",
) -> Tensor:
    """Return weights of the tokens whose gain reaches a threshold, in the captions whose mean gain reaches it.

    The gain of a token is ``log P_v - log P_r``.

    Args:
        viewer_logprobs: ``[B, T]`` float, ``log P_v(token | image, text before it)`` under a model that sees the image.
        ref_logprobs: ``[B, T]`` float, ``log P_r(token | text before it)`` without the image.
        mask: ``[B, T]`` bool, True on loss-generating tokens; values elsewhere are ignored.
        share: of the captions that are kept, in (0, 1], which gives the threshold. Default: ``0.7``, the paper's.
        threshold: in nats, in the place of the share. Default: ``None``.
        normalization: ``"batch"`` or ``"none"``, as in :func:`.importance_weights`. Default: ``"batch"``.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False.

    Raises:
        ValueError: for a share outside (0, 1], another normalization, tensors of different shapes, or log-probabilities
            that are NaN or positive.
    """
    check_arguments(share, normalization)
    check_logprobs(viewer_logprobs, mask, "viewer_logprobs")
    check_logprobs(ref_logprobs, mask)
    return normalize(raw_weights(viewer_logprobs, ref_logprobs, mask, share, threshold), mask, normalization)


def raw_weights(
    viewer_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    share: float,
    threshold: float | None,
    gather: Callable[[Tensor], list[Tensor]] = lambda part: [part],
) -> Tensor:
    """Return weights before normalization, ``[B, T]`` float32; ``gather`` collects the captions' gains of all ranks."""
    viewer, reference = viewer_logprobs.float(), ref_logprobs.float()
    gains = torch.where(mask & (viewer != reference), viewer - reference, 0.0)  # not -inf less -inf
    means = gains.sum(1, dtype=torch.float64) / mask.sum(1).clamp(min=1)
    if threshold is None:
        ranked = torch.cat(gather(means[mask.any(1)].cpu())).sort(descending=True).values
        kept = math.ceil(len(ranked) * share - 1e-9)  # 0.7 * 10 is 7, not 8
        threshold = float(ranked[kept - 1]) if kept else 0.0
    return (mask & (gains >= threshold) & (means >= threshold)[:, None]).float()


def check_arguments(share: float, normalization: str) -> None:
    """Raise a ValueError for a share outside (0, 1], or a normalization that would give weight to captions left out."""
    check_share(share)
    if normalization not in ("batch", "none"):
        raise ValueError(f"normalization={normalization!r}: VIG leaves captions out; expected 'batch' or 'none'.")
