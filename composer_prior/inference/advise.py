"""Advice on token weights: measure how much of the captions the image explains, and which weights find it."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from composer.utils import dist, get_device

from composer_prior.algorithms.image_gain.weights import raw_weights
from composer_prior.algorithms.prior.weights import raw_weights as prior_weights
from composer_prior.evaluation.benchmark import run_benchmark
from composer_prior.evaluation.image_dependence import ImageDependence
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.training.config import HELPERS, SHIPPED, load_recipe, name_of_data
from composer_prior.training.reference import model_folder
from composer_prior.training.run import prepare

NEEDS_IMAGE = 0.5  # nats by which the log-probability of a token falls when it sees another image
FEW = 0.02  # share of tokens that need the image
WORDS, FEWEST = 8, 5  # words that are named, and occurrences of each
FLOOR = 0.1  # a default, see docs/scores.md: no tested rule finds it from these figures
METHODS = ("next-token prediction", "prior", f"prior, floor {FLOOR}", f"image_gain, floor {FLOOR}")


@dataclass
class Advice:
    """Figures of a data set's captions.

    Args:
        captions: that were read.
        tokens: of them.
        reference_nll: nats per token under the text-only reference.
        viewer_nll: nats per token under the viewer.
        share: of the tokens, those that need the image: the viewer's log-probability falls by more than 0.5 nats when
            it sees another sample's image. Tokens for which it rises by as much are subtracted, as chance.
        methods: by method ``on_needed``, the share of the weight on tokens that need the image; ``on_predicted``, that
            on tokens with ``P_r`` above 0.5; ``precision``, how many of a caption's heaviest tokens need the
            image, taking as many as do; and ``effective_sample_size``.
        favoured: words of which less than a tenth need the image, with the largest mean weights under PRIOR.
    """

    captions: int
    tokens: int
    reference_nll: float
    viewer_nll: float
    share: float
    methods: dict[str, dict[str, float]]
    favoured: list[str]

    @property
    def recommendation(self) -> str:
        """A sentence that names a method and the reason."""
        prior, gain = (self.methods[name]["precision"] for name in METHODS[2:])
        if self.share < FEW or self.viewer_nll >= self.reference_nll:
            return (
                "Next-token prediction is enough: the image explains next to nothing here, or the viewer does not see "
                "it. Try a viewer that is trained longer, or one that exists."
            )
        named = "PRIOR" if gain - prior < 0.1 else "ImageGain"
        plain, chosen = (self.methods[METHODS[number]] for number in (0, 2 if named == "PRIOR" else 3))
        return (
            f"{named} with floor={FLOOR}: {prior:.0%} of PRIOR's heaviest tokens and {gain:.0%} of ImageGain's need "
            f"the image. Tokens that need the image get {chosen['on_needed']:.0%} of the weight instead of "
            f"{plain['on_needed']:.0%}, and those that the text predicts {chosen['on_predicted']:.0%} instead of "
            f"{plain['on_predicted']:.0%}. The floor is a default. "
            "docs/evidence.md has our results with such weights; composer-prior study measures yours."
        )

    def __str__(self) -> str:
        width = max(map(len, METHODS))
        names = ("weight on tokens that need the image", "on predicted ones", "precision", "effective sample size")
        rows = [f"{'':{width}}  {'  '.join(names)}"]
        for name, figures in self.methods.items():
            cells = (f"{value:{len(head)}.3f}" for head, value in zip(names, figures.values(), strict=True))
            rows.append(f"{name:{width}}  {'  '.join(cells)}")
        favoured = f"PRIOR favours words that the image does not explain: {', '.join(self.favoured)}"
        return "\n".join(
            [
                f"{self.captions:,} captions, {self.tokens:,} tokens: {self.reference_nll:.3f} nats per token without "
                f"the image, {self.viewer_nll:.3f} with it; {self.share:.1%} of the tokens need the image",
                *rows,
                *([favoured] if self.favoured else []),
                self.recommendation,
            ]
        )


def advise(
    data: str,
    *,
    reference: str | None = None,
    viewer: str | None = None,
    samples: int = 500,
    steps: int = 300,
    out: str = "advice",
) -> Advice:
    """Measure how much of the captions the image explains, and which weights find it.

    Without models, a small reference and a small viewer are trained on the data first, into ``out``. The viewer's tower
    then starts from random weights, and photographs need a viewer that exists. All captions are those that the models
    have learned. ImageGain's weights and the need of the image come from one viewer, which favours ImageGain.
    A page shows captions, shaded by their dependence on the image and by PRIOR's weights.

    Args:
        data: folder or remote of an MDS data set, as ``composer-prior convert`` makes it.
        reference: folder or hub id of a text-only language model that knows the captions.
        viewer: folder or hub id of an image-text-to-text model that has learned such captions.
        samples: captions that are judged.
        steps: that each of the two models is trained for, 64 samples each.
        out: folder of the models, the answers and the page.

    Raises:
        ValueError, OSError: naming the option, a model or the data.
    """
    if (reference is None) != (viewer is None):
        raise ValueError("Give reference= and viewer=, or neither, and both are trained.")
    for name, number in (("samples", samples), ("steps", steps)):
        if number < 1:
            raise ValueError(f"{name}={number}: expected at least 1.")
    folder = Path(out).expanduser()
    if reference is None or viewer is None:
        reference, viewer = _train(data, steps, folder)
    dist.initialize_dist(get_device(None))
    model = ImageTextModel.from_pretrained(viewer).to(cast(torch.device, get_device(None)._device))
    benchmark = ImageDependence(data, reference)
    settings = {"data": benchmark.fingerprint, "reference": reference, "viewer": viewer}
    file = folder / "predictions.jsonl"
    _, predictions = run_benchmark(
        benchmark, model, predictions=file, settings=settings, limit=samples, progress=None, overwrite=True
    )
    if dist.get_global_rank() == 0:
        (folder / "advice.html").write_text(benchmark.page(predictions, f"Advice: {data}"), encoding="utf-8")
    return advice_of(predictions)


def _train(data: str, steps: int, folder: Path) -> tuple[str, str]:
    """Train a small reference and viewer, unless they exist, and return their folders."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked
    words = [f"train={data}", f"tokenizer.name={folder}/tokenizer-{name_of_data(data)}"]
    for name in HELPERS:
        words += [f"{name}.max_duration={steps}ba", f"{name}.run_folder={folder}/${{run_name}}-{steps}"]
        words += [f"{name}.sample_captions=0"]
    recipe = load_recipe(SHIPPED / "gain_vit.yaml", words)
    prepare(recipe, itself=False)
    return str(model_folder(recipe.helpers["reference"])), str(model_folder(recipe.helpers["viewer"]))


def advice_of(predictions: Sequence[Mapping[str, Any]]) -> Advice:
    """Return the figures of the predictions of :class:`.ImageDependence` with a reference."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    weights: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    for prediction in predictions:
        another = prediction["with_another"] or prediction["without"]  # one sample alone has no other
        seen, blind = np.array(prediction["with_image"]), np.array(another)
        alone = np.log1p(-np.minimum(np.array(prediction["weights"]), 1 - 1e-7))
        found["seen"].append(seen)
        found["alone"].append(alone)
        found["needs"].append(seen - blind > NEEDS_IMAGE)
        found["chance"].append(blind - seen > NEEDS_IMAGE)
        found["predicted"].append(alone > np.log(0.5))
        texts, sees = torch.tensor(alone)[None], torch.tensor(seen)[None]
        mask = torch.ones_like(texts, dtype=torch.bool)
        of_caption = (
            mask.float(),
            prior_weights(texts, mask, 1.0, 0.0),
            prior_weights(texts, mask, 1.0, FLOOR),
            raw_weights(sees, texts, mask, 1.0, FLOOR),
        )
        for name, values in zip(METHODS, of_caption, strict=True):
            weights[name].append(values[0].numpy().astype(float))
    needs = np.concatenate(found["needs"])
    return Advice(
        captions=len(predictions),
        tokens=len(needs),
        reference_nll=float(-np.concatenate(found["alone"]).mean()),
        viewer_nll=float(-np.concatenate(found["seen"]).mean()),
        share=max(0.0, float(needs.mean() - np.concatenate(found["chance"]).mean())),
        methods={name: _figures(values, found["needs"], found["predicted"]) for name, values in weights.items()},
        favoured=_favoured(predictions, weights["prior"], found["needs"]),
    )


def _figures(
    weights: Sequence[np.ndarray], needs: Sequence[np.ndarray], predicted: Sequence[np.ndarray]
) -> dict[str, float]:
    hits, sizes = 0.0, []
    for values, need in zip(weights, needs, strict=True):
        count = int(need.sum())
        cut = np.sort(values)[::-1][count - 1] if count else np.inf
        above, tied = values > cut, values == cut
        hits += need[above].sum() + (need[tied].mean() * (count - above.sum()) if count else 0)  # ties share the rest
        sizes.append(values.sum() ** 2 / max(len(values) * (values**2).sum(), 1e-12))
    every, all_needs = np.concatenate(weights), np.concatenate(needs)
    return {
        "on_needed": float(every[all_needs].sum() / max(every.sum(), 1e-12)),
        "on_predicted": float(every[np.concatenate(predicted)].sum() / max(every.sum(), 1e-12)),
        "precision": float(hits / max(1, all_needs.sum())),
        "effective_sample_size": float(np.mean(sizes)),
    }


def _favoured(
    predictions: Sequence[Mapping[str, Any]], weights: Sequence[np.ndarray], needs: Sequence[np.ndarray]
) -> list[str]:
    """Return words that do not need the image, those of the largest mean weight first."""
    found: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for prediction, values, need in zip(predictions, weights, needs, strict=True):
        ends = np.array(prediction["ends"])
        for word in re.finditer(r"\w{3,}", prediction["caption"]):
            tokens = slice(int((ends <= word.start()).sum()), int((ends < word.end()).sum()) + 1)
            found[word[0].lower()].append((float(values[tokens].mean()), bool(need[tokens].any())))
    means = {
        word: float(np.mean([value for value, _ in pairs]))
        for word, pairs in found.items()
        if len(pairs) >= FEWEST and np.mean([needed for _, needed in pairs]) < 0.1
    }
    return [word for word in sorted(means, key=lambda one: -means[one]) if means[word] > 0.5][:WORDS]
