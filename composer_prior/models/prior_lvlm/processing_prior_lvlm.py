"""Processor of the LVLM: images and text become the model's input."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .image_processing_prior_lvlm import flat_images

LARGEST_LENGTH = 10**9  # more is transformers' way to say that there is no limit
IMAGE_TOKEN = "<image>"
ROW_TOKEN = "<row>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}<image>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)


class PriorLVLMProcessor(ProcessorMixin):
    """Prepare images and text: a beginning of sequence, the image in the place of ``<image>``, the text.

    Every piece of text is read on its own, as in training, and the sequence begins with the beginning-of-sequence token
    once, whether the text spells it or not.

    Args:
        image_processor: a :class:`.PriorLVLMImageProcessor`.
        tokenizer: of the language model, with the image tokens.
        prompt: text between image and caption in training, which stands where no text is given.
        chat_template: see transformers. Default: the parts one after the other.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - as transformers has it
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, prompt: str = "", chat_template: str | None = None
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.prompt = prompt
        self.image_token = IMAGE_TOKEN
        self.image_token_id, self.row_token_id = map(tokenizer.convert_tokens_to_ids, (IMAGE_TOKEN, ROW_TOKEN))
        eos = tokenizer.eos_token_id
        self.bos_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: Any = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        truncation: Any = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return ``input_ids`` and ``attention_mask`` ``[B, T]``, and the tensors of the images.

        ``images`` is one image or several, in the order in which the texts name them. ``text`` is one text or several,
        each with ``<image>`` once for each of its images; the default is ``<image>`` and the prompt of training, for
        each image. ``add_special_tokens`` puts the beginning-of-sequence token before text without an image, too.
        ``truncation`` cuts sequences after ``max_length`` tokens. The other arguments are those of a tokenizer.

        Raises:
            ValueError: if texts and images differ in number, or an image would be cut.
        """
        processed = [self.image_processor.process(image) for image in flat_images(images if images is not None else [])]
        if text is None:
            text = [IMAGE_TOKEN + self.prompt] * len(processed)
        texts = [text] if isinstance(text, str) else list(text)
        named = sum(one.count(IMAGE_TOKEN) for one in texts)
        if named != len(processed):
            raise ValueError(f"The text names {named} images with {IMAGE_TOKEN}, and {len(processed)} are given.")
        layouts = iter(layout for _, layout in processed)
        ids = [self._ids(one, layouts, add_special_tokens) for one in texts]
        if truncation and max_length is not None:
            cut = [row[max_length:] for row in ids]
            if any({self.image_token_id, self.row_token_id} & set(row) for row in cut):
                raise ValueError(f"max_length={max_length} cuts an image; give more.")
            ids = [row[:max_length] for row in ids]
        tokens = self._padded(ids, padding, padding_side or self.tokenizer.padding_side, max_length, pad_to_multiple_of)
        tensors = self.image_processor.batch([tensors for tensors, _ in processed]) if processed else {}
        return BatchFeature({**tokens, **tensors}, return_tensors)

    def _ids(self, text: str, layouts: Iterator[list[bool]], add_special_tokens: bool) -> list[int]:
        pieces = text.split(IMAGE_TOKEN)
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if number:
                ids += [self.row_token_id if row_ends else self.image_token_id for row_ends in next(layouts)]
            if piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        if (len(pieces) > 1 or add_special_tokens) and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _padded(
        self, ids: list[list[int]], padding: Any, side: str, max_length: int | None, multiple: int | None
    ) -> dict[str, list[list[int]]]:
        length = 0
        if padding == "max_length":
            length = max_length or self.tokenizer.model_max_length
            if length > LARGEST_LENGTH:
                raise ValueError("padding='max_length' needs max_length, for the tokenizer has none.")
        elif padding not in (False, "do_not_pad"):
            length = max(map(len, ids), default=0)
        length = -(-length // (multiple or 1)) * (multiple or 1)
        found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
        for row in ids:
            missing = max(0, length - len(row))
            for key, values, fill in (("input_ids", row, self.pad_id), ("attention_mask", [1] * len(row), 0)):
                pad = [fill] * missing
                found[key].append(pad + values if side == "left" else values + pad)
        return found


PriorLVLMProcessor.register_for_auto_class("AutoProcessor")
