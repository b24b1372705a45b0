"""Plots of runs and studies as SVG: the same numbers give the same bytes, and text stays text.

The user's own matplotlibrc changes nothing.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from composer_prior.data.messages import visible

# Okabe and Ito's colours, which most colour-blind readers can tell apart, without yellow, which is pale on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = "osD^vPX*"
_PATH = re.compile(r'<path (id="\w+" )?d="[^"]*"')
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


Points = Sequence[tuple[float, float]]
"""x and y, ordered by x."""


@dataclass(frozen=True)
class Line:
    """A curve of :func:`line_chart`.

    Args:
        name: its name in the legend.
        points: at least one.
        colour: index into :data:`COLOURS`.
        dash: how the line is broken, such as ``--`` for what others are compared with.
        dots: mark each point.
    """

    name: str
    points: Points
    colour: int
    dash: Literal["-", "--", ":"] = "-"
    dots: bool = False


@dataclass(frozen=True)
class Scatter:
    """The runs of one method by size, and the curves that were fitted through them.

    Args:
        x: ``[runs]``, sizes.
        y: ``[runs]``, values.
        fits: matplotlib's line style, and the points of a curve.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    fits: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]]


@dataclass(frozen=True)
class Looks:
    """The colour and mark of each method, by its place in the study, the baseline first."""

    methods: Sequence[str]

    def __call__(self, method: str) -> dict[str, Any]:
        """Return the colour and the mark of a method as arguments of matplotlib."""
        number = self.methods.index(method)
        return {"color": COLOURS[number % len(COLOURS)], "marker": _MARKS[number % len(_MARKS)]}


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, x_end: float = 0.0, may_be_log: bool = False) -> str:
    """Draw lines over an x axis that begins at 0.

    Args:
        lines: at least one.
        x_label: of the x axis.
        y_label: of the y axis.
        x_end: where the x axis ends, or later.
        may_be_log: take a logarithmic y axis where values are positive and the largest is over ten times the smallest.
    """
    values = np.array([y for line in lines for _, y in line.points])
    log = bool(may_be_log and values.min() > 0 and 10 < values.max() / values.min() < 1e30)
    with _drawn(6, 3.4) as (axes, svg):
        for line in lines:
            mark = "o" if line.dots or len(line.points) == 1 else ""
            x, y = zip(*line.points, strict=True)
            axes.plot(x, y, line.dash, color=COLOURS[line.colour], marker=mark, markersize=4, linewidth=1.4)
        axes.update_datalim([(0, values[0]), (x_end, values[0])])
        axes.autoscale_view()
        if log:
            _logarithmic(axes.yaxis, values)
        _labels(axes, x_label, y_label + ", logarithmic" * log)
        _legend(axes, axes.get_lines(), [line.name for line in lines])
    return svg[0]


def learning_curves(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float | None]]]], figure: str, looks: Looks
) -> str:
    """Draw the mean over the seeds of each method, in a band from their smallest to their largest value.

    Args:
        curves: by method, the batches and values of each seed.
        figure: label of the y axis.
        looks: of the methods.
    """
    with _drawn(6, 3.6) as (axes, svg):
        for method, of_seeds in curves.items():
            at: dict[float, list[float]] = {}
            for batches, values in of_seeds:
                for batch, value in zip(batches, values, strict=True):
                    if value is not None:
                        at.setdefault(batch, []).append(value)
            x = sorted(at)
            mean, low, high = ([float(of(at[batch])) for batch in x] for of in (np.mean, np.min, np.max))
            axes.fill_between(x, low, high, color=looks(method)["color"], alpha=0.15, linewidth=0)
            axes.plot(x, mean, **looks(method), markersize=4, linewidth=1.4)
        _labels(axes, "batch", figure)
        _legend(axes, axes.get_lines(), list(curves))
    return svg[0]


def forest(
    rows: Sequence[tuple[str, Mapping[str, tuple[float, tuple[float, float] | None]]]], baseline: str, looks: Looks
) -> str:
    """Draw relative improvements with their intervals: rows of figures, in each the methods.

    Args:
        rows: names from top to bottom, and by method the improvement and its interval.
        baseline: what the improvements are over.
        looks: of the methods.
    """
    methods = list(dict.fromkeys(method for _, row in rows for method in row))
    with _drawn(6.5, 1.2 + 0.3 * len(rows) + 0.16 * len(rows) * len(methods)) as (axes, svg):
        axes.axvline(0, color="#555555", linewidth=1)
        for number, (_, row) in enumerate(rows):
            for method, (value, interval) in row.items():
                y = number + 0.7 * ((methods.index(method) + 0.5) / len(methods) - 0.5)
                ends = interval or (value, value)
                axes.plot([100 * end for end in ends], [y, y], color=looks(method)["color"], linewidth=1.6)
                axes.plot([100 * value], [y], **looks(method), markersize=5)
        axes.set_yticks(range(len(rows)), [_label(name) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        _labels(axes, f"relative improvement over {baseline}, % (right is better)", "")
        _legend(axes, [Line2D([], [], **looks(method), markersize=5) for method in methods], methods)
    return svg[0]


def scaling(found: Mapping[str, Scatter], x_label: str, figure: str, looks: Looks) -> str:
    """Draw the runs and fits of each method on logarithmic axes; an axis with a value of 0 or less is linear."""
    with _drawn(6, 3.8) as (axes, svg):
        for method, one in found.items():
            axes.plot(one.x, one.y, linestyle="none", **looks(method), markersize=4, alpha=0.6)
            for dash, x, y in one.fits:
                axes.plot(x, y, dash, color=looks(method)["color"], linewidth=1.2)
        _logarithmic(axes.xaxis, np.concatenate([one.x for one in found.values()]))
        _logarithmic(axes.yaxis, np.concatenate([one.y for one in found.values()]))
        _labels(axes, x_label, figure)
        _legend(axes, [Line2D([], [], **looks(method), markersize=4) for method in found], list(found))
    return svg[0]


@contextmanager
def _drawn(width: float, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Yield axes of a size in inches to draw on, and a list that gets their SVG at the end."""
    svg = list[str]()
    with style.context(_SETTINGS, after_reset=True):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.10g}")
        yield axes, svg
        written = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the reader's fonts draw the text
            FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
        svg.append("\n".join(line.rstrip() for line in _PATH.sub(_rounded, written.getvalue()).splitlines()) + "\n")


def _rounded(path: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])


def _logarithmic(axis: Any, values: NDArray[np.float64]) -> None:
    """Make an axis logarithmic, with labels that are no TeX as matplotlib's own; linear for values of 0 or less."""
    if not values.size or not (values > 0).all():
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1e4 * values.min() else (1,)))
    axis.set_major_formatter("{x:.4g}")
    axis.set_minor_locator(NullLocator())


def _labels(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(_label(x_label))
    axes.set_ylabel(_label(y_label))


def _legend(axes: Axes, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    labels = [_label(name) for name in names]
    axes.figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)


def _label(text: str) -> str:
    """Return text that XML can hold, short enough to leave room for the plot; the tables have all of it."""
    text = visible(text).replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 16]}…{text[-15:]}"
    return f" {text}" if text.startswith("_") else text  # matplotlib hides what begins with an underscore
