"""Random weights with the distribution of PRIOR's, as a Composer algorithm."""

from itertools import chain

from composer.core import State
from composer.utils import dist
from torch import Tensor

from composer_prior.algorithms.permuted_prior.permuted_prior import PermutedPRIOR
from composer_prior.algorithms.prior.prior import PRIOR
from composer_prior.algorithms.random_prior.weights import drawn
from composer_prior.algorithms.token_weighting.noise import noise_of


class RandomPRIOR(PermutedPRIOR):
    """Give each token a weight drawn from PRIOR's weights of the whole global batch: what does mere noise do?

    Args:
        reference, alpha, normalization, floor, start, end, shard_reference, reference_dtype: see :class:`.PRIOR`.
        streams: those that stay unweighted, each with None, see :class:`.TokenWeighting`. Default: ``None``.
        seed: of the draws. Default: ``0``.

    Raises:
        ValueError: as :class:`.PRIOR`; also for a batch without ``sample_id``.
    """

    name = "random_prior"
    by_stream = ()  # the pool is of one setting
    _pool: Tensor

    def begin_batch(self, state: State, mask: Tensor) -> None:
        super().begin_batch(state, mask)
        weights = PRIOR.raw_weights(self, state, mask)[self.weighted(state, mask)]
        # Sorted, the pool is the same however the samples were shared by the ranks.
        everywhere = chain.from_iterable(dist.all_gather_object(weights.tolist()))
        self._pool = weights.new_tensor(list(everywhere)).sort().values

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        return drawn(self._pool.to(mask.device), mask, noise_of(state, mask, self.seed, "RandomPRIOR"))
