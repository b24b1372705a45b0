"""DPA's weights as a pure function of tensors (arXiv 2509.14735)."""

from torch import Tensor

from composer_prior.algorithms.cal.weights import check_arguments, raw_weights
from composer_prior.algorithms.token_weighting.normalize import Normalization, normalize


def added_probability_weights(
    difference: Tensor, mask: Tensor, window: int = 3, normalization: Normalization = "sequence"
) -> Tensor:
    """Compute weights from the probability of each label with the image minus that without it, kept in [0, 1].

    Args:
        difference: ``[B, T]`` float.
        mask: ``[B, T]`` bool, True on loss-generating tokens.
        window: odd number of neighbouring loss-generating tokens, including the token, for the mean. The paper's is 3.
        normalization: see :func:`.normalize`.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is False. Where the weights of a sequence sum to 0, normalized ones are 1.
    """
    check_arguments(1.0, 1.0, window)
    return normalize(raw_weights(difference, mask, 0.0, 1.0, window), mask, normalization)
