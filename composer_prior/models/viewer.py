"""The viewer: a frozen model that sees the image, whose probabilities say what the image explains."""

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from composer_prior.data.batch import ROW, split_packed_images
from composer_prior.data.tokenizer import tokenizer_fingerprint
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.prior_lvlm import PriorLVLMProcessor

_OF_FILES = ("auto_map", "processor_class", "image_processor_type")  # of a saved processor alone


class Viewer:
    """A frozen image-text-to-text model that scores the captions of a batch beside their images.

    It reads the batch as it was made for the trained model, so both need one tokenizer, image processor and prompt.

    Args:
        model: with its processor; put in eval mode, its gradients switched off.
        batch_size: samples per forward pass. Default: ``64``.
    """

    def __init__(self, model: ImageTextModel, batch_size: int = 64):
        self.model = ComposerLVLM(model.model.eval().requires_grad_(False), model.processor).eval()
        self.batch_size = batch_size

    @classmethod
    def of(cls, model: "Viewer | ImageTextModel | str") -> "Viewer":
        """Return a viewer as it is, one around a model, or one of a model's folder or hub id."""
        if isinstance(model, str):
            model = ImageTextModel.from_pretrained(model)
        return model if isinstance(model, cls) else cls(cast(ImageTextModel, model))

    def to(self, device: torch.device) -> "Viewer":
        """Move the model's weights."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def logprobs(self, batch: Mapping[str, Any]) -> Tensor:
        """Return ``log P_v(labels[t] | image, text before t)``, ``[B, T]`` float32, 0 where there is no label.

        Args:
            batch: of the trained model, with ``labels`` ``[B, T]``, whose device the result has.
        """
        given = {key: value for key, value in batch.items() if isinstance(value, Tensor) and key != ROW}
        device, scores = self.model.model.device, []
        for part in split_packed_images(given, self.batch_size):
            moved = {key: value.to(device) for key, value in part.items()}
            scores.append(-self.model(moved)["nll"].float())
        return torch.cat(scores).to(batch["labels"].device)

    def check_inputs(self, model: Any) -> None:
        """Refuse a trained model, a :class:`.ComposerLVLM`, as :func:`check_processors` does."""
        check_processors(self.model.processor, getattr(model, "processor", None))


def check_processors(viewers: Any, models: Any) -> None:
    """Refuse a trained model that reads images, prompt or text otherwise than the viewer.

    Args:
        viewers: processor of the viewer.
        models: processor of the trained model.

    Raises:
        ValueError: naming what differs.
    """
    for name in ("kind of processor", "tokenizer", "image_processor", "prompt"):
        if _settings(viewers, name) != _settings(models, name):
            raise ValueError(
                f"The viewer has another {name} than the model: it cannot read the model's batches. Store its "
                "log-probabilities first: composer-prior score ... viewer=MODEL."
            )


def _settings(processor: Any, name: str) -> Any:
    if name == "kind of processor":
        return isinstance(processor, PriorLVLMProcessor)
    part: Any = getattr(processor, name, "" if name == "prompt" else None)
    if name == "tokenizer" and part is not None:
        return tokenizer_fingerprint(part)
    if not hasattr(part, "to_dict"):
        return part
    found = {key: value for key, value in part.to_dict().items() if key.strip("_") not in _OF_FILES}
    return json.dumps(found, sort_keys=True, default=str)  # a file has lists where a new processor has tuples
