"""Which of several texts fits an image, by the model's likelihood: what foils and questions with options share."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from composer_prior.evaluation.benchmark import Benchmark
from composer_prior.evaluation.likelihood import TextOnly, TokenLogprobs, VisionLanguageModel, blanks
from composer_prior.evaluation.samples import per_category, with_category
from composer_prior.models.reference import ReferenceLM

TIE = 1e-3  # nats: below that, a model prefers neither
SCORES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "total": lambda with_image, text_only, tokens: with_image,
    "per_token": lambda with_image, text_only, tokens: with_image / tokens,
    "image_gain": lambda with_image, text_only, tokens: with_image - text_only,
}


@dataclass(frozen=True)
class Choice:
    """One sample.

    Args:
        image: RGB.
        texts: the first one is true, the others are not.
        category: of the sample; each has an accuracy of its own.
        prompt: text between image and text; None: that of training.
        details: what the line of the prediction says besides.
    """

    image: Image.Image
    texts: tuple[str, ...]
    category: str = ""
    prompt: str | None = None
    details: Mapping[str, Any] | None = None


class ChoiceBenchmark(Benchmark):
    """Accuracies of choosing the true text: by its log-probability (``total``), by that per token (``per_token``), and
    by how much the image raises it (``image_gain``), log P(text | image) - log P(text).

    Beside each stands what the model gets with another sample's image (``shuffled``), which is the text-only level for
    a model that ignores images; ``text_only`` is the accuracy of log P(text) alone, and ``chance`` that of guessing.
    Texts that are equally likely share the point.

    Args:
        reference: the model of log P(text): ``blank``, the model itself with a grey image, or a causal LM on text, such
            as PRIOR's reference.
        end: score the end of the text too.
    """

    headline = MappingProxyType(
        {
            "right": "image_gain",
            "with another image": "image_gain_shuffled",
            "text only": "text_only",
            "chance": "chance",
        }
    )

    def __init__(self, reference: str | ReferenceLM = "blank", end: bool = True):
        self.end = end
        self.text_only: TextOnly | None = None
        if reference != "blank":
            self.text_only = TextOnly(
                ReferenceLM.from_pretrained(reference) if isinstance(reference, str) else reference
            )

    @abstractmethod
    def choice(self, number: int) -> Choice:
        """A sample."""

    def predict(self, model: VisionLanguageModel, numbers: Sequence[int]) -> list[dict[str, Any]]:
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
        """Log-probabilities; samples of one prompt go to the model together."""
        groups = defaultdict(list)
        for place, sample in enumerate(samples):
            groups[sample.prompt].append(place)
        found: dict[int, list[TokenLogprobs]] = {}
        for prompt, places in groups.items():
            texts = [samples[place].texts for place in places]
            scores = model.logprobs([images[place] for place in places], texts, prompt, self.end)
            found.update(zip(places, scores, strict=True))
        return [found[place] for place in range(len(samples))]

    def points(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        """What a sample earns, by the names of the accuracies."""
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
        return per_category(sums, _accuracies)


def _accuracies(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: total / sums["samples"] for name, total in sums.items() if name != "samples"}


def point(scores: np.ndarray) -> float:
    """1 if the first score is the highest, shared among those within a tie; NaN where scores are."""
    best = scores >= scores.max() - TIE
    return float(best[0]) / float(best.sum()) if best.any() else np.nan
