"""Build an LVLM from a recipe's ``model``, or from its parts."""

import logging
from inspect import signature
from math import isqrt
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_prior import registry
from composer_prior.data.messages import one_line
from composer_prior.data.tokenizer import image_token_ids
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.language import (
    build_language_model,
    causal_lm_of,
    generate_greedily,
    hidden_size,
    is_recurrent,
    vocabulary_size,
)
from composer_prior.models.prior_lvlm import PriorLVLMConfig, PriorLVLMProcessor
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import (
    MERGING,
    TOWERS,
    PriorLVLMForConditionalGeneration,
)
from composer_prior.models.vision import build_open_clip, image_processor_of
from composer_prior.registry import Count


def build_lvlm(
    tokenizer: PreTrainedTokenizerBase,
    language: dict[str, Any],
    vision: dict[str, Any] | None = None,
    projector: dict[str, Any] | None = None,
    label_smoothing: float = 0.0,
    pack: bool = False,
    image_related_metrics: bool = False,
) -> ComposerLVLM:
    """Build an LVLM, or without ``vision`` a language model on the captions alone, such as the reference.

    Args:
        tokenizer: with the image tokens, as of :func:`.build_tokenizer`.
        language: arguments of :func:`.build_language_model`.
        vision: ``name`` of a vision tower and its arguments.
        projector: arguments of :func:`projector_options`; for towers of another width than the LM's.
        label_smoothing: see :class:`.ComposerLVLM`.
        pack: see :class:`.ComposerLVLM`.
        image_related_metrics: see :class:`.ComposerLVLM`.
    """
    lm = build_language_model(tokenizer, **language)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "pack": pack}
    options["image_related_metrics"] = image_related_metrics
    if vision is None:
        generate_greedily(lm, tokenizer)
        return ComposerLVLM(lm, tokenizer, **options)
    constructor = registry.load("vision", vision["name"], "model.vision.name")
    given = {"width": hidden_size(lm)} if registry.takes(constructor, "width") else {}
    tower = constructor(**given, **registry.without_name(vision))
    name, factor, freeze = projector_options(**projector) if projector is not None else (None, 1, False)
    model, processor = make_lvlm(lm, tower, name, tokenizer, factor=factor)
    if isinstance(tokenizer.chat_template, str):
        vars(processor)["chat_template"] = tokenizer.chat_template
    if freeze:
        model.model.multi_modal_projector.requires_grad_(False)
    return ComposerLVLM(model, processor, **options)


def lvlm_skeleton(tokenizer: PreTrainedTokenizerBase, language: dict[str, Any], **config: Any) -> ComposerLVLM:
    """Build what :func:`build_lvlm` builds on the meta device: every shape and no weight, in seconds for any size."""
    vision = config.pop("vision", None)
    tower: Any = None if vision is None else registry.load("vision", vision["name"], "model.vision")
    if vision is not None and tower is not build_open_clip and registry.takes(tower, "pretrained"):
        vision = {**vision, "pretrained": None}  # OpenCLIP's says by it what becomes of pictures, and loads nothing
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))  # OpenCLIP and transformers say that there are no weights
    try:
        with torch.device("meta"):
            return build_lvlm(tokenizer, language, vision, **config)
    finally:
        logging.disable(level)


def projector_options(
    name: Literal["linear", "mlp", "pixel_shuffle", "mean_pool"], factor: Count | None = None, freeze: bool = False
) -> tuple[str, int, bool]:
    """Return the projector's name, its factor, 1 where it merges nothing, and if it is kept as it is.

    Args:
        name: ``linear``; ``mlp``, two layers with a GELU; or the same two layers on merged features: ``pixel_shuffle``
            lays those of a block beside each other, ``mean_pool`` averages them.
        factor: of the two that merge, the side of a block: the image takes ``factor ** 2`` times fewer tokens.
        freeze: keep the projector's weights as they are.

    Raises:
        ValueError: for a factor without merging, or merging without one.
    """
    if (factor is None) == (name in MERGING):
        needs = "needs" if name in MERGING else "takes no"
        raise ValueError(f"model.projector.name={name} {needs} model.projector.factor.")
    return name, factor or 1, freeze


def make_lvlm(
    lm: PreTrainedModel,
    tower: nn.Module,
    projector: str | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    factor: int = 1,
) -> tuple[PriorLVLMForConditionalGeneration, PriorLVLMProcessor]:
    """Make an LVLM of its parts, whose modules it takes, and its processor.

    Args:
        lm: a causal LM whose embeddings hold the image tokens.
        tower: see :mod:`.vision`.
        projector: a name of :func:`projector_options`, or None where the tower's features have the LM's width.
        tokenizer: with the image tokens.
        prompt: text between image and caption. Default: none.
        factor: of a projector that merges, see :func:`projector_options`.

    Raises:
        ValueError: for parts that do not fit, or an LM that cannot generate from embeddings.
    """
    if hasattr(lm, "get_base_model"):
        raise ValueError("The LM has adapters of PEFT: make the LVLM without them, then give it to get_peft_model.")
    if factor > 1:
        _merge(tower, factor)
    settings: Any = tower.config
    if projector is None and settings["width"] != hidden_size(lm):
        raise ValueError(
            f"model.projector is missing: features of {settings['width']} do not fit an LM of {hidden_size(lm)}."
        )
    _check_generation(lm)
    if len(tokenizer) > vocabulary_size(lm):
        raise ValueError(f"The LM embeds {vocabulary_size(lm)} of {len(tokenizer)} tokens.")
    image_token_id, row_token_id = image_token_ids(tokenizer)
    config = PriorLVLMConfig(lm.config, settings, projector, image_token_id, row_token_id)
    model = PriorLVLMForConditionalGeneration(config, lm, tower)
    generate_greedily(model, tokenizer)
    return model, PriorLVLMProcessor(image_processor_of(tower), tokenizer, prompt)


def _merge(tower: Any, factor: int) -> None:
    """Let a tower keep the features of each block of ``factor`` x ``factor`` together; refuse one without a grid."""
    where, settings = f"model.projector.factor={factor}", tower.config
    known: Any = tuple(TOWERS.values())
    if not isinstance(tower, known):
        raise ValueError(f"{where}: {type(tower).__name__} has no grid that is known; use the projector mlp.")
    if settings["type"] == "naflex":
        rows = factor  # of its grids, which are made of blocks
        if settings["max_tokens"] < factor**2:
            raise ValueError(f"{where}: model.vision.max_tokens={settings['max_tokens']} holds no block of features.")
    elif settings["type"] == "patches":
        rows = settings["max_side"] // settings["patch_size"]
    else:
        rows = isqrt(settings["image_tokens"])
    if rows % factor or (settings["type"] == "open_clip" and rows**2 != settings["image_tokens"]):
        raise ValueError(f"{where} does not divide the tower's grid of {rows} x {rows} features.")
    tower.config = {**settings, "merge": factor}


@torch.no_grad()
def _check_generation(language: PreTrainedModel) -> None:
    """Refuse, before it is trained on images, an LM that cannot generate from embeddings."""
    model: Any = causal_lm_of(language)
    reason = "its generate takes no inputs_embeds"
    works = model.can_generate() and "inputs_embeds" in signature(model.prepare_inputs_for_generation).parameters
    if works and is_recurrent(model) and model.device.type != "meta":
        image = torch.zeros(1, 3, hidden_size(model), device=model.device, dtype=model.dtype)
        mask = torch.ones(1, 3, dtype=torch.long, device=model.device)
        try:
            model.generate(inputs_embeds=image, attention_mask=mask, max_new_tokens=2)
        except Exception as error:  # whatever the code of some model raises
            works, reason = False, one_line(error)
    if not works:
        raise ValueError(f"{type(model).__name__} cannot caption images ({reason}); give another language model.")
