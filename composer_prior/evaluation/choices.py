"""Choices between texts about an image by the model's likelihood, the base of foils and of questions with options."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from composer_prior.data.tokenizer import CaptionFormat
from composer_prior.evaluation.benchmark import Benchmark
from composer_prior.evaluation.samples import other_images, per_category, with_category
from composer_prior.models.image_text_model import ImageTextModel, TokenLogprobs, encode_text, with_offsets
from composer_prior.models.reference import ReferenceLM

TIE = 1e-3  # nats: below that, a model prefers neither
SCORES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "total": lambda with_image, text_only, tokens: with_image,
    "per_token": lambda with_image, text_only, tokens: with_image / tokens,
    "image_gain": lambda with_image, text_only, tokens: with_image - text_only,
}


@dataclass(frozen=True)
class Choice:
    """One sample."""

    image: Image.Image  # RGB
    texts: tuple[str, ...]  # the first one is true, the others are not
    category: str = ""  # of the sample; each has its accuracy
    prompt: str | None = None  # text between image and text; None: that of training
    details: Mapping[str, Any] | None = None  # further keys of the prediction


class TextOnly:
    """A causal LM that scores the texts without any image, such as PRIOR's reference, which has its tokenizer."""

    def __init__(self, model: ReferenceLM | str):
        self.model = ReferenceLM.of(model)

    def logprobs(
        self, images: Sequence[Any], texts: Sequence[Sequence[str]], prompt: str | None = None, end: bool = True
    ) -> list[list[TokenLogprobs]]:
        """Return what :meth:`.ImageTextModel.logprobs` returns; the images count only by their number."""
        tokenizer: Any = self.model.tokenizer
        prefix = CaptionFormat(tokenizer, prompt or "").prefix_ids()
        encoded = [[encode_text(tokenizer, text, end) for text in some] for some in texts]
        rows = [[*prefix, *ids] for some in encoded for ids, _ in some]
        found = iter(self.model.score_texts(rows, len(prefix)))
        return with_offsets([[next(found).tolist() for _ in some] for some in encoded], encoded)


def blanks(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return grey images of the same sizes, which stand for no image."""
    return [Image.new("RGB", image.size, (127, 127, 127)) for image in images]


class ChoiceBenchmark(Benchmark):
    """Accuracies of choosing the true text among others.

    ``total`` chooses by log-probability, ``per_token`` by log-probability per token, and ``image_gain`` by how much the
    image raises it, log P(text | image) - log P(text). Each has a figure with another sample's image (``shuffled``),
    the text-only level for a model that ignores images. ``text_only`` is the accuracy of log P(text) alone, and
    ``chance`` that of guessing. Equally likely texts share the point.

    Args:
        reference: the model of log P(text): ``blank``, the model itself with a grey image, or a causal LM on text, such
            as PRIOR's reference.
        end: score the end of the text too.
    """

    headline: ClassVar[Mapping[str, str]] = {
        "right": "image_gain",
        "with another image": "image_gain_shuffled",
        "text only": "text_only",
        "chance": "chance",
    }

    def __init__(self, reference: str | ReferenceLM = "blank", end: bool = True):
        self.end = end
        self.text_only = None if reference == "blank" else TextOnly(reference)

    @abstractmethod
    def choice(self, number: int) -> Choice:
        """Return a sample."""

    def predict(self, model: ImageTextModel, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return log-probabilities of all texts: with the image, with another sample's, and without one."""
        samples = [self.choice(number) for number in numbers]
        images = [sample.image for sample in samples]
        others = [self.choice(self.other(number)).image for number in numbers]
        found = [
            self._by_prompt(source, pictures, samples)
            for source, pictures in ((model, images), (model, others), (self.text_only or model, blanks(images)))
        ]
        predictions = []
        for number, sample, own, shuffled, text_only in zip(numbers, samples, *found, strict=True):
            alone = self.other(number) == number
            predictions.append(
                {
                    "category": sample.category,
                    "texts": list(sample.texts),
                    "logprobs": [sum(text.values) for text in own],
                    "logprobs_shuffled": None if alone else [sum(text.values) for text in shuffled],
                    "logprobs_text_only": [sum(text.values) for text in text_only],
                    "tokens": [len(text.values) for text in own],
                    **(sample.details or {}),
                }
            )
        return predictions

    def _by_prompt(self, model: Any, images: list[Image.Image], samples: list[Choice]) -> list[list[TokenLogprobs]]:
        """Return log-probabilities; samples of one prompt go to the model together."""
        found: dict[int, list[TokenLogprobs]] = {}
        for prompt in dict.fromkeys(sample.prompt for sample in samples):
            rows = [row for row, sample in enumerate(samples) if sample.prompt == prompt]
            scores = model.logprobs([images[i] for i in rows], [samples[i].texts for i in rows], prompt, self.end)
            found.update(zip(rows, scores, strict=True))
        return [found[row] for row in range(len(samples))]

    def points(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        """Return the points of a sample, by the names of the accuracies."""
        tokens = np.array(prediction["tokens"])
        # Files of earlier versions say logprobs_prior.
        text_only = np.array(prediction.get("logprobs_text_only") or prediction["logprobs_prior"])
        points = {"chance": 1 / len(tokens), "text_only": point(text_only)}
        for key, suffix in (("logprobs", ""), ("logprobs_shuffled", "_shuffled")):
            scores = np.array(prediction[key] or [np.nan] * len(tokens))
            points |= {f"{name}{suffix}": point(score(scores, text_only, tokens)) for name, score in SCORES.items()}
        return points

    def count(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        return with_category({**self.points(prediction), "samples": 1.0}, prediction["category"])

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return per_category(
            sums, lambda some: {name: total / some["samples"] for name, total in some.items() if name != "samples"}
        )


class FileChoices(ChoiceBenchmark):
    """Choices about images in files; each sample has an ``image``, its file or its bytes."""

    def __init__(self, samples: Sequence[Any], reference: str, end: bool):
        self.samples = samples
        self._others = other_images([sample.image for sample in samples])
        super().__init__(reference, end)

    def __len__(self) -> int:
        return len(self.samples)

    def other(self, number: int) -> int:
        return self._others[number]


def point(scores: np.ndarray) -> float:
    """Return 1 if the first score is the highest, shared among scores within a tie; NaN where scores are."""
    best = scores >= scores.max() - TIE
    return float(best[0]) / float(best.sum()) if best.any() else np.nan
