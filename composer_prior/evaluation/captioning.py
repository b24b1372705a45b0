"""Generated captions against those that people wrote: CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from composer_prior.evaluation.caption_metrics import bleu, bleu_counts, cider_d, document_frequency, rouge_l, tokenize
from composer_prior.evaluation.captioned import CaptionBenchmark
from composer_prior.evaluation.samples import per_category, with_category


class Captioning(CaptionBenchmark):
    """``cider_d`` in [0, 10], ``bleu_1`` to ``bleu_4`` and ``rouge_l`` in [0, 1].

    The figures are pycocoevalcap's (papers often give them times 100, of which CIDEr-D's maximum is 1000). CIDEr-D's
    document frequencies come from the references of all images, also where only the first are captioned; in a
    category they are the category's own. Where these are the same for all images, as of one image, it is undefined.
    """

    headline: ClassVar[Mapping[str, str]] = {"CIDEr-D": "cider_d", "BLEU-4": "bleu_4", "ROUGE-L": "rouge_l"}
    undefined: ClassVar[Mapping[str, str]] = {"cider_d": "no n-gram of the references tells one image from another"}

    def truth(self, number: int, caption: str) -> dict[str, Any]:
        return {"references": list(self.images.samples[number].references)}

    def count(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        caption = tokenize(prediction["caption"])
        references = [tokenize(reference) for reference in prediction["references"]]
        counts = {"captions": 1.0, "rouge_l": rouge_l(caption, references), **bleu_counts(caption, references)}
        category = prediction["category"]
        found = with_category(counts, category)
        for name in {"", category}:
            key = f"cider_d/{name}" if name else "cider_d"
            frequency, documents = self._documents[name]
            told = any(count < documents for count in frequency.values())  # else all weights are 0
            found[key] = cider_d(caption, references, frequency, documents) if told else np.nan
        return found

    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return per_category(sums, _figures)

    def details(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the mean number of words of a caption."""
        return {"words": float(np.mean([len(tokenize(prediction["caption"])) for prediction in predictions]))}

    @cached_property
    def _documents(self) -> dict[str, tuple[Mapping[tuple[str, ...], int], int]]:
        """For all images (``""``) and for each category: in how many images an n-gram is, and how many there are."""
        samples = self.images.samples
        found: dict[str, tuple[Mapping[tuple[str, ...], int], int]] = {}
        for name in {"", *(sample.category for sample in samples)}:
            chosen = [sample for sample in samples if name in ("", sample.category)]
            tokens = ([tokenize(reference) for reference in sample.references] for sample in chosen)
            found[name] = document_frequency(tokens), len(chosen)
        return found


def _figures(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = sums["captions"]
    means = {name: sums[name] / count for name in ("cider_d", "rouge_l")}
    return means | {f"bleu_{n}": np.where(count > 0, value, np.nan) for n, value in enumerate(bleu(sums), 1)}
