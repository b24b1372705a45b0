"""An LVLM as transformers' own LLaVA: a folder that its stock classes load, with no code of ours.

A model without an equivalent is refused by name. The result is compared with the model before
the folder is there.
"""

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import transformers
from PIL import Image
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from composer_prior.data.hub import quiet
from composer_prior.data.messages import one_line
from composer_prior.data.storage import whole_folder, written_here
from composer_prior.data.tokenizer import bos_id
from composer_prior.models.image_text_model import ImageTextModel, differing_weights
from composer_prior.models.language import generate_greedily, parts_of, vocabulary_size
from composer_prior.models.llava_check import PICTURES, LlavaError, compare, failure, refusal
from composer_prior.models.model_folder import SHARD_SIZE, for_generation
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import (
    OpenCLIPTower,
    PriorLVLMForConditionalGeneration,
    decoder_of,
    logit_transform,
)
from composer_prior.models.prior_lvlm.processing_prior_lvlm import CHAT_TEMPLATE, IMAGE_TOKEN
from composer_prior.models.stock_vision import NoStockModelError, StockVision, stock_vision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LlavaReport:
    """Result of :func:`export_llava`."""

    folder: Path
    dtype: str  # of the weights there
    logits: float  # the largest difference of a logit from the model in float32
    pixels: float  # the largest difference of a normalized pixel
    warnings: list[str]  # of which pictures pixels differ all the same

    def __str__(self) -> str:
        line = (
            f"{self.folder}: LLaVA in {self.dtype}; on {PICTURES} pictures the captions are the same, logits differ by "
            f"at most {self.logits:.1e} and pixels by {self.pixels:.1e} in float32."
        )
        return "\nwarning: ".join([line, *self.warnings])


def export_llava(
    model: ImageTextModel, folder: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> LlavaReport:
    """Write a model as transformers' ``LlavaForConditionalGeneration``, with ``LlavaProcessor`` and tokenizer.

    The folder is loaded again and compared with the model before it gets its name.

    Args:
        model: with a tower of OpenCLIP that is a plain ViT of CLIP or SigLIP.
        folder: where to; it appears only when it is whole.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``. Default: the model's own.
        overwrite: replace a folder that an earlier export has written. Default: ``False``.

    Raises:
        LlavaError: one line, naming what has no LLaVA equivalent, or what came out otherwise.
        FileExistsError: if the folder exists and is not to be overwritten.
    """
    folder = Path(folder).expanduser()
    check_output(folder, dtype, overwrite)
    llava, processor = llava_of(model)
    own: torch.dtype = llava.dtype
    kept = DTYPES[dtype] if dtype else own
    with whole_folder(folder, replace=True) as temporary:
        llava.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(temporary)
        del llava
        with quiet():
            stock, *stock_processors = _load(temporary)
            differences = compare(model, stock, *stock_processors)
        if kept != own:
            for config in (stock.config, stock.config.text_config, stock.config.vision_config):
                config.dtype = kept  # each part is loaded in its own
            stock.to(dtype=kept).save_pretrained(temporary, max_shard_size=SHARD_SIZE)
    return LlavaReport(folder, str(kept).removeprefix("torch."), *differences)


def check_output(folder: Path, dtype: str | None, overwrite: bool) -> None:
    """Refuse what :func:`export_llava` cannot write, before anything is loaded."""
    if dtype is not None and dtype not in DTYPES:
        raise LlavaError(f"dtype={dtype}: expected {', '.join(DTYPES)}.")
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder, or overwrite=true.")
    found = folder / "config.json"
    if found.name not in written_here(folder) or json.loads(found.read_bytes())["model_type"] != LlavaConfig.model_type:
        raise FileExistsError(f"{folder} holds no earlier export, so it is not overwritten; choose another folder.")


def llava_of(model: ImageTextModel) -> tuple[Any, Any]:
    """Build a ``LlavaForConditionalGeneration`` that shares weights with the model, and its ``LlavaProcessor``."""
    if hasattr(model.model, "get_base_model"):
        raise refusal("the model", "it has adapters of PEFT; merge them first, merge_and_unload()")
    if not isinstance(model.model, PriorLVLMForConditionalGeneration):
        raise LlavaError(
            f"a {model.model.config.model_type} needs no export: its model folder is in transformers' own form, which "
            "transformers reads without code of composer-prior."
        )
    parts = parts_of(model.model)
    tower, lm = parts.get("vision"), cast(PreTrainedModel, parts["language"])
    if not isinstance(tower, OpenCLIPTower):
        raise refusal(f"the vision tower {type(tower).__name__}", "it is no encoder of OpenCLIP")
    if (merge := tower.config.get("merge", 1)) > 1:
        raise refusal(f"the projector {model.model.config.projector}", f"it makes one image token of {merge**2}")
    if "tiles" in tower.config:
        raise refusal("model.vision.tiles", "LLaVA reads one square an image")
    try:
        vision = stock_vision(tower.encoder, tower.image_size)
    except NoStockModelError as error:
        raise refusal(f"the vision tower {architecture_name(tower.config)}", one_line(error)) from error
    text, language = _language(lm)
    projector_act, projector = _projector(parts["projector"], vision.config.hidden_size, text.hidden_size)
    processor = _processor(model.processor, tower, vision)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_index=model.processor.image_token_id,
        projector_hidden_act=projector_act,
        vision_feature_select_strategy="default" if vision.class_tokens else "full",
        vision_feature_layer=-1,  # blocks that come later are not there
        image_seq_length=tower.config["image_tokens"],
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=[LlavaForConditionalGeneration.__name__],
    )
    llava: Any
    try:
        with torch.device("meta"):
            llava = LlavaForConditionalGeneration(config)
    except Exception as error:
        raise failure(lm, error) from error
    decoder, stock = decoder_of(lm), llava.model.language_model
    if type(decoder) is not type(stock):
        raise refusal(
            f"the language model {type(lm).__name__}",
            f"transformers makes a {type(stock).__name__} of its configuration, not a {type(decoder).__name__}",
        )
    encoder = getattr(llava.model.vision_tower, "vision_model", llava.model.vision_tower)  # transformers 5: without it
    place = next(name for name, module in llava.named_modules() if module is encoder)
    weights = {
        **{f"{place}.{name}": tensor for name, tensor in vision.weights.items()},
        **{f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.items()},
        **language,
    }
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})
    for part in (config, text, vision.config):
        part.dtype = dtype
    try:
        llava.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise refusal("the model", one_line(error)) from error
    llava.tie_weights()
    generate_greedily(llava, model.tokenizer)
    return llava, processor


def architecture_name(vision: Any) -> str:
    """Return the name of OpenCLIP's architecture with a tower's configuration, at any image size."""
    described = {key: value for key, value in vision["vision_cfg"].items() if key != "image_size"}
    same = []
    for name in open_clip.list_models():
        known = open_clip.get_model_config(name)
        settings = dict(known["vision_cfg"])
        size = settings.pop("image_size", None)
        if settings == described and bool(known.get("quick_gelu")) == vision["quick_gelu"]:
            same.append(
                (size != vision["vision_cfg"].get("image_size"), known["embed_dim"] != vision["embed_dim"], name)
            )
    return min(same)[-1] if same else described.get("timm_model_name", "of OpenCLIP")


def _projector(projector: nn.Module, width_in: int, width_out: int) -> tuple[str, dict[str, Tensor]]:
    """Return the activation and the weights of LLaVA's projector, which always has two layers."""
    layers: list[Any] = list(projector) if isinstance(projector, nn.Sequential) else [projector]
    kinds = [nn.Linear if isinstance(layer, nn.Linear) else type(layer) for layer in layers]
    if kinds == [nn.Linear, nn.GELU, nn.Linear] and layers[1].approximate == "none":
        first, second, activation = layers[0], layers[2], "gelu"
    elif kinds in ([nn.Linear], [nn.Identity]):
        first = layers[0] if kinds == [nn.Linear] else nn.Linear(width_in, width_out, bias=False)
        if kinds == [nn.Identity]:
            nn.init.eye_(first.weight)
        second, activation = nn.Linear(width_out, width_out, bias=False).to(first.weight), "linear"
        nn.init.eye_(second.weight)
    else:
        raise refusal(
            f"the projector {type(projector).__name__}", "LLaVA's is linear, or two layers with a GELU between"
        )
    weights = {}
    for name, layer in (("linear_1", first), ("linear_2", second)):
        weights[f"{name}.weight"] = layer.weight.detach()
        weights[f"{name}.bias"] = layer.weight.new_zeros(width_out) if layer.bias is None else layer.bias.detach()
    return activation, weights


def _language(language: Any) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Return configuration and weights of the language model in LLaVA: its decoder, and a linear head without bias."""
    what = f"the language model {type(language).__name__}"
    config = copy.deepcopy(language.config)
    if not type(config).__module__.startswith("transformers."):
        raise refusal(what, "its code is not in transformers")
    head, embeddings = language.get_output_embeddings(), language.get_input_embeddings()
    if not isinstance(head, nn.Linear):
        raise refusal(what, f"its LM head is a {type(head).__name__}, no linear layer")
    if head.bias is not None:
        raise refusal(what, "its LM head has a bias")
    scale, softcap = logit_transform(config)
    if scale != 1 or softcap is not None:
        raise refusal(what, f"it {'scales' if softcap is None else 'caps'} its logits")
    widths = {embeddings.weight.shape[1], head.in_features, getattr(config, "hidden_size", None)}
    if len(widths) > 1:
        raise refusal(what, "its embeddings, hidden states and LM head differ in width")
    config.vocab_size = vocabulary_size(language)
    decoder = decoder_of(language)
    # LLaVA of transformers 5 looks for tied embeddings under this name only, and one without fails.
    config.tie_word_embeddings = head.weight is embeddings.weight and hasattr(decoder, "embed_tokens")
    config.use_cache = True
    config.architectures = [type(language).__name__]  # vLLM builds the language model by it
    weights = {f"model.language_model.{name}": t.detach() for name, t in decoder.state_dict().items()}
    shared = head.weight.detach() if config.tie_word_embeddings else head.weight.detach().clone()
    return config, {**weights, "lm_head.weight": shared}


def _processor(own: Any, tower: OpenCLIPTower, vision: StockVision) -> Any:
    """Build the stock processor with the model's preprocessing of images and text."""
    return LlavaProcessor(
        _image_processor(tower),
        _with_bos(for_generation(own).tokenizer),
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy="default" if vision.class_tokens else "full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=vision.class_tokens,
    )


def _image_processor(tower: OpenCLIPTower) -> CLIPImageProcessor:
    """Build the image processor on Pillow, which resizes exactly as OpenCLIP; the one on torch rounds differently.

    It confuses rows and channels of images 1 or 3 pixels high. In transformers 5 the one on torch has its name.
    """
    on_pillow: type[CLIPImageProcessor] = getattr(transformers, "CLIPImageProcessorPil", CLIPImageProcessor)
    given, size = tower.config["preprocess"], tower.image_size
    if given["resize_mode"] == "longest":
        raise refusal("resize_mode=longest", "no image processor of transformers pads a picture like that")
    square = {"height": size, "width": size}
    crops = given["resize_mode"] == "shortest"
    return on_pillow(
        size={"shortest_edge": size} if crops else square,
        do_center_crop=crops,
        crop_size=square,
        resample=Image.Resampling.BILINEAR if given["interpolation"] == "bilinear" else Image.Resampling.BICUBIC,
        image_mean=list(given["mean"]),
        image_std=list(given["std"]),
    )


def _with_bos(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer that begins a text with the beginning-of-sequence token, as our sequences, for any class.

    Classes such as GPT-NeoX's override this setting of the file when they load it; the plain class keeps it.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = json.loads(json.dumps(settings["pre_tokenizer"]), object_hook=_alike_everywhere)
    settings |= {"padding": None, "truncation": None, "pre_tokenizer": pre_tokenizer}
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(settings))
    bos = bos_id(tokenizer)
    with_special, plain = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    if with_special != [bos, *plain]:
        token = tokenizer.convert_ids_to_tokens(bos)
        pieces = {"single": [token, "$A"], "pair": [token, "$A", "$B"]}
        before = processors.TemplateProcessing(**pieces, special_tokens=[(token, bos)])
        others = backend.post_processor if with_special == plain else None
        backend.post_processor = before if others is None else processors.Sequence([others, before])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_prefix_space=(settings["pre_tokenizer"] or {}).get("add_prefix_space", False),  # or it is set to False
        **tokenizer.special_tokens_map,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
    )


def _alike_everywhere(settings: dict[str, Any]) -> dict[str, Any]:
    """Read text after an image as text at the beginning: some tokenizers put a space before that alone."""
    return {**settings, "prepend_scheme": "always"} if settings.get("prepend_scheme") == "first" else settings


def _load(folder: Path) -> tuple[Any, Any, Any]:
    """Load a folder with stock transformers: the model, the processor on Pillow, and the default one."""
    on_pillow, default = [AutoProcessor.from_pretrained(folder, **backend) for backend in ({"backend": "pil"}, {})]
    llava, found = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    odd = differing_weights(found)
    if odd:
        raise LlavaError(f"LLaVA, loaded again, differs in {len(odd)} weights, such as {odd[0]}; nothing is written.")
    return llava.eval(), on_pillow, default
