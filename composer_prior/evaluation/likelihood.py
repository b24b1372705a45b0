"""Models as benchmarks see them: how likely texts are beside images, and captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from composer_prior.data.hub import ModelFolderError, load_pretrained
from composer_prior.data.messages import DataError, one_line
from composer_prior.data.tokenizer import CaptionFormat, encode_caption
from composer_prior.models.continuation import continuation_logprobs, same
from composer_prior.models.language import generate_greedily, head_of
from composer_prior.models.lvlm import LVLM
from composer_prior.models.reference import ReferenceLM


class TokenLogprobs(NamedTuple):
    """Log-probability of each token of a text, and which characters of the text it is.

    Args:
        values: in nats; the last is that of the end of the sequence, where that was asked for.
        offsets: ``[start, end)`` of each token in the text; ``(n, n)`` for the end of the sequence.
    """

    values: list[float]
    offsets: list[tuple[int, int]]


class VisionLanguageModel(Protocol):
    """What a benchmark asks of a model."""

    def logprobs(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[Sequence[str]],
        prompt: str | None = None,
        end: bool = True,
    ) -> list[list[TokenLogprobs]]:
        """Log-probabilities of the texts of each image.

        Args:
            images: RGB.
            texts: for each image the texts that are scored with it.
            prompt: text between image and text. Default: that of training, where it is known, or none.
            end: score the end of the sequence too.
        """
        ...

    def captions(self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 64) -> list[str]:
        """A greedy caption of each image."""
        ...


class OwnModel:
    """An :class:`.LVLM`, as :func:`composer_prior.load` gives it or while it is trained."""

    def __init__(self, model: LVLM):
        self.model = model

    def logprobs(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[Sequence[str]],
        prompt: str | None = None,
        end: bool = True,
    ) -> list[list[TokenLogprobs]]:
        encoded = [[_encode(self.model.tokenizer, text, end) for text in some] for some in texts]
        ids = [[one for one, _ in some] for some in encoded]
        inputs = [self.model.image_processor(image.convert("RGB")) for image in images]
        return _with_offsets(self.model.text_logprobs(inputs, ids, prompt), encoded)

    def captions(self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 64) -> list[str]:
        return self.model.generate(images, prompt, max_new_tokens)


class HuggingFaceModel:
    """Any image-text-to-text model of transformers, through its processor.

    Args:
        model: such as a LLaVA, a Qwen2-VL or an Idefics3; put in evaluation mode, and its defaults of generation, such
            as a repetition penalty, are taken away.
        processor: of the model. With a chat template, image and prompt are what the user says.
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model.eval()
        self.processor = processor
        generate_greedily(model)
        if not hasattr(model, "model") or model.get_output_embeddings() is None:
            raise DataError(f"{type(model).__name__} has no decoder and head that texts could be scored with.")

    @classmethod
    def from_pretrained(cls, path: str | Path, trust_remote_code: bool = False) -> "HuggingFaceModel":
        """Model and processor of a folder or hub id.

        Raises:
            DataError: one line, naming what is wrong.
        """
        try:
            model = load_pretrained(AutoModelForImageTextToText, path, trust_remote_code)
            processor = load_pretrained(AutoProcessor, path, trust_remote_code)
        except ModelFolderError:
            raise
        except Exception as error:  # whatever the code of some model raises
            raise DataError(f"{path} holds no image-text-to-text model: {one_line(error)}") from error
        return cls(model, processor)

    @torch.no_grad()
    def logprobs(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[Sequence[str]],
        prompt: str | None = None,
        end: bool = True,
    ) -> list[list[TokenLogprobs]]:
        encoded = [[_encode(self.processor.tokenizer, text, end) for text in some] for some in texts]
        ids = [[one for one, _ in some] for some in encoded]
        inputs = [self._inputs([image], prompt) for image in images]
        found: list[list[list[float]]] = [[] for _ in images]
        for rows in same([one["input_ids"].shape[1] for one in inputs]):
            prefix = inputs[rows[0]] if len(rows) == 1 else self._inputs([images[row] for row in rows], prompt)
            scores = continuation_logprobs(self.model.model, head_of(self.model), prefix, [ids[row] for row in rows])
            for row, values in zip(rows, scores, strict=True):
                found[row] = values
        return _with_offsets(found, encoded)

    @torch.no_grad()
    def captions(self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 64) -> list[str]:
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        inputs = self._inputs(images, prompt)
        found = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _inputs(self, images: Sequence[Image.Image], prompt: str | None) -> Any:
        """What stands before a text: the image and the prompt, as the processor writes them."""
        text = getattr(self.processor, "prompt", "") if prompt is None else prompt
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
            written = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            written = self.processor.image_token + text
        pictures = [[image.convert("RGB")] for image in images]
        inputs = self.processor(images=pictures, text=[written] * len(images), padding=True, return_tensors="pt")
        return inputs.to(self.model.device)


class TextOnly:
    """A causal LM that scores the texts without any image, such as PRIOR's reference.

    Args:
        model: a :class:`.ReferenceLM` with its tokenizer.
    """

    def __init__(self, model: ReferenceLM):
        self.model = model

    def logprobs(
        self,
        images: Sequence[Any],
        texts: Sequence[Sequence[str]],
        prompt: str | None = None,
        end: bool = True,
    ) -> list[list[TokenLogprobs]]:
        tokenizer: Any = self.model.tokenizer
        prefix = CaptionFormat(tokenizer, prompt or "").prefix_ids()
        encoded = [[_encode(tokenizer, text, end) for text in some] for some in texts]
        rows = [[*prefix, *ids] for some in encoded for ids, _ in some]
        found = iter(self.model.score_texts(rows, len(prefix)))
        return _with_offsets([[next(found).tolist() for _ in some] for some in encoded], encoded)


def blanks(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Grey images of the same sizes, which stand for none."""
    return [Image.new("RGB", image.size, (127, 127, 127)) for image in images]


def _encode(tokenizer: Any, text: str, end: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text, and the characters of it that each is."""
    encoding = encode_caption(tokenizer, text)
    ids, offsets = [*encoding.ids], [*encoding.offsets]
    if end:
        ids.append(tokenizer.eos_token_id)
        offsets.append((len(text), len(text)))
    if not ids:
        raise ValueError("A text without tokens has no likelihood; give one that is not empty.")
    return ids, offsets


def _with_offsets(values: list[list[list[float]]], encoded: Sequence[Sequence[Any]]) -> list[list[TokenLogprobs]]:
    return [
        [TokenLogprobs(one, offsets) for one, (_, offsets) in zip(scores, some, strict=True)]
        for scores, some in zip(values, encoded, strict=True)
    ]
