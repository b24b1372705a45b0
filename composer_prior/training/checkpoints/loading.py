"""Load the model of a checkpoint, or the weights of a checkpoint or model folder into another model."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from composer_prior.data.hub import ModelFolderError, load_pretrained
from composer_prior.data.messages import one_line
from composer_prior.data.tokenizer import add_image_tokens, has_image_tokens, tokenizer_fingerprint
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.image_text_model import ImageTextModel, captioner_classes, classes_of
from composer_prior.models.language import causal_lm_of, generate_greedily, parts_of
from composer_prior.models.lora import beside_adapters, merged
from composer_prior.models.model_folder import fitting_weights, load_processor
from composer_prior.training.checkpoints.identity import OLD_NAMES, RunIdentity, read_identity, read_sharded, read_state
from composer_prior.training.checkpoints.pickles import METADATA
from composer_prior.training.checkpoints.storage import check_sums, find_weights

ARCHITECTURE = "architecture"  # a folder of the run: the model in Hugging Face format without weights


def load_weights(path: str, model: ComposerLVLM, trust_remote_code: bool = False) -> str:
    """Give a model the weights of another run, and nothing else of it; return a line on what was loaded from where.

    The weights fit if names and shapes of all of a part's weights (vision, projector, language) are the same, and the
    tokenizer, which says what each row of the embeddings stands for. A part that is not there at all, as in a language
    model on text, stays as it is. Data and other settings of the run may differ.

    Args:
        path: see :func:`.find_weights`.
        model: with whole weights, on the CPU; or on the meta device, for which no weight is read and all else is
            checked.
        trust_remote_code: run code that comes with a model folder. Default: ``False``.
    """
    source = find_weights(path)
    empty = any(parameter.is_meta for parameter in model.parameters())
    weights, fingerprint = read_weights(source, trust_remote_code, has_image_tokens(model.tokenizer), whole=not empty)
    remedy = "init_from needs the same architecture and tokenizer"
    if fingerprint is not None and fingerprint != tokenizer_fingerprint(model.tokenizer):
        raise ValueError(f"init_from={path}: it was trained with another tokenizer than the recipe's; {remedy}.")
    parts: dict[str, Any] = parts_of(model.model)
    target: Any = model.model
    loaded = list(parts)
    found = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if not any(re.search(r"\.(vision_|visual\.)", name) for name in weights):  # a language model on text
        loaded, target, head = ["language"], parts["language"], causal_lm_of(target).get_output_embeddings()
        if head not in {*target.modules()}:  # in other families the head is beside the language model
            target = nn.ModuleDict({"model": target, "lm_head": head})
    try:
        fitting = fitting_weights(beside_adapters(found, target), target)
    except ValueError as error:
        raise ValueError(f"init_from={path}: {error}; {remedy}.") from error
    if not empty:
        target.load_state_dict(fitting, strict=False)  # what is not there is tied
    kept = sorted({*parts} - {*loaded})
    without = f"; {', '.join(kept)} stay as the recipe says" if kept else ""
    return f"Weights: {', '.join(sorted(loaded))} from {source}{without}"


def read_weights(
    source: Path, trust_remote_code: bool = False, image_tokens: bool = True, whole: bool = True
) -> tuple[dict[str, Tensor], str | None]:
    """Return weights by their names in a :class:`.ComposerLVLM`, and the fingerprint of their tokenizer if known.

    Args:
        source: see :func:`.find_weights`.
        trust_remote_code: run code that comes with a model folder. Default: ``False``.
        image_tokens: the tokenizer of a language model gets our image tokens. Default: ``True``.
        whole: ``False`` reads names and shapes alone; the values are then of no use. Default: ``True``.
    """
    if source.is_file():
        if whole:
            check_sums(source)
        state = read_state(source)
        weights = {name.removeprefix("module."): tensor for name, tensor in state["model"].items()}
        fingerprint = state.get("callbacks", {}).get(RunIdentity.__qualname__, {}).get("tokenizer")
    elif (source / METADATA).is_file():
        prefix = "state.model."
        weights = {name.removeprefix(prefix): tensor for name, tensor in read_sharded(source, prefix, whole).items()}
        fingerprint = (read_identity(source) or {}).get("tokenizer")
    else:
        classes = classes_of(source, trust_remote_code)
        if not whole:
            kinds = classes or (AutoTokenizer, AutoConfig, AutoModelForCausalLM)
            with torch.device("meta"):
                reader, model = _with_new_weights(source, kinds, trust_remote_code)
            tokenizer = getattr(reader, "tokenizer", reader)
        elif classes is not None:
            lvlm = ImageTextModel.from_pretrained(source, trust_remote_code)
            model, tokenizer = lvlm.model, lvlm.tokenizer
        else:
            model = load_pretrained(AutoModelForCausalLM, source, trust_remote_code, dtype=torch.float32)
            tokenizer = load_pretrained(AutoTokenizer, source, trust_remote_code)
        if image_tokens and classes is None:
            add_image_tokens(tokenizer)
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        fingerprint = tokenizer_fingerprint(tokenizer)
    if any(name.startswith("model.language.") for name in weights):
        raise ValueError(OLD_NAMES.format(source))
    return weights, fingerprint


def _with_new_weights(folder: Path, classes: tuple[Any, Any, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """Return what reads the inputs of a folder's model, and that model with new weights."""
    reader, settings, kind = classes
    config = load_pretrained(settings, folder, trust_remote_code)
    made = getattr(kind, "from_config", None)  # None: of our own class
    model = made(config, trust_remote_code=trust_remote_code) if made else kind(config)
    return load_processor(reader, folder, trust_remote_code), model


def load_checkpoint(path: Path, trust_remote_code: bool = False) -> ImageTextModel:
    """Load the model of a checkpoint, which has the weights; the run folder above it has the rest.

    Args:
        path: see :func:`.find_weights`.
        trust_remote_code: run code that comes with the model. Default: ``False``.

    Raises:
        ModelFolderError: one line, naming what is wrong.
    """
    try:
        source = find_weights(str(path)).resolve()
    except ValueError as error:
        raise ModelFolderError(f"{path}: {one_line(error)}.") from error
    runs = [parent for parent in source.parents if (parent / ARCHITECTURE / "config.json").is_file()]
    if not runs:
        raise ModelFolderError(f"{source} has no {ARCHITECTURE}/ in a folder above it; leave it in its run folder.")
    folder = runs[0] / ARCHITECTURE
    try:
        processor, model = _with_new_weights(folder, captioner_classes(folder, trust_remote_code), trust_remote_code)
        weights, fingerprint = read_weights(source)
        whole = {name.removeprefix("model."): tensor.float() for name, tensor in weights.items()}
        whole = merged(whole, (read_identity(source) or {}).get("lora_scaling"))
    except ModelFolderError:
        raise
    except Exception as error:  # whatever the code of some model raises
        raise ModelFolderError(f"{source} cannot be loaded: {one_line(error)}") from error
    if fingerprint not in (None, tokenizer_fingerprint(processor.tokenizer)):
        raise ModelFolderError(f"{source} was made with another tokenizer than {folder} holds.")
    try:
        model.load_state_dict(fitting_weights(whole, model), strict=False, assign=True)  # what is not there is tied
    except ValueError as error:
        raise ModelFolderError(f"{source} is no checkpoint of the model in {folder}: {error}.") from error
    model.tie_weights()
    generate_greedily(model, processor.tokenizer)
    return ImageTextModel(model.eval(), processor)
