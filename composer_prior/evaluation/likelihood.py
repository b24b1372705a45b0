"""Models as benchmarks use them: likelihoods of texts beside images, and captions."""

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from composer_prior.data.tokenizer import CaptionFormat
from composer_prior.models.image_text_model import TokenLogprobs, encode_text, with_offsets
from composer_prior.models.reference import ReferenceLM


class VisionLanguageModel(Protocol):
    """The methods that a benchmark needs of a model, such as an :class:`.ImageTextModel`."""

    def logprobs(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[Sequence[str]],
        prompt: str | None = None,
        end: bool = True,
    ) -> list[list[TokenLogprobs]]:
        """Return the log-probabilities of the texts of each image.

        Args:
            images: RGB.
            texts: for each image the texts that are scored with it.
            prompt: text between image and text. Default: that of training, where it is known, or none.
            end: score the end of the sequence too.
        """
        ...

    def generate_captions(
        self, images: Sequence[Image.Image], prompt: str | None = None, max_new_tokens: int = 64
    ) -> list[str]:
        """Return a greedy caption of each image."""
        ...


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
        encoded = [[encode_text(tokenizer, text, end) for text in some] for some in texts]
        rows = [[*prefix, *ids] for some in encoded for ids, _ in some]
        found = iter(self.model.score_texts(rows, len(prefix)))
        return with_offsets([[next(found).tolist() for _ in some] for some in encoded], encoded)


def blanks(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return grey images of the same sizes, which stand for no image."""
    return [Image.new("RGB", image.size, (127, 127, 127)) for image in images]
