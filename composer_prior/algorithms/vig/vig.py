"""VIG as a Composer algorithm."""

from typing import Literal

from composer.core import State, Time
from composer.utils import dist
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.token_weighting.token_weighting import Streams
from composer_prior.algorithms.token_weighting.viewer_weighting import ViewerWeighting
from composer_prior.algorithms.vig.weights import check_arguments, raw_weights
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.reference import Dtype, ReferenceLM
from composer_prior.models.viewer import Viewer


class VIG(ViewerWeighting):
    """Train on the captions and tokens with the highest visual information gain (`arXiv 2602.17186`_).

    The gain of a token is ``log P_v - log P_r``, that of a caption the mean over its tokens. A token is kept where both
    reach one threshold.

    Logged beside the rest: ``vig/viewer_nll`` and ``vig/reference_nll`` (nats per token).

    Args:
        viewer, reference: see :class:`.ViewerWeighting`.
        share: of the captions that are kept, in (0, 1]; the threshold is the lowest mean gain among those of the global
            batch. Default: ``0.7``, the paper's.
        threshold: in nats, in the place of the share; the paper's is that of the whole data. Default: ``None``.
        normalization: ``"batch"`` (the loss is the mean over the tokens that are kept) or ``"none"``.
            Default: ``"batch"``.
        start, end, shard_reference, reference_dtype: see :class:`.ReferenceWeighting`.
        streams: those that stay unweighted, each with None, see :class:`.TokenWeighting`. Default: ``None``.

    Raises:
        ValueError: as :class:`.ViewerWeighting`; also for a share outside (0, 1] and another normalization.

    .. _arXiv 2602.17186: https://arxiv.org/abs/2602.17186
    """

    name = "vig"

    def __init__(
        self,
        viewer: Viewer | ImageTextModel | str | None = None,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        share: float = 0.7,
        threshold: float | None = None,
        normalization: Literal["batch", "none"] = "batch",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        shard_reference: bool = False,
        reference_dtype: Dtype | None = None,
        streams: Streams | None = None,
    ):
        check_arguments(share, normalization)
        super().__init__(viewer, reference, normalization, start, end, shard_reference, reference_dtype, streams)
        self.share, self.threshold = share, threshold

    def begin_batch(self, state: State, mask: Tensor) -> None:
        super().begin_batch(state, mask)
        scores = (state.batch["viewer_logprobs"], state.batch["ref_logprobs"])
        kept = raw_weights(*scores, self.weighted(state, mask), self.share, self.threshold, dist.all_gather_object)
        state.batch = {**state.batch, "selected": kept}

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        return state.batch["selected"]
