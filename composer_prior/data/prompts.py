"""Images with a prompt and a completion for transformers' Trainer and TRL, with any tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.tokenizer import IMAGE_TOKEN, bos_id


def beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the token that begins every sequence: the beginning of sequence, or else its end."""
    return str(tokenizer.convert_ids_to_tokens(bos_id(tokenizer)))


def prompt_and_completion(processor: Any, caption: str, prompt: str = "") -> dict[str, str]:
    """Return the prompt and the completion of a sample, as TRL and :class:`CompletionCollator` read them.

    Args:
        processor: of an image-text-to-text model.
        caption: the text that is learnt, as our models and references learn it: a space is put before it only behind a
            prompt.
        prompt: text between image and caption. Default: none.

    Raises:
        ValueError: for a tokenizer without an end of sequence.
    """
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no end-of-sequence token; set its eos_token.")
    image = getattr(processor, "image_token", IMAGE_TOKEN)
    space = " " if prompt else ""
    return {
        "prompt": f"{beginning(tokenizer)}{image}{prompt}",
        "completion": f"{space}{caption}{tokenizer.eos_token}",
    }


class CompletionCollator:
    """Make a batch of rows with ``image``, ``prompt`` and ``completion``, whose labels are those of the completion.

    Labels are found by position, so a tokenizer may use one token for beginning, end and padding.

    Args:
        processor: of an image-text-to-text model; one without padding pads with the end of sequence.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = [[row["image"]] for row in rows]

        def process(texts: list[str]) -> dict[str, Tensor]:
            options = {"add_special_tokens": False, "padding": True, "return_tensors": "pt"}
            return self.processor(images=images, text=texts, **options)

        before = process([row["prompt"] for row in rows])["attention_mask"].sum(1, keepdim=True)  # [B, 1]
        batch = process([row["prompt"] + row["completion"] for row in rows])
        real = batch["attention_mask"]
        learnt = real.bool() & (real.cumsum(1) > before)
        return {**batch, "labels": torch.where(learnt, batch["input_ids"], IGNORE_INDEX)}
