"""Build any image-text-to-text model of transformers, with its own processor, from a recipe's ``model``."""

from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from composer_prior.data.hub import ModelFolderError, load_pretrained
from composer_prior.data.messages import one_line
from composer_prior.data.processing import image_placeholder
from composer_prior.data.tokenizer import placeholder
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.image_text_model import captions_images
from composer_prior.models.language import generate_greedily, is_recurrent, named_weights, vocabulary_size
from composer_prior.models.prior_lvlm import PriorLVLMConfig
from composer_prior.registry import did_you_mean

Part = Literal["vision", "projector", "language"]
# Families that are not trained here, and why.
_REFUSED = {
    "mllama": "its layers read the image by cross-attention, whose mask spans the caption",
    PriorLVLMConfig.model_type: "it is this package's own; use the model lvlm, with init_from for its weights",
}
_TOKENS = {  # settings of configurations that name tokens, which a new model takes from its tokenizer
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "boi_token_index": "<start_of_image>",
    "eoi_token_index": "<end_of_image>",
}


def build_hugging_face(
    tokenizer: PreTrainedTokenizerBase,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
    freeze: list[Part] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    label_smoothing: float = 0.0,
    image_related_metrics: bool = False,
) -> ComposerLVLM:
    """Build an image-text-to-text model of transformers, pretrained or new; on the meta device without its weights.

    Args:
        tokenizer: that of the processor, as of :func:`.build_tokenizer` with ``image_tokens: false``.
        pretrained: folder or hub id of the model.
        config: for a new model, ``model_type`` and the arguments of its configuration.
        processor: ``name``, its folder or hub id, by default ``pretrained``; and settings of its image processor, such
            as ``max_pixels``, ``do_image_splitting`` or ``size``.
        freeze: parts that are kept as they are: vision, projector, language.
        trust_remote_code: run code that comes with the model.
        attn_implementation: transformers' name of how attention is computed. Default: transformers' own choice.
        label_smoothing: see :class:`.ComposerLVLM`.
        image_related_metrics: see :class:`.ComposerLVLM`.

    Raises:
        ValueError: for settings that do not fit, and for a family that cannot be trained so, with the reason.
        OSError: for a folder or hub id without a model.
    """
    if (pretrained is None) == (config is None):
        raise ValueError("model needs either `pretrained` (a hub id or folder) or `config` (a new model).")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation}
    settings = None if pretrained is None else _read_configuration(pretrained, trust_remote_code)
    made = build_processor(tokenizer, pretrained, processor, trust_remote_code)
    if settings is None:
        settings = _new_configuration(dict(config or {}), made)
    if pretrained is None or torch.empty(0).device.type == "meta":
        model = AutoModelForImageTextToText.from_config(settings, dtype=torch.float32, **options)
    else:
        model = load_pretrained(AutoModelForImageTextToText, pretrained, dtype=torch.float32, **options)
    if is_recurrent(model):
        raise ValueError(
            f"model: a {settings.model_type} cannot be trained here: its language model is recurrent, as in Mamba."
        )
    if len(tokenizer) > vocabulary_size(model):
        raise ValueError(f"model: it embeds {vocabulary_size(model)} of the tokenizer's {len(tokenizer)} tokens.")
    generate_greedily(model, tokenizer)
    weights = [*named_weights(model)]
    for part in freeze or ():
        own = [weight for name, weight in weights if name.partition(".")[0] == part]
        if not own:
            raise ValueError(f"model.freeze: a {settings.model_type} has no part known as {part}; leave it out.")
        for weight in own:
            weight.requires_grad_(False)
    return ComposerLVLM(model, made, label_smoothing=label_smoothing, image_related_metrics=image_related_metrics)


def build_processor(
    tokenizer: PreTrainedTokenizerBase, pretrained: str | None, options: dict[str, Any] | None, trust_remote_code: bool
) -> Any:
    """Load a processor, change settings of its image processor, and let it have the recipe's tokenizer."""
    changes = dict(options or {})
    name = changes.pop("name", pretrained)
    if name is None:
        raise ValueError("model.processor.name is missing: a new model needs the folder or hub id of a processor.")
    try:
        processor = load_pretrained(AutoProcessor, name, trust_remote_code)
    except ModelFolderError as error:
        raise ModelFolderError(f"model.processor.name={error}") from error
    except (OSError, ValueError) as error:
        raise OSError(f"model.processor.name={name!r} is no folder with a processor: {one_line(error)}") from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ValueError(f"model.processor.name={name!r} holds a {type(processor).__name__}, not images and text.")
    image_placeholder(processor)
    known = processor.image_processor.to_dict()
    for key in changes:
        if key not in known:
            raise ValueError(f"model.processor.{key} is not a key. {did_you_mean(key, ['name', *known])}")
    if changes:
        if "size" in changes:  # which Qwen2-VL's of before would override
            known = {key: value for key, value in known.items() if key not in ("min_pixels", "max_pixels")}
        processor.image_processor = type(processor.image_processor).from_dict({**known, **changes})
    if processor.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"tokenizer.name is another tokenizer than that of the processor {name}; leave it out.")
    if processor.tokenizer("a")["input_ids"] != tokenizer("a")["input_ids"]:  # PaliGemma's processor adds bos itself
        adds = str(getattr(processor.tokenizer, "add_bos_token", None)).lower()
        raise ValueError(
            f"tokenizer adds other special tokens to a text than the processor {name} lets its own add: set "
            f"tokenizer.kwargs.add_bos_token={adds}."
        )
    processor.tokenizer = tokenizer
    if tokenizer.chat_template is not None and placeholder(tokenizer) != image_placeholder(processor):
        raise ValueError(f"tokenizer.chat_template: it is not known how a {type(processor).__name__} names images.")
    processor.chat_template = tokenizer.chat_template  # without one, images are captioned so in training and after it
    return processor


def _read_configuration(pretrained: str, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of a model of a folder or hub id, and refuse one that cannot be trained."""
    try:
        return _checked(load_pretrained(AutoConfig, pretrained, trust_remote_code))
    except ModelFolderError as error:
        raise ModelFolderError(f"model.pretrained={error}") from error
    except OSError as error:
        raise OSError(f"model.pretrained={pretrained!r} is no folder with a model: {one_line(error)}") from error


def _checked(settings: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration; raise ValueError for one of a model that cannot be trained here."""
    kind = settings.model_type
    if kind in _REFUSED:
        raise ValueError(f"model: a {kind} cannot be trained here: {_REFUSED[kind]}.")
    if not captions_images(settings):
        raise ValueError(f"model: a {kind} is no image-text-to-text model of transformers.")
    if settings.is_encoder_decoder:
        raise ValueError(f"model: a {kind} cannot be trained here: it reads images apart from its captions' tokens.")
    return settings


def _new_configuration(arguments: dict[str, Any], processor: Any) -> PretrainedConfig:
    """Return a new model's configuration, with the vocabulary and the special tokens of its processor."""
    tokenizer, kind = processor.tokenizer, arguments.pop("model_type", None)
    text = {"vocab_size": len(tokenizer), **(arguments.get("text_config") or {})}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text.setdefault(name, getattr(tokenizer, name))
    known = vars(AutoConfig.for_model(kind))
    named = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items() if name in known}
    image = getattr(processor, "image_token_id", None) or tokenizer.convert_tokens_to_ids(processor.image_token)
    named |= {name: image for name in ("image_token_id", "image_token_index") if name in known}
    return _checked(AutoConfig.for_model(kind, **{**named, **arguments, "text_config": text}))


def hugging_face_skeleton(tokenizer: PreTrainedTokenizerBase, **config: Any) -> ComposerLVLM:
    """Build what :func:`build_hugging_face` builds on the meta device: every shape and no weight."""
    with torch.device("meta"):
        return build_hugging_face(tokenizer, **config)
