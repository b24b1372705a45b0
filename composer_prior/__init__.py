"""PRIOR, token-prioritized vision-language pre-training, for MosaicML Composer.

The public names load their module on first use, so the weighting can be used without importing Composer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_prior.algorithms.prior import PRIOR, importance_weights
    from composer_prior.algorithms.prior.hugging_face import PRIORMixin
    from composer_prior.algorithms.token_weighting.selective_backprop import selective_backprop_keys
    from composer_prior.algorithms.token_weighting.token_weighting import TokenWeighting
    from composer_prior.data.captions import StreamingCaptionDataset
    from composer_prior.data.prompts import CompletionCollator, beginning, prompt_and_completion
    from composer_prior.inference.loading import load
    from composer_prior.models.composer_lvlm import ComposerLVLM
    from composer_prior.models.image_text_model import ImageTextModel
    from composer_prior.models.reference import ReferenceLM

__version__ = "0.2.0.dev0"

_MODULES = {
    "PRIOR": "composer_prior.algorithms.prior.prior",
    "PRIORMixin": "composer_prior.algorithms.prior.hugging_face",
    "importance_weights": "composer_prior.algorithms.prior.weights",
    "CompletionCollator": "composer_prior.data.prompts",
    "ComposerLVLM": "composer_prior.models.composer_lvlm",
    "ImageTextModel": "composer_prior.models.image_text_model",
    "ReferenceLM": "composer_prior.models.reference",
    "StreamingCaptionDataset": "composer_prior.data.captions",
    "TokenWeighting": "composer_prior.algorithms.token_weighting.token_weighting",
    "beginning": "composer_prior.data.prompts",
    "load": "composer_prior.inference.loading",
    "prompt_and_completion": "composer_prior.data.prompts",
    "selective_backprop_keys": "composer_prior.algorithms.token_weighting.selective_backprop",
}

__all__ = [
    "PRIOR",
    "CompletionCollator",
    "ComposerLVLM",
    "ImageTextModel",
    "PRIORMixin",
    "ReferenceLM",
    "StreamingCaptionDataset",
    "TokenWeighting",
    "beginning",
    "importance_weights",
    "load",
    "prompt_and_completion",
    "selective_backprop_keys",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'composer_prior' has no attribute '{name}'")
