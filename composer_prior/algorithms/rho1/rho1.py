"""Rho-1 as a Composer algorithm."""

from typing import Literal

from composer.core import State, Time
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.rho1.weights import check_share, selection_weights
from composer_prior.algorithms.token_weighting.reference_weighting import ReferenceWeighting
from composer_prior.algorithms.token_weighting.token_weighting import Streams
from composer_prior.models.reference import Dtype, ReferenceLM


class Rho1(ReferenceWeighting):
    """Train on the tokens of each caption with the highest excess loss over the reference (arXiv 2404.07965).

    The paper selects among the tokens of a batch. Here each caption keeps its share, so that the selection does not
    depend on how the batch is cut into microbatches and ranks.

    Args:
        share: of a caption's tokens that are kept, in (0, 1]. Default: ``0.6``, the paper's.
        normalization: ``"sequence"`` (the loss is the mean over the tokens that are kept) or ``"none"``.
            Default: ``"sequence"``.
        reference, start, end, shard_reference, reference_dtype: see :class:`.ReferenceWeighting`.
        streams: those that stay unweighted, each with None, see :class:`.TokenWeighting`. Default: ``None``.

    Raises:
        ValueError: as :class:`.ReferenceWeighting`; also for a share outside (0, 1].
    """

    name = "rho1"

    def __init__(
        self,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        share: float = 0.6,
        normalization: Literal["sequence", "none"] = "sequence",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        shard_reference: bool = False,
        reference_dtype: Dtype | None = None,
        streams: Streams | None = None,
    ):
        check_share(share)
        super().__init__(reference, normalization, start, end, shard_reference, reference_dtype, streams)
        self.share = share

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        return selection_weights(self.nll(state), self.ref_logprobs(state, mask), mask, self.share)
