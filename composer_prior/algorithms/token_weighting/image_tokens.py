"""Positions of the image in the text of a vision-language model, which a text-only reference must not see."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from composer_prior.data.batch import IGNORE_INDEX

# Attributes of Hugging Face configurations that hold the id of a token of the image.
_CONFIG_NAMES = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "vision_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_index",
    "eoi_token_index",
    "row_token_id",
)
# Tokens around and between those, which only the tokenizer knows (Idefics3, SmolVLM, InternVL, Pixtral, Gemma 3 ...).
_TOKEN = re.compile(
    r"<\|?(image|video)(_pad|_soft_token)?\|?>|<\|vision_(start|end|pad)\|>|<(start|end)_of_image>"
    r"|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>|</?img>|<IMG_CONTEXT>|\[IMG(_BREAK|_END)?\]"
)


def image_token_ids(model: Any) -> tuple[int, ...]:
    """Ids of the tokens that stand for the image in the model's input.

    They are what the Hugging Face configuration names, and the special tokens of ``model.tokenizer`` that lay an image
    out.

    Raises:
        ValueError: for a Hugging Face vision-language model without its tokenizer.
    """
    config = getattr(getattr(model, "model", model), "config", None)
    if hasattr(config, "vision_config") and getattr(model, "tokenizer", None) is None:
        raise ValueError(
            "The image's tokens cannot be told from text without the model's tokenizer: give the model's processor."
        )
    ids = {getattr(config, name, None) for name in _CONFIG_NAMES}
    added = getattr(getattr(model, "tokenizer", None), "added_tokens_decoder", {})
    ids |= {token_id for token_id, token in added.items() if _TOKEN.fullmatch(str(token))}
    return tuple(sorted(token_id for token_id in ids if isinstance(token_id, int)))


def image_positions(input_ids: Tensor, labels: Tensor, model: Any) -> Tensor:
    """``[B, T]`` bool: positions of the image's tokens, and of the line breaks that lie between them and nothing else.

    Args:
        input_ids: ``[B, T]`` int64.
        labels: ``[B, T]`` int64; a line break with a label is text.
        model: a :class:`.ComposerLVLM`.
    """
    image = torch.isin(input_ids, torch.tensor(image_token_ids(model), dtype=torch.long, device=input_ids.device))
    breaks = torch.tensor(_line_break_ids(model), dtype=torch.long, device=input_ids.device)
    is_break = torch.isin(input_ids, breaks) & (labels == IGNORE_INDEX)
    return image | (is_break & _next_to(image, is_break) & _next_to(image.flip(1), is_break.flip(1)).flip(1))


def text_positions(batch: Mapping[str, Tensor], model: Any) -> Tensor:
    """``[B, T]`` bool: the real positions that are not the image's, see :func:`image_positions`.

    A batch may say itself which they are, ``text_mask``.
    """
    if "text_mask" in batch:
        return batch["text_mask"]
    is_text = ~image_positions(batch["input_ids"], batch["labels"], model)
    return is_text & batch["attention_mask"].bool() if "attention_mask" in batch else is_text


def without_images(batch: Mapping[str, Tensor], model: Any) -> Tensor:
    """``[B, 1]`` bool: the samples without an image, of a model that reads images and has a tokenizer; else none.

    Args:
        batch: see :func:`text_positions`.
        model: a :class:`.ComposerLVLM`.
    """
    none = torch.zeros_like(batch["labels"][:, :1], dtype=torch.bool)
    config = getattr(getattr(model, "model", model), "config", None)
    reads_images = hasattr(config, "vision_config") or hasattr(config, "image_token_id")
    knows = reads_images and getattr(model, "tokenizer", None) is not None
    if not knows or not ("text_mask" in batch or image_token_ids(model)):
        return none
    real = batch["attention_mask"].bool() if "attention_mask" in batch else ~none
    return ~(real & ~text_positions(batch, model)).any(1, keepdim=True)


def _next_to(image: Tensor, is_break: Tensor) -> Tensor:
    """Return True at positions whose last token that is no line break belongs to the image."""
    place = torch.arange(image.shape[1], device=image.device).expand_as(image)
    last = torch.where(is_break, -1, place).cummax(1).values
    return image.gather(1, last.clamp(min=0)) & (last >= 0)


def _line_break_ids(model: Any) -> list[int]:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return []
    return [i for text in ("\n", "\n\n", "\n\n\n") for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
