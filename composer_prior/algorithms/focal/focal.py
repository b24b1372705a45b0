"""The focal loss as a Composer algorithm."""

from typing import Literal

from composer.core import State, Time
from torch import Tensor

from composer_prior.algorithms.focal.weights import focal_weights
from composer_prior.algorithms.token_weighting.token_weighting import Streams, TokenWeighting


class Focal(TokenWeighting):
    """Weight the loss of each caption token by ``(1 - P)^gamma``, ``P`` the model's own (arXiv 1708.02002).

    It needs no reference: it finds what is hard for the model with the image, not what is hard without it.

    Args:
        gamma: exponent, >= 0. Default: ``2.0``, the paper's.
        normalization: ``"none"``, the paper's, or ``"sequence"``. Default: ``"none"``.
        start, end: see :class:`.TokenWeighting`.
        streams: those that stay unweighted, each with None, see :class:`.TokenWeighting`. Default: ``None``.

    Raises:
        ValueError: as :class:`.TokenWeighting`; also for a negative gamma.
    """

    name = "focal"

    def __init__(
        self,
        gamma: float = 2.0,
        normalization: Literal["sequence", "none"] = "none",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        streams: Streams | None = None,
    ):
        if not gamma >= 0:
            raise ValueError(f"gamma={gamma}: the exponent of (1 - P) must be 0 or more; the paper uses 2.")
        super().__init__(normalization, start, end, streams)
        self.gamma = gamma

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        return focal_weights(self.nll(state), mask, self.gamma)
