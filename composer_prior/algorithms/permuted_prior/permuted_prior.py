"""PRIOR with permuted weights, as a Composer algorithm."""

from composer.core import State, Time
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.permuted_prior.weights import permuted
from composer_prior.algorithms.prior.prior import PRIOR
from composer_prior.algorithms.token_weighting.noise import noise_of
from composer_prior.algorithms.token_weighting.normalize import Normalization
from composer_prior.models.reference import ReferenceLM


class PermutedPRIOR(PRIOR):
    """Give each caption PRIOR's weights in a random order, new in each step: is it the tokens, or only the spread?

    Args:
        reference, alpha, normalization, floor, start, end, shard_reference: see :class:`.PRIOR`.
        seed: of the order. Default: ``0``.

    Raises:
        ValueError: as :class:`.PRIOR`; also for a batch without ``sample_id``.
    """

    name = "permuted_prior"

    def __init__(
        self,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        alpha: float = 1.0,
        normalization: Normalization = "sequence",
        floor: float = 0.0,
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        shard_reference: bool = False,
        seed: int = 0,
    ):
        super().__init__(reference, alpha, normalization, floor, start, end, shard_reference)
        self.seed = seed

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        weights = super().raw_weights(state, mask)
        return permuted(weights, mask, noise_of(state, mask, self.seed, "PermutedPRIOR"))
