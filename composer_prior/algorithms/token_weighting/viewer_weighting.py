"""Methods that compare a viewer, a model that sees the image, with a text-only reference."""

from typing import cast

import torch
from composer.core import Precision, State, Time, get_precision_context
from torch import Tensor
from transformers import PreTrainedModel

from composer_prior.algorithms.token_weighting.normalize import Normalization, check_logprobs
from composer_prior.algorithms.token_weighting.reference_weighting import ReferenceWeighting
from composer_prior.algorithms.token_weighting.token_weighting import Streams, unwrapped
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.reference import Dtype, ReferenceLM
from composer_prior.models.viewer import Viewer


class ViewerWeighting(ReferenceWeighting):
    """Weight tokens by their log-probability under a viewer, ``viewer_logprobs`` in the batch, and under a reference.

    Logged beside the rest: ``viewer_nll`` and ``reference_nll`` (nats per token).

    Args:
        viewer: an :class:`.ImageTextModel` or the path of one, which scores each batch and so needs the tokenizer,
            the image processor and the prompt of the trained model; or None, when the batch carries
            ``viewer_logprobs``. Default: ``None``.
        reference, normalization, start, end, shard_reference, reference_dtype, streams: see
            :class:`.ReferenceWeighting`.

    Raises:
        ValueError: as :class:`.ReferenceWeighting`; also for a batch with neither ``viewer_logprobs`` nor a viewer to
            compute them, and a viewer that reads images or text otherwise than the model.
    """

    needs_reference = True

    def __init__(
        self,
        viewer: Viewer | ImageTextModel | str | None = None,
        reference: ReferenceLM | PreTrainedModel | str | None = None,
        normalization: Normalization = "sequence",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        shard_reference: bool = False,
        reference_dtype: Dtype | None = None,
        streams: Streams | None = None,
    ):
        super().__init__(reference, normalization, start, end, shard_reference, reference_dtype, streams)
        self.viewer = None if viewer is None else Viewer.of(viewer)

    def prepare(self, state: State) -> None:
        super().prepare(state)
        if self.viewer is not None:
            self.viewer.check_inputs(unwrapped(state.model))

    def begin_batch(self, state: State, mask: Tensor) -> None:
        if self.needs_reference:
            super().begin_batch(state, mask)
        if "viewer_logprobs" not in state.batch:
            if self.viewer is None:
                name = type(self).__name__
                raise ValueError(
                    f"{name} found neither `viewer_logprobs` in the batch nor a viewer: give {name}(viewer=...) a "
                    "model that sees the images, or load stored scores of one."
                )
            self.viewer.to(cast(torch.device, state.device._device))
            with get_precision_context(state.precision or Precision.FP32, state.precision_config):
                viewer_logprobs = self.viewer.logprobs(state.batch)
            state.batch = {**state.batch, "viewer_logprobs": viewer_logprobs.clamp(max=0.0)}  # rounding exceeds 0
        check_logprobs(state.batch["viewer_logprobs"], self.weighted(state, mask), "viewer_logprobs")

    def sums(self, state: State, mask: Tensor) -> dict[str, Tensor]:
        found = {"viewer_nll": -state.batch["viewer_logprobs"].where(mask, 0).double().sum()}
        return found | (super().sums(state, mask) if self.needs_reference else {})
