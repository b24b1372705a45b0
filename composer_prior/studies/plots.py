"""Figures of a study as SVG: the same bytes for the same numbers, text as text, a colour and mark per method.

Reports of runs draw their own charts; here intervals, bands and logarithmic axes are wanted, and seconds do not matter.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from composer_prior.data.messages import visible
from composer_prior.reports.chart import log_ticks, ticks
from composer_prior.studies.comparison import Curve, Interval
from composer_prior.studies.scaling import Fit, Points

# Okabe and Ito's colours, told apart by most colour-blind readers, without the yellow that white swallows.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = "osD^vPX*"
_LONGEST = 56  # characters of a label
_SETTINGS = {
    "svg.hashsalt": "composer-prior",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are what users wrote
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Looks:
    """The colour and mark of each method, by its place in the study, the baseline first."""

    methods: Sequence[str]

    def colour(self, method: str) -> str:
        return _COLOURS[self.methods.index(method) % len(_COLOURS)]

    def mark(self, method: str) -> str:
        return _MARKS[self.methods.index(method) % len(_MARKS)]


def learning_curves(curves: Mapping[str, Sequence[Curve]], figure: str, looks: Looks) -> str:
    """Of each method the mean over its seeds, in a band from their smallest to their largest value.

    Args:
        curves: by method, one per seed.
        figure: the y axis.
        looks: of the methods.
    """
    with _drawn(6, 3.6) as (axes, svg):
        lines = []
        for method, of_seeds in curves.items():
            at: dict[float, list[float]] = {}
            for batches, values in of_seeds:
                for batch, value in zip(batches, values, strict=True):
                    if value is not None:
                        at.setdefault(batch, []).append(value)
            x = sorted(at)
            mean, low, high = ([float(of(at[batch])) for batch in x] for of in (np.mean, np.min, np.max))
            colour = looks.colour(method)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            lines += axes.plot(x, mean, color=colour, marker=looks.mark(method), markersize=4, linewidth=1.4)
        axes.set_xlabel("batch")
        axes.set_ylabel(_label(figure))
        _legend(axes, lines, list(curves))
    return svg[0]


def forest(rows: Sequence[tuple[str, Mapping[str, tuple[float, Interval | None]]]], baseline: str, looks: Looks) -> str:
    """Relative improvements with their intervals: rows of figures, in each the methods.

    Args:
        rows: names from top to bottom, and by method the improvement and its interval.
        baseline: what they are over.
        looks: of the methods.
    """
    methods = list(dict.fromkeys(method for _, row in rows for method in row))
    with _drawn(6.5, 1.2 + 0.3 * len(rows) + 0.16 * len(rows) * len(methods)) as (axes, svg):
        axes.axvline(0, color="#555555", linewidth=1)
        for number, (_, row) in enumerate(rows):
            for method, (value, interval) in row.items():
                y = number + 0.7 * ((methods.index(method) + 0.5) / len(methods) - 0.5)
                look: dict[str, Any] = {"color": looks.colour(method), "linewidth": 1.6}
                if interval:
                    axes.plot([100 * bound for bound in interval], [y, y], **look)
                axes.plot([100 * value], [y], marker=looks.mark(method), markersize=5, **look)
        axes.set_yticks(range(len(rows)), [_label(name) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(_label(f"relative improvement over {baseline}, % (right is better)"))
        handles = [
            Line2D([], [], color=looks.colour(method), marker=looks.mark(method), markersize=5) for method in methods
        ]
        _legend(axes, handles, methods)
    return svg[0]


def scaling(found: Mapping[str, tuple[Points, Fit]], x_label: str, figure: str, looks: Looks) -> str:
    """Runs and fits on logarithmic axes: with asymptote as a line, the straight line dotted."""
    with _drawn(6, 3.8) as (axes, svg):
        handles = []
        for method, (points, fit) in found.items():
            colour, mark = looks.colour(method), looks.mark(method)
            x = np.repeat(points.x, len(points.seeds))
            axes.plot(x, points.y.ravel(), linestyle="none", color=colour, marker=mark, markersize=4, alpha=0.6)
            handles.append(Line2D([], [], color=colour, marker=mark, markersize=4))
            values = {name: estimate.value for name, estimate in fit.coefficients.items()}
            along = np.geomspace(points.x.min(), points.x.max(), 60) if len(points.x) else points.x
            if "c" in values:
                axes.plot(along, values["a"] + values["b"] * along ** -values["c"], color=colour, linewidth=1.4)
            if "k" in values:
                straight = np.exp(values["k0"] - values["k"] * np.log(along))
                axes.plot(along, straight, color=colour, linewidth=1, linestyle=":")
        _logarithmic(axes.xaxis, axes.set_xscale, [float(x) for points, _ in found.values() for x in points.x])
        _logarithmic(axes.yaxis, axes.set_yscale, [float(y) for points, _ in found.values() for y in points.y.ravel()])
        axes.set_xlabel(_label(x_label))
        axes.set_ylabel(_label(figure))
        _legend(axes, handles, list(found))
    return svg[0]


@contextmanager
def _drawn(width: float, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on, and where the SVG is put at the end; in inches. The user's own matplotlibrc changes nothing."""
    svg = list[str]()
    with style.context(_SETTINGS, after_reset=True):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot(), svg
        written = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the reader's fonts draw the text
            FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
        svg.append("\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n")


def _logarithmic(axis: Axis, set_scale: Callable[[str], None], values: Sequence[float]) -> None:
    """A logarithmic axis with round numbers, whose labels are no TeX as matplotlib's own; linear if it must be."""
    if not values or min(values) <= 0:
        return
    set_scale("log")
    low, high = min(values), max(values)
    marks = log_ticks(low, high) if high > 5 * low else ticks(low, high, 5)
    axis.set_ticks(marks, [f"{mark:.4g}" for mark in marks])
    axis.set_ticks([], minor=True)


def _legend(axes: Axes, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    labels = [_label(name) for name in names]
    axes.figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)


def _label(text: str) -> str:
    """Text that XML can hold, not too long to leave room for the plot; the tables have all of it."""
    text = visible(text).replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 16]}…{text[-15:]}"
    return f" {text}" if text.startswith("_") else text  # matplotlib hides what begins with an underscore
