"""ImageGain as a Composer algorithm."""

from typing import Literal

from composer.core import State, Time
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.image_gain.weights import raw_weights
from composer_prior.algorithms.prior.weights import check_arguments
from composer_prior.algorithms.token_weighting.normalize import Normalization
from composer_prior.algorithms.token_weighting.token_weighting import Streams
from composer_prior.algorithms.token_weighting.viewer_weighting import ViewerWeighting
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.reference import Dtype, ReferenceLM
from composer_prior.models.viewer import Viewer


class ImageGain(ViewerWeighting):
    """Weight the loss of each caption token by ``floor + (1 - floor) (1 - P_r / max(P_r, P_v))^alpha``.

    ``P_v`` is the token's probability under a viewer, a model that sees the image, and ``P_r`` under PRIOR's text-only
    reference. A token that the image does not explain, such as a name, has the weight ``floor``. With ``P_v = 1`` the
    weights are PRIOR's.

    Logged beside the rest: ``image_gain/viewer_nll`` and ``image_gain/reference_nll`` (nats per token).

    Args:
        viewer, reference: see :class:`.ViewerWeighting`.
        over: ``"reference"``; or ``"model"``: in the place of ``P_r`` stands the probability that the trained model
            itself gives the token, detached, so that a learned token has the weight ``floor``. It needs no
            reference. Default: ``"reference"``.
        alpha: exponent, >= 0. Default: ``1.0``.
        normalization: ``"sequence"``, ``"batch"`` (the global batch) or ``"none"``. Default: ``"sequence"``.
        floor: share of next-token prediction mixed in, in [0, 1). Default: ``0.1``.
        start, end, shard_reference, reference_dtype: see :class:`.ReferenceWeighting`.
        streams: ``alpha`` and ``floor`` by stream, see :class:`.PRIOR`. Default: ``None``.

    Raises:
        ValueError: as :class:`.ViewerWeighting`; also for ``over="model"`` with a reference or with
            ``normalization="batch"``.
    """

    name = "image_gain"
    by_stream = ("alpha", "floor")
    check = staticmethod(check_arguments)

    def __init__(
        self,
        viewer: Viewer | ImageTextModel | str | None = None,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        over: Literal["reference", "model"] = "reference",
        alpha: float = 1.0,
        normalization: Normalization = "sequence",
        floor: float = 0.1,
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        shard_reference: bool = False,
        reference_dtype: Dtype | None = None,
        streams: Streams | None = None,
    ):
        check_arguments(alpha, normalization, floor)
        if over not in ("reference", "model"):
            raise ValueError(f"over={over!r}: expected 'reference' or 'model'.")
        if over == "model" and reference is not None:
            raise ValueError("over='model' compares with the trained model itself: leave the reference out.")
        if over == "model" and normalization == "batch":
            raise ValueError("normalization='batch' needs weights before the forward pass; over='model' has none.")
        super().__init__(viewer, reference, normalization, start, end, shard_reference, reference_dtype, streams)
        self.needs_reference = over == "reference"
        self.alpha, self.floor = alpha, floor

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        theirs = self.ref_logprobs(state, mask) if self.needs_reference else -self.nll(state).detach()
        return raw_weights(state.batch["viewer_logprobs"], theirs, mask, self.alpha, self.floor)
