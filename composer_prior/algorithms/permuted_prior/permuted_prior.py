"""PRIOR with permuted weights, as a Composer algorithm."""

from typing import Any

from composer.core import State
from torch import Tensor

from composer_prior.algorithms.permuted_prior.weights import permuted
from composer_prior.algorithms.prior.prior import PRIOR
from composer_prior.algorithms.token_weighting.noise import noise_of


class PermutedPRIOR(PRIOR):
    """Give each caption PRIOR's weights in a random order, new in each step: is it the tokens, or only the spread?

    Args:
        reference, alpha, normalization, floor, start, end, shard_reference, reference_dtype, streams: see
            :class:`.PRIOR`.
        seed: of the order. Default: ``0``.

    Raises:
        ValueError: as :class:`.PRIOR`; also for a batch without ``sample_id``.
    """

    name = "permuted_prior"

    def __init__(self, *arguments: Any, seed: int = 0, **prior: Any):
        super().__init__(*arguments, **prior)
        self.seed = seed

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        weights = super().raw_weights(state, mask)
        return permuted(weights, mask, noise_of(state, mask, self.seed, "PermutedPRIOR"))
