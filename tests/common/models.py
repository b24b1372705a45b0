"""Small real models of both families."""

from typing import Any

from composer.utils import reproducibility
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from composer_prior import ComposerLVLM
from composer_prior.data.batch import ImageInputs
from composer_prior.models.build import make_lvlm
from composer_prior.models.prior_lvlm import PriorLVLMForConditionalGeneration, PriorLVLMImageProcessor
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import NaFlexTower
from composer_prior.models.vision import build_naflex, build_open_clip, build_patches, image_inputs

FAMILIES = ("encoder", "patches")
# Others, with fewer tokens or more pixels.
FRONT_ENDS = ("pixel_shuffle", "mean_pool", "merged_patches", "tiles", "merged_tiles", "naflex", "merged_naflex")
INPUTS = ("input_ids", "pixel_values", "pixel_patches", "patch_mask", "image_grid")


def small_lm(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Build a Llama of two layers with random weights large enough for distinct predictions."""
    reproducibility.seed_all(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


def small_naflex(**changes: Any) -> NaFlexTower:
    """A NaFlexVit of three blocks, of which two are left, with patches of 8 pixels and a register token."""
    config = {"depth": 3, "embed_dim": 32, "num_heads": 2, "pos_embed_grid_size": [4, 4], "reg_tokens": 1}
    arguments = {"patch_size": 8, "max_tokens": 24, "config": config, **changes}
    return build_naflex("naflexvit_base_patch16_siglip", **arguments)


def small_lvlm(
    family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, options: Any = None, **changes: Any
) -> ComposerLVLM:
    """An LVLM of a family or front end around :func:`small_lm`, with ``options`` of :class:`ComposerLVLM`."""
    lm = small_lm(tokenizer, seed, **changes)
    projector, factor = "mlp", 1
    if family == "encoder":
        tower: Any = build_open_clip("prior-vit-tiny", image_size=24, layer=-2)
    elif family == "patches":
        tower, projector = build_patches(lm.config.hidden_size, patch_size=16, max_side=48), None
    elif family == "merged_patches":
        tower, projector, factor = build_patches(lm.config.hidden_size, 8, max_side=48), "pixel_shuffle", 2
    elif family.endswith("naflex"):
        tower = small_naflex()
        projector, factor = ("mlp", 1) if family == "naflex" else ("pixel_shuffle", 2)
    elif family.endswith("tiles"):
        tower = build_open_clip("prior-vit-tiny", image_size=24, tiles={"max": 4})
        projector, factor = ("mlp", 1) if family == "tiles" else ("pixel_shuffle", 2)
    else:
        tower, projector, factor = build_open_clip("prior-vit-tiny", image_size=48), family, 2
    parts = make_lvlm(lm, tower, projector, tokenizer, factor=factor)
    return ComposerLVLM(*parts, image_related_metrics=True, **(options or {}))  # as in a run


def model_inputs(batch: Any) -> dict[str, Tensor]:
    """Return the inputs of the model in a batch."""
    return {key: batch[key] for key in INPUTS if key in batch}


def full_logits(model: PriorLVLMForConditionalGeneration, batch: Any) -> Tensor:
    """The logits ``[B, T, V]`` of a batch that is padded at its end."""
    return model(**model_inputs(batch)).logits


def patch_inputs(image: Image.Image, patch_size: int, max_side: int) -> ImageInputs:
    """An image in patches, as a data set's sample holds it."""
    vision = {"type": "patches", "patch_size": patch_size, "max_side": max_side}
    return image_inputs(PriorLVLMImageProcessor(vision), image)
