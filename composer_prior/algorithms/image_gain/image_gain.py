"""ImageGain as a Composer algorithm."""

from typing import Literal, cast

import torch
from composer.core import Precision, State, Time, get_precision_context
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.image_gain.weights import raw_weights
from composer_prior.algorithms.prior.weights import check_arguments
from composer_prior.algorithms.token_weighting.normalize import Normalization, check_logprobs
from composer_prior.algorithms.token_weighting.reference_weighting import ReferenceWeighting
from composer_prior.algorithms.token_weighting.token_weighting import unwrapped
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.reference import Dtype, ReferenceLM
from composer_prior.models.viewer import Viewer


class ImageGain(ReferenceWeighting):
    """Weight the loss of each caption token by ``floor + (1 - floor) (1 - P_r / max(P_r, P_v))^alpha``.

    ``P_v`` is the token's probability under a viewer, a model that sees the image, and ``P_r`` under PRIOR's text-only
    reference. A token that the image does not explain, such as a name, has the weight ``floor``. With ``P_v = 1`` the
    weights are PRIOR's.

    Logged beside the rest: ``image_gain/viewer_nll`` and ``image_gain/reference_nll`` (nats per token).

    Args:
        viewer: an :class:`.ImageTextModel` or the path of one, which scores each batch and so needs the tokenizer and
            the image processor of the trained model; or None, when the batch carries ``viewer_logprobs``.
            Default: ``None``.
        reference: as for :class:`.PRIOR`. Default: ``None``.
        over: ``"reference"``; or ``"model"``: in the place of ``P_r`` stands the probability that the trained model
            itself gives the token, detached, so that a learned token has the weight ``floor``. It needs no
            reference. Default: ``"reference"``.
        alpha: exponent, >= 0. Default: ``1.0``.
        normalization: ``"sequence"``, ``"batch"`` (the global batch) or ``"none"``. Default: ``"sequence"``.
        floor: share of next-token prediction mixed in, in [0, 1). Default: ``0.1``.
        start, end, shard_reference, reference_dtype: see :class:`.ReferenceWeighting`.

    Raises:
        ValueError: as :class:`.ReferenceWeighting`; also for a batch with neither ``viewer_logprobs`` nor a viewer to
            compute them, a viewer that reads images or text otherwise than the model, and ``over="model"`` with a
            reference or with ``normalization="batch"``.
    """

    name = "image_gain"

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
    ):
        check_arguments(alpha, normalization, floor)
        if over not in ("reference", "model"):
            raise ValueError(f"over={over!r}: expected 'reference' or 'model'.")
        if over == "model" and reference is not None:
            raise ValueError("over='model' compares with the trained model itself: leave the reference out.")
        if over == "model" and normalization == "batch":
            raise ValueError("normalization='batch' needs weights before the forward pass; over='model' has none.")
        super().__init__(reference, normalization, start, end, shard_reference, reference_dtype)
        self.viewer = None if viewer is None else Viewer.of(viewer)
        self.over, self.alpha, self.floor = over, alpha, floor

    def prepare(self, state: State) -> None:
        super().prepare(state)
        if self.viewer is not None:
            self.viewer.check_inputs(unwrapped(state.model))

    def begin_batch(self, state: State, mask: Tensor) -> None:
        if self.over == "reference":
            super().begin_batch(state, mask)
        if "viewer_logprobs" not in state.batch:
            if self.viewer is None:
                raise ValueError(
                    "ImageGain found neither `viewer_logprobs` in the batch nor a viewer: give ImageGain(viewer=...) a "
                    "model that sees the images, or load stored scores of one."
                )
            self.viewer.to(cast(torch.device, state.device._device))
            with get_precision_context(state.precision or Precision.FP32, state.precision_config):
                viewer_logprobs = self.viewer.logprobs(state.batch)
            state.batch = {**state.batch, "viewer_logprobs": viewer_logprobs.clamp(max=0.0)}  # rounding exceeds 0
        check_logprobs(state.batch["viewer_logprobs"], mask, "viewer_logprobs")

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        theirs = self.ref_logprobs(state, mask) if self.over == "reference" else -self.nll(state).detach()
        return raw_weights(state.batch["viewer_logprobs"], theirs, mask, self.alpha, self.floor)

    def sums(self, state: State, mask: Tensor) -> dict[str, Tensor]:
        found = {"viewer_nll": -state.batch["viewer_logprobs"][mask].double().sum()}
        return found | (super().sums(state, mask) if self.over == "reference" else {})
