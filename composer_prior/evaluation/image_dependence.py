"""Dependence of each token on the image, and its agreement with PRIOR's weights."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from scipy.stats import spearmanr

from composer_prior.data.captions import overlaps
from composer_prior.evaluation.benchmark import Benchmark, figures_of
from composer_prior.evaluation.captioned import CaptionSamples
from composer_prior.evaluation.choices import TextOnly, blanks
from composer_prior.models.image_text_model import ImageTextModel, TokenLogprobs
from composer_prior.reports.page import legend, sample_card, samples_page
from composer_prior.reports.run_report import results
from composer_prior.scoring.align import align_logprobs, token_edges

PAGE_SAMPLES = 100
PAGE_NATS = 5.0  # of the strongest colour
FEWEST = 5  # occurrences of a word whose mean is told


class ImageDependence(Benchmark):
    """Per token, log P with the image minus log P without it (a grey one), and minus log P with another image.

    Figures, in nats per token: ``dependence`` over all tokens, and apart over those that the image determines
    (``dependence_related``) and the others (``dependence_other``), where the data know them; ``dependence_shuffled``
    with another sample's image in the place of its own, which is 0 or less for a model that sees. With a reference,
    whether its weights 1 - P_r fall on what the image determines: ``rank_correlation`` (Spearman, within a caption, of
    weight and dependence), and, where the data know the image-related tokens, ``precision_of_weights``: how many of the
    heaviest tokens of a caption are image-related, taking as many as there are; beside it ``precision_of_dependence``
    and ``precision_of_chance``.

    Args:
        data: an MDS data set of image-caption pairs; of several captions the first counts.
        reference: PRIOR's reference, whose weights are judged. Default: none.
    """

    headline: ClassVar[Mapping[str, str]] = {
        "nats from the image": "dependence",
        "on image-related tokens": "dependence_related",
        "on others": "dependence_other",
    }

    def __init__(self, data: str, reference: str | None = None):
        self.samples = CaptionSamples(data)
        self.reference = None if reference is None else TextOnly(reference)
        self.fingerprint = self.samples.fingerprint

    def __len__(self) -> int:
        return len(self.samples)

    def predict(self, model: ImageTextModel, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return log-probabilities per token with the image, with another and without one, and the weights."""
        samples = [self.samples[number] for number in numbers]
        others = [self.samples[self.other(number)].image for number in numbers]
        images = [sample.image for sample in samples]
        texts = [sample.captions[:1] for sample in samples]
        found = [[own for (own,) in model.logprobs(pictures, texts)] for pictures in (images, blanks(images), others)]
        weights: Iterable[Any] = [None] * len(samples)
        if self.reference is not None:
            scores = self.reference.logprobs(images, texts)
            weights = [_weights(of, own, text) for (of,), own, (text,) in zip(scores, found[0], texts, strict=True)]
        return [
            {
                "caption": text,
                "ends": [end for _, end in own.offsets],
                "with_image": own.values,
                "without": without.values,
                "with_another": None if self.other(number) == number else another.values,
                "related": None if sample.spans is None else overlaps(own.offsets, sample.spans),
                "weights": weight,
            }
            for number, sample, (text,), own, without, another, weight in zip(
                numbers, samples, texts, *found, weights, strict=True
            )
        ]

    def count(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        dependence = _dependence(prediction)
        with_image, another = np.array(prediction["with_image"]), np.array(prediction["with_another"], float)
        shuffled = another - np.array(prediction["without"])
        sums = {"tokens": float(len(dependence)), "dependence": dependence.sum(), "shuffled": shuffled.sum()}
        sums["gain"] = (with_image - another).sum()
        weights = prediction["weights"]
        if weights is not None and np.ptp(weights) and np.ptp(dependence):  # where all are equal, there is no rank
            sums |= {"correlation": spearmanr(weights, dependence).statistic, "correlated": 1.0}
        if prediction["related"] is None:
            return sums
        related = np.array(prediction["related"])
        for name, mask in (("related", related), ("other", ~related)):
            sums |= {f"tokens_{name}": float(mask.sum()), f"dependence_{name}": dependence[mask].sum()}
        sums |= {"hits_of_dependence": _hits(dependence, related), "hits_of_chance": related.sum() * related.mean()}
        if weights is not None:
            sums["hits_of_weights"] = _hits(np.array(weights), related)
        return sums

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {
            "dependence": sums["dependence"] / sums["tokens"],
            "dependence_shuffled": sums["shuffled"] / sums["tokens"],
            "own_minus_another": sums["gain"] / sums["tokens"],
        }
        for name in ("related", "other"):
            if f"tokens_{name}" in sums:
                found[f"dependence_{name}"] = sums[f"dependence_{name}"] / sums[f"tokens_{name}"]
        if "correlated" in sums:
            found["rank_correlation"] = sums["correlation"] / sums["correlated"]
        for name in ("weights", "dependence", "chance"):
            if f"hits_of_{name}" in sums:
                found[f"precision_of_{name}"] = sums[f"hits_of_{name}"] / sums["tokens_related"]
        return found

    def details(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return words by their dependence on the image, the largest first: mean over their occurrences, nats."""
        found = defaultdict(list)
        for prediction in predictions:
            for word, value in _words(prediction):
                found[word].append(value)
        means = [
            {"word": word, "count": len(values), "dependence": float(np.mean(values))}
            for word, values in found.items()
            if len(values) >= FEWEST
        ]
        return {"words": sorted(means, key=lambda one: -one["dependence"])}

    def page(self, predictions: Sequence[Mapping[str, Any]], title: str) -> str:
        """Return the figures, and captions shaded by their dependence on the image and by the reference's weights."""
        cards = []
        for prediction in predictions[:PAGE_SAMPLES]:
            values = _dependence(prediction)
            shades = [_shades(prediction, values.tolist())]
            labels = [f"the image adds {values.sum():.3g} nats, {values.mean():.3g} per token", "weights, 1 - P"]
            if prediction["weights"] is not None:
                shades.append(_shades(prediction, prediction["weights"]))
            number, texts = prediction["sample"], [""] * len(shades)
            full = (PAGE_NATS, 1.0)
            cards.append(sample_card(number, self.samples[number].encoded, texts, shades, labels[: len(shades)], full))
        above = results({}, {"image_dependence": figures_of(self, predictions)})
        above += legend("The stronger the colour, the more nats the image adds to log P of a token", PAGE_NATS)
        if self.reference is not None:
            above += legend("Below, the stronger the colour, the larger the weight 1 - P under the reference")
        return samples_page(cards, title, above=above)


def _weights(reference: TokenLogprobs, own: TokenLogprobs, text: str) -> list[float]:
    """Return 1 - P_r for each of the model's tokens; the last is the end of the sequence."""
    edges, to_edges = (token_edges(tokens.offsets[:-1], len(text)) for tokens in (reference, own))
    carried = align_logprobs(np.array(reference.values[:-1], dtype=np.float32), edges, to_edges)
    return [float(value) for value in -np.expm1([*carried.tolist(), reference.values[-1]])]


def _dependence(prediction: Mapping[str, Any]) -> np.ndarray:
    return np.array(prediction["with_image"]) - np.array(prediction["without"])


def _hits(values: np.ndarray, related: np.ndarray) -> float:
    """Count the image-related tokens among the largest values, taking as many as there are."""
    return float(related[np.argsort(-values, kind="stable")[: related.sum()]].sum())


def _words(prediction: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Yield words in lower case, each with the sum over the tokens that end in it."""
    ends, values = np.array(prediction["ends"]), _dependence(prediction)
    for word in re.finditer(r"[^\W_]+", prediction["caption"]):
        inside = (ends > word.start()) & (ends <= word.end())
        if inside.any():
            yield word[0].lower(), sum(values[inside].tolist())


def _shades(prediction: Mapping[str, Any], values: Sequence[float]) -> list[tuple[str, float | None]]:
    """Return the pieces of a caption with the values of their tokens; tokens within one character share a piece."""
    caption, start, pieces = prediction["caption"], 0, []
    for end, value in zip(prediction["ends"][:-1], values, strict=False):
        if end > start:
            pieces.append((caption[start:end], float(value)))
            start = end
    return [*pieces, (caption[start:], None), ("</s>", float(values[-1]))]
