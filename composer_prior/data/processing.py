"""Samples by a processor of transformers: what it writes before a caption, and the tensors of the image."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from composer_prior.data.batch import PROCESSED, ImageInputs
from composer_prior.data.chat import MARKS, Written, characters, first_token, within
from composer_prior.data.messages import one_line
from composer_prior.data.tokenizer import whole_placeholder

_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def image_tokens(processor: Any) -> list[str]:
    """Return the texts that a processor takes for an image: first the one it replaces, last the one of the features."""
    places = ((processor, "boi_token"), (processor, "image_token"), (processor.tokenizer, "image_token"))
    found = [str(token) for place, name in places if (token := getattr(place, name, None))]
    return [*dict.fromkeys(found)]  # Gemma 3 has two


def image_placeholder(processor: Any) -> str:
    """Return the text in whose place a processor of transformers puts an image; raise ValueError if it has none."""
    found = image_tokens(processor)
    if not found:
        raise ValueError(f"{type(processor).__name__} has no image token: it is no processor of images and text.")
    return whole_placeholder(found[0])


def check_height(processor: Any, image: Image.Image) -> None:
    """Raise ValueError for an image whose height a processor of transformers takes for a number of channels."""
    images = processor.image_processor
    if image.height in (1, 3) and not getattr(images, "is_fast", False):  # transformers guesses where channels are
        raise ValueError(f"{type(images).__name__} takes its height of {image.height} for that many channels")


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
    _place: tuple[int, int] = field(init=False)  # tokens of the prompt, and of what the processor writes behind it

    def __post_init__(self) -> None:
        """Find the prompt's place, here and not in each worker of a loader."""
        blank, whole, without = Image.new("RGB", (64, 64)), [], []
        if self.prompt:
            whole, without = (self._process(blank, text)["input_ids"][0].tolist() for text in (self.prompt, ""))
        same = next((i for i, pair in enumerate(zip(whole, without, strict=False)) if pair[0] != pair[1]), len(without))
        object.__setattr__(self, "_place", (len(whole) - len(without), len(without) - same))

    def __call__(self, image: Image.Image) -> ImageInputs:
        """Return the tokens before the caption and the image's tensors.

        Raises:
            ValueError: for an image that the processor cannot read, or that has too many tokens.
        """
        check_height(self.processor, image)
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

    def read(self, images: Sequence[Image.Image], written: Written) -> tuple[dict[str, list[Any]], dict[str, Tensor]]:
        """Return the tokens of a conversation or document, and the tensors of its images.

        Args:
            images: in the order in which the text has them.
            written: the text.

        Returns:
            what is aligned with the tokens, with ``learned`` and ``text_mask`` (bool); and the tensors.

        Raises:
            ValueError: for images that the processor cannot read, and a processor that does not read text as others do.
        """
        for image in images:
            check_height(self.processor, image)
        reader, processor = _Reader(self.processor.tokenizer), copy.copy(self.processor)
        processor.tokenizer = reader
        begins = written.text.startswith(first_token(self.processor.tokenizer))
        found = _called(processor, [*images], written.marked, add_special_tokens=not begins)
        if reader.encoding is None or [*reader.encoding.ids] != found["input_ids"][0].tolist():
            raise ValueError(f"{type(self.processor).__name__} changes tokens after its tokenizer: captions alone")
        aligned = {key: found[key][0].tolist() for key in _OF_TOKENS if key in found and key != "attention_mask"}
        learned, of_images = reader.within(0), reader.within(2)
        aligned["text_mask"] = [not image for image in of_images]
        aligned["learned"] = [one and not image for one, image in zip(learned, of_images, strict=True)]
        return aligned, {key: value for key, value in found.items() if key not in _OF_TOKENS}

    def _process(self, image: Image.Image, prompt: str) -> Mapping[str, Tensor]:
        return _called(self.processor, [image], image_placeholder(self.processor) + prompt)


def _called(processor: Any, images: list[Image.Image], text: str, **options: Any) -> Mapping[str, Tensor]:
    """Return what a processor makes of images and a text."""
    given = {"images": [[image.convert("RGB") for image in images]]} if images else {}
    try:
        found = processor(text=[text], return_tensors="pt", **given, **options)
        found.pop("labels", None)  # PaliGemma's, of no suffix
        return found
    except Exception as error:  # whatever the code of some processor raises
        raise ValueError(one_line(error)) from error


class _Reader:
    """A tokenizer that takes ``MARKS`` out of a text before it reads it, and knows which tokens were between."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.text = ""
        self.encoding: Any = None
        self.spans: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["tokenizer"], name)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        """Read one text, expanded by a processor, as the tokenizer does."""
        plain, self.spans, marked = "", {mark: [] for mark in MARKS}, text if isinstance(text, str) else text[0]
        for piece in re.split(f"([{MARKS}])", marked):
            if piece in self.spans:
                self.spans[piece].append(len(plain))
            else:
                plain += piece
        self.text = plain
        found = self.tokenizer(plain if isinstance(text, str) else [plain], **kwargs)
        self.encoding, to_token = found.encodings[0], found.char_to_token
        # Idefics3's processor of transformers 5 looks up characters of the text with its marks.
        found.char_to_token = lambda sample, char: to_token(sample, char - sum(map(marked[:char].count, MARKS)))
        return found

    def within(self, kind: int) -> list[bool]:
        """Return for each token whether it is between the marks of a kind."""
        spans = [*zip(self.spans[MARKS[kind]], self.spans[MARKS[kind + 1]], strict=True)]
        pairs = zip(within(characters(self.encoding, self.text), spans), self.encoding.special_tokens_mask, strict=True)
        return [inside and not added for inside, added in pairs]
