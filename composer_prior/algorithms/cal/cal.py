"""CAL as a Composer algorithm."""

from typing import Any, Literal

import torch
from composer.core import Precision, State, Time, get_precision_context
from torch import Tensor

from composer_prior.algorithms.cal.weights import check_arguments, raw_weights
from composer_prior.algorithms.token_weighting.image_tokens import image_token_ids, text_positions
from composer_prior.algorithms.token_weighting.token_weighting import Streams, TokenWeighting, unwrapped
from composer_prior.models.composer_lvlm import ComposerLVLM


class CAL(TokenWeighting):
    """Weight the loss of each caption token by what the image adds to its logit (`arXiv 2405.17871`_).

    The model reads each microbatch twice: once without the image and without gradient, once as always. Without the
    image means the text alone, as a reference would read it: the image's positions are taken out.

    Logged beside the rest: ``cal/difference``, the mean of the differences before they are clamped.

    Args:
        low, high: the difference of the logits is clamped to these. Default: ``1.0`` and ``5.0``, the paper's.
        window: an odd number of neighbours that are averaged, the token included. Default: ``3``, the paper's.
        normalization: ``"sequence"`` or ``"none"``. Default: ``"sequence"``.
        start, end: see :class:`.TokenWeighting`.
        streams: those that stay unweighted, each with None, see :class:`.TokenWeighting`. Default: ``None``.

    Raises:
        ValueError: as :class:`.TokenWeighting`; also for impossible bounds, an even window, or a model of which the
            logits of the labels cannot be had.

    .. _arXiv 2405.17871: https://arxiv.org/abs/2405.17871
    """

    name = "cal"
    normalized = False  # True: without the image, log-probabilities are compared, not logits
    _without: Tensor
    _difference: Tensor

    def __init__(
        self,
        low: float = 1.0,
        high: float = 5.0,
        window: int = 3,
        normalization: Literal["sequence", "none"] = "sequence",
        start: str | Time = "0dur",
        end: str | Time = "1dur",
        streams: Streams | None = None,
    ):
        self.check(low, high, window)
        super().__init__(normalization, start, end, streams)
        self.low, self.high, self.window = low, high, window

    @staticmethod
    def check(low: float = 1.0, high: float = 5.0, window: int = 3) -> None:
        """Refuse impossible arguments without building anything."""
        check_arguments(low, high, window)

    def prepare(self, state: State) -> None:
        """Let the model return the logits of the labels.

        Raises:
            ValueError: for a model that is no :class:`.ComposerLVLM`.
        """
        model = unwrapped(state.model)
        if not isinstance(model, ComposerLVLM):
            raise ValueError(
                f"{type(self).__name__} needs the logits of the labels, which {type(model).__name__} does not give: "
                "wrap the model of transformers in ComposerLVLM(model, processor)."
            )
        image_token_ids(model)
        model.label_logits = not self.normalized

    @torch.no_grad()
    def before_forward(self, state: State) -> None:
        """Read the text of the microbatch without its images."""
        model: Any = unwrapped(state.model)
        batch = state.batch
        with get_precision_context(state.precision or Precision.FP32, state.precision_config):
            text = text_positions(batch, model)
            self._without = model.text_label_logits(batch["input_ids"], text, batch["labels"], self.normalized)

    def raw_weights(self, state: State, mask: Tensor) -> Tensor:
        """Return the weights, ``[B, T]`` float32."""
        outputs: Any = state.outputs
        difference = self.contrast(outputs, self._without).detach()
        self._difference = torch.where(mask & self._without.isfinite(), difference, 0.0)
        return raw_weights(self._difference, mask, self.low, self.high, self.window)

    def contrast(self, outputs: Any, without: Tensor) -> Tensor:
        """Return what the image adds to the score of each label, ``[B, T]``.

        Args:
            outputs: of the model beside the image.
            without: ``[B, T]`` what it gives each label without the image, see ``normalized``.
        """
        return outputs["label_logits"] - without

    def sums(self, state: State, mask: Tensor) -> dict[str, Tensor]:
        """Return the sum of the differences."""
        return {"difference": self._difference.where(mask, 0).double().sum()}
