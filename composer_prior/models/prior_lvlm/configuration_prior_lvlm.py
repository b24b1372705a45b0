"""Configuration of the LVLM."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig


class PriorLVLMConfig(PretrainedConfig):
    """Configuration of :class:`.PriorLVLMForConditionalGeneration`.

    Args:
        text_config: of the causal language model.
        vision: the tower: ``{"type": "open_clip", "embed_dim", "vision_cfg", "quick_gelu", "layer", "width",
            "image_tokens", "preprocess"}``, ``{"type": "patches", "patch_size", "max_side", "width"}``, or ``{"type":
            "naflex", "architecture", "arguments", "layer", "patch_size", "max_tokens", "width", "preprocess"}``; with
            ``"merge"``, each block of ``merge`` x ``merge`` features becomes one image token; with
            ``"tiles": {"max"}``, an OpenCLIP tower reads a large image in several squares.
        projector: ``linear``, ``mlp``, ``pixel_shuffle``, ``mean_pool``, or None for none.
        image_token_id: id of the token in whose places image features are put.
        row_token_id: id of the token that ends each row of patches.
    """

    model_type = "prior_lvlm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - as transformers has it

    def __init__(
        self,
        text_config: Any = None,
        vision: Mapping[str, Any] | None = None,
        projector: str | None = None,
        image_token_id: int = 0,
        row_token_id: int = 0,
        **kwargs: Any,
    ):
        if isinstance(text_config, Mapping):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.vision = dict(vision or {"type": "patches", "patch_size": 16, "max_side": 512, "width": 4096})
        self.projector = projector
        self.image_token_id, self.row_token_id = image_token_id, row_token_id
        kwargs.setdefault("tie_word_embeddings", bool(self.text_config.tie_word_embeddings))
        # The language model's own choice: transformers would otherwise reset it.
        kwargs.setdefault("attn_implementation", getattr(self.text_config, "_attn_implementation", None))
        super().__init__(**kwargs)


PriorLVLMConfig.register_for_auto_class()
