"""An LVLM as a folder in Hugging Face form: what :meth:`.LVLM.save_pretrained` writes and ``from_pretrained`` reads.

Importing this module registers the form with transformers, so that its ``Auto`` classes read such folders without
running code from them.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
)

from composer_prior.data.hub import ModelFolderError, load_pretrained, model_place
from composer_prior.data.messages import one_line
from composer_prior.data.storage import whole_folder
from composer_prior.data.tokenizer import image_token_ids
from composer_prior.models.language import generate_greedily
from composer_prior.models.modeling_prior_lvlm import (
    PriorLVLMConfig,
    PriorLVLMForConditionalGeneration,
    PriorLVLMImageProcessor,
    PriorLVLMProcessor,
)
from composer_prior.models.vision import OpenCLIPTower, PatchEmbedding

AutoConfig.register(PriorLVLMConfig.model_type, PriorLVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(PriorLVLMConfig, PriorLVLMForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(PriorLVLMConfig, slow_image_processor_class=PriorLVLMImageProcessor, exist_ok=True)
AutoProcessor.register(PriorLVLMConfig, PriorLVLMProcessor, exist_ok=True)

SHARD_SIZE = "5GB"


def hugging_face_config(model: Any) -> PriorLVLMConfig:
    """The configuration of an LVLM's Hugging Face form.

    Raises:
        ValueError: for a model that has none.
    """
    tower = model.vision
    if not isinstance(tower, (OpenCLIPTower, PatchEmbedding)):
        raise ValueError(f"a model whose vision tower is {type(tower).__name__} has no Hugging Face form")
    if hasattr(model.language, "get_base_model"):
        raise ValueError("adapters of PEFT are no part of the Hugging Face form; merge them first, merge_and_unload()")
    image_token_id, row_token_id = image_token_ids(model.tokenizer)
    text_config = deepcopy(model.language.config)
    text_config.dtype = next(model.language.parameters()).dtype
    return PriorLVLMConfig(
        text_config=text_config,
        vision=tower.config,
        projector=_projector_name(model.projector),
        image_token_id=image_token_id,
        row_token_id=row_token_id,
        architectures=[PriorLVLMForConditionalGeneration.__name__],
        dtype=text_config.dtype,
    )


def _projector_name(projector: nn.Module) -> str | None:
    if isinstance(projector, nn.Identity):
        return None
    return "linear" if isinstance(projector, nn.Linear) else "mlp"


def build_processor(model: Any, prompt: str = "") -> PriorLVLMProcessor:
    """The processor of a model's Hugging Face form.

    Args:
        model: with a vision tower of ours.
        prompt: text between image and caption in training.
    """
    image_processor = PriorLVLMImageProcessor(model.vision.config)
    return PriorLVLMProcessor(image_processor, _for_saving(model.tokenizer), prompt=prompt)


def _for_saving(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads on the left, as generation needs, and names no inputs that the model does not have."""
    copy = deepcopy(tokenizer)
    copy.padding_side, copy.model_input_names = "left", ["input_ids", "attention_mask"]
    # What is saved are the arguments that the tokenizer was made with.
    copy.init_kwargs |= {"padding_side": copy.padding_side, "model_input_names": copy.model_input_names}
    if copy.pad_token_id is None:
        copy.pad_token = copy.eos_token
    return copy


def save_folder(
    model: Any,
    folder: str | Path,
    weights: Mapping[str, Tensor] | None,
    prompt: str,
    card: str | None = None,
) -> None:
    """Write an LVLM in Hugging Face form; the folder exists only when it is whole.

    Args:
        model: with a vision tower of ours.
        folder: one that was written before is replaced, but for what was not written so.
        weights: by their names in the model, whole and on the CPU; None leaves them out.
        prompt: text between image and caption in training.
        card: text of the model card. Default: none is written.

    Raises:
        ValueError: for a model that has no Hugging Face form.
    """
    config = hugging_face_config(model)
    with torch.device("meta"):
        form: Any = PriorLVLMForConditionalGeneration(config)
    generate_greedily(form, model.tokenizer)
    state = None if weights is None else hugging_face_weights(weights, form)
    with whole_folder(Path(folder), replace=True) as temporary:
        if state is None:
            config.save_pretrained(temporary)
            form.generation_config.save_pretrained(temporary)
        else:
            form.save_pretrained(temporary, state_dict=state, max_shard_size=SHARD_SIZE)
        build_processor(model, prompt).save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card)


def hugging_face_weights(weights: Mapping[str, Tensor], form: PriorLVLMForConditionalGeneration) -> dict[str, Tensor]:
    """Weights of an LVLM under the names of its Hugging Face form, tied ones once.

    Raises:
        ValueError: if there are others, too few, or of other shapes, as after surgery on the model.
    """
    names = names_in_lvlm(form)
    known = {name for same in names.values() for name in same}
    further = sorted(name for name in weights if name not in known)
    lacking = sorted(same[0] for same in names.values() if not {*same} & {*weights})
    if further or lacking:
        example = f"{further[0]}, which it does not have" if further else f"{lacking[0]}, which is missing"
        raise ValueError(f"{len(further) + len(lacking)} weights differ, such as {example}")
    found = {name: next(weights[one] for one in same if one in weights).detach() for name, same in names.items()}
    shapes = {name: tensor.shape for name, tensor in form.state_dict().items()}
    differing = [name for name, tensor in found.items() if tensor.shape != shapes[name]]
    if differing:
        name = differing[0]
        both = f"{list(found[name].shape)} instead of {list(shapes[name])}"
        raise ValueError(f"{len(differing)} weights are of another shape, such as {name}: {both}")
    return found


def names_in_lvlm(form: PriorLVLMForConditionalGeneration) -> dict[str, list[str]]:
    """For the name of each weight in the Hugging Face form its names in an LVLM, several where weights are tied."""
    language: dict[int, list[str]] = {}
    for name, tensor in form.causal_lm.state_dict(keep_vars=True).items():  # type: ignore[union-attr, operator]
        language.setdefault(id(tensor), []).append(f"language.{name}")
    prefixes = {"model.vision_tower.": "vision.", "model.multi_modal_projector.": "projector."}
    names, seen = {}, set()
    for name, tensor in form.state_dict(keep_vars=True).items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if id(tensor) not in seen:
            names[name] = [prefixes[prefix] + name.removeprefix(prefix)] if prefix else language[id(tensor)]
        seen.add(id(tensor))
    return names


def load_form(
    path: str | Path, trust_remote_code: bool = False
) -> tuple[PriorLVLMForConditionalGeneration, PriorLVLMProcessor]:
    """Model and processor of a folder, or of a hub id, in Hugging Face form.

    Args:
        path: the folder.
        trust_remote_code: run code that comes with the language model.

    Raises:
        ModelFolderError: one line, naming what is wrong.
    """
    path = model_place(path)
    _check_folder(path)
    try:
        processor = load_pretrained(PriorLVLMProcessor, path, trust_remote_code)
        form, found = load_pretrained(
            PriorLVLMForConditionalGeneration, path, trust_remote_code, output_loading_info=True
        )
    except ModelFolderError:
        raise
    except Exception as error:
        raise ModelFolderError(f"{path} holds no model that can be loaded: {one_line(error)}") from error
    differing = differing_weights(found)
    if differing:
        raise ModelFolderError(f"{path} is not whole: {len(differing)} weights differ, such as {differing[0]}.")
    return form, processor


def differing_weights(found: Mapping[str, Any]) -> list[str]:
    """What transformers' ``output_loading_info`` says is missing, unexpected or of another shape."""
    return sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])})


def empty_form(
    path: Path, trust_remote_code: bool = False
) -> tuple[PriorLVLMForConditionalGeneration, PriorLVLMProcessor]:
    """Model and processor of a folder without weights; the model's are random.

    Raises:
        ModelFolderError: one line, naming what is wrong.
    """
    _check_folder(path)
    try:
        processor = load_pretrained(PriorLVLMProcessor, path, trust_remote_code)
        return PriorLVLMForConditionalGeneration(load_pretrained(AutoConfig, path, trust_remote_code)), processor
    except ModelFolderError:
        raise
    except Exception as error:
        raise ModelFolderError(f"{path} holds no model that can be loaded: {one_line(error)}") from error


def _check_folder(path: str | Path) -> None:
    """Refuse a folder that is no model of ours, whatever else it is."""
    file = Path(path) / "config.json"
    if not Path(path).exists():
        return  # a hub id
    try:
        kind = json.loads(file.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelFolderError(f"{path} holds no model: {one_line(error)}") from error
    if kind != PriorLVLMConfig.model_type:
        raise ModelFolderError(f"{path} holds a model of the type {kind}, not {PriorLVLMConfig.model_type}.")


def tower_of(form: PriorLVLMForConditionalGeneration) -> OpenCLIPTower | PatchEmbedding:
    """The tower of a model in Hugging Face form as an LVLM has it; it shares its weights."""
    vision, tower = form.config.vision, form.model.vision_tower
    if vision["type"] == "open_clip":
        return OpenCLIPTower.from_config(vision, tower.encoder)
    patches = PatchEmbedding(**{key: value for key, value in vision.items() if key != "type"})
    patches.proj = tower.proj
    return patches
