"""The page at the end of a run: curves of its metrics, results beside others', and captions of images."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any, TypeVar

from composer_prior.reports.page import document, escape, legend, picture, side_by_side, table
from composer_prior.reports.plots import COLOURS, Line, line_chart

T = TypeVar("T")
POINTS = 500  # of a curve, at most

TOKENS = {"all": "", "image-related": "_image_related", "other": "_other"}
"""The tokens that metrics are over, and how the names of those metrics end."""

Figure = Mapping[str, float | None]
"""``value``, and ``low`` and ``high`` of its interval where there is one."""

_NAMES = {"cider_d": "CIDEr-D", "bleu": "BLEU", "rouge_l": "ROUGE-L", "chair_i": "CHAIR-i", "chair_s": "CHAIR-s"}
# Explanation of each figure, which says where lower is better.
_WORDS = {
    "loss": "nats per token, lower is better; image-related tokens are those that the image determines",
    "total": "accuracy of choosing the true text by log P(text | image)",
    "per_token": "accuracy of choosing it by log P(text | image) per token",
    "image_gain": "accuracy of choosing it by log P(text | image) - log P(text), so that likely texts gain nothing",
    "cider_d": "similarity of rare n-grams with the reference captions, 0 to 10",
    "bleu": "share of a caption's n-grams up to that length that the reference captions have, 0 to 1",
    "rouge_l": "longest common sequence of words with the reference captions, 0 to 1",
    "chair_i": "share of the mentions of objects that are not in the image; lower is better",
    "chair_s": "share of the captions that mention such an object; lower is better",
    "recall": "share of the objects in the image that are named",
    "precision": "share of the named objects that are in the image",
    "all_right": "share of the captions that name every object in the image and no other",
    "dependence": "nats per token that the image adds to log P",
    "own_minus_another": "nats per token by which the right image is better than another",
    "rank_correlation": "of the reference's weights with the dependence, within a caption",
    "precision_of_weights": "share of image-related tokens among the heaviest",
}
# Figures that others are compared with.
_SHUFFLED, _TEXT_ONLY, _CHANCE = "_shuffled", "text_only", "chance"
_COMPARED = {
    _SHUFFLED: "shuffled images: the figure with the image of another sample",
    _TEXT_ONLY: "text only: accuracy of log P(text) alone",
    _CHANCE: "chance: accuracy of guessing",
}


@dataclass
class Curve:
    """A curve of any number of points in bounded memory: neighbours are averaged so that few enough are left.

    Bins have the same width, a power of two that doubles when there are more than ``POINTS`` of them.
    """

    width: int = 1
    bins: dict[int, list[float]] = field(default_factory=dict)  # count, sum of x, sum of y

    def add(self, x: float, y: float) -> None:
        """Add a point."""
        self._put(int(x // self.width), (1, x, y))
        while len(self.bins) > POINTS:
            self.width *= 2
            narrow, self.bins = self.bins, {}
            for number, sums in narrow.items():
                self._put(number // 2, sums)

    def _put(self, number: int, sums: Sequence[float]) -> None:
        self.bins[number] = [old + new for old, new in zip(self.bins.get(number, (0, 0, 0)), sums, strict=True)]

    @property
    def points(self) -> list[tuple[float, float]]:
        """The means of the bins, in order."""
        return [(x / count, y / count) for _, (count, x, y) in sorted(self.bins.items())]


class Logged:
    """Any number of a run's records: a thinned curve of each metric, and the last values; finite numbers only."""

    def __init__(self, records: Iterable[Mapping[str, Any]]):
        self.curves: defaultdict[str, Curve] = defaultdict(Curve)
        self.last: dict[str, float] = {}
        for record in records:
            for name, value in record.items():
                if type(value) not in (int, float) or not math.isfinite(value):
                    self.last.pop(name, None)
                    continue
                self.last[name] = value
                if name.startswith(("loss/train/", "metrics/", "prior/", "lr-", "eval/")):
                    self.curves[name].add(record["batch"], value)
        self.end = self.last.get("batch", 0.0)

    def line(self, metric: str, name: str, colour: int, **style: Any) -> list[Line]:
        """Return the curve of a metric as a list, empty where it was not logged."""
        return [Line(name, self.curves[metric].points, colour, **style)] if metric in self.curves else []


def run_report(
    records: Iterable[Mapping[str, Any]],
    title: str,
    *,
    validation: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    benchmarks: Mapping[str, Mapping[str, Figure]] = MappingProxyType({}),
    cards: Iterable[str] = (),
    recipe: str = "",
) -> str:
    """Return the page as HTML, without the parts that a run lacks.

    Args:
        records: of the run, each with ``batch`` and the metrics logged at it; read once.
        title: plain text.
        validation: metrics by the name of their model.
        benchmarks: figures by the name of their benchmark.
        cards: of :func:`.sample_card`, one per sample.
        recipe: plain text.
    """
    logged = Logged(records)
    charts = _training_charts(logged) + _stream_charts(logged) + _benchmark_charts(logged)
    units = {"batch": "batches", "sample": "samples", "token": "tokens"}
    counts = [f"{count:,} {said}" for unit, said in units.items() if (count := logged.last.get(f"time/{unit}"))]
    summary = f"Trained on {', '.join(counts)}." if counts else "How long it was trained was not logged."
    parts = [f"<p>{escape(summary)}</p>\n", results(validation, benchmarks)]
    if charts:
        width = max(curve.width for curve in logged.curves.values())
        means = f" Each point is the mean over up to {width:,} batches." if width > 1 else ""
        says = f"Loss and accuracy are unweighted unless a chart says so; those of training are of each batch.{means}"
        parts.append(f"<h2>Curves</h2>\n<p>{says}</p>\n{side_by_side(charts)}")
    if cards := list(cards):
        says = legend("The stronger the colour of a generated token, the more probable it was to the model")
        parts.append(f"<h2>Captions of validation images</h2>\n{says}{side_by_side(cards, 'samples')}")
    if recipe:
        parts.append(f"<details><summary>Recipe</summary><pre>{escape(recipe)}</pre></details>\n")
    return document(title, "".join(parts))


def _training_charts(logged: Logged) -> list[str]:
    loss, accuracy = list[Line](), list[Line]()
    for colour, (tokens, suffix) in enumerate(TOKENS.items(), start=1):
        for part, said, dots in (("train", "training", False), ("eval", "validation", True)):
            for value, lines in (("loss", loss), ("accuracy", accuracy)):
                metric = f"metrics/{part}/{value}{suffix}"
                lines += logged.line(metric, f"{tokens}, {said}", colour, dash="--" if dots else "-", dots=dots)
    if "metrics/train/loss" not in logged.curves:
        loss += logged.line("loss/train/total", "training", 1)
    weighted = [
        *logged.line("prior/loss_weighted", "weighted by PRIOR (minimized)", 1),
        *logged.line("prior/loss_unweighted", "unweighted", 2),
        *logged.line("prior/reference_nll", "of the reference, unweighted", 0, dash="--"),
    ]
    weights = [
        *logged.line("prior/effective_sample_size", "effective sample size, share of the tokens", 1),
        *logged.line("prior/top_decile_share", "weight on the heaviest tenth of the tokens", 2),
    ]
    rates = sorted(name for name in logged.curves if name.startswith("lr-"))
    rate = [line for number, name in enumerate(rates) for line in logged.line(name, name[3:], number % len(COLOURS))]
    found = [
        ("Loss", loss, "nats per token", True),
        ("Accuracy", accuracy, "share of the tokens", False),
        ("Training loss with and without PRIOR's weights", weighted, "nats per token", True),
        ("PRIOR's weights", weights, "share", False),
        *(("Learning rate", some, "learning rate", False) for some in _groups(rate, len(COLOURS))),
    ]
    return [_chart(title, lines, label, logged.end, log) for title, lines, label, log in found if lines]


def _stream_charts(logged: Logged) -> list[str]:
    """Return a chart for each figure of the streams that the data mix, with all streams in it."""
    figure = re.compile("metrics/(train|eval)/([^/]+)/(loss|share)")
    streams = list(dict.fromkeys(found[2] for found in map(figure.fullmatch, logged.curves) if found))
    charts = []
    for title, y_label, metrics in (
        ("Loss by stream", "nats per token", {"loss/train/{}": "", "metrics/eval/{}/loss": ", validation"}),
        ("Accuracy by stream", "share", {"metrics/train/{}/accuracy": "", "metrics/eval/{}/accuracy": ", validation"}),
        ("Share of the samples by stream", "share", {"metrics/train/{}/share": ""}),
        ("Tokens so far by stream", "loss-generating tokens", {"metrics/train/{}/tokens": ""}),
        ("Loss weighted by PRIOR, by stream", "nats per token", {"prior/{}/loss_weighted": ""}),
        ("Loss of the reference by stream", "nats per token", {"prior/{}/reference_nll": ""}),
        ("Effective sample size by stream", "share of the tokens", {"prior/{}/effective_sample_size": ""}),
        ("Weight on the heaviest tenth by stream", "share", {"prior/{}/top_decile_share": ""}),
    ):
        for some in _groups(streams, len(COLOURS)):
            lines = list[Line]()
            for colour, stream in enumerate(some):
                for metric, said in metrics.items():
                    style: dict[str, Any] = {"dash": "--", "dots": True} if said else {}
                    lines += logged.line(metric.format(stream), f"{stream}{said}", colour, **style)
            charts += [_chart(title, lines, y_label, logged.end)] if lines else []
    return charts


def _chart(title: str, lines: Sequence[Line], y_label: str, end: float, may_be_log: bool = False) -> str:
    """Return a chart over batches as HTML, described in words by the first and last value of each line."""
    spans = (f"{line.name}: {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    description = f"{y_label} by batch, 0 to {end:,.10g}. {'; '.join(spans)}."
    return picture(line_chart(lines, "batch", y_label, end, may_be_log), title, description)


def _benchmark_charts(logged: Logged) -> list[str]:
    """Return charts of the benchmarks that were run more than once; figures of categories are in the table only."""
    by_benchmark = defaultdict(list)
    for name in sorted(logged.curves):
        kind, _, rest = name.partition("/")
        benchmark, _, figure = rest.partition("/")
        if kind == "eval" and "/" not in figure and len(logged.curves[name].bins) > 1:
            by_benchmark[benchmark].append(figure)
    charts = []
    for benchmark, figures in by_benchmark.items():
        own = [figure for figure in figures if not _is_comparison(figure)]
        for some in _groups(own, len(COLOURS) - 1) or [[]]:  # a colour for each
            lines = list[Line]()
            for colour, figure in enumerate(some, start=1):
                for end, said in (("", ""), (_SHUFFLED, ", shuffled images")):
                    metric, name = f"eval/{benchmark}/{figure}{end}", f"{_said(figure)}{said}"
                    lines += logged.line(metric, name, colour, dash="--" if end else "-", dots=True)
            lines += logged.line(f"eval/{benchmark}/{_TEXT_ONLY}", _said(_TEXT_ONLY), 0, dash="--")
            lines += logged.line(f"eval/{benchmark}/{_CHANCE}", _CHANCE, 0, dash=":")
            if lines:
                charts.append(_chart(f"Benchmark: {benchmark}", lines, "value", logged.end))
    return charts


def _groups(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def results(validation: Mapping[str, Mapping[str, float]], benchmarks: Mapping[str, Mapping[str, Figure]]) -> str:
    """Return tables of validation metrics and of benchmarks as HTML, with their explanations."""
    parts = []
    pairs = product(("loss", "accuracy"), TOKENS.items())
    names = {f"{value}{end}": f"{value}, {tokens}" for value, (tokens, end) in pairs}
    names = {name: said for name, said in names.items() if any(_shown(row.get(name)) for row in validation.values())}
    if names:
        rows = [[model, *(_shown(row.get(name)) or "-" for name in names)] for model, row in validation.items()]
        parts.append(table(["validation", *names.values()], rows))
    for benchmark, figures in benchmarks.items():
        whole = [name for name in figures if "/" not in name]
        parts.append(_benchmark_table(benchmark, figures, whole))
        if categories := [name for name in figures if "/" in name]:
            rest = _benchmark_table(benchmark, figures, categories)
            parts.append(f"<details><summary>{escape(benchmark)} by category</summary>{rest}</details>\n")
    shown = ["loss"] * bool(names) + [name.partition("/")[0] for figures in benchmarks.values() for name in figures]
    return f"<h2>Results</h2>\n{''.join(parts)}{_explained(shown)}" if any(parts) else ""


def _explained(figures: Sequence[str]) -> str:
    """Return the explanations of the figures and of the columns beside them, as an HTML list."""
    said = defaultdict[str, list[str]](list)
    for figure in dict.fromkeys(figures):
        if (words := _look_up(_WORDS, figure)) and not _is_comparison(figure):
            said[words].append(_said(figure))
    lines = [f"{', '.join(names)}: {words}" for words, names in said.items()]
    lines += [words for end, words in _COMPARED.items() if any(f.endswith(end) for f in figures if _is_comparison(f))]
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>\n" if lines else ""


def _benchmark_table(benchmark: str, figures: Mapping[str, Figure], names: Sequence[str]) -> str:
    """Return a table with a row per figure and its baselines beside it, without empty columns."""
    rows = []
    for name in names:
        figure, slash, category = name.partition("/")
        if _is_comparison(figure):
            continue
        end = f"{slash}{category}"
        others = [f"{figure}{_SHUFFLED}{end}", f"{_TEXT_ONLY}{end}", f"{_CHANCE}{end}"]
        interval = [_shown(figures[name].get(bound)) for bound in ("low", "high")]
        shown = [_shown(figures[other]["value"]) or "-" if other in figures else "" for other in others]
        low = "lower is better" if "lower is better" in _look_up(_WORDS, figure) else ""
        said = " · ".join(filter(None, (benchmark, category, _said(figure), low)))
        rows.append(
            [said, _shown(figures[name].get("value")) or "-", " to ".join(interval) if all(interval) else "", *shown]
        )
    header = ["benchmark", "this model", "95 % interval", "shuffled images", "text only", "chance"]
    used = [column for column in range(len(header)) if column < 2 or any(row[column] for row in rows)]
    cells = [[row[column] for column in used] for row in rows]
    return table([header[column] for column in used], cells) if rows else ""


def _is_comparison(figure: str) -> bool:
    return figure in (_TEXT_ONLY, _CHANCE) or figure.endswith(_SHUFFLED)


def _look_up(texts: Mapping[str, str], figure: str) -> str:
    """Return the text of a figure, or of the figure whose name its own begins with."""
    return texts.get(figure) or texts.get(figure.rpartition("_")[0], "")


def _said(figure: str) -> str:
    name, number = _look_up(_NAMES, figure), figure.rpartition("_")[2]
    return f"{name}-{number}" if name == "BLEU" else name or figure.replace("_", " ")


def _shown(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4f}"
