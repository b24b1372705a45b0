"""Which algorithms of Composer cannot run beside a weighting of tokens, refused before anything runs, and why."""

from collections.abc import Sequence
from typing import Any

from composer.algorithms import (
    Alibi,
    ColOut,
    CutMix,
    CutOut,
    Factorize,
    GyroDropout,
    LabelSmoothing,
    MixUp,
    NoOpModel,
    ProgressiveResizing,
    SelectiveBackprop,
)
from composer.core import Algorithm
from torch import nn

from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.language import parts_of
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import PatchEmbedding

_MIXES_TARGETS = "it mixes the targets of two samples, but a caption's tokens are also the model's input"
_INSTEAD = "transform images as they are read, StreamingCaptionDataset(transform=...)"
_RESIZES = f"it changes the size of the images, but the text already has a token for each of their patches; {_INSTEAD}"
_REASONS: dict[type[Algorithm], str] = {
    Alibi: "it reshapes all tensors of the batch to other lengths, which cuts images and captions apart",
    CutMix: _MIXES_TARGETS,
    GyroDropout: "its masks are for inputs [B, D], not for sequences [B, T, D]",
    LabelSmoothing: "it needs all logits as one tensor; smooth in ComposerLVLM(..., label_smoothing=0.1)",
    MixUp: _MIXES_TARGETS,
    NoOpModel: "it replaces the model by one that reads no captions",
    ProgressiveResizing: _RESIZES,
}


def check_stack(algorithms: Sequence[Algorithm], model: Any, method: str) -> None:
    """Refuse algorithms that would break on captions or silently do something else to them.

    Raises:
        ValueError: one line, naming the algorithm, the reason and what to do.
    """
    for algorithm in algorithms:
        reason = refusal(algorithm, model)
        if reason is not None:
            raise ValueError(f"{type(algorithm).__name__} does not stack with {method}: {reason}.")


def refusal(algorithm: Algorithm, model: Any) -> str | None:
    """Return why an algorithm cannot run beside a weighting of tokens on this model; None if it can."""
    if isinstance(algorithm, ColOut) and algorithm.batch:
        return _RESIZES
    if isinstance(algorithm, CutOut):
        return _cutout_refusal(algorithm, model)
    if isinstance(algorithm, Factorize):
        return _factorize_refusal(algorithm, model)
    if isinstance(algorithm, SelectiveBackprop):
        return _selective_backprop_refusal(algorithm, model)
    return next((reason for kind, reason in _REASONS.items() if isinstance(algorithm, kind)), None)


def _cutout_refusal(algorithm: CutOut, model: Any) -> str | None:
    if isinstance(model, ComposerLVLM) and isinstance(parts_of(model.model).get("vision"), PatchEmbedding):
        return f"the batch has patches, not images [B, 3, H, W]; {_INSTEAD}"
    if isinstance(algorithm.input_key, int):
        return f"input_key={algorithm.input_key}, but batches are dicts; give CutOut(input_key='pixel_values')"
    return None


def _factorize_refusal(algorithm: Factorize, model: nn.Module) -> str | None:
    attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    if algorithm.factorize_linears and any(module.embed_dim >= algorithm.min_features for module in attention):
        return "nn.MultiheadAttention reads the weight of the layer that it would replace; set factorize_linears=False"
    return None


def _selective_backprop_refusal(algorithm: SelectiveBackprop, model: Any) -> str | None:
    if not isinstance(model, ComposerLVLM):
        return f"{type(model).__name__} has no losses per sample"
    if algorithm.scale_factor != 1:
        return f"scale_factor={algorithm.scale_factor}, but it selects by whole samples; leave it at 1"
    if isinstance(algorithm.input_key, int) or isinstance(algorithm.target_key, int):
        return "batches are dicts; give SelectiveBackprop(**selective_backprop_keys(model))"
    return None
