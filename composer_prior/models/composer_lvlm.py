"""The LVLM as Composer trains it."""

from collections.abc import Mapping
from typing import Any, Literal

from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models.head import weighted_mean
from composer_prior.models.lvlm import LVLM
from composer_prior.models.metrics import TokenMetric, caption_metrics


class ComposerLVLM(ComposerModel):
    """An :class:`.LVLM` with loss and metrics. The loss honours ``token_weights`` in the batch.

    Args:
        model: the model, also usable without Composer.
        image_related_metrics: report image-related and other tokens apart; the batch then has ``image_related``
            (``[B, T]`` bool). Default: ``False``.
    """

    honours_token_weights = True

    def __init__(self, model: LVLM, image_related_metrics: bool = False):
        super().__init__()
        self.model = model
        self.image_related_metrics = image_related_metrics

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def image_token_ids(self) -> tuple[int, int]:
        """Ids that stand for the image in ``input_ids``; a text-only reference drops them."""
        return self.model.image_token_id, self.model.row_token_id

    @property
    def image_processor(self) -> Any:
        """What turns an image into the model's input; None without a vision tower."""
        return None if self.model.vision is None else self.model.vision.image_processor

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.model(batch)

    def loss(
        self,
        outputs: Mapping[str, Tensor],
        batch: Any,
        *args: Any,
        reduction: Literal["mean", "none"] = "mean",
        **kwargs: Any,
    ) -> Tensor:
        """Mean over the loss-generating tokens of weight times negative log-likelihood.

        Args:
            outputs: those of ``forward``.
            batch: a dict of tensors, or a pair whose second is ``labels``.
            reduction: ``"none"`` gives the mean over the tokens of each sample, ``[B]``.
        """
        labels, weights = (
            (batch[1], None) if isinstance(batch, tuple) else (batch["labels"], batch.get("token_weights"))
        )
        nll = outputs.get("smoothed_nll", outputs["nll"])
        if reduction == "none":
            return nll.sum(1) / (labels != IGNORE_INDEX).sum(1).clamp(min=1)
        return weighted_mean(nll, weights, labels)

    def eval_forward(self, batch: Mapping[str, Tensor], outputs: Any = None) -> dict[str, Tensor]:
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return dict(caption_metrics(self.image_related_metrics))

    def update_metric(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor], metric: Metric) -> None:
        assert isinstance(metric, TokenMetric)
        metric.update(batch, outputs)
