"""Metrics over the loss-generating tokens of captions."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torchmetrics import MeanMetric

from composer_prior.data.batch import IGNORE_INDEX

Tokens = Literal["all", "image_related", "other"]


class TokenMetric(MeanMetric):
    """Mean over tokens of the negative log-likelihood (``loss``), its exponential (``perplexity``), or ``accuracy``.

    Args:
        value: what is averaged.
        tokens: over all loss-generating tokens, the ``image_related`` or the ``other`` ones of them.
    """

    def __init__(self, value: Literal["loss", "perplexity", "accuracy"], tokens: Tokens = "all", **kwargs: Any):
        super().__init__(**kwargs)
        self.value_name = value
        self.tokens = tokens

    def update(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        values = outputs["correct" if self.value_name == "accuracy" else "nll"]
        mask = token_mask(batch, self.tokens)
        super().update(values.float(), mask.float())

    def compute(self) -> Tensor:
        mean = super().compute()
        return mean.exp() if self.value_name == "perplexity" else mean


def token_mask(batch: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
    """``[B, T]`` bool: the loss-generating tokens that are counted."""
    mask = batch["labels"] != IGNORE_INDEX
    if tokens == "all":
        return mask
    image_related = batch["image_related"]
    return mask & (image_related if tokens == "image_related" else ~image_related)


def caption_metrics(image_related: bool) -> dict[str, TokenMetric]:
    """Loss, perplexity and accuracy, and loss and accuracy of image-related and other tokens where they are known."""
    metrics = {name: TokenMetric(name) for name in ("loss", "perplexity", "accuracy")}  # type: ignore[arg-type]
    if image_related:
        for tokens in ("image_related", "other"):
            for value in ("loss", "accuracy"):
                metrics[f"{value}_{tokens}"] = TokenMetric(value, tokens)  # type: ignore[arg-type]
    return metrics
