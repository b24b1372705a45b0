"""The language model: any Hugging Face causal LM, and the tokens that stand for an image in its input."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

IMAGE_TOKEN = "<image>"
ROW_TOKEN = "<row>"


def build_language_model(
    tokenizer: PreTrainedTokenizerBase,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    freeze: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM, pretrained or new, whose embeddings hold every token of the tokenizer.

    Args:
        tokenizer: its length is the vocabulary of a new model.
        pretrained: hub id or folder of a Hugging Face causal LM.
        config: for a new model, ``model_type`` and the arguments of its Hugging Face configuration.
        freeze: keep its weights as they are, the embeddings of added tokens included.
        trust_remote_code: run code that comes with the pretrained model.

    Raises:
        ValueError: unless exactly one of ``pretrained`` and ``config`` is given, or for an LM whose logits are not
            its head applied to its last hidden states.
    """
    if pretrained is not None and config is None:
        model = AutoModelForCausalLM.from_pretrained(
            pretrained, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
    else:
        model = AutoModelForCausalLM.from_config(_configuration(tokenizer, pretrained, config, trust_remote_code))
    if len(tokenizer) > vocabulary_size(model):
        model.resize_token_embeddings(len(tokenizer))
    check_head(model)
    return model.requires_grad_(not freeze)


def language_skeleton(
    tokenizer: PreTrainedTokenizerBase,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    freeze: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """What :func:`build_language_model` builds, without its weights: call it on the meta device.

    Raises:
        ValueError, OSError: as there, but for what only weights can show.
    """
    settings = _configuration(tokenizer, pretrained, config, trust_remote_code)
    text = settings.get_text_config(decoder=True)
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    return model.requires_grad_(not freeze)


def _configuration(
    tokenizer: PreTrainedTokenizerBase,
    pretrained: str | None,
    config: dict[str, Any] | None,
    trust_remote_code: bool,
) -> PretrainedConfig:
    """The Hugging Face configuration of a pretrained model or of a new one."""
    if (pretrained is None) == (config is None):
        raise ValueError("model.language needs either `pretrained` (a hub id or folder) or `config` (a new model).")
    if pretrained is not None:
        return AutoConfig.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
    settings = {"vocab_size": len(tokenizer), **dict(config or {})}
    return AutoConfig.for_model(settings.pop("model_type", None), **settings)


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the image and row-separator tokens, added to the tokenizer when it has none."""
    missing = [token for token in (IMAGE_TOKEN, ROW_TOKEN) if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_additional_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.convert_tokens_to_ids(ROW_TOKEN)


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that starts every sequence: the tokenizer's own, or its end-of-sequence token."""
    token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token_id is None:
        raise ValueError("The tokenizer has neither a beginning- nor an end-of-sequence token; set its eos_token.")
    return token_id


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of tokens that the model embeds."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


def hidden_size(model: PreTrainedModel) -> int:
    """Size of the model's input embeddings."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[1]


def last_hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """``[B, T, D]`` hidden states that the head maps to logits.

    The model may be one of PEFT around a causal LM, whose decoder holds the adapters.

    Raises:
        ValueError: for a method of PEFT that adds virtual tokens to the input.
    """
    causal_lm: Any = model
    if hasattr(model, "get_base_model"):
        config = cast(Any, model).active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"{config.peft_type.value} adds virtual tokens to the text, which have no place; use LoRA."
            )
        causal_lm = cast(Any, model).get_base_model()
    return causal_lm.base_model(**inputs, use_cache=False).last_hidden_state


def head_of(model: PreTrainedModel) -> nn.Module:
    """The module that maps hidden states to logits."""
    return model.get_output_embeddings()


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse an LM that changes its logits after the head (scaling, soft-capping), which we would leave out."""
    was_training = model.training
    model.eval()
    ids = torch.arange(2, device=model.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    ours = head_of(model)(last_hidden_states(model, input_ids=ids))
    model.train(was_training)
    if not torch.allclose(logits.float(), ours.float(), atol=1e-4, rtol=1e-3):
        raise ValueError(f"{type(model).__name__} changes its logits after the LM head, which is not supported.")
