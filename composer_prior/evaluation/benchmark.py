"""The base of benchmarks, and how one is run: predictions line by line, and figures with intervals from them alone."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from composer.utils import dist
from tqdm import tqdm

from composer_prior.data.files import begin_lines
from composer_prior.data.messages import one_line
from composer_prior.models.image_text_model import ImageTextModel

RESAMPLES = 1000
Figures = dict[str, dict[str, float | None]]


class Benchmark(ABC):
    """Samples, the answers of a model, and the figures of the answers.

    A figure is a function of sums over samples, so that its interval is one product of matrices. Register a class with
    ``@register("benchmark", name)``; the arguments of its constructor are the options of the command.
    """

    fingerprint: str  # of what the samples are made from
    batch_size: int = 16  # samples per call of the model
    headline: ClassVar[Mapping[str, str]] = {}  # figures of the closing line, by their words there
    undefined: ClassVar[Mapping[str, str]] = {}  # reasons why a figure may have no value, by its name

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    def other(self, number: int) -> int:
        """Return the sample whose image replaces that of a sample; itself if there is no other image."""
        return (number + max(1, len(self) // 2)) % len(self)

    @abstractmethod
    def predict(self, model: ImageTextModel, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the answers of a model to some samples, as JSON values for :meth:`.Benchmark.count`."""

    @abstractmethod
    def count(self, prediction: Mapping[str, Any]) -> dict[str, float]:
        """Return the terms that one sample adds to the sums."""

    @abstractmethod
    def figures(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the figures of sums over samples, which have the names of :meth:`.Benchmark.count` and any shape."""

    def details(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return further results, for JSON."""
        return {}

    def page(self, predictions: Sequence[Mapping[str, Any]], title: str) -> str:
        """Return samples and predictions as a page of HTML."""
        raise ValueError(f"page= is given, and {type(self).__name__} makes no page; leave it out.")


def run_benchmark(
    benchmark: Benchmark,
    model: ImageTextModel,
    *,
    predictions: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    progress: bool | None = False,
    overwrite: bool = False,
    share: bool = True,
    seed: int = 17,
) -> tuple[Figures, list[dict[str, Any]]]:
    """Return the figures of a model with 95 % intervals, and its predictions; every rank must call it.

    Args:
        benchmark: to run.
        model: to answer.
        predictions: a file with a line of JSON per sample, from which an interrupted run goes on. Default: none.
        settings: of the predictions; a file made with other settings is refused.
        limit: number of first samples. Default: all.
        progress: show a bar; None: on a terminal.
        overwrite: replace the file of predictions.
        share: ranks share the samples; otherwise each does all, as sharded weights require.
        seed: of the intervals.
    """
    count = len(benchmark) if limit is None else min(limit, len(benchmark))
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    box: list[list[dict[str, Any]]] = [[]]
    if predictions is not None and rank == 0:
        box = [begin_lines(predictions, settings or {}, overwrite)]
    dist.broadcast_object_list(box)
    found = {line["sample"]: line for line in box[0] if line["sample"] < count}
    todo = [number for number in range(count) if number not in found]
    batches = [todo[start : start + benchmark.batch_size] for start in range(0, len(todo), benchmark.batch_size)]
    step = ranks if share else 1
    hidden = None if progress is None else not progress  # None: unless there is a terminal
    if rank != 0:
        hidden = True
    with tqdm(total=count, initial=len(found), unit=" samples", disable=hidden) as bar:
        for start in range(0, len(batches), step):
            together = batches[start : start + step]
            place = rank if share else 0
            mine = together[place] if place < len(together) else []
            answers, trouble = [], None
            try:
                answers = benchmark.predict(model, mine) if mine else []
            except Exception as error:  # the other ranks must not wait for this one's answers
                trouble = error
            lines = [{"sample": number, **answer} for number, answer in zip(mine, answers, strict=not trouble)]
            said = "" if trouble is None else one_line(trouble)
            gathered = dist.all_gather_object((lines, said)) if share else [(lines, said)]
            if trouble is not None:
                raise trouble
            for _, elsewhere in gathered:
                if elsewhere:
                    raise RuntimeError(f"Another rank could not answer: {elsewhere}")
            new = [line for part, _ in gathered for line in part]
            if predictions is not None and rank == 0:
                with open(predictions, "a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in new)
            found.update((line["sample"], line) for line in new)
            bar.update(len(new))
    ordered = [found[number] for number in sorted(found)]
    return figures_of(benchmark, ordered, seed), ordered


def figures_of(benchmark: Benchmark, predictions: Sequence[Mapping[str, Any]], seed: int = 17) -> Figures:
    """Return figures with 95 % percentile intervals of a bootstrap over samples.

    An undefined value is None, as is the interval of one sample and of a category (``name/category``) with one sample.
    """
    if not predictions:
        return {}
    counts = [benchmark.count(prediction) for prediction in predictions]
    sizes = Counter(category for one in counts for category in {name.partition("/")[2] for name in one})
    names = sorted({name for one in counts for name in one})
    table = np.array([[one.get(name, 0.0) for name in names] for one in counts]).reshape(len(counts), len(names))
    draws = np.random.default_rng(seed).multinomial(
        len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES if len(counts) > 1 else 0
    )  # [R, n], how often each sample is drawn

    def evaluate(sums: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return benchmark.figures(dict(zip(names, np.moveaxis(sums, -1, 0), strict=True)))

    values, resampled = evaluate(table.sum(0)), evaluate(draws @ table)
    return {
        name: _interval(value, resampled[name] if sizes[name.partition("/")[2]] > 1 else resampled[name][:0])
        for name, value in values.items()
    }


def reasons(benchmark: Benchmark, figures: Figures) -> dict[str, str]:
    """Return the reasons why figures have no value, by their names."""
    other = "there is no other image or nothing to divide by"
    named = {name: name.partition("/")[0] for name, one in figures.items() if one["value"] is None}
    return {name: benchmark.undefined.get(figure, other) for name, figure in named.items()}


def _interval(value: Any, resampled: np.ndarray) -> dict[str, float | None]:
    defined = resampled[np.isfinite(resampled)]
    low, high = map(float, np.percentile(defined, [2.5, 97.5])) if len(defined) else (None, None)
    return {"value": float(value) if np.isfinite(value) else None, "low": low, "high": high}
