"""Build any image-text-to-text model of transformers, with its own processor, from a recipe's ``model``."""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from composer_prior.data.batch import PROCESSED
from composer_prior.data.hub import ModelFolderError, load_pretrained
from composer_prior.data.messages import one_line
from composer_prior.data.processing import image_placeholder, image_tokens
from composer_prior.data.tokenizer import placeholder
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.image_text_model import captions_images
from composer_prior.models.language import (
    causal_lm_of,
    check_decoder,
    decoder_of,
    generate_greedily,
    is_recurrent,
    named_weights,
    new_configuration,
    parts_of,
    reads_flat_keys,
    vocabulary_size,
)
from composer_prior.models.lora import add_lora
from composer_prior.models.prior_lvlm import PriorLVLMProcessor
from composer_prior.registry import did_you_mean

Part = Literal["vision", "projector", "language"]
# Families that are not trained here, and why.
_REFUSED = {"mllama": "its layers read the image by cross-attention, whose mask spans the caption"}
# Families whose get_image_features returns one feature for each image token and nothing else.
_FEATURED = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "idefics3"),
    *("smolvlm", "internvl", "gemma3", "paligemma"),
)
_PIXELS = ("min_pixels", "max_pixels")  # of Qwen2-VL's images, whose settings hold them as ``size`` in transformers 5
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
    lora: dict[str, Any] | None = None,
    label_smoothing: float = 0.0,
    image_related_metrics: bool = False,
) -> ComposerLVLM:
    """Build an image-text-to-text model of transformers, pretrained or new; on the meta device without its weights.

    Args:
        tokenizer: that of the processor, as of :func:`.build_tokenizer` with ``image_tokens: false``.
        pretrained: folder or hub id of the model.
        config: for a new model, ``model_type`` and the arguments of its configuration, as in a ``config.json``.
        processor: ``name``, its folder or hub id, by default ``pretrained``; and settings of its image processor, such
            as ``max_pixels``, ``do_image_splitting`` or ``size``.
        freeze: parts that are kept as they are: vision, projector, language.
        trust_remote_code: run code that comes with the model.
        attn_implementation: transformers' name of how attention is computed. Default: transformers' own choice.
        lora: arguments of :func:`.add_lora`: adapters are trained in the place of the language model's weights.
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
    for part in (settings, *(getattr(settings, name) for name in settings.sub_configs)):
        if part is not None:
            part.dtype = torch.float32  # as from_pretrained has it: a part in half precision would stay so
    if pretrained is None or torch.empty(0).device.type == "meta":
        model = AutoModelForImageTextToText.from_config(settings, dtype=torch.float32, **options)
    else:
        model = load_pretrained(AutoModelForImageTextToText, pretrained, dtype=torch.float32, **options)
    try:
        check_decoder(model)
    except ValueError as error:
        where = "model.config.model_type" if pretrained is None else f"model.pretrained={pretrained!r}"
        raise ValueError(f"{where}: {error}") from error
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
    if lora is not None:
        add_lora(cast(PreTrainedModel, parts_of(model)["language"]), **lora)
        model.get_output_embeddings().requires_grad_(False)
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
    taken = getattr(getattr(processor.image_processor, "valid_kwargs", None), "__annotations__", {})
    names = [*known, *(name for name in _PIXELS if name in taken and name not in known)]
    for key in changes:
        if key not in names:
            raise ValueError(f"model.processor.{key} is not a key. {did_you_mean(key, ['name', *names])}")
    if changes:
        if "size" in changes:  # which Qwen2-VL's of before would override
            known = {key: value for key, value in known.items() if key not in _PIXELS}
        processor.image_processor = type(processor.image_processor).from_dict({**known, **changes})
    theirs = processor.tokenizer
    if theirs.get_vocab() != tokenizer.get_vocab() or theirs("a")["input_ids"] != tokenizer("a")["input_ids"]:
        raise ValueError(f"tokenizer.name is another tokenizer than that of the processor {name}; leave it out.")
    processor.tokenizer = tokenizer
    if tokenizer.chat_template is not None and placeholder(tokenizer) != image_placeholder(processor):
        raise ValueError(f"tokenizer.chat_template: it is not known how a {type(processor).__name__} names images.")
    processor.chat_template = tokenizer.chat_template  # without one, images are captioned so in training and after it
    return processor


def _read_configuration(pretrained: str, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of a model of a folder or hub id, and refuse one that cannot be trained."""
    try:
        return _checked(load_pretrained(AutoConfig, pretrained, trust_remote_code), f"model.pretrained={pretrained!r}")
    except ModelFolderError as error:
        raise ModelFolderError(f"model.pretrained={error}") from error
    except OSError as error:
        raise OSError(f"model.pretrained={pretrained!r} is no folder with a model: {one_line(error)}") from error


def _checked(settings: PretrainedConfig, where: str) -> PretrainedConfig:
    """Return a configuration; raise ValueError for one of a model that cannot be trained here, naming its key."""
    kind = settings.model_type
    if kind in _REFUSED:
        raise ValueError(f"{where}: a {kind} cannot be trained here: {_REFUSED[kind]}.")
    if not captions_images(settings):
        raise ValueError(f"{where}: a {kind} is no image-text-to-text model of transformers.")
    if settings.is_encoder_decoder:
        raise ValueError(f"{where}: a {kind} cannot be trained here: it reads images apart from its captions' tokens.")
    return settings


def _new_configuration(arguments: dict[str, Any], processor: Any) -> PretrainedConfig:
    """Return a new model's configuration, with the vocabulary and the special tokens of its processor."""
    tokenizer = processor.tokenizer
    given = _checked(new_configuration(arguments, "model.config"), "model.config.model_type")
    text = {"vocab_size": len(tokenizer)}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = vars(given)
    named = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items() if name in known}
    image = tokenizer.convert_tokens_to_ids(image_tokens(processor)[-1])
    named |= {name: image for name in ("image_token_id", "image_token_index") if name in known}
    if "text_config" not in arguments and reads_flat_keys(given):
        return AutoConfig.for_model(**{**named, **text, **arguments})
    text |= arguments.get("text_config") or {}
    return AutoConfig.for_model(**{**named, **arguments, "text_config": text})


def hugging_face_skeleton(tokenizer: PreTrainedTokenizerBase, **config: Any) -> ComposerLVLM:
    """Build what :func:`build_hugging_face` builds on the meta device: every shape and no weight."""
    with torch.device("meta"):
        return build_hugging_face(tokenizer, **config)


@torch.no_grad()
def check_image_tokens(model: ComposerLVLM, config: Mapping[str, Any]) -> str:
    """Refuse a processor that writes more or fewer image tokens than its model makes features of an image.

    Return a warning instead for a family whose features may have another form; "" if there is none.

    Args:
        model: without weights, as of :func:`hugging_face_skeleton`.
        config: the recipe's ``model``, whose keys the error names.

    Raises:
        ValueError: with both numbers.
    """
    if model.reads_text_alone or isinstance(model.processor, PriorLVLMProcessor):
        return ""
    known = knows_features(model)
    keys = [f"model.processor.{key}" for key in config.get("processor") or ()]
    keys += ["model.config.vision_config"] if config.get("config") else []
    remedy = f"change {' or '.join(keys or ['model.processor'])}"
    image = model.image_processor(Image.new("RGB", (64, 64)))
    try:
        tokens = image.prefix["input_ids"].count(causal_lm_of(model.model).config.image_token_id)
        features = sum(part.numel() // part.shape[-1] for part in _features(model, image.tensors[PROCESSED]))
    except Exception as error:  # whatever the code of some model raises
        if not known:
            return ""
        raise ValueError(f"model: it cannot read its processor's images: {one_line(error)}; {remedy}.") from error
    if tokens == features:
        return ""
    said = (
        f"model: its processor writes {tokens} image tokens for an image of 64 x 64 pixels, of which it makes "
        f"{features} features; {remedy}."
    )
    if known:
        raise ValueError(said)
    return f"Warning: {said}"


def unused_weights(model: ComposerLVLM) -> list[str]:
    """Return the trained weights that no feature of an image depends on, such as LLaVA's behind the layer it reads.

    DDP would wait for their gradients. The model is without weights, as of :func:`hugging_face_skeleton`. Of families
    with features of another form, such as Qwen3-VL, whose layers read further ones, none are known.
    """
    trained = any(name.startswith("vision.") and weight.requires_grad for name, weight in named_weights(model.model))
    if not (trained and knows_features(model)):
        return []
    parts = _features(model, model.image_processor(Image.new("RGB", (64, 64))).tensors[PROCESSED])
    torch.stack([part.sum() for part in parts]).sum().backward()
    seen = {name: weight for name, weight in model.named_parameters() if not weight.is_meta and weight.requires_grad}
    return [name for name, weight in seen.items() if weight.grad is None]


def knows_features(model: ComposerLVLM) -> bool:
    """Return True for a family of transformers whose features of an image are known and can be made apart."""
    module = type(causal_lm_of(model.model)).__module__
    return module.startswith(tuple(f"transformers.models.{family}." for family in _FEATURED))


def _features(model: ComposerLVLM, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the features of an image by the model's own path, with zeros for the weights on the meta device."""
    core: Any = decoder_of(causal_lm_of(model.model))
    if "flash" in str(core.config._attn_implementation):
        core.set_attn_implementation("sdpa")  # on a CPU
    language = {*parts_of(model.model)["language"].modules()}
    for module in {*core.modules()} - language:
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta:
                zeros = torch.zeros_like(tensor, device="cpu")
                kept = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(zeros, tensor.requires_grad) if kept else zeros)
    found = core.get_image_features(**{key: value for key, value in tensors.items() if key in model.inputs})
    found = getattr(found, "pooler_output", found)  # transformers 5
    return [found] if isinstance(found, Tensor) else [*found]
