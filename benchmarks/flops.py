"""Floating-point operations that the models need, by count: without padding, and attention of text to its past alone.

A backward pass is twice the forward pass.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.training.monitors import flop_counter

IMAGES = ("pixel_values", "pixel_patches", "patch_mask", "image_grid")


def lm_forward(lm: PreTrainedModel, lengths: Tensor) -> float:
    """Count linear layers and causal attention for sequences of these lengths, without padding or head."""
    linear = 2 * _linear_parameters(lm.base_model) * int(lengths.sum())
    config: Any = lm.config
    attention = 4 * config.hidden_size * config.num_hidden_layers * float((lengths.double() ** 2).sum()) / 2
    return linear + attention


def head_forward(lm: PreTrainedModel, tokens: int) -> float:
    """Count the operations of the logits of this many tokens."""
    config: Any = lm.config
    return 2 * config.hidden_size * config.vocab_size * tokens


def image_forward(lvlm: Any, images: Mapping[str, Tensor]) -> tuple[float, float]:
    """Count the operations of images in tower and projector, of any kind, as the callback ``compute_monitor`` does."""
    with torch.no_grad(), flop_counter() as tower:
        features = lvlm.model.vision_tower(**images)
    with torch.no_grad(), flop_counter() as projector:
        lvlm.model.multi_modal_projector(features)
    return float(tower.get_total_flops()), float(projector.get_total_flops())


def training_parts(model: ComposerLVLM, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Count one training step on a batch by part: forward and backward, without recomputation."""
    lvlm: Any = model.model
    images = {key: value for key, value in batch.items() if key in IMAGES}
    labelled = int((batch["labels"] != IGNORE_INDEX).sum())
    return {
        "tower and projector": 3 * sum(image_forward(lvlm, images)),
        "LM": 3 * lm_forward(lvlm.causal_lm, batch["attention_mask"].sum(1)),
        "head": 3 * head_forward(lvlm.causal_lm, labelled),
    }


def reference_forward(lm: PreTrainedModel, batch: Mapping[str, Tensor], image_tokens: int) -> float:
    """Count the operations of scoring the captions of a batch."""
    labelled = int((batch["labels"] != IGNORE_INDEX).sum())
    return lm_forward(lm, batch["attention_mask"].sum(1) - image_tokens) + head_forward(lm, labelled)


def _linear_parameters(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
