"""From the parts of a recipe to the objects of a run."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from composer.core import Precision
from composer.utils import dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_prior import registry
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.language import build_language_model, hidden_size, language_skeleton
from composer_prior.models.lvlm import LVLM
from composer_prior.models.projector import build_projector
from composer_prior.models.vision import OpenCLIPTower


def build_lvlm(
    tokenizer: PreTrainedTokenizerBase,
    language: dict[str, Any],
    vision: dict[str, Any] | None = None,
    projector: dict[str, Any] | None = None,
    label_smoothing: float = 0.0,
    pack: bool = False,
    image_related_metrics: bool = False,
) -> ComposerLVLM:
    """An LVLM; without ``vision``, a language model on the captions alone, such as the reference.

    Args:
        tokenizer: with the image tokens, as of :func:`.build_tokenizer`.
        language: arguments of :func:`.build_language_model`.
        vision: ``name`` of a vision tower and its arguments.
        projector: ``name`` (``linear`` or ``mlp``) and ``freeze``; for towers of another width than the LM's.
        label_smoothing, pack: see :class:`.LVLM`.
        image_related_metrics: see :class:`.ComposerLVLM`.
    """
    lm = build_language_model(tokenizer, **language)
    return _assemble(lm, tokenizer, vision, projector, label_smoothing, pack, image_related_metrics)


def lvlm_skeleton(tokenizer: PreTrainedTokenizerBase, language: dict[str, Any], **config: Any) -> ComposerLVLM:
    """What :func:`build_lvlm` builds, on the meta device: every shape and no weight, in seconds for any size.

    Raises:
        ValueError: as :func:`build_lvlm`, but for what only weights can show.
    """
    vision = config.pop("vision", None)
    tower: Any = None if vision is None else registry.look_up("vision", vision["name"], "model.vision")
    if vision is not None and tower is not OpenCLIPTower and registry.takes(tower, "pretrained"):
        vision = {**vision, "pretrained": None}  # OpenCLIP's says by it what becomes of pictures, and loads nothing
    logging.disable(logging.WARNING)  # OpenCLIP says that there are no weights, and not that none are wanted
    try:
        with torch.device("meta"):
            return _assemble(language_skeleton(tokenizer, **language), tokenizer, vision, **config)
    finally:
        logging.disable(logging.NOTSET)


def build_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, parallelism: Mapping[str, Any] | None = None
) -> Any:
    """The model of a recipe; with FSDP2 the first rank alone loads weights, and Composer brings them to the others.

    Args:
        config: the recipe's ``model``.
        tokenizer: of :func:`.build_tokenizer`.
        parallelism: the recipe's ``parallelism_config``.
    """
    if "fsdp2" in (parallelism or {}) and dist.get_global_rank() != 0 and config["name"] == "lvlm":
        try:
            return lvlm_skeleton(tokenizer, **_without_name(config))
        except RuntimeError:
            pass  # a tower from outside that computes while it is built
    return build_named("model", config, tokenizer=tokenizer)


def _assemble(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vision: dict[str, Any] | None = None,
    projector: dict[str, Any] | None = None,
    label_smoothing: float = 0.0,
    pack: bool = False,
    image_related_metrics: bool = False,
) -> ComposerLVLM:
    width = hidden_size(lm)
    tower = projection = None
    if vision is not None:
        tower = _build_tower(vision, width)
    if projector is not None and tower is not None:
        projection = build_projector(width_in=tower.width, width_out=width, **projector)
    elif tower is not None and tower.width != width:
        raise ValueError(f"model.projector is missing: features of {tower.width} do not fit an LM of {width}.")
    model = LVLM(tower, projection, lm, tokenizer, label_smoothing, pack)
    return ComposerLVLM(model, image_related_metrics)


def _build_tower(config: Mapping[str, Any], width: int) -> Any:
    tower = registry.look_up("vision", config["name"], "model.vision.name")
    given = {"width": width} if registry.takes(tower, "width") else {}
    return tower(**given, **_without_name(config))


def build_named(kind: str, config: Mapping[str, Any], **given: Any) -> Any:
    """Build a component given as ``{name: ..., argument: ...}``."""
    return registry.build(kind, config["name"], _without_name(config), kind, **given)


def build_all(kind: str, configs: Mapping[str, Any]) -> list[Any]:
    """Build components given as ``{name: {argument: ...}}``, in order, without those whose arguments are None."""
    return [
        registry.build(kind, name, arguments, f"{kind}s.{name}")
        for name, arguments in configs.items()
        if arguments is not None
    ]


def without_reference(components: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's algorithms or benchmarks without their ``reference``, whose weights none then loads."""
    return {
        name: None if given is None else {key: value for key, value in given.items() if key != "reference"}
        for name, given in components.items()
    }


def build_precision(name: str) -> Precision:
    """Return a precision; ``auto`` is ``amp_bf16`` on CUDA, ``fp32`` on the CPU, where bf16 can be 100 times slower."""
    if name == "auto":
        return Precision.AMP_BF16 if torch.cuda.is_available() else Precision.FP32
    return Precision(name)


def _without_name(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "name"}
