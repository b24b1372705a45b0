"""A model as a folder that ``from_pretrained`` reads, written as a whole."""

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import cached_file

from composer_prior.data.hub import find_model, load_pretrained
from composer_prior.data.storage import whole_folder
from composer_prior.models.lora import merged, scaling_of
from composer_prior.models.prior_lvlm import PriorLVLMForConditionalGeneration, PriorLVLMProcessor
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import TOWERS

SHARD_SIZE = "5GB"
PROMPT = "prompt.txt"  # of training, which a processor of transformers does not keep


def load_processor(kind: Any, path: str | Path, trust_remote_code: bool = False) -> Any:
    """Load the processor of a model folder or hub id, with the prompt of training where it is there."""
    processor = load_pretrained(kind, path, trust_remote_code)
    with suppress(OSError):  # there is none, or the hub is away
        processor.prompt = Path(str(cached_file(find_model(path), PROMPT))).read_text()
    return processor


def save_model_folder(
    model: PreTrainedModel,
    processor: Any,
    folder: str | Path,
    weights: Mapping[str, Tensor] | None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a model with its processor and the code that reads it; the folder exists only when it is whole.

    Args:
        model: of transformers; FSDP2 may have sharded it.
        processor: of the model, or the tokenizer of a language model.
        folder: one that was written before is replaced, but for what was not written so.
        weights: by their names in the model, whole and on the CPU; None leaves them out. Those of a recipe's LoRA are
            merged.
        files: names and texts of further files. Default: none.

    Raises:
        ValueError: for a model that no folder holds: with adapters, a tower from outside, or weights that its
            configuration does not describe, as after surgery.
    """
    empty = empty_copy(model)
    state = None if weights is None else fitting_weights(merged(weights, scaling_of(model)), empty)
    with whole_folder(Path(folder), replace=True) as temporary:
        if state is None:
            empty.config.save_pretrained(temporary)
            empty.generation_config.save_pretrained(temporary)
        else:
            empty.save_pretrained(temporary, state_dict=state, max_shard_size=SHARD_SIZE)
        for_generation(processor).save_pretrained(temporary)
        if hasattr(processor, "prompt") and not isinstance(processor, PriorLVLMProcessor):
            (temporary / PROMPT).write_text(processor.prompt)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text)


def empty_copy(model: PreTrainedModel) -> Any:
    """Build a model of the same configuration on the meta device; raise if that does not describe the model."""
    if hasattr(model, "get_base_model"):
        raise ValueError("adapters of PEFT are no part of a model folder; merge them first, merge_and_unload()")
    if isinstance(model, PriorLVLMForConditionalGeneration):
        tower = model.model.vision_tower
        if not isinstance(tower, tuple(TOWERS.values())):
            raise ValueError(f"a model with the tower {type(tower).__name__} cannot be saved in Hugging Face format")
    config = deepcopy(model.config)
    dtype = next(model.parameters()).dtype
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.dtype = dtype
    known: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        empty = known(config).to(dtype)
    empty.generation_config = model.generation_config
    return empty


def fitting_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model, tied ones once; raise if their names or shapes are not the model's."""
    expected: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    further, lacking = sorted(weights.keys() - expected.keys()), sorted(expected.keys() - weights.keys())
    if further or lacking:
        example = f"{further[0]}, which it does not have" if further else f"{lacking[0]}, which is missing"
        raise ValueError(f"{len(further) + len(lacking)} weights differ, such as {example}")
    differing = [name for name, tensor in weights.items() if tensor.shape != expected[name].shape]
    if differing:
        name = differing[0]
        both = f"{list(weights[name].shape)} instead of {list(expected[name].shape)}"
        raise ValueError(f"{len(differing)} weights are of another shape, such as {name}: {both}")
    once = {id(tensor): name for name, tensor in reversed(expected.items())}  # the first name of a tied weight
    return {name: weights[name].detach() for name, tensor in expected.items() if once[id(tensor)] == name}


def for_generation(processor: Any) -> Any:
    """Return a copy of our processor whose tokenizer pads on the left and names the model's inputs alone."""
    if not isinstance(processor, PriorLVLMProcessor):
        return processor
    tokenizer = deepcopy(processor.tokenizer)
    tokenizer.padding_side, tokenizer.model_input_names = "left", ["input_ids", "attention_mask"]
    # transformers saves the arguments of the constructor.
    tokenizer.init_kwargs |= {"padding_side": "left", "model_input_names": tokenizer.model_input_names}
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return PriorLVLMProcessor(processor.image_processor, tokenizer, processor.prompt, processor.chat_template)
