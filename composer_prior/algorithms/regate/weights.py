"""ReGATE's selection of tokens as pure functions of tensors (arXiv 2507.21420)."""

from torch import Tensor

from composer_prior.algorithms.rho1.weights import highest


def difficulty_weights(
    difficulty: Tensor, ref_logprobs: Tensor, mask: Tensor, share: float = 0.5, reference_weight: float = 0.5
) -> Tensor:
    """Return 1 on the share of each caption's tokens that are hardest, the first of equal ones, and 0 on others.

    Args:
        difficulty: ``[B, T]`` float, moving average of ``-log P(token)`` under the model that is trained.
        ref_logprobs: ``[B, T]`` float, ``log P_r(token)`` under the reference.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        share: of a caption's tokens that are kept, in (0, 1]; rounded up. Default: ``0.5``, the paper's.
        reference_weight: factor of the reference's loss beside the difficulty, >= 0. Default: ``0.5``, the paper's.

    Returns:
        ``[B, T]`` float32 without gradient, 0 where ``mask`` is False.
    """
    return highest(difficulty.detach().float() - reference_weight * ref_logprobs.float(), mask, share)


def averaged(loss: Tensor, before: Tensor | None, decay: float) -> Tensor:
    """Return the moving average of a caption's losses ``[k]``: ``decay * before + (1 - decay) * loss``.

    It starts at the first loss, and again for a caption of another length.
    """
    return loss if before is None or len(before) != len(loss) else decay * before + (1 - decay) * loss
