"""Samples by a processor of transformers: what it writes before a caption, and the tensors of the image."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from composer_prior.data.batch import PROCESSED, ImageInputs
from composer_prior.data.messages import one_line

_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")  # an image has its positions by the tokens around it


def image_placeholder(processor: Any) -> str:
    """Return the text in whose place a processor of transformers puts an image; raise ValueError if it has none."""
    names = ("boi_token", "image_token")  # Gemma 3 has both and replaces the first
    found = next((token for name in names if (token := getattr(processor, name, None))), None)
    if found is None:
        raise ValueError(f"{type(processor).__name__} has no image token: it is no processor of images and text.")
    return "".join(_QWEN) if found == _QWEN[1] else str(found)


@dataclass(frozen=True)
class ProcessorInputs:
    """Make of an image what stands before its caption, as the model's processor writes it.

    Args:
        processor: of transformers. Its chat template is not used: images are captioned without one.
        prompt: text between image and caption. Default: none.
        caption_type: ``token_type_ids`` of captions; 1 for PaliGemma, whose prefix is seen both ways. Default: ``0``.
        positions: how many the language model has. Default: no limit.
        caption_tokens: the longest caption, which image and prompt have to leave positions for. Default: ``1``.
    """

    processor: Any
    prompt: str = ""
    caption_type: int = 0
    positions: int | None = None
    caption_tokens: int = 1

    def __call__(self, image: Image.Image) -> ImageInputs:
        """Return the tokens before the caption and the image's tensors.

        Raises:
            ValueError: for an image that the processor cannot read, or that has too many tokens.
        """
        images = self.processor.image_processor
        if image.height in (1, 3) and not getattr(images, "is_fast", False):  # transformers guesses where channels are
            raise ValueError(f"{type(images).__name__} takes its height of {image.height} for that many channels")
        found = self._process(image, self.prompt)
        ids = found["input_ids"][0]
        if self.positions is not None and len(ids) + self.caption_tokens > self.positions:
            raise ValueError(
                f"image and prompt take {len(ids)} of the language model's {self.positions} positions, a caption up to "
                f"{self.caption_tokens}; lower max_caption_tokens, or the size of images in model.processor"
            )
        prefix = {key: found[key][0].tolist() for key in _OF_TOKENS if key in found and key != "attention_mask"}
        if self.caption_type:
            prefix["token_type_ids"] = [0] * len(ids)
        prompt, tail = self._place
        bos = self.processor.tokenizer.bos_token_id
        before = len(ids) - tail - prompt
        prefix["text_mask"] = [i == bos for i in prefix["input_ids"][:before]] + [True] * prompt + [False] * tail
        tensors = {key: value for key, value in found.items() if key not in _OF_TOKENS}
        return ImageInputs({PROCESSED: tensors}, [], prefix, {"token_type_ids": self.caption_type, "text_mask": True})

    @cached_property
    def _place(self) -> tuple[int, int]:
        """Return the numbers of tokens of the prompt, and of what the processor writes behind it."""
        blank = Image.new("RGB", (64, 64))
        whole, without = (self._process(blank, text)["input_ids"][0].tolist() for text in (self.prompt, ""))
        same = next((i for i, pair in enumerate(zip(whole, without, strict=False)) if pair[0] != pair[1]), len(without))
        return len(whole) - len(without), len(without) - same if self.prompt else 0

    def _process(self, image: Image.Image, prompt: str) -> Mapping[str, Tensor]:
        text = image_placeholder(self.processor) + prompt
        try:
            return self.processor(images=[[image.convert("RGB")]], text=[text], return_tensors="pt")
        except Exception as error:  # whatever the code of some processor raises
            raise ValueError(one_line(error)) from error
