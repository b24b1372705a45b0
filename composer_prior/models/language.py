"""The language model: any Hugging Face causal LM."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    masking_utils,
)

from composer_prior.data.hub import ModelFolderError, load_pretrained
from composer_prior.data.messages import one_line
from composer_prior.models.head import Head, TransformedHead
from composer_prior.models.lora import add_lora
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import (
    PriorLVLMForConditionalGeneration,
    decoder_of,
    logit_transform,
)
from composer_prior.registry import did_you_mean, parameters_of

VOCABULARY_MULTIPLE = 64  # of embeddings that grow, which suits products and shards
# Kinds of layers in which tokens see each other by attention alone; the last three tell their MLPs.
_ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention", "dense", "sparse", "moe"}
_PLACES = {  # in the part under the head of models with images
    "vision_tower": "vision",
    "vision_model": "vision",
    "visual": "vision",
    "multi_modal_projector": "projector",
    "connector": "projector",
    "visual.merger": "projector",
    "language_model": "language",
    "text_model": "language",
}
# Of what transformers' GenerationConfig holds, that which changes no text.
_KEPT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("use_cache", "output_attentions", "output_hidden_states", "transformers_version"),
}


def build_language_model(
    tokenizer: PreTrainedTokenizerBase,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    freeze: bool = False,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    lora: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Build a causal LM, pretrained or new, with embeddings for every token of the tokenizer.

    On the meta device it has its shapes and types and no weights, and errors that only weights show do not appear.

    Args:
        tokenizer: its length is the vocabulary of a new model.
        pretrained: hub id or folder of a Hugging Face causal LM.
        config: for a new model, ``model_type`` and the arguments of its Hugging Face configuration.
        freeze: keep its weights as they are, the embeddings of added tokens included.
        trust_remote_code: run code that comes with the pretrained model.
        attn_implementation: transformers' name of how attention is computed, such as ``sdpa``, ``eager`` or
            ``flash_attention_2``. Default: transformers' own choice.
        lora: arguments of :func:`.add_lora`: adapters are trained in the place of the LM's weights. Default: none.

    Raises:
        ValueError: unless exactly one of ``pretrained`` and ``config`` is given, for ``freeze`` beside ``lora``, or for
            an LM that :func:`check_head` or :func:`.add_lora` refuses.
        OSError: for a folder or hub id without a model.
    """
    if (pretrained is None) == (config is None):
        raise ValueError("model.language needs either `pretrained` (a hub id or folder) or `config` (a new model).")
    if freeze and lora is not None:
        raise ValueError("model.language.freeze=true: adapters are trained; set it to false, or leave out lora.")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation}
    if pretrained is None:
        settings = new_configuration({"vocab_size": len(tokenizer), **dict(config or {})}, "model.language.config")
        model = AutoModelForCausalLM.from_config(settings, **options)
    elif torch.empty(0).device.type != "meta":
        model = load_pretrained(AutoModelForCausalLM, pretrained, dtype=torch.float32, **options)
    else:
        try:
            settings = load_pretrained(AutoConfig, pretrained, trust_remote_code)
        except ModelFolderError as error:
            raise ModelFolderError(f"model.language.pretrained={error}") from error
        except (OSError, ValueError) as error:
            raise OSError(
                f"model.language.pretrained={pretrained!r} is no folder with a model: {one_line(error)}"
            ) from error
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, **options)
    _add_tokens(model, tokenizer, pretrained, trust_remote_code)
    check_head(model, reads_embeddings=True)
    model.requires_grad_(not freeze)
    if lora is not None:
        add_lora(model, **lora)
    return model


def new_configuration(arguments: Mapping[str, Any], where: str) -> PretrainedConfig:
    """Return the configuration of a new model.

    Args:
        arguments: ``model_type`` and the arguments of its class; those of its parts are mappings.
        where: their key in the recipe, for messages.

    Raises:
        ValueError: for a type that transformers does not know, and for a key that it would store without effect: one
            that is misspelled, or that belongs to a part. Other unknown keys, as config.json files have, are kept.
    """
    kind = arguments.get("model_type")
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(kind or "", [*CONFIG_MAPPING.keys()])
        raise ValueError(f"{where}.model_type={kind!r} is not a type of transformers. {hint}".strip())
    settings = AutoConfig.for_model(**arguments)
    flat = "text_config" not in arguments and reads_flat_keys(settings)
    _check_keys(arguments, settings, where, _known_keys(settings.get_text_config()) if flat else set())
    return settings


def reads_flat_keys(settings: PretrainedConfig) -> bool:
    """Return True if a configuration takes the keys of its text part beside its own, as that of Qwen2-VL does."""
    if "text_config" not in settings.sub_configs:
        return True
    return type(settings)(num_hidden_layers=1).get_text_config().num_hidden_layers == 1


def _check_keys(arguments: Mapping[str, Any], settings: PretrainedConfig, where: str, further: set[str]) -> None:
    known = _known_keys(settings) | further
    for key, value in arguments.items():
        if not (key in known or key.startswith("_") or _looks_up(settings, key)):  # config.json may hold private ones
            parts = [part for part in settings.sub_configs if key in _known_keys(getattr(settings, part, None))]
            misplaced = [part for part in parts if getattr(getattr(settings, part), key, None) != value]
            if misplaced or difflib.get_close_matches(key, known, n=1, cutoff=0.9):
                hint = f"It is one of {' and '.join(misplaced)}." if misplaced else did_you_mean(key, known)
                raise ValueError(f"{where}.{key} is not a key of a {settings.model_type}. {hint}".strip())
        if key in settings.sub_configs and isinstance(value, Mapping):
            _check_keys(value, getattr(settings, key), f"{where}.{key}", set())


def _looks_up(settings: PretrainedConfig, key: str) -> bool:
    """Return True if the model's code asks for a key that its configuration may lack, such as SigLIP's head."""
    files = Path(inspect.getfile(type(settings))).parent.glob("modeling_*.py")
    return any(re.search(rf'attr\([\w.]*config, "{re.escape(key)}"', file.read_text()) for file in files)


def _known_keys(settings: PretrainedConfig | None) -> set[str]:
    """Return the keys of a configuration's class, by their names of now and before."""
    if settings is None:  # a part that a model leaves out
        return set()
    kind = type(settings)
    known = {
        "model_type",
        "torch_dtype",
        "tie_word_embeddings",
        *vars(kind()),
        *parameters_of(kind),
        *kind.attribute_map,
    }
    if "rope_parameters" in known:  # transformers 5, which reads these too
        known |= {"rope_scaling", "rope_theta", "partial_rotary_factor"}
    return {key for key in known if not key.startswith("_")}


@torch.no_grad()
def _add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pretrained: str | None, trust: bool
) -> None:
    """Let a model embed every token: those that it has not learned begin as the mean of those that it has.

    They may have rows already, of noise that nothing has trained, where the model's table is longer than its own
    vocabulary. transformers would draw new rows around that mean, for which it decomposes a covariance of the
    embeddings' width.
    """
    known, own = vocabulary_size(model), None
    if len(tokenizer) > known:
        model.resize_token_embeddings(len(tokenizer), VOCABULARY_MULTIPLE, mean_resizing=False)
    if model.device.type == "meta":
        return
    added: list[int] = []
    if pretrained is not None:
        added = getattr(tokenizer, "added_image_token_ids", [])  # of a folder of weights alone, all that is known
        place = Path(pretrained).expanduser()
        kinds = ("tokenizer*", "vocab*", "*.model")
        has_one = not place.is_dir() or any(file for kind in kinds for file in place.glob(kind))
        with suppress(Exception):  # whatever a tokenizer raises that is not there; transformers 5 makes an empty one
            own = load_pretrained(AutoTokenizer, pretrained, trust).get_vocab() if has_one else None
    if own is not None:
        added = [id for id, token in tokenizer.added_tokens_decoder.items() if own.get(str(token)) != id]
    rows = torch.arange(vocabulary_size(model))
    new = (rows >= known) | torch.isin(rows, torch.tensor(added, dtype=torch.long))
    learned = ~new if own is None else ~new & torch.isin(rows, torch.tensor([*own.values()]))
    if new.any():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for tensor in module.parameters():
                tensor[new] = learned.to(tensor) @ tensor / learned.sum()  # their mean, without a copy of them


def generate_greedily(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Let a model generate the most likely tokens unless a call says otherwise, and be saved so.

    A model of a hub brings defaults, such as a repetition penalty, beams or a temperature, which transformers applies
    without a word and may refuse to write.

    Args:
        model: of transformers, or one of PEFT around it.
        tokenizer: whose beginning, end and padding of a sequence the model takes. Default: it keeps its own.
    """
    model = causal_lm_of(model)
    neutral = {name: value for name, value in vars(GenerationConfig()).items() if name not in _KEPT}
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        for name in vars(config).keys() & neutral.keys():
            setattr(config, name, getattr(PretrainedConfig(), name, None))
    if model.generation_config is not None:  # of a class that generates
        vars(model.generation_config).update(neutral)
        if tokenizer is not None:
            eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
            model.generation_config.update(
                bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=pad if pad is not None else eos
            )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of tokens that the model embeds."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


def hidden_size(model: PreTrainedModel) -> int:
    """Return the size of the model's input embeddings."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[1]


def last_hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return ``[B, T, D]`` hidden states that the head maps to logits.

    The model may be one of PEFT around a causal LM, whose decoder holds the adapters. Sequences are padded at their end
    or not at all, so the mask is causal. The inputs are ``input_ids`` or ``inputs_embeds``, and what else the decoder
    takes.
    """
    check_adapters(model)
    read: Tensor = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    if read.is_cuda and "attention_mask" not in inputs:
        # Without one, transformers builds a mask [B, 1, T, T], which keeps attention from its causal kernel.
        inputs["attention_mask"] = torch.ones(read.shape[:2], dtype=torch.long, device=read.device)
    return decoder_of(causal_lm_of(model))(**inputs, use_cache=False).last_hidden_state


def check_decoder(model: PreTrainedModel) -> None:
    """Raise a ValueError for a model without a decoder under a head, which the loss and likelihoods are made of."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [part for part in model.children() if any(module is embeddings for module in part.modules())]
    if head is None or not parts or parts[0] is embeddings:
        raise ValueError(f"{type(model).__name__} has no decoder and head that texts could be scored with.")


def check_adapters(model: PreTrainedModel) -> None:
    """Raise if a method of PEFT adds virtual tokens to the input."""
    config = cast(Any, model).active_peft_config if hasattr(model, "get_base_model") else None
    if config is not None and config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value} adds virtual tokens to the text, which have no place; use LoRA.")


def head_of(model: PreTrainedModel) -> Head:
    """Return the map of hidden states to logits: the module, with the scale and cap of the model's configuration."""
    module = model.get_output_embeddings()
    scale, softcap = logit_transform(causal_lm_of(model).config.get_text_config())
    return module if (scale, softcap) == (1, None) else TransformedHead(module, scale, softcap)


def is_recurrent(model: Any) -> bool:
    """Return True if a layer carries more from token to token than attention's keys and values, as in Mamba or LFM2.

    Padding before a text, several texts in one row and a cropped cache change the results of such a layer. The kinds of
    layers decide; an unknown kind counts as recurrent. The model may be one of PEFT, and needs no weights.
    """
    model = parts_of(model)["language"]
    config = model.config.get_text_config(decoder=True)
    kinds = {kind for name in ("layer_types", "layers_block_type") for kind in getattr(config, name, None) or ()}
    layers = getattr(model, "language_model", model).modules()  # beside one there may be a tower
    return bool(model._is_stateful or kinds - _ATTENTION or any(isinstance(layer, nn.Conv1d) for layer in layers))


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer blocks, in order: the modules that a model's class says are never split among devices."""
    names = block_names(model)
    return [module for module in causal_lm_of(model).modules() if is_block(names, module)]


def block_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the classes of :func:`transformer_blocks`."""
    parts = [part for part in causal_lm_of(model).modules() if isinstance(part, PreTrainedModel)]
    return {name for part in parts for name in part._no_split_modules or ()}


def is_block(names: set[str], module: nn.Module) -> bool:
    """Return True for a transformer block; ask before FSDP2, which gives modules another class."""
    return type(module).__name__ in names


def parts_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the parts of a model by the names that recipes use: ``vision``, ``projector`` and ``language``.

    A model on text alone is its own language model. In a model of another family parts are found by their usual names;
    one that has none of them is its own language model too. Qwen2-VL's projector lies in its tower.
    """
    base: Any = causal_lm_of(model)
    if isinstance(base, PriorLVLMForConditionalGeneration):
        vision, projector = base.model.vision_tower, base.model.multi_modal_projector
        return {"vision": vision, "projector": projector, "language": base.causal_lm}
    if base.config.get_text_config() is base.config:
        return {"language": base}
    modules = dict(decoder_of(base).named_modules())
    return {"language": base, **{part: modules[name] for name, part in _PLACES.items() if name in modules}}


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights by the names that recipes use, such as ``projector.0.weight``; a tied one several times."""
    base, parts = causal_lm_of(model), parts_of(model)
    if isinstance(base, PriorLVLMForConditionalGeneration) or len(parts) == 1:
        for part, module in parts.items():
            for name, weight in module.named_parameters(remove_duplicate=False):
                yield f"{part}.{name}", weight
        return
    owners = {module: f"{part}." for part, module in parts.items()} | {
        base.get_output_embeddings(): "language.lm_head."
    }
    places = {f"{name}.": owners[module] for name, module in model.named_modules() if name and module in owners}
    for name, weight in model.named_parameters(remove_duplicate=False):
        place = max((place for place in places if name.startswith(place)), key=len, default="")
        whole = places.get(place, "") + name.removeprefix(place)
        yield whole.replace("model.image_newline", "projector.image_newline"), weight  # LLaVA-OneVision's, in no module


def as_forward(model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function as a forward pass of a model: where FSDP2 has sharded it, it gathers what its root unit holds."""
    if not isinstance(model, FSDPModule):
        return function(*args, **kwargs)
    if "_call" not in vars(model):
        vars(model)["_call"] = lambda function, *args, **kwargs: function(*args, **kwargs)
        register_fsdp_forward_method(model, "_call")
    return cast(Any, model)._call(function, *args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode and then back in the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def causal_lm_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the Hugging Face model inside one of PEFT."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def check_head(model: PreTrainedModel, reads_embeddings: bool = False) -> None:
    """Refuse an LM whose logits are not what we make of its hidden states.

    A few short passes. What the model does to its logits shows on others in their place, large whatever the weights
    are. A model on the meta device, where few can run, is taken at its configuration's word.

    Args:
        model: a causal LM, or one of PEFT around it.
        reads_embeddings: it is to read embeddings in the place of token ids, as an LVLM's does: check that it can.

    Raises:
        ValueError: one line, naming the model's class and what is not supported.
    """
    name = type(causal_lm_of(model)).__name__
    if reads_embeddings and model.config.get_text_config() is not model.config:
        raise ValueError(f"{name} has a vision or audio tower of its own; give its text model, saved alone.")
    if any("recurrent_states" in vars(module) for module in model.modules()):  # RecurrentGemma
        raise ValueError(f"{name} keeps the states of one batch for the next, which is not supported.")
    if model.device.type == "meta":
        return
    try:
        with evaluating(model):
            complaint = _complaint(model, reads_embeddings)
    except Exception as error:  # whatever the code of some model raises
        line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{name} cannot be used as a language model: {type(error).__name__}: {line}") from error
    for module in model.modules():
        if isinstance(getattr(module, "rope_deltas", None), Tensor):  # Qwen2-VL keeps it; other ranks have none yet
            cast(Any, module).rope_deltas = None
    if complaint:
        raise ValueError(f"{name} {complaint}, which is not supported.")


def _complaint(model: PreTrainedModel, reads_embeddings: bool) -> str | None:
    """Return the first violated assumption about an LM, or None."""
    head, embeddings = TransformedHead.of(head_of(model)), model.get_input_embeddings()
    ids = torch.arange(4, device=model.device)[None] * (vocabulary_size(model) // 4)
    seen: list[tuple[Tensor, Tensor]] = []
    readers: list[nn.Module] = []

    def replace(_: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        large = torch.linspace(-100, 100, logits.shape[-1], device=logits.device).expand(logits.shape)
        seen.append((inputs[0], large))
        return large.clone()

    def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if torch.equal(inputs[0], ids):
            readers.append(module)

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [head.module.register_forward_hook(replace), *(table.register_forward_pre_hook(look) for table in tables)]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        return "makes its logits without its output embeddings"
    hidden, replaced = seen[0]
    if not _same(logits, head.transform(replaced)):
        return "changes its logits after the LM head"
    if not _same(hidden, last_hidden_states(model, input_ids=ids)):
        return "changes its hidden states before the LM head"
    if reads_embeddings and (
        len(readers) > 1 or not _same(hidden, last_hidden_states(model, inputs_embeds=embeddings(ids)))
    ):
        return "makes more of token ids than the embeddings in whose place images stand"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors differ by rounding alone."""
    tolerance = 1e-3 if a.dtype == torch.float32 else 2e-2
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())


def prepare_compile() -> None:
    """Keep transformers' search for packed sequences out of compiled graphs.

    Traced, it makes every attention mask a full one, in code that the C++ compiler refuses (torch 2.7).
    """
    module: Any = masking_utils
    search = module.find_packed_sequence_indices
    if not getattr(search, "kept_out", False):
        module.find_packed_sequence_indices = torch.compiler.disable(search)
        module.find_packed_sequence_indices.kept_out = True
