"""Small real models of both families."""

from typing import Any

from composer.utils import reproducibility
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from composer_prior import LVLM, ComposerLVLM
from composer_prior.models.projector import build_projector
from composer_prior.models.vision import OpenCLIPTower, PatchEmbedding

FAMILIES = ("encoder", "patches")


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


def small_lvlm(family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> ComposerLVLM:
    """Build an LVLM of either family around :func:`small_lm`."""
    lm = small_lm(tokenizer, seed, **changes)
    width = lm.config.hidden_size
    if family == "encoder":
        tower: Any = OpenCLIPTower("prior-vit-tiny", image_size=24, layer=-2)
        projector = build_projector("mlp", tower.width, width)
    else:
        tower, projector = PatchEmbedding(width, patch_size=16, max_side=48), None
    return ComposerLVLM(LVLM(tower, projector, lm, tokenizer), image_related_metrics=True)  # as in a run
