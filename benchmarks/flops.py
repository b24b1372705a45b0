"""Floating-point operations of the models, by count. A backward pass is twice the forward pass."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.models.composer_lvlm import ComposerLVLM


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


def tower_forward(lvlm: Any) -> float:
    """Count the operations of one image in the tower."""
    encoder, patches = lvlm.model.vision_tower.encoder, lvlm.config.vision["image_tokens"] + 1
    blocks = encoder.transformer.resblocks
    attention = 4 * encoder.conv1.out_channels * len(blocks) * patches**2
    linear = 2 * sum(p.numel() for p in blocks.parameters() if p.ndim == 2) * patches
    return float(linear + attention + 2 * encoder.conv1.weight.numel() * (patches - 1))


def projector_forward(lvlm: Any) -> float:
    """Count the operations of one image in the projector."""
    tokens = lvlm.config.vision["image_tokens"] / lvlm.config.vision.get("merge", 1) ** 2
    return 2 * _linear_parameters(lvlm.model.multi_modal_projector) * tokens


def training_parts(model: ComposerLVLM, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Count one training step on a batch by part: forward and backward, without recomputation."""
    lvlm: Any = model.model
    labelled = int((batch["labels"] != IGNORE_INDEX).sum())
    return {
        "tower and projector": 3 * len(batch["input_ids"]) * (tower_forward(lvlm) + projector_forward(lvlm)),
        "LM": 3 * lm_forward(lvlm.causal_lm, batch["attention_mask"].sum(1)),
        "head": 3 * head_forward(lvlm.causal_lm, labelled),
    }


def reference_forward(lm: PreTrainedModel, batch: Mapping[str, Tensor], image_tokens: int) -> float:
    """Count the operations of scoring the captions of a batch."""
    labelled = int((batch["labels"] != IGNORE_INDEX).sum())
    return lm_forward(lm, batch["attention_mask"].sum(1) - image_tokens) + head_forward(lm, labelled)


def _linear_parameters(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
