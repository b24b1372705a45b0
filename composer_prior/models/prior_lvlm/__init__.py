"""The LVLM as a model of transformers, whose ``Auto`` classes read it from here and run no code of a model folder.

The other files import nothing of the package: they travel with saved models for ``trust_remote_code=True``.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from .configuration_prior_lvlm import PriorLVLMConfig
from .image_processing_prior_lvlm import PriorLVLMImageProcessor
from .modeling_prior_lvlm import PriorLVLMForConditionalGeneration
from .processing_prior_lvlm import PriorLVLMProcessor

AutoConfig.register(PriorLVLMConfig.model_type, PriorLVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(PriorLVLMConfig, PriorLVLMForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(PriorLVLMConfig, slow_image_processor_class=PriorLVLMImageProcessor, exist_ok=True)
AutoProcessor.register(PriorLVLMConfig, PriorLVLMProcessor, exist_ok=True)

__all__ = [
    "PriorLVLMConfig",
    "PriorLVLMForConditionalGeneration",
    "PriorLVLMImageProcessor",
    "PriorLVLMProcessor",
]
